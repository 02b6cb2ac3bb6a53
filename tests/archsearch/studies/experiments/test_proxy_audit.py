from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pytest

import archsearch.reports.study.audit
from archsearch.cost.counter import cost
from archsearch.reports import study_report
from archsearch.score import QUALITY_METRICS, Quality
from archsearch.stats.rank_correlation import spearman
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.experiments.proxy_audit import AS_IS, BASELINES, AgreementRow, audit
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.progress import ProgressCallback
from tests.archsearch.studies.quick import SPACE, QuickScorer, quick_cost, quick_loss

Make = Callable[..., StudyConfig]


class LongScorer(QuickScorer):
    """Scores that foretell: the long run's loss is the short one's, its distance is the number of params."""

    def quality(
        self, arch: Architecture, *, seeds: Sequence[int], progress: ProgressCallback, artifacts: Path
    ) -> Quality:
        quality = super().quality(arch, seeds=seeds, progress=progress, artifacts=artifacts)
        if self.settings.protocol.steps == StudyConfig.model_fields["protocol"].default.steps:
            return quality
        params = float(quick_cost(arch).params)
        other = quality.validation_loss.model_copy(update={"value": params, "low": params, "high": params})
        return quality.model_copy(update={"frechet_distance": other})


def row(rows: list[AgreementRow], **fields: Any) -> AgreementRow:
    (found,) = [r for r in rows if all(getattr(r, name) == value for name, value in fields.items())]
    return found


def test_scores_are_set_beside_the_long_run(settings: Make) -> None:
    short = settings(trials=9)
    search(short, quiet=True, scorer=LongScorer)
    rows = audit(short, factor=5, quiet=True, scorer=LongScorer)
    long_loss, long_distance = (f"{name} of a run 5× as long" for name in QUALITY_METRICS[:2])
    assert row(rows, score="validation_loss", target=long_loss, kind=AS_IS).rho == pytest.approx(1)
    assert row(rows, score="params", target=long_distance, kind=AS_IS).rho == pytest.approx(-1), "more is worse here"
    assert row(rows, score="validation_loss", target="itself with another seed", kind=AS_IS).rho == pytest.approx(1)
    assert row(rows, score="latency_ms", target=long_loss, kind="at equal latency").rho is None
    assert {r.n for r in rows} == {9}
    assert len(rows) == 3 * (len(QUALITY_METRICS) + len(QUALITY_METRICS) * (len(QUALITY_METRICS) + len(BASELINES)))
    assert load_study(short).user_attrs["audit"] == [asdict(r) for r in rows]
    long = [
        c
        for c in load_candidates(load_study(settings(name="quick-audit-5x", storage=short.url)))
        if c.state == "scored"
    ]
    assert sorted(quick_loss(c.architecture) for c in long) == sorted(
        quick_loss(c.architecture) for c in load_candidates(load_study(short)) if c.reused_from is None
    )


