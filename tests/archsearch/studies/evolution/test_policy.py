"""The policy of an evolving study, decided from invented rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest

from archsearch.stats.estimate import Estimate
from archsearch.studies.config.evolution import EvolutionConfig
from archsearch.studies.evolution.policy import Action, BlockCosts, FinishedRound, decide
from archsearch.studies.storage.rounds import BlockImportance, EvolutionRound, Phase
from snapgen.architecture import block_index
from snapgen.architecture.block_index import BlockRef
from snapgen.architecture.schema import Architecture
from tests.snapgen.nets import tiny

ARCH = block_index.with_explicit_layers(tiny())
NAMES = [block.name for block in block_index.blocks(ARCH)]
HOW = EvolutionConfig(target_ms=10, tolerance=0.05, round_steps=1, final_steps=1, max_edits_per_round=2)
COPIES = BlockCosts(lambda _: 1.0, {block.block_site: 2 for block in block_index.blocks(ARCH)})


def round_of(
    number: int,
    ms: float,
    quality: float,
    *,
    phase: Phase = "evolve",
    loss: Callable[[int], float] = lambda i: 0.01 * (i + 1),
    arch: Architecture = ARCH,
    predicted: float | None = None,
) -> FinishedRound:
    """A round whose blocks cost 1 ms each, later ones worth more."""
    worths = tuple(
        BlockImportance(
            block=block.name,
            label=block.label,
            site=block.site,
            layer=block.layer,
            kind=block.kind,
            index=block.index,
            loss=Estimate(value=loss(i), low=loss(i) - 0.001, high=loss(i) + 0.001),
            ms=1.0,
        )
        for i, block in enumerate(block_index.removable(arch))
    )
    found = EvolutionRound(
        number=number,
        phase=phase,
        parent=number - 1 if number else None,
        removed=(),
        copied=(),
        metric="validation_loss",
        quality=Estimate(value=quality, low=quality, high=quality),
        predicted_ms=ms if predicted is None else predicted,
        steps=1,
        training_macs=1,
        worths=() if phase == "final" else worths,
        next="",
    )
    return FinishedRound(found, ms, arch)


def action(*past: FinishedRound, how: EvolutionConfig = HOW, costs: BlockCosts = COPIES) -> Action:
    found = decide(how, costs, past)
    assert isinstance(found, Action)
    return found


def test_it_begins_with_robust_training() -> None:
    assert action() == Action("robust", None, why="begin")


def test_over_the_target_the_least_worthy_go_in_a_group() -> None:
    found = action(round_of(0, 20, 1))
    assert (found.phase, found.parent, found.removed, found.copied) == ("evolve", 0, tuple(NAMES[:2]), ())


def test_no_more_go_than_the_target_needs() -> None:
    assert action(round_of(0, 11.4, 1)).removed == (NAMES[0],)


def test_a_block_that_costs_more_is_worth_less() -> None:
    past = round_of(0, 20, 1, loss=lambda _: 0.5)
    dear = past.round.worths[3].model_copy(update={"ms": 5.0})
    worths = (*past.round.worths[:3], dear, *past.round.worths[4:])
    past = dataclasses.replace(past, round=past.round.model_copy(update={"worths": worths}))
    assert action(past).removed[0] == NAMES[3]


def test_what_a_block_saves_is_scaled_to_the_whole_net() -> None:
    """The table says 10 ms, the clock 12: each block is taken to cost a fifth more."""
    assert len(action(round_of(0, 12.0, 1, predicted=10.0)).removed) == 2
    assert len(action(round_of(0, 11.6, 1, predicted=10.0)).removed) == 1


def test_under_the_target_the_most_worthy_are_copied_as_far_as_they_fit() -> None:
    assert action(round_of(0, 7, 1)).copied == (NAMES[-1], NAMES[-2])
    assert action(round_of(0, 9, 1)).copied == (NAMES[-1],)


def test_a_place_that_is_full_is_left_out() -> None:
    full = dict.fromkeys(COPIES.max_count, 2) | {block_index.blocks(ARCH)[-1].block_site: 1}
    assert action(round_of(0, 7, 1), costs=BlockCosts(lambda _: 1.0, full)).copied == (NAMES[-2], NAMES[-3])


def test_a_block_whose_use_cannot_be_told_is_not_copied() -> None:
    found = decide(HOW, COPIES, [round_of(0, 7, 1, loss=lambda _: 0.0005)])
    assert isinstance(found, Action)
    assert found.phase == "final"


def test_where_no_copy_fits_the_least_worthy_make_room() -> None:
    found = action(round_of(0, 10.2, 1))
    assert (found.removed, found.copied) == ((NAMES[0],), (NAMES[-1],))


def test_no_swap_that_loses_more_than_it_brings() -> None:
    found = action(round_of(0, 10.2, 1, loss=lambda _: 0.5))
    assert found.phase == "final"
    assert "no block is worth more" in found.why


def test_it_ends_when_the_next_one_at_the_target_is_no_better() -> None:
    before = round_of(0, 10, 1.0)
    better, no_better = round_of(1, 10, 0.9), round_of(1, 10, 0.995)
    assert action(before, better).phase == "evolve"
    found = action(before, no_better)
    assert (found.phase, found.parent) == ("final", 1)
    assert action(before, round_of(1, 10, 1.1)).parent == 0


def test_of_a_score_below_zero_the_gain_counts_alike() -> None:
    """Minus CLIP's cosine: −0.31 is better than −0.30."""
    assert action(round_of(0, 10, -0.30), round_of(1, 10, -0.31)).phase == "evolve"
    assert action(round_of(0, 10, -0.30), round_of(1, 10, -0.301)).phase == "final"


