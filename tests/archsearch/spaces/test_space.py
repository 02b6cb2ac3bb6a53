"""Points of a space: sampling, neighbors, sizes, references."""

from __future__ import annotations

import json
import math
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from archsearch.cost.counter import cost
from archsearch.library import shipped
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import Space
from archsearch.spaces.summary import _params
from snapgen.architecture import block_index
from snapgen.errors import InputError
from tests.archsearch.spaces.test_loading import BASE, GOOD

# Two key/value heads do not divide the three heads of 48 channels; 32 and 64 channels have an even number of heads.
PARTLY_INVALID = f"""{BASE}
knobs:
  levels[1].num_kv_heads: [1, 2, null]
  levels[1].channels: [32, 48, 64]
  rope: [false, true]
"""


def write_space(folder: Path, text: str) -> Space:
    path = folder / "own.yaml"
    path.write_text(text)
    return load_space(path)


@pytest.fixture
def partly_invalid(tmp_path: Path) -> Space:
    return write_space(tmp_path, PARTLY_INVALID)


def test_a_point_becomes_an_architecture(tmp_path: Path) -> None:
    space = write_space(tmp_path, GOOD)
    arch = space.architecture({"qk_norm": 1, "convs": 1})
    assert arch.qk_norm
    assert {blocks.conv for _, blocks, _ in arch.named_levels()} == {"separable"}
    assert space.labels({"qk_norm": 1, "convs": 1}) == {"qk_norm": "true", "convs": "separable"}
    assert space.base_point == {"qk_norm": 0, "convs": 0}
    assert space.reference_points() == {"base": space.base_point, "both": {"qk_norm": 1, "convs": 1}}
    assert space.reference_points(["both"]) == {"both": {"qk_norm": 1, "convs": 1}}


def test_size_counts_points_and_distinct_counts_nets(partly_invalid: Space) -> None:
    assert partly_invalid.size() == 18
    assert partly_invalid.log_size() == pytest.approx(math.log10(18))
    # 48 channels with 2 heads are invalid, and 2 key/value heads at 32 channels are one per query head.
    assert partly_invalid.distinct() == (18 - 2 - 2, True)


def test_a_large_space_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = "".join(f"  {way}[{i}].expansion: [1, 2, 3]\n" for way in ("down", "up") for i in range(2))
    more = "  all.conv: [standard, separable]\n  mid.ffn_ratio: [2, 3, 4]\n  rope: [false, true]\n"
    space = write_space(tmp_path, f"{BASE}\nknobs:\n{knobs}{more}")
    assert space.size() == 3**4 * 2 * 3 * 2
    # Plain convs have no expansion, and the middle no transformer: (1 + 81) nets, each with and without RoPE.
    assert space.distinct() == (2 * 82, True)
    monkeypatch.setattr("archsearch.spaces.space.LARGEST_COUNT", 100)
    estimate, exact = space.distinct(samples=200)
    assert not exact
    assert estimate == pytest.approx(2 * 82, rel=0.15)


def test_samples_are_valid_and_reach_everything(partly_invalid: Space) -> None:
    rng = random.Random(0)
    points = [partly_invalid.sample(rng) for _ in range(300)]
    assert all(map(partly_invalid.valid, points))
    assert len({tuple(point.values()) for point in points}) == 16
    again = random.Random(0)
    assert [partly_invalid.sample(again) for _ in range(300)] == points


def test_a_space_without_valid_points_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = write_space(tmp_path, GOOD)
    monkeypatch.setattr(Space, "valid", lambda *_: False)
    with pytest.raises(InputError, match=r"own.yaml: knobs: 1000 random points in a row were invalid"):
        space.sample(random.Random(0))


