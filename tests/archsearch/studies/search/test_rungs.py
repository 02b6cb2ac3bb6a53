"""Studies in which candidates pause at rungs, and go on only if they may be on the front."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archsearch.reports.study.candidates import candidates as report_candidates
from archsearch.reports.study.data import load_study_data
from archsearch.score import Quality
from archsearch.stats.pareto import non_dominated
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import eligible, load_attempts, load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.artifacts import CHECKPOINT
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.further_runs import LIKELY
from archsearch.studies.storage.ranking import Ranking
from archsearch.studies.storage.record import Candidate
from archsearch.studies.storage.rungs import FEWEST, TRUSTED, RungModel
from snapgen.architecture.schema import Architecture
from snapgen.seeding import derive_seed
from tests.archsearch.studies.quick import QuickScorer

Make = Callable[..., StudyConfig]

RUNGS = {"rungs": {"steps": [30, 80]}, "seeds": {"first": 1, "front": 2}}
PROTOCOL = {"steps": 240, "train_seeds": [0, 1]}


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File of the trainings: architecture, seed, first and last step."""
    path = tmp_path / "steps.txt"
    monkeypatch.setenv("QUICK_STEPS", str(path))
    return path


class Rugged(QuickScorer):
    """Most architectures are dominated by others of about the same latency."""

    def _quality(self, arch: Architecture, seeds: Sequence[int], factor: float = 1.0) -> Quality:
        return super()._quality(arch, seeds, factor * (1 + derive_seed(3, arch.id) / 2**63))


class Misleading(Rugged):
    """The order at the rungs is the opposite one."""

    def _quality(self, arch: Architecture, seeds: Sequence[int], factor: float = 1.0) -> Quality:
        quality = super()._quality(arch, seeds)
        value = quality.validation_loss.value if factor == 1.0 else 1 / quality.validation_loss.value
        estimate = quality.validation_loss.model_copy(update={"value": value, "low": value, "high": value})
        return quality if factor == 1.0 else quality.model_copy(update={"validation_loss": estimate})


def run(settings: StudyConfig, scorer: type[QuickScorer] = Rugged) -> list[Candidate]:
    return load_candidates(search(settings, quiet=True, scorer=scorer))


def test_the_hopeless_are_pruned_and_say_so(settings: Make, steps: Path) -> None:
    made = settings(trials=30, sampler="random", protocol=PROTOCOL, **RUNGS)
    candidates = run(made)
    pruned = [c for c in candidates if c.state == "paused"]
    assert len(candidates) == 30
    assert 8 < len(pruned) <= 30 - FEWEST, "the first go on, so that the rungs become known"
    assert all(c.score.quality is None and c.score.latency and c.score.cost.params for c in pruned)
    odds = Ranking(made, candidates).chances
    assert all(odds[c.number] <= LIKELY for c in pruned)
    trained: dict[tuple[str, str], list[tuple[int, int]]] = collections.defaultdict(list)
    for line in steps.read_text().splitlines():
        arch, seed, first, last = line.split()
        trained[arch, seed].append((int(first), int(last)))
    for c in candidates:
        reached = [0, *(r.step for r in c.rungs), *([240] if c.state == "scored" else [])]
        assert trained[c.architecture.id, "0"] == list(itertools.pairwise(reached)), "no step twice"
    rows = report_candidates(load_study_data(load_study(made))).set_index("trial")
    for c in pruned:
        assert rows.loc[c.number, "rung"] == c.rungs[-1].step
        assert rows.loc[c.number, "front_probability"] == odds[c.number]
    scorer = Rugged(made, made.load_space())
    losses = [scorer._quality(c.architecture, (0,)).validation_loss.value for c in candidates]
    front = non_dominated([(loss, c.value("latency_ms")) for loss, c in zip(losses, candidates, strict=True)])
    assert {candidates[i].state for i in front} == {"scored"}, "the rungs tell all here"


def test_no_rung_decides_that_does_not_tell(settings: Make) -> None:
    made = settings(trials=12, sampler="random", protocol=PROTOCOL, **RUNGS)
    candidates = run(made, Misleading)
    assert {c.state for c in candidates} == {"scored"}
    assert len(eligible(candidates)) == 12
    model = Ranking(made, candidates).rung_models[30]
    assert model is not None
    assert model.correlation < 0


