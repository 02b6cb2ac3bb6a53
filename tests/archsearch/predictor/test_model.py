"""Latency models: fitting to records, and predicted records with intervals."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archsearch import devices
from archsearch.cost.operations import Operation, operations
from archsearch.latency.records import LatencySample
from archsearch.predictor import model as prediction
from archsearch.predictor.backend import PredictedBackend
from archsearch.predictor.model import FEATURES, LatencyModel, features, fit_latency_model
from archsearch.spaces.loading import load_space
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.records import latency_record
from tests.snapgen.nets import tiny

# A device: milliseconds for one of each feature; all others take nothing.
DEVICE = {"conv calls": 0.01, "linear calls": 0.003, "conv GMACs": 20.0, "linear GMACs": 9.0, "attention MB": 0.4}


@pytest.fixture(scope="module")
def nets() -> list[tuple[Architecture, Sequence[Operation]]]:
    space, rng = load_space("emoji"), random.Random(3)
    archs = [space.architecture(space.sample(rng)) for _ in range(34)]
    return [(arch, operations(arch, 8, context_tokens=16)) for arch in archs]


def on_device(net: tuple[Architecture, Sequence[Operation]], *, noise: float, seed: int = 0) -> LatencySample:
    x = features(net[1], element_bytes=4, cache_mb=None)
    ms = sum(DEVICE.get(name, 0) * amount for name, amount in zip(FEATURES, x, strict=True))
    ms *= np.exp(noise * np.random.default_rng([seed, int(net[0].id, 16)]).standard_normal())
    return LatencySample(architecture=net[0], latent_size=8, context_tokens=16, record=latency_record(float(ms)))


@pytest.fixture(scope="module")
def model(nets: Any) -> LatencyModel:
    return fit_latency_model([on_device(net, noise=0.02) for net in nets[:24]])


def test_features_add_up_over_a_net() -> None:
    steps = [
        Operation("conv", 3_000_000_000, 4_000_000, 1_000_000, (1, 8, 9, 9)),
        Operation("conv", 1_000_000_000, 1_000_000, 0, (1, 8, 9, 9)),
        Operation("norm", 0, 2_000_000, 500_000, (1, 8, 9, 9)),
    ]
    found = dict(zip(FEATURES, features(steps, element_bytes=2, cache_mb=None), strict=True))
    wanted = {"conv calls": 2, "conv GMACs": 4, "conv MB": 10, "norm calls": 1, "norm MB": 4, "weights MB": 3}
    assert {name: amount for name, amount in found.items() if amount} == wanted


@pytest.mark.parametrize(("batch", "spilled"), [(1, 4.5), (2, 3.0)])
def test_a_convolution_spills_what_the_cache_does_not_hold_of_one_image(batch: int, spilled: float) -> None:
    step = Operation("conv", 6_000_000_000, 4_000_000, 0, (batch, 8, 9, 9))
    found = dict(zip(FEATURES, features([step], element_bytes=2, cache_mb=2), strict=True))
    assert found["spilled conv GMACs"] == spilled


def test_attention_counts_the_heads_of_its_keys() -> None:
    def heads(num_kv_heads: int | None) -> float:
        arch = tiny({"all.num_kv_heads": num_kv_heads, "all.cross_attention": False, "mid.num_transformers": 0})
        steps = operations(arch, 8, context_tokens=5)
        return float(features(steps, element_bytes=2, cache_mb=None)[FEATURES.index("attention heads")])

    attentions = 3  # one transformer on the way down, two on the way up, of four heads each
    assert (heads(1), heads(2), heads(None)) == (attentions, 2 * attentions, 4 * attentions)


def test_it_predicts_nets_that_it_has_not_seen(model: LatencyModel, nets: Any) -> None:
    errors = [
        model.predict(steps).ms / on_device((arch, steps), noise=0).record.median_ms - 1 for arch, steps in nets[24:]
    ]
    assert np.abs(errors).max() < 0.06


def test_its_interval_holds_most_of_them(model: LatencyModel, nets: Any) -> None:
    held = []
    for seed in range(8):
        for arch, steps in nets[24:]:
            low, high = model.predict(steps).interval_ms
            held.append(low <= on_device((arch, steps), noise=0.02, seed=seed + 1).record.median_ms <= high)
    assert 0.75 <= np.mean(held) <= 1


def test_the_interval_is_wider_far_from_the_records(model: LatencyModel) -> None:
    def width(channels: int) -> float:
        arch = Architecture.model_validate(
            load_space("emoji").base.model_dump()
            | {"down": [{"channels": channels}] * 3, "up": [{"channels": channels}] * 3}
        )
        found = model.predict(operations(arch, 8, context_tokens=16))
        return found.interval_ms[1] / found.ms

    assert width(512) > 1.2 * width(48)


def test_the_interval_stays_finite_where_nothing_is_known(model: LatencyModel) -> None:
    huge = Operation("copy", 0, 10**15, 0, (1, 8, 8, 8))
    found = model.predict([Operation("conv", 10**6, 10**4, 10**3, (1, 8, 8, 8)), huge])
    assert found.interval_ms[1] / found.ms <= 1000.001
    assert model.record(found).interval_ms == found.interval_ms


def test_a_net_that_would_take_no_time_is_refused(model: LatencyModel) -> None:
    idle = model.model_copy(update={"coefficients": dict.fromkeys(model.coefficients, 0.0)})
    with pytest.raises(InputError, match="predicts zero"):
        idle.predict([Operation("conv", 10**6, 10**4, 10**3, (1, 8, 8, 8))])


def test_the_shares_are_the_whole(model: LatencyModel, nets: Any) -> None:
    found = model.predict(nets[0][1])
    assert sum(found.shares.values()) == pytest.approx(found.ms)
    assert set(found.shares) <= {*prediction.KINDS, "weights"}


def test_a_model_comes_back_from_its_file(model: LatencyModel, nets: Any, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(model.to_json())
    again = LatencyModel.load(tmp_path / "model.json")
    assert again.to_json() == model.to_json()
    for _, steps in nets[:3]:
        one, other = model.predict(steps), again.predict(steps)
        assert other.ms == pytest.approx(one.ms, rel=1e-4)
        assert other.interval_ms == pytest.approx(one.interval_ms, rel=1e-3)


def test_the_backend_gives_a_record_that_shows_as_predicted(model: LatencyModel, nets: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(model.to_json())
    backend = devices.backend(f"predicted:{path}", threads=1)
    assert isinstance(backend, PredictedBackend)
    found = backend.measure(nets[0][0], 8, 16)
    assert (found.source, found.runs, found.device, found.chip) == ("predicted", 0, "host", "a chip")
    assert found.interval_ms is not None
    low, high = found.interval_ms
    assert low < found.lower_quartile_ms < found.median_ms < found.upper_quartile_ms < high
    assert found.conditions != latency_record(1).conditions, "a prediction is not ranked with measurements"
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_records_without_an_interval_are_still_read() -> None:
    values = latency_record(1.5).model_dump(mode="json")
    del values["interval_ms"]
    assert type(latency_record(1)).model_validate(values) == latency_record(1.5)


def test_two_models_of_a_device_do_not_rank_together(model: LatencyModel, nets: Any) -> None:
    other = model.model_copy(update={"tolerance": model.tolerance * 2})
    one, two = (m.record(m.predict(nets[0][1])) for m in (model, other))
    assert one.conditions != two.conditions
    assert one.conditions[:-1] == two.conditions[:-1]


def test_what_was_never_seen_is_not_predicted(nets: Any) -> None:
    plain = [net for net in nets if not any(step.kind == "depthwise" for step in net[1])]
    separable = next(net for net in nets if any(step.kind == "depthwise" for step in net[1]))
    model = fit_latency_model([on_device(net, noise=0.02) for net in plain])
    with pytest.raises(InputError, match="cannot predict depthwise calls"):
        model.predict(separable[1])


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (lambda records: records[:9], "records of 9 nets, too few"),
        (lambda records: [*records[:11], _with(records[11], chip="another")], "a chip and another"),
        (lambda records: [_with(r, source="predicted") for r in records], "has predicted records"),
    ],
)
def test_records_that_make_no_model_are_refused(nets: Any, changed: Any, problem: str) -> None:
    records = [on_device(net, noise=0) for net in nets[:12]]
    with pytest.raises(InputError, match=problem):
        fit_latency_model(changed(records))


def _with(timed: LatencySample, **changes: object) -> LatencySample:
    return timed.model_copy(update={"record": timed.record.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "version"),
        ({"coefficients": {"magic": 1.0}}, "unknown feature 'magic'"),
        ({"coefficients": {"conv calls": -1.0}}, "negative"),
        ({"covariance": [[1.0]]}, "covariance is not"),
        ({"quantiles": {"half": 1.0}}, "quantiles"),
        ({"speed": 3}, "unknown key"),
    ],
)
def test_a_file_that_is_no_model_is_refused(model: LatencyModel, tmp_path: Path, change: Any, problem: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(model.to_json()) | change))
    with pytest.raises(InputError, match=problem):
        devices.backend(f"predicted:{path}")


@pytest.mark.parametrize(
    ("device", "options", "problem"),
    [
        ("predicted:iphone-3g", {}, "neither a profile nor a file"),
        ("predicted:missing.json", {}, "does not exist"),
        ("predicted:", {}, "unknown device 'predicted:'"),
        ("predicted:iphone-15-pro", {"speed": 1}, "unknown key"),
    ],
)
def test_a_device_that_is_none_is_refused(device: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        devices.backend(device, **options)


def test_other_threads_than_the_records_are_refused(model: LatencyModel, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(model.to_json())
    with pytest.raises(InputError, match="predicts 1 threads, not 2"):
        devices.backend(f"predicted:{path}", threads=2)


def test_a_profile_takes_a_studys_threads() -> None:
    assert devices.backend("predicted:iphone-15-pro", threads=1).measure(tiny(), 8, 5).threads is None
