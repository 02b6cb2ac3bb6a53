"""Records out of files and studies, and the card of a model held to others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archsearch.latency import records as timings
from archsearch.latency.records import LatencySample
from archsearch.predictor.model import FEATURES, LatencyModel, features, fit_latency_model
from archsearch.studies.experiments.latency_validation import load_records, validate_model
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from snapgen.architecture.overrides import apply_overrides
from snapgen.errors import InputError
from tests.archsearch.studies import quick
from tests.records import latency_record
from tests.snapgen.nets import tiny

# The device that these records are of: depthwise convolutions are cheap in MACs and dear in memory.
TAKES = {"conv GMACs": 30.0, "depthwise MB": 2.0, "linear GMACs": 10.0, "attention calls": 0.05, "norm MB": 0.5}


def of(**changes: Any) -> LatencySample:
    arch = apply_overrides(tiny(), changes)
    timed = LatencySample(architecture=arch, latent_size=16, context_tokens=5, record=latency_record(1))
    x = features(timed.operations(), element_bytes=4, cache_mb=None)
    ms = 0.05 + sum(TAKES.get(name, 0) * amount for name, amount in zip(FEATURES, x, strict=True))
    noise = np.random.default_rng(int(arch.id, 16)).standard_normal()
    return timed.model_copy(update={"record": latency_record(float(ms * np.exp(0.01 * noise)))})


@pytest.fixture(scope="module")
def records() -> list[LatencySample]:
    """Samples of nets that differ in kind and number of blocks, so that MACs alone do not determine their times."""
    return [
        of(**{"all.conv": conv, "mid.transformer_depth": mid, "up[1].num_transformers": up, "down[1].channels": width})
        for width in (16, 32)
        for conv in ("standard", "separable")
        for mid in (0, 1, 3)
        for up in (0, 2, 5)
    ]


@pytest.fixture(scope="module")
def model(records: list[LatencySample]) -> LatencyModel:
    return fit_latency_model(records[::2])


def test_the_card_is_of_nets_that_the_model_has_not_seen(model: LatencyModel, records: list[LatencySample]) -> None:
    found = validate_model(model, records)
    assert (found.nets, found.excluded) == (18, 18)
    assert found.rows == validate_model(model, records[1::2]).rows


def test_a_model_beats_its_baselines_where_kinds_matter(model: LatencyModel, records: list[LatencySample]) -> None:
    ours, macs, params = validate_model(model, records).rows
    assert (ours.name, macs.name, params.name) == ("this model", "MACs alone", "params alone")
    assert ours.spearman is not None
    assert macs.spearman is not None
    assert ours.spearman.value > 0.95 > macs.spearman.value
    assert ours.kendall > macs.kendall
    assert ours.within_10 >= 0.8 > macs.within_10
    assert ours.coverage is not None
    assert ours.coverage >= 0.7
    assert macs.coverage is None


def test_the_card_counts_as_it_says(model: LatencyModel, records: list[LatencySample]) -> None:
    """Against the definitions, by hand."""
    held = records[1::2]
    (ours, *_), predictions = validate_model(model, held).rows, [model.predict(timed.operations()) for timed in held]
    times = [timed.record.median_ms for timed in held]
    pairs = [(i, j) for i in range(len(held)) for j in range(i)]
    agree = [np.sign((times[i] - times[j]) * (predictions[i].ms - predictions[j].ms)) for i, j in pairs]
    assert ours.kendall == pytest.approx(np.mean(agree))
    errors = [abs(p.ms / ms - 1) for p, ms in zip(predictions, times, strict=True)]
    assert ours.within_5 == np.mean([error <= 0.05 for error in errors])
    held_in = [p.interval_ms[0] <= ms <= p.interval_ms[1] for p, ms in zip(predictions, times, strict=True)]
    assert ours.coverage == np.mean(held_in)


def test_records_of_another_device_are_refused(model: LatencyModel, records: list[LatencySample]) -> None:
    other = [t.model_copy(update={"record": latency_record(1, chip="another")}) for t in records]
    with pytest.raises(InputError, match="have chip another, the model has a chip"):
        validate_model(model, other)


def test_too_few_new_nets_are_refused(model: LatencyModel, records: list[LatencySample]) -> None:
    with pytest.raises(InputError, match="has 2 nets that the model was not fitted to"):
        validate_model(model, records[:5])


def test_a_file_gives_the_lowest_of_each(tmp_path: Path) -> None:
    for ms in (3, 2, 4):
        timings.append(tmp_path / "r.jsonl", of().model_copy(update={"record": latency_record(ms)}))
    assert [timed.record.median_ms for timed in load_records(str(tmp_path / "r.jsonl"))] == [2]


def test_a_study_gives_its_measured_records(settings: Callable[..., Any]) -> None:
    study = search(settings(trials=3), scorer=quick.QuickScorer, quiet=True)
    candidates = {c.architecture.id: c for c in load_candidates(study)}
    found = load_records("quick")
    assert len(found) >= 3
    for timed in found:
        assert timed.record == candidates[timed.architecture.id].score.latency
        assert (timed.latent_size, timed.context_tokens) == (8, 77)


def test_a_study_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="neither a shipped study nor a file"):
        load_records("nowhere")


def test_a_study_runs_on_a_predicted_phone(settings: Callable[..., Any]) -> None:
    latency = {"device": "predicted:iphone-16-pro-max"}
    done = load_candidates(search(settings(objectives=("latency_ms", "params"), latency=latency, trials=2), quiet=True))
    found = [c.score.latency for c in done if c.state == "scored" and c.score.latency]
    assert len(found) == 2
    assert all(record.source == "predicted" and record.interval_ms for record in found)
    with pytest.raises(InputError, match="no measured latency"):
        load_records("quick")


@pytest.mark.slow
def test_the_published_records_give_the_published_card() -> None:
    """65 passes on the meta device; the records were measured, so nothing here depends on this machine's speed."""
    folder = Path(__file__).parents[4] / "reports" / "results"
    model = fit_latency_model(load_records(str(folder / "latency_fit.jsonl")))
    found = validate_model(model, load_records(str(folder / "latency_held.jsonl")))
    ours, macs, params = found.rows
    assert (found.nets, found.excluded) == (40, 0)
    assert ours.spearman is not None
    assert ours.spearman.value >= 0.98
    assert ours.within_10 >= 0.9
    assert ours.coverage is not None
    assert ours.coverage >= 0.9
    assert max(macs.within_10, params.within_10) < 0.5
