"""The rows of an ablation: what is derived from a ladder, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from archsearch.cost.counter import cost
from archsearch.spaces.loading import load_space
from archsearch.studies.config.ablation import AblationConfig, plan, space_of
from archsearch.studies.config.study import load_config
from snapgen.errors import InputError

LADDER: dict[str, Any] = {
    "0": {"title": "base"},
    "1": {"title": "fewer attentions", "over": "0", "changes": {"stages[1].self_attention": False}},
    "2a": {"title": "separable", "over": "1", "changes": {"all.conv": "separable"}},
    "2b": {"title": "expanded", "over": "1", "changes": {"all.conv": "separable", "all.expansion": 2}},
    "3": {"title": "MQA", "over": "2b", "changes": {"all.kv_heads": 1}},
}


def ladder(changes: dict[str, Any] | None = None, **given: Any) -> AblationConfig:
    rows = {name: dict(row) for name, row in LADDER.items()} | (changes or {})
    return AblationConfig.model_validate({"rows": rows, "final": "3", "alone": True, **given})


def base() -> Any:
    return load_space("emoji").base


def test_the_choices_are_the_way_down_from_the_final_row() -> None:
    assert ladder().choices == ("1", "2b", "3")


def test_every_row_stands_on_the_one_below() -> None:
    rows = {row.name: row for row in plan(ladder(), base(), source="file")}
    assert list(rows) == [
        *LADDER,
        *("3 without 1", "3 without 2b", "3 without 3"),
        *("0 with 1", "0 with 2b", "0 with 3"),
    ]
    assert rows["3"].architecture.down[1].kv_heads == 1
    assert rows["3"].architecture.down[1].expansion == 2
    assert not rows["3"].architecture.down[1].self_attention
    assert rows["3 without 1"].architecture.down[1].self_attention
    assert rows["3 without 3"].architecture.id == rows["2b"].architecture.id
    assert rows["0 with 1"].architecture.id == rows["1"].architecture.id
    assert rows["0 with 3"].architecture.down[1].conv == "plain"
    assert {row.over for row in rows.values() if row.group == "without"} == {"3"}
    assert {row.over for row in rows.values() if row.group == "alone"} == {"0"}


def test_a_change_made_again_counts_last() -> None:
    again = {
        "1": {"title": "one", "over": "0", "changes": {"all.ffn_ratio": 3}},
        "2a": {"title": "all", "over": "1", "changes": {"stages.ffn_ratio": 2}},
        "2b": {"title": "again", "over": "2a", "changes": {"all.ffn_ratio": 3, "qk_norm": True}},
    }
    settings = AblationConfig.model_validate({"rows": {"0": LADDER["0"], **again}, "final": "2b", "without": False})
    rows = {row.name: row.architecture for row in plan(settings, base(), source="file")}
    assert (rows["2a"].down[1].ffn_ratio, rows["2a"].mid.ffn_ratio) == (2, 3)
    assert (rows["2b"].down[1].ffn_ratio, rows["2b"].mid.ffn_ratio) == (3, 3)


def test_the_space_has_every_architecture_once() -> None:
    around = load_space("emoji")
    space = space_of(ladder(), around, source="file")
    rows = plan(ladder(), around.base, source="file")
    assert space.size() == len({row.architecture.id for row in rows}) == 9
    built = {space.architecture(point).id for point in space.references.values()}
    assert built == {row.architecture.id for row in rows}
    assert space.base == around.base
    assert (space.latent_size, space.context_tokens) == (around.latent_size, around.context_tokens)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"2a": {**LADDER["2a"], "over": "nine"}}, "over 'nine' is no row above it"),
        ({"2a": {**LADDER["2a"], "over": None}}, "only the first row"),
        ({"2a": {"title": "nothing", "over": "1"}}, "the base changes nothing, every other row something"),
        ({"4": {"title": "x", "over": "3", "changes": {"qk_norm": True}, "colour": 1}}, "colour"),
    ],
)
def test_a_ladder_without_footing_is_refused(rows: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ladder(rows)


def test_a_final_row_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="final 'six' is no row above the base"):
        ladder(final="six")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"all.colour": 1}, r"ablation\.rows\.2a\.changes\.all\.colour: unknown field 'colour' of all; use one of"),
        ({"all.conv": "round"}, r"rows\.2a\.changes\.all\.conv: 'round' is not"),
        ({"all.expansion": 2}, r"rows\.2a\.changes\.all\.expansion: changes nothing in this row's net; remove it"),
        ({"all.ffn_ratio": 4}, r"rows\.2a\.changes: build the same net as row 1; correct"),
        ({"stages[1].channels": 33}, r"rows\.2a: down\[1\] has 33 channels, not a multiple of norm_groups; use"),
    ],
)
def test_a_row_that_does_not_fit_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan(ladder({"2a": {"title": "wrong", "over": "1", "changes": changes}}), base(), source="file")


@pytest.mark.parametrize("name", ["snapgen", "emoji"])
def test_the_shipped_ablations_build(name: str) -> None:
    settings = load_config(name, "ablation")
    assert settings.ablation is not None
    rows = plan(settings.ablation, load_space(settings.space).base, source=name)
    assert [row.name for row in rows if row.group == "ladder"][:8] == ["0", "1", "2a", "2b", "3", "4", "5", "6"]


def test_both_ablations_make_the_same_changes() -> None:
    """Down to the number of blocks of the first stage, which the smaller base has fewer of."""
    small, full = (load_config(name, "ablation").ablation for name in ("emoji", "snapgen"))
    assert small is not None
    assert full is not None
    for name, row in small.rows.items():
        theirs = dict(full.rows[name].changes)
        theirs |= {path: row.changes[path] for path in theirs if path == "down[0].transformers"}
        assert row.changes == theirs


def test_the_papers_deltas_are_ours_within_a_point() -> None:
    """Params and MACs of arXiv 2412.09619, section 3.1, at the 128 x 128 latent."""
    settings = load_config("ablation/snapgen")
    space = load_space(settings.space)
    assert settings.ablation is not None
    rows = {row.name: row for row in plan(settings.ablation, space.base, source="file") if row.group == "ladder"}
    costs = {n: cost(row.architecture, space.latent_size) for n, row in rows.items()}
    compared = 0
    for name, row in rows.items():
        for quantity in ("params", "macs"):
            published = row.published.get(quantity)
            if published is not None and published.value is not None and row.over is not None:
                ours = 100 * (getattr(costs[name], quantity) / getattr(costs[row.over], quantity) - 1)
                assert abs(ours - published.value) <= 1.0, (name, quantity, ours)
                compared += 1
    assert compared == 10
