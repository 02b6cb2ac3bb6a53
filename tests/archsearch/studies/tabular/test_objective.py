from __future__ import annotations

import optuna
import pytest

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
        assert trial.user_attrs["seconds"] == pytest.approx(sum(run.seconds for run in runs))


def test_what_the_table_lacks_is_refused(table: BenchmarkTable) -> None:
    with pytest.raises(InputError, match="synthetic: has no objective 'fid'; use validation_loss"):
        table.objective(["fid"])
    with pytest.raises(InputError, match="synthetic: has no seed 5; use 0, 1"):
        table.objective(seeds=[5])
