"""Policy of an evolving study: which blocks to remove or copy, and when to end (arXiv 2306.00980, section 3.1).

The decision depends only on the finished rounds, so a study that was killed decides as it would have before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from archsearch.studies.config.evolution import EvolutionConfig
from archsearch.studies.storage.rounds import BlockImportance, EvolutionRound, Phase
from snapgen.architecture.block_index import BlockRef, BlockSite, block_counts, blocks
from snapgen.architecture.schema import Architecture


@dataclass(frozen=True)
class FinishedRound:
    """A finished round.

    Attributes:
        ms: measured latency of its network.
        architecture: architecture of its network.
    """

    round: EvolutionRound
    ms: float
    architecture: Architecture


@dataclass(frozen=True)
class Action:
    """Action of the next round.

    Attributes:
        parent: number of the round whose network is edited; None for the first round.
        removed: names of the blocks to remove.
        copied: names of the blocks to copy.
        why: reason, for the log and the report.
    """

    phase: Phase
    parent: int | None
    removed: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class BlockCosts:
    """Costs and bounds of blocks.

    Attributes:
        copy_ms: latency of one more copy of a block, by the block table.
        max_count: largest number of blocks at each site.
    """

    copy_ms: Callable[[BlockRef], float]
    max_count: Mapping[BlockSite, int]


def decide(settings: EvolutionConfig, costs: BlockCosts, past: Sequence[FinishedRound]) -> Action | str:
    """The next action, or the reason why there is none.

    Above the target the blocks of lowest value per millisecond are removed, several per round. At or below the target
    the blocks of highest value are copied, as far as they fit. If none fits, the most valuable block is copied and the
    least valuable ones are removed to make room. The evolution ends when a network at the target is no better than the
    earlier ones at the target; the best of those is then trained in a final round.

    Args:
        past: finished rounds, in order.
    """
    if not past:
        return Action("robust", None, why="begin")
    last = past[-1]
    if last.round.phase == "final":
        return f"ended with a network of {last.ms:.4g} ms"
    if last.ms > settings.max_ms:
        if len(past) > settings.rounds:
            return f"{settings.rounds} rounds ended at {last.ms:.4g} ms, above the target"
        return _remove(settings, last)
    at_target = [finished for finished in past if finished.ms <= settings.max_ms]
    best_before = min((finished.round.quality.value for finished in at_target[:-1]), default=math.inf)
    if last.round.quality.value > best_before - settings.min_improvement * abs(best_before):
        return _finish(settings, at_target, "the last network at the target was no better")
    if len(past) > settings.rounds:
        return _finish(settings, at_target, f"{settings.rounds} rounds are over")
    action = _copy(settings, costs, last) or _swap(settings, costs, last)
    return action or _finish(settings, at_target, "no block is worth more than the blocks that a copy would replace")


def _remove(settings: EvolutionConfig, last: FinishedRound) -> Action | str:
    """Remove the least valuable blocks until the target is met, at most ``max_edits_per_round``."""
    removed: list[BlockImportance] = []
    ms = last.ms
    for importance in sorted(last.round.worths, key=lambda importance: importance.value):
        if len(removed) == settings.max_edits_per_round or ms <= settings.max_ms:
            break
        removed.append(importance)
        ms -= importance.ms * _scale(last)
    if not removed:
        return f"no block is left to remove at {last.ms:.4g} ms"
    why = f"{last.ms:.4g} ms is above {settings.max_ms:.4g}"
    return Action("evolve", last.round.number, removed=_names(removed), why=why)


def _copy(settings: EvolutionConfig, costs: BlockCosts, last: FinishedRound) -> Action | None:
    """Copy the most valuable blocks that fit under the target, at most ``max_edits_per_round``; None if none fits."""
    copied: list[BlockImportance] = []
    ms = last.ms
    for importance, copy_ms in _copyable(costs, last):
        if len(copied) < settings.max_edits_per_round and ms + copy_ms * _scale(last) <= settings.max_ms:
            copied.append(importance)
            ms += copy_ms * _scale(last)
    why = f"{last.ms:.4g} ms leaves room under {settings.max_ms:.4g}"
    return Action("evolve", last.round.number, copied=_names(copied), why=why) if copied else None


def _swap(settings: EvolutionConfig, costs: BlockCosts, last: FinishedRound) -> Action | None:
    """Copy the most valuable block and remove the least valuable ones to make room, if those lose less in total."""
    for importance, copy_ms in _copyable(costs, last)[:1]:
        removed: list[BlockImportance] = []
        ms = last.ms + copy_ms * _scale(last)
        for other in sorted(last.round.worths, key=lambda other: other.value):
            if ms <= settings.max_ms or len(removed) == settings.max_edits_per_round:
                break
            if (other.site, other.layer, other.kind) != (importance.site, importance.layer, importance.kind):
                removed.append(other)
                ms -= other.ms * _scale(last)
        if ms <= settings.max_ms and sum(other.loss.value for other in removed) < importance.loss.value:
            why = f"{importance.label} is worth more per ms than the blocks removed for its copy"
            return Action("evolve", last.round.number, _names(removed), (importance.block,), why)
    return None


def _copyable(costs: BlockCosts, last: FinishedRound) -> list[tuple[BlockImportance, float]]:
    """Useful blocks whose site has room for a copy, most valuable first, each with the latency of that copy."""
    count = block_counts(last.architecture)
    by_name = {block.name: block for block in blocks(last.architecture)}
    copyable = [
        (importance, costs.copy_ms(block))
        for importance, block in ((importance, by_name[importance.block]) for importance in last.round.worths)
        if importance.loss.low > 0 and count[block.block_site] < costs.max_count.get(block.block_site, 0)
    ]
    return sorted(copyable, key=lambda pair: pair[0].value, reverse=True)


def _finish(settings: EvolutionConfig, at_target: Sequence[FinishedRound], why: str) -> Action | str:
    """Train the best network at the target in a final round, or end if there is no final round."""
    best = min(at_target, key=lambda finished: finished.round.quality.value)
    if not settings.final_steps:
        return f"ended with round {best.round.number}, {best.ms:.4g} ms: {why}"
    return Action("final", best.round.number, why=why)


def _scale(last: FinishedRound) -> float:
    """Measured latency over the sum of the block table; the ratio is assumed to hold for every block."""
    return last.ms / last.round.predicted_ms


def _names(importances: Sequence[BlockImportance]) -> tuple[str, ...]:
    return tuple(importance.block for importance in importances)
