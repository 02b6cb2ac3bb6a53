from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from archsearch import load_table
from archsearch.studies.tabular.file import write_table
from archsearch.studies.tabular.table import BenchmarkTable
from snapgen.errors import InputError
from tests.archsearch import synthetic_table


@pytest.fixture(scope="module")
def table() -> BenchmarkTable:
    return synthetic_table.make()


def test_a_trial_has_the_values_of_its_architecture(table: BenchmarkTable) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(table.objective(("validation_loss", "latency_ms", "iphone-15-pro"), seeds=[0, 1]), n_trials=5)
    for trial in study.trials:
        point = {knob.name: trial.params[knob.name] for knob in table.space.knobs}
        entry = table.entries[table.space.architecture(point).id]
        runs = [table.short_runs[entry.id][seed] for seed in (0, 1)]
        expected = [sum(run.scores["validation_loss"] for run in runs) / 2, entry.quartiles_ms[1]]
        assert trial.values == pytest.approx([*expected, entry.predicted_ms["iphone-15-pro"]])
        assert trial.user_attrs["architecture_id"] == entry.id
        assert trial.user_attrs["seconds"] == pytest.approx(sum(run.seconds for run in runs))


def test_what_the_table_lacks_is_refused(table: BenchmarkTable) -> None:
    with pytest.raises(InputError, match="synthetic: has no objective 'fid'; use validation_loss"):
        table.objective(["fid"])
    with pytest.raises(InputError, match="synthetic: has no seed 5; use 0, 1"):
        table.objective(seeds=[5])
    with pytest.raises(InputError, match="seeds: is empty; use 0, 1"):
        table.objective(seeds=[])


def test_the_true_front_is_a_frame(table: BenchmarkTable, tmp_path: Path) -> None:
    write_table(table, tmp_path / "table.csv.gz")
    loaded = load_table(tmp_path / "table.csv.gz")
    assert repr(loaded) == f"Table({str(tmp_path / 'table.csv.gz')!r}: 384 architectures, 976 runs)"
    front = loaded.pareto_front()
    losses, latencies = loaded.table.true_values("validation_loss"), loaded.table.numbers("latency_ms")
    for arch_id in table.entries:
        better = [i for i in front.index if losses[i] <= losses[arch_id] and latencies[i] <= latencies[arch_id]]
        assert better == [arch_id] if arch_id in front.index else better, "no other one is better than those alone"
    assert front["validation_loss"].is_monotonic_increasing
    assert set(front["all.num_kv_heads"]) <= {"null", "1"}
    assert set(loaded.frame()["knob all.num_kv_heads"]) == {"null", "1"}
    assert loaded.pareto_front("latency_ms")["latency_ms"].nunique() == 1
    with pytest.raises(InputError, match="has no objective 'retrieval_mrr'; use validation_loss"):
        loaded.pareto_front("retrieval_mrr")
