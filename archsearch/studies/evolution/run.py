"""Evolve a network: in each round edit blocks, train further and value every block, until the target is met.

The rounds are trials of an ordinary study, so an evolution resumes and reports like any study. A round's network starts
from the weights of its parent round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna import Study

from archsearch.block_latency.table import BlockTable
from archsearch.devices import backend
from archsearch.latency.repeats import measure_round_robin
from archsearch.quality import processes
from archsearch.quality.candidate_evaluator import SeedRun
from archsearch.quality.metrics import build_metric, difference, estimate
from archsearch.quality.short_run import Checkpoints
from archsearch.score import LatencyRecord, Quality
from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.evolution.block_table import (
    evolution_config,
    load_or_fit_block_table,
    max_block_counts,
    stored_block_table,
)
from archsearch.studies.evolution.policy import Action, BlockCosts, FinishedRound, decide
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.proposer import Proposal, SearchSpaceExhausted
from archsearch.studies.search.run import search
from archsearch.studies.search.samplers import distributions
from archsearch.studies.search.scorer import ROUND, ArchsearchScorer
from archsearch.studies.search.weights import load_unet
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.record import TrialRecord
from archsearch.studies.storage.rounds import FINAL, BlockImportance, EvolutionRound
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.architecture import block_index
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write
from snapgen.models import subnetworks
from snapgen.models.unet import UNet
from snapgen.progress import ProgressCallback, subtask
from snapgen.seeding import derive_seed


def evolve(settings: StudyConfig, *, quiet: bool = False) -> Study:
    """Evolve a network to its target latency, or resume the evolution.

    Raises:
        InputError: if the study has no evolution settings, if no network of the space can meet the target, or for the
            reasons of `archsearch.studies.search.run.search`.
    """
    if processes.is_follower():
        return search(settings, quiet=True)
    evolution = evolution_config(settings)
    changes: dict[str, Any] = {} if settings.trials else {"trials": evolution.rounds + 2}
    if evolution.target_ratio is not None:
        with settings.error_context("latency"):
            device = backend(settings.latency.device, **settings.latency.backend_options)
        base_ms = load_or_fit_block_table(settings, settings.load_space(), device).whole_ms
        changes["evolve"] = evolution.resolve_target(base_ms).model_dump(mode="json")
    settings = settings.with_changes(changes)
    return search(settings, quiet=quiet, scorer=EvolutionScorer, proposer=EvolutionProposer)


class EvolutionProposer:
    """Proposes each round's network: that of its parent round, edited by the action that the policy decides."""

    def __init__(self, settings: StudyConfig, space: Space, study: Study) -> None:  # noqa: ARG002
        self._settings, self._space = settings, space
        self._evolution = evolution_config(settings)
        self.choices: Mapping[str, Any] = distributions(space.knobs)

    def propose(self, claim: TrialRecord, trials: StudyTrials, *, attempt: int = 0) -> Proposal:  # noqa: ARG002
        """The network of the next round, whatever slot was claimed.

        Raises:
            SearchSpaceExhausted: if the evolution has ended; the message is the reason.
        """
        past = _rounds(trials)
        table = stored_block_table(self._settings)
        assert table is not None, "the study stores its block table when it begins"
        action = decide(self._evolution, _costs(self._space, table), past)
        if isinstance(action, str):
            raise SearchSpaceExhausted(action)
        if action.parent is None:
            arch = self._space.base
        else:
            arch = block_index.edit_blocks(past[action.parent].architecture, action.removed, action.copied)
        name = {"robust": "base", "final": FINAL}.get(action.phase)
        point = self._space.point_of(arch)
        assert point is not None, "actions stay within the space"
        return Proposal(point, self._space.architecture(point), name, {})