def test_neighbors_are_one_step_away_and_valid(partly_invalid: Space) -> None:
    point = {"levels[1].num_kv_heads": 2, "levels[1].channels": 1, "rope": 0}
    assert list(partly_invalid.neighbors(point)) == [
        # One step down to 2 heads is invalid, and from all heads to 1 is two steps.
        {**point, "levels[1].channels": 0},
        {**point, "levels[1].channels": 2},
        {**point, "rope": 1},
    ]


@pytest.mark.parametrize("name", shipped("space"))
def test_neighborhood_is_mutual(name: str) -> None:
    space = load_space(name)
    point = space.sample(random.Random(3))
    for neighbor in space.neighbors(point):
        assert point in list(space.neighbors(neighbor))


def test_points_iterates_over_all(partly_invalid: Space) -> None:
    points = list(partly_invalid.points())
    assert len(points) == 18
    assert sum(map(partly_invalid.valid, points)) == 16


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    digest = write_space(tmp_path, GOOD).digest
    assert write_space(tmp_path, "# a comment\n" + GOOD).digest == digest
    for change in (
        ("2.5e6", "2.4e6"),
        ("latent_size: 8", "latent_size: 16"),
        ("[false, true]", "[true, false]"),
        ("both", "two"),
    ):
        assert write_space(tmp_path, GOOD.replace(*change)).digest != digest, change


def test_json_data(tmp_path: Path) -> None:
    space = write_space(tmp_path, GOOD)
    values = json.loads(json.dumps(space.to_dict()))
    assert values["name"] == "own"
    assert values["digest"] == space.digest
    assert values["references"] == {"both": {"qk_norm": "true", "convs": "separable"}}
    assert values["knobs"][1] == {
        "name": "convs",
        "choices": ["plain", "separable"],
        "ordered": False,
        "changes": [{}, {"all.conv": "separable"}],
    }


def test_a_space_can_be_pickled() -> None:
    space = load_space("emoji")
    assert pickle.loads(pickle.dumps(space)).digest == space.digest


def test_a_choice_that_fits_only_with_another_is_kept(tmp_path: Path) -> None:
    """Two key/value heads are invalid for the base's 3 heads (48 channels), but valid with the other width."""
    space = write_space(
        tmp_path, f"{BASE}\nknobs:\n  levels[1].num_kv_heads: [2, null]\n  levels[1].channels: [48, 64]\n"
    )
    assert not space.valid({**space.base_point, "levels[1].num_kv_heads": 0})
    assert space.valid({"levels[1].num_kv_heads": 0, "levels[1].channels": 1})


def test_blocks_become_knobs(tmp_path: Path) -> None:
    space = write_space(tmp_path, f"{BASE}\nblocks: {{extra_copies: 2}}\nknobs: {{qk_norm: [false, true]}}\n")
    assert space.base.id == write_space(tmp_path, GOOD).base.id
    block_knobs = [knob for knob in space.knobs if "layers" in knob.name]
    assert [knob.name for knob in block_knobs[:2]] == [f"down[0].layers[{i}].num_res_blocks" for i in range(2)]
    assert len(block_knobs) == len(block_index.blocks(space.base)), "each layer has at most one of a kind here"
    assert all(knob.ordered and knob.choices == ("0", "1", "2", "3") for knob in block_knobs)
    assert all(space.base_point[knob.name] == 1 for knob in block_knobs)
    fewer = write_space(tmp_path, f"{BASE}\nblocks: {{extra_copies: 0}}\n")
    assert [knob.choices for knob in fewer.knobs] == [("0", "1")] * len(block_knobs)


@given(st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_any_choice_of_blocks_is_a_net(rng: random.Random) -> None:
    space = load_space("emoji-blocks")
    point = {knob.name: rng.randrange(len(knob.choices)) for knob in space.knobs}
    assert space.valid(point)
    arch = space.architecture(point)
    assert len(block_index.blocks(arch)) == sum(point.values())
    assert _params(arch) == cost(arch, space.latent_size, context_tokens=space.context_tokens).params
    assert space.architecture(space.base_point).id == space.base.id
