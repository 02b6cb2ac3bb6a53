"""The rows of an ablation: what is derived from a ladder, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from archsearch.cost.counter import cost
from archsearch.spaces.loading import load_space
from archsearch.studies.config.ablation import AblationConfig, expand_rows, space_of_rows
from archsearch.studies.config.study import load_config
from snapgen.errors import InputError

LADDER: dict[str, Any] = {
    "0": {"title": "base"},
    "1": {"title": "fewer attentions", "baseline": "0", "overrides": {"levels[1].self_attention": False}},
    "2a": {"title": "separable", "baseline": "1", "overrides": {"all.conv": "separable"}},
    "2b": {"title": "expanded", "baseline": "1", "overrides": {"all.conv": "separable", "all.expansion": 2}},
    "3": {"title": "MQA", "baseline": "2b", "overrides": {"all.num_kv_heads": 1}},
}


def ladder(changes: dict[str, Any] | None = None, **given: Any) -> AblationConfig:
    rows = {name: dict(row) for name, row in LADDER.items()} | (changes or {})
    return AblationConfig.model_validate({"rows": rows, "final_row": "3", "one_at_a_time": True, **given})


def base() -> Any:
    return load_space("emoji").base


def test_the_choices_are_the_way_down_from_the_final_row() -> None:
    assert ladder().choices == ("1", "2b", "3")


def test_every_row_stands_on_the_one_below() -> None:
    rows = {row.name: row for row in expand_rows(ladder(), base(), source="file")}
    assert list(rows) == [
        *LADDER,
        *("3 without 1", "3 without 2b", "3 without 3"),
        *("0 with 1", "0 with 2b", "0 with 3"),
    ]
    assert rows["3"].architecture.down[1].num_kv_heads == 1
    assert rows["3"].architecture.down[1].expansion == 2
    assert not rows["3"].architecture.down[1].self_attention
    assert rows["3 without 1"].architecture.down[1].self_attention
    assert rows["3 without 3"].architecture.id == rows["2b"].architecture.id
    assert rows["0 with 1"].architecture.id == rows["1"].architecture.id
    assert rows["0 with 3"].architecture.down[1].conv == "standard"
    assert {row.baseline for row in rows.values() if row.group == "leave_one_out"} == {"3"}
    assert {row.baseline for row in rows.values() if row.group == "one_at_a_time"} == {"0"}


def test_a_change_made_again_counts_last() -> None:
    again = {
        "1": {"title": "one", "baseline": "0", "overrides": {"all.ffn_ratio": 3}},
        "2a": {"title": "all", "baseline": "1", "overrides": {"levels.ffn_ratio": 2}},
        "2b": {"title": "again", "baseline": "2a", "overrides": {"all.ffn_ratio": 3, "qk_norm": True}},
    }
    settings = AblationConfig.model_validate(
        {"rows": {"0": LADDER["0"], **again}, "final_row": "2b", "leave_one_out": False}
    )
    rows = {row.name: row.architecture for row in expand_rows(settings, base(), source="file")}
    assert (rows["2a"].down[1].ffn_ratio, rows["2a"].mid.ffn_ratio) == (2, 3)
    assert (rows["2b"].down[1].ffn_ratio, rows["2b"].mid.ffn_ratio) == (3, 3)


def test_the_space_has_every_architecture_once() -> None:
    around = load_space("emoji")
    space = space_of_rows(ladder(), around, source="file")
    rows = expand_rows(ladder(), around.base, source="file")
    assert space.size() == len({row.architecture.id for row in rows}) == 9
    built = {space.architecture(point).id for point in space.references.values()}
    assert built == {row.architecture.id for row in rows}
    assert space.base == around.base
    assert (space.latent_size, space.context_tokens) == (around.latent_size, around.context_tokens)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"2a": {**LADDER["2a"], "baseline": "nine"}}, "baseline 'nine' is not an earlier row"),
        ({"2a": {**LADDER["2a"], "baseline": None}}, "the first row, the base, has no baseline"),
        ({"2a": {"title": "nothing", "baseline": "1"}}, "the base has no overrides and every other row has some"),
        ({"4": {"title": "x", "baseline": "3", "overrides": {"qk_norm": True}, "colour": 1}}, "colour"),
    ],
)
def test_a_ladder_without_footing_is_refused(rows: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ladder(rows)


def test_a_final_row_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="final_row 'six' is not a row after the base"):
        ladder(final_row="six")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"all.colour": 1}, r"ablation\.rows\.2a\.overrides\.all\.colour: unknown field 'colour' of all; use one of"),
        ({"all.conv": "round"}, r"rows\.2a\.overrides\.all\.conv: 'round' is not"),
        ({"all.expansion": 2}, r"rows\.2a\.overrides\.all\.expansion: has no effect on this row's net; remove it"),
        ({"all.ffn_ratio": 4}, r"rows\.2a\.overrides: build the same net as row 1; correct"),
        ({"levels[1].channels": 33}, r"rows\.2a: down\[1\] has 33 channels, not a multiple of norm_groups; use"),
    ],
)
def test_a_row_that_does_not_fit_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        expand_rows(ladder({"2a": {"title": "wrong", "baseline": "1", "overrides": changes}}), base(), source="file")


@pytest.mark.parametrize("name", ["snapgen", "emoji"])
def test_the_shipped_ablations_build(name: str) -> None:
    settings = load_config(name, "ablation")
    assert settings.ablation is not None
    rows = expand_rows(settings.ablation, load_space(settings.space).base, source=name)
    assert [row.name for row in rows if row.group == "ladder"][:8] == ["0", "1", "2a", "2b", "3", "4", "5", "6"]


def test_both_ablations_make_the_same_changes() -> None:
    """Down to the number of blocks of the first stage, which the smaller base has fewer of."""
    small, full = (load_config(name, "ablation").ablation for name in ("emoji", "snapgen"))
    assert small is not None
    assert full is not None
    for name, row in small.rows.items():
        theirs = dict(full.rows[name].overrides)
        theirs |= {path: row.overrides[path] for path in theirs if path == "down[0].num_transformers"}
        assert row.overrides == theirs


def test_the_papers_deltas_are_ours_within_a_point() -> None:
    """Params and MACs of arXiv 2412.09619, section 3.1, at the 128 x 128 latent."""
    settings = load_config("ablation/snapgen")
    space = load_space(settings.space)
    assert settings.ablation is not None
    rows = {row.name: row for row in expand_rows(settings.ablation, space.base, source="file") if row.group == "ladder"}
    costs = {n: cost(row.architecture, space.latent_size) for n, row in rows.items()}
    compared = 0
    for name, row in rows.items():
        for quantity in ("params", "macs"):
            published = row.published.get(quantity)
            if published is not None and published.value is not None and row.baseline is not None:
                ours = 100 * (getattr(costs[name], quantity) / getattr(costs[row.baseline], quantity) - 1)
                assert abs(ours - published.value) <= 1.0, (name, quantity, ours)
                compared += 1
    assert compared == 10