class EvolutionScorer(ArchsearchScorer):
    """Scores a round's network: trains it from the weights of its parent round and values its blocks."""

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        self._evolution = evolution_config(settings)
        if not settings.trains:
            remedy = "name one, e.g. validation_loss"
            raise InputError(settings.source, "no objective is a quality number", remedy, place="objectives")
        super().__init__(settings, space)
        assert self._evaluator is not None
        assert self._backend is not None
        self._trainer = self._evaluator
        with settings.error_context("evolve.metric"):
            own = self._evolution.num_samples
            samples = settings.protocol.num_samples if own is None else own
            self._gauge = build_metric(self._evolution.metric, self._trainer, samples=samples)
        self._table = load_or_fit_block_table(settings, space, self._backend)
        _check_target(settings, space, self._table)

    def describe(self) -> Mapping[str, Any]:
        """Attributes for the study, with the block table; see `archsearch.studies.search.scorer.Scorer`."""
        return {**super().describe(), "block_table": self._table.model_dump(mode="json")}

    def quality(
        self,
        arch: Architecture,
        *,
        seeds: Sequence[int],  # noqa: ARG002 - a round has its own
        progress: ProgressCallback,
        artifacts: Path,
        until: int | None = None,  # noqa: ARG002 - nor are there rungs
    ) -> Quality:
        """Quality of the round's network after training; writes its `EvolutionRound` to `ROUND` for the trial."""
        study = load_study(self._settings)
        past = _rounds(StudyTrials(study).read())
        action = decide(self._evolution, _costs(self._space, self._table), past)
        assert isinstance(action, Action)
        number = len(past)
        unet = self._initial_unet(study, action)
        assert unet.arch.id == arch.id, "the proposal is the action's network"
        run = self._train(unet, action, number, subtask(progress, 0, 0.7), self.checkpoints(artifacts))
        quality = self._trainer.quality([run])
        if quality.diverged:
            remedy = "lower protocol.learning_rate or evolve.round_lr_scale; the same command resumes the study"
            raise InputError(self._settings.source, f"round {number} diverged", remedy, place="protocol")
        self._trainer.write(run, artifacts)
        record = self._record_round(run.unet, action, number, past, subtask(progress, 0.7, 1))
        with atomic_write(artifacts / ROUND) as file:
            file.write_text(record.model_dump_json())
        return quality

    def _initial_unet(self, study: Study, action: Action) -> UNet:
        """The round's network before its training: the parent's trained network after the action, or a new base."""
        if action.parent is None:
            return self._trainer.initial_network(self._space.base, derive_seed(self._settings.seed, "weights"))
        parent = next(c for c in load_candidates(study) if c.slot == action.parent)
        unet = subnetworks.edit_network(load_unet(study, parent), action.removed, action.copied)
        unet.to(self._trainer.device)
        return unet

    def _train(
        self, unet: UNet, action: Action, number: int, progress: ProgressCallback, checkpoints: Checkpoints
    ) -> SeedRun:
        """Train the round's network; in a round without training steps only evaluate it."""
        first, last = action.phase == "robust", action.phase == "final"
        steps = self._steps(action)
        if not steps:
            return self._trainer.evaluate(unet, number=number)
        learning_rate = self._settings.protocol.learning_rate * (1 if first else self._evolution.round_lr_scale)
        return self._trainer.run(
            unet,
            self._settings.protocol.model_copy(update={"steps": steps, "learning_rate": learning_rate}),
            number=number,
            seed=derive_seed(self._settings.seed, "round", number),
            block_dropout=0 if last else self._evolution.block_dropout,
            progress=progress,
            checkpoints=checkpoints,
        )

    def latency(self, arch: Architecture) -> LatencyRecord:
        """Lowest of several latency measurements, as in the block table, since the next action depends on it.

        Measurements of the same network in earlier rounds are included.
        """
        earlier = [c for c in load_candidates(load_study(self._settings)) if c.architecture.id == arch.id]
        records = {arch.id: [c.score.latency for c in earlier if c.score.latency is not None]}
        measure_round_robin(
            super().latency,
            [arch],
            records,
            save=lambda *_: None,
            min_repeats=2,
            max_repeats=self._evolution.table.max_repeats,
        )
        record = min(records[arch.id], key=lambda record: record.median_ms)
        self._ms = record.median_ms
        return record

    def _record_round(
        self, unet: UNet, action: Action, number: int, past: Sequence[FinishedRound], progress: ProgressCallback
    ) -> EvolutionRound:
        """Value every removable block of the trained network and describe the round, including the next action."""
        reference = self._gauge.measure(unet)
        importances: list[BlockImportance] = []
        candidates = block_index.removable(unet.arch) if action.phase != "final" else ()
        for i, block in enumerate(candidates):
            # ΔCLIP / ΔLatency of arXiv 2306.00980, section 3.1, with the study's metric in place of CLIP
            with subnetworks.blocks_disabled(unet, {block.name}):
                loss = difference(reference, self._gauge.measure(unet))
            importances.append(
                BlockImportance(
                    block=block.name,
                    label=block.label,
                    site=block.site,
                    layer=block.layer,
                    kind=block.kind,
                    index=block.index,
                    loss=loss,
                    ms=self._table.block_ms(block),
                )
            )
            progress((i + 1) / len(candidates), "valuing blocks")
        # a training step takes 3 × the forward MACs: one forward pass and a backward pass of twice its cost
        macs = self.cost(unet.arch).macs * 3 * self._settings.protocol.batch_size * self._steps(action)
        record = EvolutionRound(
            number=number,
            phase=action.phase,
            parent=action.parent,
            removed=action.removed,
            copied=action.copied,
            metric=self._evolution.metric,
            quality=estimate(reference),
            predicted_ms=self._table.predict(unet.arch),
            steps=self._steps(action),
            training_macs=macs + (past[action.parent].round.training_macs if action.parent is not None else 0),
            worths=tuple(importances),
            next="",
        )
        after = [*past, FinishedRound(record, self._ms, unet.arch)]
        next_action = decide(self._evolution, _costs(self._space, self._table), after)
        return record.model_copy(update={"next": _describe(next_action)})

    def _steps(self, action: Action) -> int:
        """Training steps of a round; none in the first round if its weights are inherited."""
        if action.phase == "robust":
            return 0 if self._settings.protocol.init_from is not None else self._settings.protocol.steps
        return self._evolution.final_steps if action.phase == "final" else self._evolution.round_steps


