"""One worker's loop: claim a slot, find out which candidate it is for, score that candidate, tell the study."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.latency.base import DeviceLostError, MeasurementError
from archsearch.score import OBJECTIVES, Score
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.proposer import CandidateProposer, Proposal, SearchSpaceExhausted
from archsearch.studies.search.scorer import NOTES, Scorer
from archsearch.studies.storage.database import artifact_store
from archsearch.studies.storage.leases import heartbeat
from archsearch.studies.storage.trial_queue import DONE, BudgetSpent, ClaimedTrial, NothingToDo, TrialQueue, values_of
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study

    from archsearch.spaces.space import Space

WAIT_SECONDS = 0.5
NOTE_SECONDS = 1.0
"""How often a trial's progress is written to the storage, at most."""

FAILURES = 3
"""So many candidates given up in a row, and the study stops: the fault is not the candidates'."""

REFUSALS = 12
"""Likewise where the last one could not be run on the device: a space may hold whole regions of those."""

_COST = ("params", "macs", "activation_bytes")


class Worker:
    """Scores candidates of one study until it is finished.

    Args:
        tell: takes a line for the user.
        tick: called at every progress; may draw.
    """

    def __init__(
        self,
        study: Study,
        settings: StudyConfig,
        space: Space,
        scorer: Scorer,
        proposer: CandidateProposer,
        *,
        tell: Callable[[str], None],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._study, self._settings, self._scorer = study, settings, scorer
        self._ledger = TrialQueue(study, settings)
        self._proposer = proposer
        self._tell, self._tick = tell, tick
        self._given_up = 0
        self._limits = limits(settings, space)

    def run(self) -> str:
        """Work until the study is finished; why it is, in words.

        Raises:
            InputError: of the scorer, or if too many candidates fail.
        """
        while True:
            self._tick()
            claim = self._ledger.claim()
            if isinstance(claim, BudgetSpent):
                return claim.reason
            if isinstance(claim, NothingToDo):
                time.sleep(WAIT_SECONDS)
                continue
            try:
                self._work(claim)
            except SearchSpaceExhausted as error:
                return str(error)

    def _work(self, claim: ClaimedTrial) -> None:
        import optuna

        try:
            with heartbeat(self._study._storage, claim.trial_id):
                self._score(claim)
            self._given_up = 0
        except optuna.exceptions.UpdateFinishedTrialError:
            # Other workers took us for dead (a machine asleep, a network away) and have this slot now.
            self._tell(f"trial {claim.number}: taken over by another worker")
        except (KeyboardInterrupt, SystemExit, InputError, SearchSpaceExhausted):
            self._ledger.withdraw(claim.trial_id)
            raise
        except DeviceLostError as error:
            self._ledger.withdraw(claim.trial_id)
            problem = f"{error}; trial {claim.number} waits for it"
            raise InputError(self._settings.source, problem, error.remedy, place="latency") from None
        except MeasurementError as error:
            self._refused(claim, error)
        except Exception as error:
            self._crashed(claim, error)

    def _refused(self, claim: ClaimedTrial, error: MeasurementError) -> None:
        """The device can not run this candidate, and would not the next time: it is given up, and the study goes on."""
        self._ledger.refuse(claim.trial_id, _told(error))
        self._tell(f"trial {claim.number} given up: {error}")
        self._count_given_up(error, at_most=REFUSALS)

    def _crashed(self, claim: ClaimedTrial, error: Exception) -> None:
        self._ledger.crash(claim.trial_id, _told(error))
        again = claim.slot in _open(self._ledger)
        self._tell(f"trial {claim.number} failed: {_told(error)}; " + ("it is tried again" if again else "given up"))
        if not again:
            self._count_given_up(error, at_most=FAILURES)

    def _count_given_up(self, error: Exception, *, at_most: int) -> None:
        self._given_up += 1
        if self._given_up >= at_most:
            problem = f"{self._given_up} candidates in a row failed, the last with {_told(error)}"
            raise InputError(self._settings.source, problem, "mend that; the same command goes on")

    def _score(self, claim: ClaimedTrial) -> None:
        ledger, trial_id = self._ledger, claim.trial_id
        proposal = self._published(claim)
        arch = proposal.architecture
        ledger.set_point(trial_id, proposal.point, self._proposer.choices)
        ledger.set_system_attrs(trial_id, proposal.sampler_attrs)
        ledger.note(trial_id, name=proposal.name, architecture=arch.model_dump(mode="json"))
        if proposal.same_as is not None:
            score = Score.model_validate(proposal.same_as.user_attrs["score"])
            first = proposal.same_as.user_attrs.get("reused_from")
            ledger.note(trial_id, reused_from=proposal.same_as.number if first is None else first)
            self._finish(claim, score)
            return
        self._stage(claim, "cost")
        score = Score(cost=self._scorer.cost(arch))
        if self._outside(claim, score, _COST):
            return
        self._stage(claim, "latency")
        first = self._scorer.latency(arch)
        score = score.model_copy(update={"latency": first})
        if self._outside(claim, score, ("latency_ms",), final=first.source == "measured"):
            return
        score = self._with_quality(claim, arch, score)
        self._stage(claim, "latency", 1.0)
        score = score.model_copy(update={"latency": self._scorer.settled_latency(arch, first)})
        if not self._outside(claim, score, ("latency_ms",)):
            self._finish(claim, score)

    def _published(self, claim: ClaimedTrial) -> Proposal:
        """A proposal that no other worker has under way: say which it is, then look who else said so."""
        attempt = 0
        while True:
            proposal = self._proposer.propose(claim, self._ledger.trials(), attempt=attempt)
            self._ledger.note(claim.trial_id, architecture_id=proposal.architecture.id)
            others = [t for t in self._ledger.trials() if t.state.name == "RUNNING" and t.number != claim.number]
            if all(t.user_attrs.get("architecture_id") != proposal.architecture.id for t in others):
                return proposal
            attempt += 1

    def _outside(self, claim: ClaimedTrial, score: Score, names: tuple[str, ...], *, final: bool = True) -> bool:
        """Tell the constraints on those numbers, or on those that are not final none; if one is broken, it is over."""
        broken = self._broken(score, names)
        if final or broken:
            self._constrain(claim, score, names)
        if not broken:
            return False
        self._ledger.note(claim.trial_id, score=score.model_dump(mode="json"), infeasible=broken)
        self._ledger.prune(claim.trial_id)
        return True

    def _constrain(self, claim: ClaimedTrial, score: Score, names: tuple[str, ...]) -> None:
        """Constraints are relative, so that those on params and on milliseconds weigh alike."""
        for name in names:
            if name in self._limits:
                self._ledger.constrain(claim.trial_id, name, OBJECTIVES[name].getter(score) / self._limits[name] - 1)

    def _broken(self, score: Score, names: tuple[str, ...]) -> str:
        values = {name: OBJECTIVES[name].getter(score) for name in names if name in self._limits}
        over = {name: value for name, value in values.items() if value > self._limits[name]}
        return "; ".join(f"{name} {value:.4g}, limit {self._limits[name]:.4g}" for name, value in over.items())

    def _with_quality(self, claim: ClaimedTrial, arch: Architecture, score: Score) -> Score:
        if not self._settings.trains:
            return score
        self._ledger.note(claim.trial_id, score=score.model_dump(mode="json"))
        folder = self._settings.folder / "working" / str(claim.slot)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            progress = ThrottledProgress(lambda stage, fraction: self._stage(claim, stage, fraction))
            quality = self._scorer.quality(arch, progress=progress, artifacts=folder)
            notes = folder / NOTES
            if notes.exists():
                self._ledger.note(claim.trial_id, **json.loads(notes.read_text()))
                notes.unlink()
            (folder / "architecture.json").write_text(arch.to_json())
            self._upload(claim, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return score.model_copy(update={"quality": quality})

    def _upload(self, claim: ClaimedTrial, folder: Path) -> None:
        from optuna.artifacts import upload_artifact
        from optuna.trial import Trial

        for weights in folder.glob("unet/*.safetensors"):
            weights.rename(folder / "unet.safetensors")
        trial, store = Trial(self._study, claim.trial_id), artifact_store(self._study)
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=trial)

    def _finish(self, claim: ClaimedTrial, score: Score) -> None:
        self._constrain(claim, score, tuple(OBJECTIVES))
        values = values_of(score, self._settings.objectives)
        # After the stage all is known: whoever finds the trial so can tell it, if we no longer can.
        self._ledger.note(claim.trial_id, score=score.model_dump(mode="json"), fraction=1.0, stage=DONE)
        self._ledger.finish(claim.trial_id, values)

    def _stage(self, claim: ClaimedTrial, stage: str, fraction: float = 0.0) -> None:
        self._ledger.note(claim.trial_id, stage=stage, fraction=fraction)
        self._tick()


class ThrottledProgress:
    """A progress callback that passes on every new stage, and within one a call a second."""

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self._report, self._stage, self._at = report, "", 0.0

    def __call__(self, stage: str, fraction: float) -> None:
        now = time.monotonic()
        if stage != self._stage or now - self._at >= NOTE_SECONDS:
            self._stage, self._at = stage, now
            self._report(stage, fraction)


def limits(settings: StudyConfig, space: Space) -> dict[str, float]:
    """Most of each number that a candidate may have: the space's and the study's, whichever is less."""
    both = [*space.limits.items(), *settings.limits.items()]
    return {name: min(most for n, most in both if n == name) for name, _ in both}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _open(ledger: TrialQueue) -> dict[int, Any]:
    from archsearch.studies.storage.trial_queue import open_slots

    return open_slots(ledger.trials())