def test_resumes_and_scores_nothing_twice(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = settings(trials=6)
    search(short, quiet=True, scorer=LongScorer)
    monkeypatch.setenv("QUICK_LOG", str(tmp_path / "log"))
    first = audit(short, quiet=True, scorer=LongScorer)
    assert audit(short, quiet=True, scorer=LongScorer) == first
    assert len((tmp_path / "log").read_text().split()) == 6


def test_a_few_candidates_are_spread_over_the_ranking(settings: Make) -> None:
    short = settings(trials=10)
    search(short, quiet=True, scorer=LongScorer)
    rows = audit(short, candidates=4, quiet=True, scorer=LongScorer)
    assert {r.n for r in rows} == {4}
    losses = sorted(c.value("validation_loss") for c in load_candidates(load_study(short)))
    chosen = [
        c.value("validation_loss")
        for c in load_candidates(load_study(settings(name="quick-audit-5x", storage=short.url)))
    ]
    assert {losses[0], losses[-1]} <= set(chosen)


def test_a_study_of_few_seeds_that_starts_from_another_is_audited(settings: Make) -> None:
    seeds: dict[str, Any] = {"seeds": {"first": 1, "front": 2}, "protocol": {"train_seeds": [0, 1]}}
    search(settings(name="first", trials=4, **seeds), quiet=True, scorer=QuickScorer)
    short = settings(trials=2, start_from="first", **seeds)
    search(short, quiet=True, scorer=QuickScorer)
    assert {r.n for r in audit(short, quiet=True, scorer=QuickScorer)} == {6}


def test_an_audit_of_twins_compares_them_with_their_own_size(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SPACE.replace("[32, 48, 64]", "[64, 48, 32]").replace("channels: 32,", "channels: 64,")
    (tmp_path / "real.yaml").write_text(real.partition("references:")[0])
    (tmp_path / "twin.yaml").write_text(SPACE)
    short = settings(trials=9, space=str(tmp_path / "real.yaml"), proxy=str(tmp_path / "twin.yaml"))
    study = search(short, quiet=True, scorer=LongScorer)
    monkeypatch.setattr("archsearch.studies.experiments.proxy_audit.cost", lambda arch, *_, **__: quick_cost(arch))
    rows = audit(short, quiet=True, scorer=LongScorer)
    distance = "frechet_distance of the twin in twin of a run 5× as long"
    size = {"score": "params of the twin in twin", "target": distance}
    assert row(rows, **size, kind=AS_IS).rho == pytest.approx(-1), "the long run's distance is the twin's params"
    same = row(rows, **{**size, "score": "macs of the twin in twin"}, kind="at equal MACs of the twin in twin")
    assert same.rho is None
    latency = row(rows, **{**size, "score": "latency_ms of the candidate"}, kind=AS_IS)
    scored = [c for c in load_candidates(study) if c.reused_from is None]
    of_twins = [quick_cost(c.trained).params for c in scored if c.trained]
    expected = spearman([-c.value("latency_ms") for c in scored], of_twins)
    assert expected is not None
    assert latency.rho == pytest.approx(expected.value)
    assert {r.kind for r in rows} == {
        AS_IS,
        "at equal latency of the candidate",
        "at equal MACs of the twin in twin",
    }
    page = study_report.write_report(load_study(short), tmp_path / "report.html").read_text()
    assert "Params and MACs are the twins’, latency is the candidates’" in page


def test_too_little_to_audit(settings: Make) -> None:
    with pytest.raises(InputError, match="has not begun"):
        audit(settings(), quiet=True, scorer=LongScorer)
    search(settings(trials=3), quiet=True, scorer=LongScorer)
    with pytest.raises(InputError, match="needs 4"):
        audit(settings(), quiet=True, scorer=LongScorer)
    with pytest.raises(InputError, match="2 or more"):
        audit(settings(), factor=1, quiet=True, scorer=LongScorer)


def test_a_study_without_quality_cannot_be_audited(settings: Make) -> None:
    costs = settings(objectives=["latency_ms", "params"], trials=6)
    search(costs, quiet=True, scorer=LongScorer)
    with pytest.raises(InputError, match="objectives: no quality is among them, so no candidate was trained; audit a"):
        audit(costs, quiet=True, scorer=LongScorer)


def test_a_plan_that_is_not_of_the_space(settings: Make) -> None:
    with pytest.raises(InputError, match=r"initial_points\[0\]: is not a point"):
        search(settings(initial_points=[{"convs": 1}]), quiet=True, scorer=QuickScorer)


class ElasticScorer(QuickScorer):
    """Inherited scores do not foretell the long run, short ones from new weights do."""

    def quality(
        self, arch: Architecture, *, seeds: Sequence[int], progress: ProgressCallback, artifacts: Path
    ) -> Quality:
        quality = super().quality(arch, seeds=seeds, progress=progress, artifacts=artifacts)
        if self.settings.protocol.init_from is None:
            return quality
        worse = 10 - quality.validation_loss.value
        other = quality.validation_loss.model_copy(update={"value": worse, "low": worse, "high": worse})
        return quality.model_copy(update={"validation_loss": other})


ELASTIC: dict[str, Any] = {
    "protocol": {"init_from": "net", "steps": 10, "batch_size": 4},
    "supernet_audit": {"supernet_images": 900, "scratch_steps": 50},
}


def test_inherited_scores_are_set_beside_scores_from_scratch(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = settings(trials=9, **ELASTIC)
    search(short, quiet=True, scorer=ElasticScorer)
    monkeypatch.setenv("QUICK_LOG", str(tmp_path / "log"))
    rows = audit(short, factor=4, candidates=6, quiet=True, scorer=ElasticScorer)
    target = "validation_loss of a run from scratch of 200 steps"
    assert row(rows, score="validation_loss", target=target, kind=AS_IS).rho == pytest.approx(-1)
    assert row(rows, score="validation_loss from scratch at equal compute", target=target, kind=AS_IS).rho == 1
    assert {r.n for r in rows} == {6}
    assert len((tmp_path / "log").read_text().split()) == 12
    assert audit(short, factor=4, candidates=6, quiet=True, scorer=ElasticScorer) == rows
    assert len((tmp_path / "log").read_text().split()) == 12, "resumed, nothing is scored twice"
    names = {s.study_name for s in optuna.get_all_study_summaries(short.url)}
    (scratch,) = (name for name in names if "scratch" in name)
    protocol = load_study(settings(name=scratch, storage=short.url)).user_attrs["protocol"]["protocol"]
    assert protocol["init_from"] is None
    scored = [c for c in load_candidates(load_study(short)) if c.reused_from is None]
    space = short.load_space()
    whole = cost(space.base, space.latent_size, context_tokens=space.context_tokens).macs
    passes = sum(10 * 4 * 2 * c.score.cost.macs for c in scored) + 900 * whole  # two seeds
    again = sum(protocol["steps"] * 4 * 2 * c.score.cost.macs for c in scored)
    assert passes <= again < passes + sum(4 * 2 * c.score.cost.macs for c in scored), (
        "a step each is what rounding adds"
    )
    assert "validation loss from scratch at equal compute" in archsearch.reports.study.audit.markdown(rows, steps=240)


def test_inherited_weights_of_unknown_cost(settings: Make) -> None:
    with pytest.raises(
        InputError, match="supernet_audit: is missing, so the cost of the inherited weights is unknown; give"
    ):
        audit(settings(protocol={"init_from": "net"}), quiet=True, scorer=QuickScorer)
    with pytest.raises(ValueError, match=r"give protocol\.init_from or remove it"):
        settings(supernet_audit=ELASTIC["supernet_audit"])


def test_the_report_shows_it(settings: Make, tmp_path: Path) -> None:
    short = settings(trials=6)
    search(short, quiet=True, scorer=LongScorer)
    audit(short, quiet=True, scorer=LongScorer)
    page = study_report.write_report(load_study(short), tmp_path / "report.html").read_text()
    assert 'id="audit"' in page
    assert "of a run 5× as long" in page