def _check_target(settings: StudyConfig, space: Space, table: BlockTable) -> None:
    """Raise, before anything is trained, if by the block table no network of the space can meet the target."""
    evolution, costs = evolution_config(settings), _costs(space, table)
    base_blocks = block_index.blocks(space.base)
    last_at_site, count = {block.block_site: block for block in base_blocks}, block_index.block_counts(space.base)
    copies = [block for site, block in last_at_site.items() for _ in range(costs.max_count[site] - count[site])]
    fastest = table.predict(block_index.edit_blocks(space.base, [block.name for block in base_blocks]))
    slowest = table.predict(space.base) + sum(costs.copy_ms(block) for block in copies)
    if not fastest <= evolution.max_ms or not slowest >= evolution.min_ms:
        reachable = f"{fastest:.3g} to {slowest:.3g} ms"
        problem = f"{evolution.target_ms:g} ms is not met by any network of the space; they take {reachable}"
        raise InputError(settings.source, problem, "give a target in this range", place="evolve.target_ms")


def _costs(space: Space, table: BlockTable) -> BlockCosts:
    return BlockCosts(
        lambda block: table.block_ms(dataclasses.replace(block, index=block.index + 1)), max_block_counts(space)
    )


def _rounds(trials: Sequence[TrialRecord]) -> list[FinishedRound]:
    """The finished rounds, in order."""
    done = [
        FinishedRound(t.round, t.value("latency_ms"), block_index.with_explicit_layers(t.architecture))
        for t in trials
        if t.state == "scored" and t.round is not None and t.architecture is not None
    ]
    return sorted(done, key=lambda finished: finished.round.number)


def _describe(action: Action | str) -> str:
    """The next action in words, for the log and the report."""
    if isinstance(action, str):
        return f"stop: {action}"
    if action.phase == "final":
        return f"train round {action.parent} further with all blocks enabled: {action.why}"
    edits = [
        f"{verb} {', '.join(names)}" for verb, names in (("remove", action.removed), ("copy", action.copied)) if names
    ]
    return f"{' and '.join(edits)}: {action.why}"
