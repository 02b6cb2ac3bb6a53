from __future__ import annotations

import random
from typing import Any

import pytest

from archsearch.cost.counter import cost
from archsearch.predictor.backend import predicted_backend
from archsearch.spaces.loading import load_space
from archsearch.spaces.summary import KnobSummary
from archsearch.stats.main_effects import Effects
from archsearch.studies.experiments import counted_effects
from archsearch.studies.experiments.counted_effects import CountedNeighbors, count_neighbors

SPACE = load_space("emoji")
FACTORS = [KnobSummary(k.name, k.choices, k.ordered, SPACE.base_point[k.name]) for k in SPACE.knobs]
FEW = [f for f in FACTORS if f.name in ("rope", "convs", "all.ffn_ratio", "levels[1].transformer_depth")]


def attrs(**latency: Any) -> dict[str, Any]:
    return {"space": SPACE.to_dict(), "settings": {"latency": {"device": "predicted:iphone-15-pro", **latency}}}


def neighbors(**kwargs: Any) -> CountedNeighbors:
    return count_neighbors(attrs(), FEW, [SPACE.base_point], predicted=None, **kwargs)


def sizes(effects: Effects) -> dict[str, float]:
    return {f"{knob.name}: {e.change}": e.size.value for knob in effects.knobs for e in knob.effects}


def test_effects_on_a_cost_are_what_the_cost_changes_by() -> None:
    """A regression of candidates' params calls rotary embeddings, which have none, 12 % worse."""
    effects = neighbors().effects("params")
    assert effects.counted
    found = sizes(effects)
    assert found["rope: false → true"] == 0
    name = "levels[1].transformer_depth"
    before, after = (
        cost(SPACE.architecture({**SPACE.base_point, name: i}), SPACE.latent_size, context_tokens=SPACE.context_tokens)
        for i in (0, 1)
    )
    change = after.params / before.params - 1
    assert change > 0.05
    expected = change if f"{name}: 1 → 2" in found else 1 / (1 + change) - 1
    assert expected == pytest.approx(next(size for key, size in found.items() if key.startswith(name)))
    assert sum(knob.share.value for knob in effects.knobs) == pytest.approx(1)
    assert {knob.name: knob.share.value for knob in effects.knobs}["rope"] == 0


def test_effects_that_differ_between_candidates_have_their_smallest_and_largest() -> None:
    points = [SPACE.base_point, SPACE.sample(random.Random(1)), SPACE.sample(random.Random(2))]
    effects = count_neighbors(attrs(), FEW, points, predicted=None).effects("macs")
    assert effects.n == 3
    spans = [e.size for knob in effects.knobs for e in knob.effects]
    assert all(size.low <= size.value <= size.high for size in spans)
    assert any(size.low < size.high for size in spans)


def test_a_predicted_latency_is_counted_and_a_measured_one_is_not() -> None:
    record = predicted_backend("iphone-15-pro", {}).measure(SPACE.base, SPACE.latent_size, SPACE.context_tokens)
    counted = count_neighbors(attrs(), FEW[:1], [SPACE.base_point], predicted=record)
    assert set(counted.logarithms) == {"params", "macs", "activation_bytes", "latency_ms"}
    assert "latency_ms" not in neighbors().logarithms
    of_another = record.model_copy(update={"runtime": "Core ML, model 12345678"})
    assert "latency_ms" not in count_neighbors(attrs(), FEW[:1], [SPACE.base_point], predicted=of_another).logarithms
    gone = attrs(device="predicted:gone.json")
    assert "latency_ms" not in count_neighbors(gone, FEW[:1], [SPACE.base_point], predicted=record).logarithms


def test_few_neighbors_are_counted_and_only_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(counted_effects, "MAX_COUNTED", 2 * sum(len(f.choices) - 1 for f in FEW))
    points = [SPACE.sample(random.Random(i)) for i in range(9)]
    assert count_neighbors(attrs(), FEW, points, predicted=None).effects("params").n == 2

    def never(*_: object, **__: object) -> None:
        raise AssertionError("was counted again")

    monkeypatch.setattr("archsearch.studies.search.known_costs.cost", never)
    assert count_neighbors(attrs(), FEW, points, predicted=None).effects("params").n == 2
