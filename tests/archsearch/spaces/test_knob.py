"""Knobs: names, overrides, and whether choices are ordered."""

from __future__ import annotations

from typing import Any

import pytest

from archsearch.spaces.knob import Knob, read_knob


def knob(name: str, choices: Any) -> Knob:
    return read_knob(name, choices, 3, source="test")


@pytest.mark.parametrize(
    ("path", "choices", "ordered"),
    [
        ("all.ffn_ratio", [2, 2.5, 4], True),
        ("all.ffn_ratio", [4, 3, 2], True),
        ("all.ffn_ratio", [2, 4, 3], False),
        ("all.num_kv_heads", [1, 2, None], True),
        ("all.num_kv_heads", [None, 2, 1], True),
        ("all.num_kv_heads", [1, None, 2], False),
        ("qk_norm", [False, True], False),
        ("all.conv", ["standard", "separable"], False),
    ],
)
def test_numbers_in_order_make_an_ordered_knob(path: str, choices: list[Any], ordered: bool) -> None:
    assert knob(path, choices).ordered is ordered


def test_labels_are_ordered_when_every_field_goes_one_way() -> None:
    small, large = (
        {"up.num_res_blocks": 1, "up[1:].num_transformers": 1},
        {"up.num_res_blocks": 2, "up[1:].num_transformers": 3},
    )
    assert knob("depth", {"small": small, "large": large}).ordered
    crossing = {"up.num_res_blocks": 3, "up[1:].num_transformers": 0}
    assert not knob("depth", {"small": small, "other": crossing}).ordered
    assert not knob("depth", {"as it is": {}, "large": large}).ordered
    mixed = knob("depth", {"a": {**small, "rope": False}, "b": {**large, "rope": True}})
    assert not mixed.ordered


def test_steps() -> None:
    ordered, other = knob("all.ffn_ratio", [2, 3, 4]), knob("x", {"a": {}, "b": {"rope": True}, "c": {"qk_norm": True}})
    assert [list(ordered.adjacent_choices(i)) for i in range(3)] == [[1], [0, 2], [1]]
    assert [list(other.adjacent_choices(i)) for i in range(3)] == [[1, 2], [0, 2], [0, 1]]


def test_labels_use_yaml_notation() -> None:
    assert knob("all.num_kv_heads", [1, None]).choices == ("1", "null")
    assert knob("qk_norm", [True, False]).choices == ("true", "false")
    assert knob("all.ffn_ratio", [2, 2.5, 3.0]).choices == ("2", "2.5", "3")


def test_changes_are_the_choice_alone() -> None:
    ratio = knob("all.ffn_ratio", [2, 4])
    changes = ratio.changes(0)
    assert changes == {"all.ffn_ratio": 2}
    changes["rope"] = True
    assert ratio.changes(0) == {"all.ffn_ratio": 2}


def test_locations() -> None:
    assert knob("all.ffn_ratio", [2, 4]).location(1) == "knobs.all.ffn_ratio[1]"
    assert knob("x", {"a": {}, "b": {"rope": True}}).location(1) == "knobs.x.b"
