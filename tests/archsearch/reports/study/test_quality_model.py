"""The sentence of the report on the sampler's model of quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archsearch.reports.study.data import load_study_data
from archsearch.reports.study.quality_model import quality_model
from archsearch.reports.study.summary import runs_in_words
from archsearch.samplers.screening import Screening
from archsearch.studies.search.run import search
from tests.archsearch.studies.quick import QuickScorer, settings

SEEDS = {"seeds": {"first": 1, "front": 2}, "protocol": {"train_seeds": [0, 1]}}


@pytest.fixture
def study_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Screening.__init__, "__defaults__", (12,))
    return lambda **given: load_study_data(search(settings(tmp_path, **given), quiet=True, scorer=QuickScorer))


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
