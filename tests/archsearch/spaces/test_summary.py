"""Space summaries: sizes, costs from smallest to largest, and whether limits can be met."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import pytest

from archsearch.spaces.loading import load_space
from archsearch.spaces.space import Space
from archsearch.spaces.summary import MIN_SAMPLES, _params, summarize
from snapgen.architecture.schema import Architecture
from tests.archsearch.spaces.test_loading import BASE

SMALL = BASE.replace("  down:", "  time: {hidden_dim: 32}\n  down:")

TEXT = f"""{SMALL}
context_tokens: 5
knobs:
  convs:
    plain: {{}}
    separable: {{all.conv: separable}}
    separable ×2: {{all.conv: separable, all.expansion: 2}}
  all.ffn_ratio: [2, 3, 4]
  levels[1].channels: [32, 48, 64]
constraints: {{params: 9.0e5}}
references:
  thin: {{'levels[1].channels': 32}}
"""


@dataclass
class Costs:
    params: int
    macs: int
    activation_bytes: int


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "own.yaml").write_text(TEXT)
    return load_space(tmp_path / "own.yaml")


def counted(arch: Architecture, latent_size: int, *, context_tokens: int) -> Costs:
    assert (latent_size, context_tokens) == (8, 5)
    params = _params(arch)
    return Costs(params, 64 * params, 2 * params)


def test_extremes_are_the_true_ones(space: Space) -> None:
    sizes = [_params(space.architecture(point)) for point in space.points()]
    summary = summarize(space, counted, samples=5)
    assert (summary.smallest.params, summary.largest.params) == (min(sizes), max(sizes))
    assert summary.smallest.params <= summary.middle.params <= summary.largest.params
    assert summary.largest.macs == 64 * summary.largest.params


def test_limits_and_references(space: Space) -> None:
    summary = summarize(space, counted, samples=20)
    assert [candidate.name for candidate in summary.references] == ["base", "thin"]
    assert summary.references[0].id == space.base.id
    assert summary.references[1].choices["levels[1].channels"] == "32"
    within = [_params(space.architecture(point)) <= 9.0e5 for point in space.points()]
    assert 0 < sum(within) < len(within)
    assert summary.within_limits == pytest.approx(sum(within) / len(within), abs=0.25)
    assert summary.can_be_met
    assert summary.smallest.within_limits
    assert not summary.largest.within_limits


def test_limits_that_nothing_meets(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(TEXT.replace("9.0e5", "10"))
    summary = summarize(load_space(tmp_path / "own.yaml"), counted, samples=3)
    assert not summary.can_be_met
    assert summary.within_limits == 0


def test_samples_fit_into_the_time(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsearch.spaces.summary.SECONDS", 0.0)
    assert summarize(space, counted).samples == MIN_SAMPLES


def test_progress_rises_to_the_end(space: Space) -> None:
    fractions: list[float] = []
    summarize(space, counted, samples=5, progress=fractions.append)
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < 0.5 < fractions[-1] <= 1


def test_as_json(space: Space) -> None:
    values = json.loads(json.dumps(asdict(summarize(space, counted, samples=3))))
    assert values["size"] == len(list(product(range(3), range(3), range(3))))
    assert values["knobs"][1] == {"name": "all.ffn_ratio", "choices": ["2", "3", "4"], "ordered": True, "base": 2}
    assert values["smallest"]["choices"]["all.ffn_ratio"] == "2"
