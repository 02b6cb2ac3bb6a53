"""Tables made from studies that were really run, with a quick scorer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from archsearch.protocol import EvaluationProtocol
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from archsearch.studies.tabular.export import tabulate
from archsearch.studies.tabular.file import load_table, write_table
from snapgen.errors import InputError
from tests.archsearch.studies.quick import QuickScorer, quick_cost, quick_latency, quick_loss

Make = Callable[..., StudyConfig]


@pytest.fixture
def run(settings: Make, space: str) -> Callable[..., StudyConfig]:
    def start(name: str, **changes: object) -> StudyConfig:
        config = settings(name=name, **{"space": space, "sampler": "grid", "trials": 9, **changes})
        search(config, quiet=True, scorer=QuickScorer)
        return config

    return start


def test_a_study_becomes_a_table(run: Callable[..., StudyConfig], tmp_path: Path) -> None:
    whole = run("whole")
    more = run("more", trials=4, protocol=EvaluationProtocol(train_seeds=(2, 3, 4)))
    long = run("long", trials=3, protocol=EvaluationProtocol(steps=2400, train_seeds=(2,)))
    table = tabulate([load_study(config) for config in (whole, more, long)])
    write_table(table, tmp_path / "table.csv.gz")
    table = load_table(tmp_path / "table.csv.gz")
    assert len(table.entries) == 9
    assert len(table.runs) == 9 * 2 + 4 * 3 + 3
    assert table.seeds == (0, 1)
    assert sorted(len(runs) for runs in table.short_runs.values()) == [2] * 5 + [5] * 4
    for arch_id, entry in table.entries.items():
        arch = table.space.architecture(entry.point)
        assert arch.id == arch_id
        assert entry.cost == quick_cost(arch)
        assert entry.quartiles_ms[1] == pytest.approx(quick_latency(arch))
        first = table.short_runs[arch_id][0]
        assert first.scores["validation_loss"] == pytest.approx(0.99 * quick_loss(arch))
        assert first.seconds > 0


def test_seconds_may_be_those_of_one_machine(run: Callable[..., StudyConfig]) -> None:
    studies = [
        run("whole"),
        run("long", trials=3, protocol=EvaluationProtocol(steps=2400, train_seeds=(2,))),
        run("larger", trials=2, protocol=EvaluationProtocol(resolution=64, train_seeds=(3,))),
    ]
    table = tabulate([load_study(config) for config in studies], seconds=lambda arch: len(arch.to_json()))
    for r in table.runs:
        own = len(table.space.architecture(table.entries[r.architecture_id].point).to_json())
        if r.seed == 3:
            assert r.seconds < 60, "those of another resolution keep the durations of their trials"
        else:
            assert r.seconds == (10 * own if r.seed == 2 else own)


def test_a_study_that_has_not_ended_is_no_complete_table(run: Callable[..., StudyConfig], tmp_path: Path) -> None:
    write_table(tabulate([load_study(run("part", trials=5))]), tmp_path / "table.csv")
    with pytest.raises(InputError, match=r"lacks 8 of 18 runs.*; let its study end, and export it again"):
        load_table(tmp_path / "table.csv")


def test_what_does_not_fit_together_is_refused(run: Callable[..., StudyConfig], settings: Make) -> None:
    part, whole = load_study(run("part", trials=3)), load_study(run("whole"))
    with pytest.raises(InputError, match="study whole: has the protocol of an earlier study"):
        tabulate([part, whole])
    shared = load_study(run("shared", trials=3, protocol=EvaluationProtocol(train_seeds=(1, 2))))
    with pytest.raises(InputError, match="study shared: has seed 1, and so has an earlier study"):
        tabulate([whole, shared])
    other = settings(name="other", trials=3)
    search(other, quiet=True, scorer=QuickScorer)
    with pytest.raises(InputError, match="study other: has another space than study whole"):
        tabulate([whole, load_study(other)])
    long = load_study(run("long", trials=5, protocol=EvaluationProtocol(steps=2400)))
    with pytest.raises(InputError, match=r"study long: has scored architecture .*, study part has not"):
        tabulate([part, long])
    with pytest.raises(InputError, match="knobs"):
        tabulate([whole], full_size="snapgen-factorial")
