"""Loop of one worker: claim a slot, propose its candidate, score the candidate, report the score to the study."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from optuna import Study

from archsearch.latency.base import DeviceLostError, MeasurementError
from archsearch.machine_faults import machine_fault
from archsearch.score import OBJECTIVES, Quality, Score
from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.known_costs import COSTS, upper_bounds
from archsearch.studies.search.known_scores import KnownScore, known_scores
from archsearch.studies.search.proposer import CandidateProposer, Proposal, SearchSpaceExhausted
from archsearch.studies.search.scorer import CHECKPOINT, CHECKPOINTS, ROUND, Scorer
from archsearch.studies.signals import raise_if_terminated
from archsearch.studies.storage.artifacts import PausedRuns, store_artifact
from archsearch.studies.storage.database import database_errors, storage_digest
from archsearch.studies.storage.leases import heartbeat
from archsearch.studies.storage.outages import patience
from archsearch.studies.storage.record import Candidate, Rung, TrialRecord
from archsearch.studies.storage.rounds import EvolutionRound
from archsearch.studies.storage.trial_queue import DONE, TrialQueue
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.progress import ProgressCallback

WAIT_SECONDS = 0.5
REPORT_SECONDS = 1.0
"""Shortest interval between two writes of a trial's progress to the storage."""

MAX_FAILED_IN_A_ROW = 3
"""The study stops after this many consecutive abandoned candidates, since the cause is then not the candidates."""

MAX_REJECTED_IN_A_ROW = 12
"""The limit where the last candidate could not run on the device; a space may contain whole regions of those."""


