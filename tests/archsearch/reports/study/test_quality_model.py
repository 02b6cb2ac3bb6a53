"""The sentence of the report on the sampler's model of quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archsearch.reports.study.data import load_study_data
from archsearch.reports.study.quality_model import quality_model
from archsearch.reports.study.summary import runs_in_words
from archsearch.samplers import acquisition
from archsearch.samplers.screening import Screening
from archsearch.score import LatencyRecord
from archsearch.studies.search.run import search
from snapgen.architecture.schema import Architecture
from tests.archsearch.studies.quick import QuickScorer, settings
from tests.records import latency_record

fitted = acquisition.choose_model

SEEDS = {"seeds": {"first": 1, "front": 2}, "protocol": {"train_seeds": [0, 1]}}


@pytest.fixture
def study_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Screening.__init__, "__defaults__", (12,))
    return lambda scorer=QuickScorer, **given: load_study_data(
        search(settings(tmp_path, **given), quiet=True, scorer=scorer)
    )


def test_a_loss_of_capacity_is_predicted_well(study_of: Callable[..., Any]) -> None:
    study = study_of(sampler="ehvi", trials=14, **SEEDS)
    model = quality_model(study)
    assert model is not None
    assert model.r_squared > 0.8
    assert (model.metric, model.candidates) == ("validation_loss", 14)
    assert set(model.features) <= {"params", "macs", "activation_bytes"}, "a measured latency is no input"
    text = model.text(study)
    assert text.startswith("The sampler's model predicts validation loss from the knobs")
    assert f"R² = {model.r_squared:.2f}" in text
    words = runs_in_words(study)
    assert "with 2 seeds" in words
    assert "with 1 seed" in words or "every candidate was trained with 2 seeds" in words


def test_no_model_is_described_of_other_samplers_or_few_candidates(study_of: Callable[..., Any]) -> None:
    assert quality_model(study_of(name="random", sampler="random", trials=8)) is None
    few = study_of(name="few", sampler="ehvi", trials=3)
    assert quality_model(few) is None
    assert runs_in_words(few) == "every candidate was trained with 2 seeds"


class Predicting(QuickScorer):
    """Its latencies are predictions below a millisecond."""

    def latency(self, arch: Architecture) -> LatencyRecord:
        return latency_record(super().latency(arch).median_ms / 100, source="predicted")


def test_it_is_the_samplers_model_of_fast_networks_too(
    study_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(Predicting, sampler="ehvi", trials=6, latency={"device": "predicted:iphone-15-pro"})
    known: dict[str, Any] = {}
    monkeypatch.setattr(
        acquisition, "choose_model", lambda *given, **options: known.update(given[2]) or fitted(*given, **options)
    )
    assert quality_model(study) is not None
    assert [*known] == ["params", "macs", "activation_bytes", "latency_ms"]
    latencies = [c.value("latency_ms") for c in study.scored]
    assert max(latencies) < 1
    assert [*known["latency_ms"]] == latencies
