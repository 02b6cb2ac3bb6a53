"""Evolve a network: worth of each block, action, training on, round after round, until the target is met.

The rounds are an ordinary study's trials, so it resumes and reports as any study does; a round's network begins with
the weights of the round that it came from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.latency.repeats import measure_round_robin
from archsearch.quality.metrics import difference, estimate, gauge
from archsearch.score import LatencyRecord, Quality, Score
from archsearch.studies.config.study import StudyConfig, error_context
from archsearch.studies.evolution.block_table import evolution_of, load_or_fit_block_table, max_block_counts, table_of
from archsearch.studies.evolution.policy import Action, BlockCosts, Past, decide
from archsearch.studies.evolution.rounds import ATTRIBUTE, BlockImportance, EvolutionRound
from archsearch.studies.search.candidates import FINAL, load_candidates
from archsearch.studies.search.proposer import Proposal, SearchSpaceExhausted
from archsearch.studies.search.run import search
from archsearch.studies.search.samplers import distributions
from archsearch.studies.search.scorer import NOTES, ArchsearchScorer, Report
from archsearch.studies.storage.database import load_study
from snapgen.architecture import block_index
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError, first_line
from snapgen.io.atomic import atomic_write
from snapgen.models import subnetworks
from snapgen.models.unet import UNet
from snapgen.seeding import derive_seed

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from archsearch.block_latency.table import BlockTable
    from archsearch.quality.evaluator import SeedRun
    from archsearch.spaces.space import Space
    from archsearch.studies.storage.trial_queue import ClaimedTrial


def evolve(settings: StudyConfig, *, quiet: bool = False) -> Study:
    """Evolve a network to its target, or go on with it.

    Raises:
        InputError: if the study does not say how, if no network of the space can meet the target, or as
            `archsearch.studies.search.run.search`.
    """
    how = evolution_of(settings)
    changes: dict[str, Any] = {} if settings.trials else {"trials": how.rounds + 2}
    if how.target_share is not None:
        aimed = how.aimed(_base_ms(settings))
        changes["evolve"] = aimed.model_dump(mode="json")
    settings = settings.with_changes(changes)
    return search(settings, quiet=quiet, scorer=EvolutionScorer, proposer=EvolutionProposer)


class EvolutionProposer:
    """Proposes each round's network: the last one's, after the action that its blocks' worths call for."""

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        self._settings, self._space = settings, space
        self._how = evolution_of(settings)
        self.choices: Mapping[str, Any] = distributions(space)

    def propose(self, claim: ClaimedTrial, trials: Sequence[FrozenTrial], *, attempt: int = 0) -> Proposal:  # noqa: ARG002
        """The next round's, whatever was claimed; as `archsearch.studies.search.proposer.Proposer.propose`.

        Raises:
            Exhausted: if there is none; with the reason.
        """
        past = _rounds(trials)
        table = table_of(self._settings)
        assert table is not None, "the study keeps it from its beginning"
        action = decide(self._how, _costs(self._space, table), past)
        if isinstance(action, str):
            raise SearchSpaceExhausted(action)
        if action.parent is None:
            arch = self._space.base
        else:
            arch = block_index.edit_blocks(past[action.parent].architecture, action.removed, action.copied)
        name = {"robust": "base", "final": FINAL}.get(action.phase)
        point = {knob.name: knob.choice_of(arch) for knob in self._space.knobs}
        found = {knob: choice for knob, choice in point.items() if choice is not None}
        assert len(found) == len(point), "actions stay within the space"
        return Proposal(found, self._space.architecture(found), name, {})