class Worker:
    """Scores candidates of one study until the study is finished.

    Args:
        log: called with each line for the user.
        tick: called on every progress, e.g. to refresh a display.
    """

    def __init__(
        self,
        study: Study,
        settings: StudyConfig,
        space: Space,
        scorer: Scorer,
        proposer: CandidateProposer,
        *,
        log: Callable[[str], None],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._study, self._settings, self._space, self._scorer = study, settings, space, scorer
        self._queue = TrialQueue(study, settings)
        self._proposer = proposer
        self._log, self._tick = log, tick
        self._abandoned = 0
        self._limits = upper_bounds(settings, space)

    def run(self) -> str:
        """Score candidates until the study is finished.

        Returns:
            Why the study is finished, for the log.

        Raises:
            InputError: from the scorer, or if too many candidates fail in a row.
        """
        try:
            while True:
                raise_if_terminated()
                self._tick()
                claim = self._queue.claim()
                if isinstance(claim, str):
                    return claim
                if claim is None:
                    self._wait()
                    continue
                self._process(claim)
        except SearchSpaceExhausted as error:
            return str(error)
        except BaseException:
            # Not in `_process`: an interrupt can fall between a trial's creation and the return of `claim`.
            self._queue.release_own()
            raise

    def _wait(self) -> None:
        """Wait while only the trials of other workers may open a slot."""
        time.sleep(WAIT_SECONDS)

    def _process(self, claim: TrialRecord) -> None:
        try:
            with heartbeat(self._study._storage, claim.trial_id):
                self._score(claim)
            self._abandoned = 0
        except SearchSpaceExhausted:
            self._queue.release(claim.trial_id)
            raise
        except database_errors():  # the study ends, and so does the trial
            raise
        except Exception as error:
            if claim.number in self._queue.trials().running:
                self._blame(claim, error)
            else:  # taken for dead (sleeping machine, lost network): another worker has claimed the slot
                self._log(f"trial {claim.number}: taken over by another worker")

    def _blame(self, claim: TrialRecord, error: Exception) -> None:
        """End a trial whose candidate is at fault; end the study, and so release the trial, if it is not."""
        if isinstance(error, DeviceLostError):
            problem = f"{error}; trial {claim.number} will be run again"
            raise InputError(self._settings.source, problem, error.remedy, place="latency") from None
        if (fault := machine_fault(error)) is not None:
            raise fault from error
        if isinstance(error, InputError):
            raise error
        if isinstance(error, MeasurementError):  # the device cannot run the candidate; the study continues
            self._queue.reject(claim.trial_id, _summary(error))
            outcome, retried, at_most = f"abandoned: {error}", False, MAX_REJECTED_IN_A_ROW
        else:
            self._queue.fail(claim.trial_id, _summary(error))
            retried, at_most = claim.slot in self._queue.trials().open_slots, MAX_FAILED_IN_A_ROW
            outcome = f"failed: {_summary(error)}; {'it is tried again' if retried else 'abandoned'}"
        self._log(f"trial {claim.number} {outcome}")
        self._abandoned += not retried
        if not retried and self._abandoned >= at_most:
            problem = f"{self._abandoned} candidates in a row failed, the last with {_summary(error)}"
            raise InputError(self._settings.source, problem, "fix the cause; the same command resumes the study")

    def _score(self, claim: TrialRecord) -> None:
        if claim.continues is not None:
            self._continue(claim)
            return
        queue, trial_id = self._queue, claim.trial_id
        proposal = self._propose(claim)
        arch = proposal.architecture
        queue.set_point(trial_id, proposal.point, self._proposer.choices)
        TrialRecord.write_sampler_attrs(self._study._storage, trial_id, proposal.sampler_attrs)
        twin = self._space.twin(proposal.point)
        queue.write(trial_id, name=proposal.name, architecture=arch, trained=twin)
        if (same := proposal.same_as) is not None:
            queue.write(trial_id, reused_from=same.number if same.reused_from is None else same.reused_from)
            self._finish(claim, same.score)
            return
        self._set_phase(claim, "cost")
        score = Score(cost=self._scorer.cost(arch))
        if self._breaks_limit(claim, score, COSTS):
            return
        self._set_phase(claim, "latency")
        latency = self._scorer.latency(arch)
        score = score.model_copy(update={"latency": latency})
        if self._breaks_limit(claim, score, ("latency_ms",), final=latency.source == "measured"):
            return
        if not self._settings.trains:
            self._complete(claim, arch, score)
            return
        queue.write(trial_id, score=score)
        if (known := self._known_quality(claim, proposal.point, twin or arch)) is not None:
            self._complete(claim, arch, score.model_copy(update={"quality": known}))
        else:
            self._run(claim, arch, score, trained=twin or arch)

    def _propose(self, claim: TrialRecord) -> Proposal:
        """A proposal that no other worker is scoring.

        The architecture is stored first and the other running trials are read after that, so that of two workers with
        the same proposal at least one notices.
        """
        attempt, trials = 0, self._queue.known
        while True:
            proposal = self._proposer.propose(claim, trials, attempt=attempt)
            self._queue.write(claim.trial_id, architecture_id=proposal.architecture.id)
            others = [t for t in trials.read().running.values() if t.number != claim.number]
            if all(t.architecture_id != proposal.architecture.id for t in others):
                return proposal
            attempt += 1

    def _breaks_limit(self, claim: TrialRecord, score: Score, names: tuple[str, ...], *, final: bool = True) -> bool:
        """Whether a limit on the named numbers is broken, which ends the trial as infeasible.

        Args:
            names: numbers of the score that are known by now.
            final: whether the numbers will not change; values of constraints are recorded only then, or if one is
                broken.
        """
        limits = {name: self._limits[name] for name in names if name in self._limits}
        exceeded = ((name, value, limit) for name, limit in limits.items() if (value := score.value(name)) > limit)
        broken = "; ".join(f"{name} {value:.4g}, limit {limit:.4g}" for name, value, limit in exceeded)
        if final or broken:
            self._record_constraints(claim, score, names)
        if not broken:
            return False
        self._queue.prune(claim.trial_id, score=score, exceeded=broken)
        return True

    def _record_constraints(self, claim: TrialRecord, score: Score, names: tuple[str, ...]) -> None:
        """Record each constraint as value / limit − 1, so that those on params and on milliseconds are comparable."""
        for name in names:
            if name in self._limits:
                self._queue.set_constraint(claim.trial_id, name, score.value(name) / self._limits[name] - 1)

    def _continue(self, claim: TrialRecord) -> None:
        """Train the candidate of another trial further: from its last rung, or with its next seed."""
        queue, trial_id = self._queue, claim.trial_id
        assert claim.continues is not None
        first = queue.trials().candidate(claim.continues)
        assert isinstance(first, Candidate)
        arch = first.architecture
        queue.set_point(trial_id, first.point, self._proposer.choices)
        queue.write(trial_id, name=first.name, architecture_id=arch.id, architecture=arch, trained=first.trained)
        if first.state == "paused":
            self._run(claim, arch, first.score, trained=first.trained or arch, paused=first)
            return
        assert first.score.quality is not None
        seeds = self._settings.protocol.train_seeds[first.runs : first.runs + 1]
        further = self._train(claim, first.trained or arch, seeds)
        self._finish(claim, first.score.model_copy(update={"quality": first.score.quality.with_seeds(further)}))

    def _run(
        self,
        claim: TrialRecord,
        arch: Architecture,
        score: Score,
        *,
        trained: Architecture,
        paused: Candidate | None = None,
    ) -> None:
        """Train with the first seeds, up to the next rung if there is one, else to the end."""
        rungs, done = self._settings.rungs, paused.rungs[-1].step if paused else 0
        until = rungs.after(done) if rungs else None
        quality = self._train(claim, trained, self._settings.first_seeds, until=until, paused=paused)
        if until is None or quality.diverged:
            self._complete(claim, arch, score.model_copy(update={"quality": quality}))
        else:
            rung = Rung(step=until, quality=quality)
            self._queue.prune(claim.trial_id, score=score, rungs=(rung,), fraction=1.0, phase=f"paused at step {until}")
        if rungs:
            self._let_go()

    def _let_go(self) -> None:
        """Delete the checkpoints of the paused candidates that are not hopeful."""
        trials = self._queue.trials()
        self._paused_runs.let_go(trials, trials.ranking(self._settings).chances)

    def _complete(self, claim: TrialRecord, arch: Architecture, score: Score) -> None:
        """Finish a trial with its final latency."""
        assert score.latency is not None
        self._set_phase(claim, "latency", 1.0)
        score = score.model_copy(update={"latency": self._scorer.final_latency(arch, score.latency)})
        if not self._breaks_limit(claim, score, ("latency_ms",)):
            self._finish(claim, score)

    def _known_quality(self, claim: TrialRecord, point: Mapping[str, int], arch: Architecture) -> Quality | None:
        """Quality with the first seeds that another study measured; the study may have begun with it at this point."""
        known = self._known_scores.get(arch.id)
        if known is None or not known.quality.covers(len(self._settings.first_seeds)):
            return None
        given = point in self._study.user_attrs.get("start", ())
        self._queue.write(claim.trial_id, reused_study=known.where, given=given)
        return known.quality

    @cached_property
    def _paused_runs(self) -> PausedRuns:
        assert self._settings.rungs is not None
        return PausedRuns(self._study, keep=self._settings.rungs.keep)

    @cached_property
    def _known_scores(self) -> Mapping[str, KnownScore]:
        return known_scores(self._study, self._settings)

    def _train(
        self,
        claim: TrialRecord,
        arch: Architecture,
        seeds: Sequence[int],
        *,
        until: int | None = None,
        paused: Candidate | None = None,
    ) -> Quality:
        """Train and evaluate, and store the artifacts: of a run that pauses, its checkpoint."""
        folder = self._working_folder(claim)
        checkpoint = folder / CHECKPOINT.format(seed=seeds[0])
        _empty(folder)
        try:
            if paused is not None:
                self._paused_runs.restore(paused, checkpoint)
            progress = ThrottledProgress(lambda fraction, message="": self._set_phase(claim, message, fraction))
            stop = {} if until is None else {"until": until}
            quality = self._scorer.quality(arch, seeds=seeds, progress=progress, artifacts=folder, **stop)
            if until is not None and not quality.diverged:
                self._paused_runs.save(claim.trial_id, checkpoint)
            else:
                self._store(claim, arch, folder)
        except Exception as error:
            resumes = isinstance(error, (InputError, *database_errors())) or machine_fault(error)
            if not resumes:  # unlike an interrupted one
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        return quality

    def _working_folder(self, claim: TrialRecord) -> Path:
        """Folder of a trial's own, which takes over what an earlier trial of the slot left.

        A worker that was taken for dead and is not goes on in a folder that nobody else uses.
        """
        every = self._settings.folder / "working"
        slot = f"{storage_digest(self._settings.url)}-{claim.slot}"
        left = sorted(every.glob(f"{slot}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        folder = every / f"{slot}-{claim.number}"
        if left and not folder.exists():
            with contextlib.suppress(OSError):
                left[-1].rename(folder)
        for other in left[:-1]:
            shutil.rmtree(other, ignore_errors=True)
        return folder

    def _store(self, claim: TrialRecord, arch: Architecture, folder: Path) -> None:
        if (path := folder / ROUND).exists():
            self._queue.write(claim.trial_id, round=EvolutionRound.model_validate_json(path.read_text()))
            path.unlink()
        (folder / "architecture.json").write_text(arch.to_json())
        for weights in folder.glob("unet/*.safetensors"):
            weights.rename(folder / "unet.safetensors")
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            store_artifact(self._study, claim.trial_id, path)

    def _finish(self, claim: TrialRecord, score: Score) -> None:
        self._record_constraints(claim, score, tuple(OBJECTIVES))
        # In phase DONE the trial holds its whole score: if this process dies now, another worker can complete it.
        self._queue.write(claim.trial_id, score=score, fraction=1.0, phase=DONE)
        self._queue.finish(claim.trial_id, score)

    def _set_phase(self, claim: TrialRecord, phase: str, fraction: float = 0.0) -> None:
        """Note the progress of a trial, unless the database is away: a note costs no training."""
        raise_if_terminated()
        with contextlib.suppress(*database_errors()), patience(0):
            self._queue.write(claim.trial_id, phase=phase, fraction=fraction)
            self._tick()


def _empty(folder: Path) -> None:
    """Make an empty folder, but for the checkpoints of an earlier attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
        elif path.name != CHECKPOINTS:
            shutil.rmtree(path)


class ThrottledProgress:
    """A progress callback that forwards every new message, and repeated messages at most once per `REPORT_SECONDS`."""

    def __init__(self, progress: ProgressCallback) -> None:
        self._progress, self._message, self._at = progress, "", 0.0

    def __call__(self, fraction: float, message: str = "") -> None:
        now, message = time.monotonic(), message or self._message
        if message != self._message or now - self._at >= REPORT_SECONDS:
            self._message, self._at = message, now
            self._progress(fraction, message)


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