def test_the_last_round_is_the_last() -> None:
    past = [round_of(0, 10, 1.0), round_of(1, 10, 0.99, phase="final")]
    assert decide(HOW, COPIES, past) == "ended with a network of 10 ms"
    without = HOW.model_copy(update={"final_steps": 0})
    assert str(decide(without, COPIES, [round_of(0, 10, 1), round_of(1, 10, 1)])).startswith("ended with round 0")


def test_rounds_are_bounded() -> None:
    how = HOW.model_copy(update={"rounds": 2})
    over = [round_of(i, 20 - i, 1) for i in range(3)]
    assert str(decide(how, COPIES, over)) == "2 rounds ended at 18 ms, above the target"
    at = [round_of(0, 20, 1), round_of(1, 10, 1), round_of(2, 10, 0.5)]
    assert action(*at, how=how).why == "2 rounds are over"


def test_a_target_is_reached_by_whoever_goes_on() -> None:
    """The decision, played with a net whose latency is 3 ms and 1 ms a block, as a search would."""
    net, past = ARCH, list[FinishedRound]()
    for number in range(30):
        ms = 3.0 + len(block_index.blocks(net))
        past.append(round_of(number, ms, 1 - 0.02 * number, arch=net))
        found = decide(HOW, COPIES, past)
        if isinstance(found, str) or found.phase == "final":
            break
        net = block_index.edit_blocks(net, found.removed, found.copied)
    assert isinstance(found, Action)
    assert found.phase == "final"
    assert HOW.min_ms <= past[found.parent or 0].ms <= HOW.max_ms


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_ms": -1},
        {"block_dropout": 1},
        {"block_dropout": -0.1},
        {"tolerance": 0},
        {"max_edits_per_round": 0},
        {"min_improvement": 1},
    ],
)
def test_settings_are_checked(wrong: Mapping[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvolutionConfig.model_validate({"target_ms": 1, "round_steps": 1, **wrong})


def test_copy_costs_are_asked_of_the_block() -> None:
    asked: list[BlockRef] = []

    def cost(block: BlockRef) -> float:
        asked.append(block)
        return 1.0

    action(round_of(0, 7, 1), costs=BlockCosts(cost, COPIES.max_count))
    assert {block.name for block in asked} == set(NAMES)