def test_few_checkpoints_stay_on_disk_and_a_deleted_training_begins_anew(settings: Make, steps: Path) -> None:
    def keeping(name: str, keep: int) -> list[Candidate]:
        rungs = {**RUNGS["rungs"], "keep": keep}
        return run(
            settings(name=name, trials=20, sampler="random", protocol=PROTOCOL, seeds=RUNGS["seeds"], rungs=rungs)
        )

    candidates, none_kept = keeping("two", 2), keeping("none", 0)
    assert [c.score for c in candidates] == [c.score for c in none_kept]
    assert any(line.split()[2:] == ["0", "80"] for line in steps.read_text().splitlines())
    made = settings(name="two", trials=20, protocol=PROTOCOL, **RUNGS)
    stored = {t.artifacts[CHECKPOINT] for t in load_attempts(load_study(made)) if CHECKPOINT in t.artifacts}
    assert len(stored) > 20, "each rung left one"
    left = {path.name for path in made.artifact_folder.iterdir()} & stored
    pruned = {c.artifacts[CHECKPOINT] for c in candidates if c.state == "paused"}
    assert len(left) <= 2 < len(pruned)
    assert left <= pruned


@pytest.mark.slow
def test_four_workers_train_no_step_twice(settings: Make, steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_SECONDS", "0.02")
    candidates = run(settings(trials=14, workers=4, sampler="random", protocol=PROTOCOL, **RUNGS))
    assert len(candidates) == 14
    lines = steps.read_text().splitlines()
    assert len(lines) == len(set(lines))


@pytest.mark.slow
def test_a_raised_budget_goes_on_from_where_it_was(settings: Make) -> None:
    def with_trials(name: str, trials: int) -> list[Candidate]:
        return run(settings(name=name, trials=trials, sampler="ehvi", protocol=PROTOCOL, **RUNGS))

    before = with_trials("parts", 14)
    after = with_trials("parts", 20)
    assert len(after) == 20
    assert [c.point for c in after[:14]] == [c.point for c in before]
    assert {c.number for c in before if c.state == "scored"} <= {c.number for c in after if c.state == "scored"}
    assert any(c.state == "paused" for c in after)


def test_line_through_what_both_have() -> None:
    """By hand: y = 2 x, exactly; then with noise, where the better half alone would correlate less."""
    exact = RungModel.fit([(x, 2 * x) for x in range(10)], range(10))
    assert exact is not None
    assert (exact.slope, exact.intercept, exact.correlation) == pytest.approx((2, 0, 1), abs=1e-9)
    assert exact.predict(4.5) == pytest.approx((9, 0), abs=1e-9)
    assert RungModel.fit([(1.0, 2.0)] * (FEWEST - 1), [1.0]) is None
    assert RungModel.fit([(1.0, float(i)) for i in range(10)], [1.0] * 10) is None
    rng = np.random.default_rng(0)
    x = rng.standard_normal(4000)
    y = x + 0.4 * rng.standard_normal(4000)
    best = x < np.quantile(x, 0.25)
    whole = RungModel.fit([*zip(x, y, strict=True)], x)
    half = RungModel.fit([*zip(x[best], y[best], strict=True)], x)
    assert whole is not None
    assert half is not None
    assert np.corrcoef(x[best], y[best])[0, 1] < 0.8 < TRUSTED < whole.correlation
    assert half.correlation == pytest.approx(whole.correlation, abs=0.02)
    mean, deviation = whole.predict(1.0)
    assert (mean, deviation) == pytest.approx((1.0, 0.4), abs=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rungs": {"steps": []}}, "at least 1 item"),
        ({"rungs": {"steps": [0, 30]}}, "rung at step 0 comes before the first step"),
        ({"rungs": {"steps": [80, 30]}}, "30 follows 80; list the steps in ascending order"),
        ({"rungs": {"steps": [30, 30]}}, "30 follows 30"),
        ({"rungs": {"steps": [240]}}, "rungs.steps has 240, but protocol.steps is 240"),
        ({"rungs": {"steps": [2.5]}}, "valid integer"),
        ({"objectives": ["latency_ms", "params"], "seeds": None}, "search by one quality objective"),
        ({"objectives": ["validation_loss", "kernel_distance", "latency_ms"]}, "search by one quality objective"),
        ({"seeds": {"first": 2, "front": 2}}, "begin with one seed"),
        ({"seeds": None}, "begin with one seed"),
    ],
)
def test_settings_that_cannot_be(settings: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**{"protocol": PROTOCOL, "sampler": "random", **RUNGS, **changes})