class EvolutionScorer(ArchsearchScorer):
    """Scores a round's network: trains it on from the round that it came from, and values its blocks."""

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        self._how = evolution_of(settings)
        if not settings.trains:
            remedy = "name one, e.g. validation_loss"
            raise InputError(settings.source, "no objective is on quality", remedy, place="objectives")
        super().__init__(settings, space)
        assert self._evaluator is not None
        with error_context(settings, "evolve.metric"):
            samples = settings.protocol.samples if self._how.samples is None else self._how.samples
            self._gauge = gauge(self._how.metric, self._evaluator, samples=samples)
        assert self._backend is not None
        self._table = load_or_fit_block_table(settings, space, self._backend)
        _check_target(settings, space, self._table)

    def describe(self) -> Mapping[str, Any]:
        """As `archsearch.studies.search.scorer.Scorer`, with the table of blocks."""
        return {**super().describe(), "block_table": self._table.model_dump(mode="json")}

    def quality(self, arch: Architecture, *, progress: Report, artifacts: Path) -> Quality:
        """As `archsearch.studies.search.scorer.Scorer`; leaves the round's `EvolutionRound` for the trial."""
        study = load_study(self._settings)
        past = _rounds(study.get_trials(deepcopy=False))
        action = decide(self._how, _costs(self._space, self._table), past)
        assert isinstance(action, Action)
        number = len(past)
        unet = self._begun(study, action)
        assert unet.arch.id == arch.id, "the proposal is the action's network"
        run = self._trained(unet, action, number, lambda stage, share: progress(stage, 0.7 * share))
        assert self._evaluator is not None
        quality = self._evaluator.quality([run])
        if quality.diverged:
            remedy = "lower protocol.learning_rate or evolve.round_rate; the same command goes on"
            raise InputError(self._settings.source, f"round {number} diverged", remedy, place="protocol")
        self._evaluator.write(run, artifacts)
        found = self._round(run.unet, action, number, past, lambda share: progress("valuing blocks", 0.7 + 0.3 * share))
        with atomic_write(artifacts / NOTES) as part:
            part.write_text(json.dumps({ATTRIBUTE: found.model_dump(mode="json")}))
        return quality

    def _begun(self, study: Study, action: Action) -> UNet:
        """The round's network before it is trained on."""
        assert self._evaluator is not None
        if action.parent is None:
            return self._evaluator.begun(self._space.base, derive_seed(self._settings.seed, "weights"))
        unet = subnetworks.edit_network(_weights(study, action.parent), action.removed, action.copied)
        unet.to(self._evaluator.device)
        return unet

    def _trained(self, unet: UNet, action: Action, number: int, progress: Report) -> SeedRun:
        assert self._evaluator is not None
        first, last = action.phase == "robust", action.phase == "final"
        steps = self._steps(action)
        if not steps:
            return self._evaluator.measured(unet, number=number)
        rate = self._settings.protocol.learning_rate * (1 if first else self._how.round_rate)
        return self._evaluator.run(
            unet,
            self._settings.protocol.model_copy(update={"steps": steps, "learning_rate": rate}),
            number=number,
            seed=derive_seed(self._settings.seed, "round", number),
            block_dropout=0 if last else self._how.block_dropout,
            tell=progress,
        )

    def latency(self, arch: Architecture) -> LatencyRecord:
        """As `archsearch.studies.search.scorer.Scorer`: the lowest of several, as in the table, as the next action
        hangs on it.

        What an earlier round measured of the same network counts.
        """
        assert self._backend is not None
        before = [
            c for c in load_candidates(load_study(self._settings), artifacts=False) if c.architecture.id == arch.id
        ]
        records = {arch.id: [c.score.latency for c in before if c.score.latency is not None]}
        for _ in measure_round_robin(
            self._backend,
            [arch],
            records,
            latent_size=self._space.latent_size,
            context_tokens=self._space.context_tokens,
            keep=lambda *_: None,
            least=2,
            most=self._how.table.most,
        ):
            pass
        record = min(records[arch.id], key=lambda record: record.median_ms)
        self._ms = record.median_ms
        return record

    def _round(
        self, unet: UNet, action: Action, number: int, past: Sequence[Past], progress: Callable[[float], None]
    ) -> EvolutionRound:
        """What is to be kept of a round: what each block of its trained network is worth, and what follows."""
        whole = self._gauge.take(unet)
        worths: list[BlockImportance] = []
        candidates = block_index.removable(unet.arch) if action.phase != "final" else ()
        for i, block in enumerate(candidates):
            with subnetworks.blocks_disabled(unet, {block.name}):
                loss = difference(whole, self._gauge.take(unet))
            worths.append(
                BlockImportance(
                    block=block.name, label=block.label, **_place(block), loss=loss, ms=self._table.of(block)
                )
            )
            progress((i + 1) / len(candidates))
        macs = self.cost(unet.arch).macs * 3 * self._settings.protocol.batch * self._steps(action)
        found = EvolutionRound(
            number=number,
            phase=action.phase,
            parent=action.parent,
            removed=action.removed,
            copied=action.copied,
            metric=self._how.metric,
            quality=estimate(whole),
            predicted_ms=self._table.predict(unet.arch),
            steps=self._steps(action),
            training_macs=macs + (past[action.parent].round.training_macs if action.parent is not None else 0),
            worths=tuple(worths),
            next="",
        )
        after = [*past, Past(found, self._ms, unet.arch)]
        return found.model_copy(update={"next": _words(decide(self._how, _costs(self._space, self._table), after))})

    def _steps(self, action: Action) -> int:
        if action.phase == "robust":
            return 0 if self._settings.protocol.inherit is not None else self._settings.protocol.steps
        return self._how.final_steps if action.phase == "final" else self._how.round_steps


