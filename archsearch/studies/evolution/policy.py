"""What an evolving study does next: which blocks go, which stand twice, when it ends (arXiv 2306.00980, section 3.1).

A function of the rounds so far, so that a study that was killed decides again as it did before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from archsearch.studies.config.evolution import EvolutionConfig
from archsearch.studies.evolution.rounds import BlockImportance, EvolutionRound, Phase
from snapgen.architecture.block_index import BlockRef, BlockSite, block_counts, blocks
from snapgen.architecture.schema import Architecture


@dataclass(frozen=True)
class Past:
    """A round that is done.

    Attributes:
        ms: its network's latency, as the study takes it.
        architecture: of its network.
    """

    round: EvolutionRound
    ms: float
    architecture: Architecture


@dataclass(frozen=True)
class Action:
    """What the next round does to which round's network; no parent: the search begins."""

    phase: Phase
    parent: int | None
    removed: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class BlockCosts:
    """What the table of blocks says.

    Attributes:
        copy_ms: of one more copy of a block.
        most: blocks that may stand in a place.
    """

    copy_ms: Callable[[BlockRef], float]
    most: Mapping[BlockSite, int]


def decide(settings: EvolutionConfig, costs: BlockCosts, past: Sequence[Past]) -> Action | str:
    """The next action, or why there is none.

    Over the target the blocks of least value per millisecond go, a group at a time. At or under it the blocks of most
    value are copied as far as they fit; where none fits, the one of most value is copied and those of least value make
    room for it. That goes on until a network at the target is no better than those before it; then the best of them is
    trained on, and that is the last round.
    """
    if not past:
        return Action("robust", None, why="begin")
    last = past[-1]
    if last.round.phase == "final":
        return f"ended with a network of {last.ms:.4g} ms"
    if last.ms > settings.most_ms:
        if len(past) > settings.rounds:
            return f"{settings.rounds} rounds ended at {last.ms:.4g} ms, over the target"
        return _remove(settings, last)
    visits = [one for one in past if one.ms <= settings.most_ms]
    before = min((one.round.quality.value for one in visits[:-1]), default=math.inf)
    if last.round.quality.value > before - settings.gain * abs(before):
        return _finish(settings, visits, "the last network at the target was no better")
    if len(past) > settings.rounds:
        return _finish(settings, visits, f"{settings.rounds} rounds are over")
    found = _copy(settings, costs, last) or _swap(settings, costs, last)
    return found or _finish(settings, visits, "no block is worth more than what would have to make room for it")


def _remove(settings: EvolutionConfig, last: Past) -> Action | str:
    """The group of least value, or so much of it as the target needs."""
    going: list[BlockImportance] = []
    left = last.ms
    for worth in sorted(last.round.worths, key=lambda worth: worth.value):
        if len(going) == settings.group or left <= settings.most_ms:
            break
        going.append(worth)
        left -= worth.ms * _scale(last)
    if not going:
        return f"no block is left to remove at {last.ms:.4g} ms"
    why = f"{last.ms:.4g} ms is over {settings.most_ms:.4g}"
    return Action("evolve", last.round.number, removed=_names(going), why=why)


def _copy(settings: EvolutionConfig, costs: BlockCosts, last: Past) -> Action | None:
    """The group of most value that fits under the target."""
    chosen: list[BlockImportance] = []
    ms = last.ms
    for worth, more in _copyable(costs, last):
        if len(chosen) < settings.group and ms + more * _scale(last) <= settings.most_ms:
            chosen.append(worth)
            ms += more * _scale(last)
    why = f"{last.ms:.4g} ms leaves room under {settings.most_ms:.4g}"
    return Action("evolve", last.round.number, copied=_names(chosen), why=why) if chosen else None


def _swap(settings: EvolutionConfig, costs: BlockCosts, last: Past) -> Action | None:
    """One copy of the block of most value, and room made for it by those of least, if together they lose less."""
    for worth, more in _copyable(costs, last)[:1]:
        going: list[BlockImportance] = []
        ms = last.ms + more * _scale(last)
        for other in sorted(last.round.worths, key=lambda other: other.value):
            if ms <= settings.most_ms or len(going) == settings.group:
                break
            if (other.site, other.layer, other.kind) != (worth.site, worth.layer, worth.kind):
                going.append(other)
                ms -= other.ms * _scale(last)
        if ms <= settings.most_ms and sum(other.loss.value for other in going) < worth.loss.value:
            why = f"{worth.label} is worth more per ms than what makes room for its copy"
            return Action("evolve", last.round.number, _names(going), (worth.block,), why)
    return None


def _copyable(costs: BlockCosts, last: Past) -> list[tuple[BlockImportance, float]]:
    """Blocks of use whose place takes another, most valuable first, and what a copy costs."""
    every = blocks(last.architecture)
    count = block_counts(last.architecture)
    by_name = {block.name: block for block in every}
    found = [
        (worth, costs.copy_ms(by_name[worth.block]))
        for worth in last.round.worths
        if worth.loss.low > 0 and count[by_name[worth.block].place] < costs.most.get(by_name[worth.block].place, 0)
    ]
    return sorted(found, key=lambda pair: pair[0].value, reverse=True)


def _finish(settings: EvolutionConfig, visits: Sequence[Past], why: str) -> Action | str:
    best = min(visits, key=lambda one: one.round.quality.value)
    if not settings.final_steps:
        return f"ended with round {best.round.number}, {best.ms:.4g} ms: {why}"
    return Action("final", best.round.number, why=why)


def _scale(last: Past) -> float:
    """How much slower the network is than its blocks' sum says: taken to hold for each of them."""
    return last.ms / last.round.predicted_ms


def _names(worths: Sequence[BlockImportance]) -> tuple[str, ...]:
    return tuple(worth.block for worth in worths)