def _base_ms(settings: StudyConfig) -> float:
    """The latency of the space's base, by the study's table."""
    from archsearch.devices import backend

    with error_context(settings, "latency"):
        device = backend(settings.latency.device, **settings.latency.backend_options)
    return load_or_fit_block_table(settings, settings.load_space(), device).whole_ms


def _check_target(settings: StudyConfig, space: Space, table: BlockTable) -> None:
    """Whether some network of the space meets the target, by the table; said before anything is trained."""
    how, costs = evolution_of(settings), _costs(space, table)
    every = block_index.blocks(space.base)
    last, count = {block.place: block for block in every}, block_index.block_counts(space.base)
    copies = [block for place, block in last.items() for _ in range(costs.most[place] - count[place])]
    fastest = table.predict(block_index.edit_blocks(space.base, [block.name for block in every]))
    slowest = table.predict(space.base) + sum(costs.copy_ms(block) for block in copies)
    if not fastest <= how.most_ms or not slowest >= how.least_ms:
        problem = (
            f"{how.target_ms:g} ms is met by no network of the space, which go from {fastest:.3g} to {slowest:.3g} ms"
        )
        raise InputError(settings.source, problem, "give a target between", place="evolve.target_ms")


def _costs(space: Space, table: BlockTable) -> BlockCosts:
    return BlockCosts(
        lambda block: table.of(dataclasses.replace(block, index=block.index + 1)), max_block_counts(space)
    )


def _rounds(trials: Sequence[FrozenTrial]) -> list[Past]:
    """The rounds that are done, in order."""
    done = [t for t in trials if t.state.name == "COMPLETE" and ATTRIBUTE in t.user_attrs]
    found = []
    for t in done:
        latency = Score.model_validate(t.user_attrs["score"]).latency
        assert latency is not None
        arch = Architecture.model_validate(t.user_attrs["architecture"])
        found.append(
            Past(
                EvolutionRound.model_validate(t.user_attrs[ATTRIBUTE]),
                latency.median_ms,
                block_index.with_explicit_layers(arch),
            )
        )
    return sorted(found, key=lambda past: past.round.number)


def _weights(study: Study, number: int) -> UNet:
    """The network that a round left.

    Raises:
        InputError: if its artifact is gone or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    candidate = next(c for c in load_candidates(study) if c.slot == number)
    path = Path(study.user_attrs["artifacts"]) / candidate.artifacts.get("unet.safetensors", "unet.safetensors")
    unet = UNet(block_index.with_explicit_layers(candidate.architecture))
    try:
        unet.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        problem = f"the weights of round {number} can not be read ({first_line(error)})"
        raise InputError(path, problem, "restore the study's artifacts, or begin it anew") from None
    return unet


def _words(action: Action | str) -> str:
    """What is to come, for people."""
    if isinstance(action, str):
        return f"stop: {action}"
    if action.phase == "final":
        return f"train round {action.parent} on, all blocks running: {action.why}"
    parts = [
        f"{verb} {', '.join(names)}" for verb, names in (("remove", action.removed), ("copy", action.copied)) if names
    ]
    return f"{' and '.join(parts)}: {action.why}"


def _place(block: block_index.BlockRef) -> dict[str, Any]:
    return {"site": block.site, "layer": block.layer, "kind": block.kind, "index": block.index}
