"""Plans for machines that are not here: their sums are those that one does by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from archsearch.cli import app
from archsearch.cost.counter import cost
from archsearch.library.machines import UTILIZATION, machines, parse_cluster
from archsearch.studies.config.study import load_config
from archsearch.studies.experiments.search_time import plan_study_on
from archsearch.training.dry_run import Plan, StagePlan
from archsearch.training.machine_plan import plan_on
from snapgen.errors import InputError


def stage(**changes: object) -> StagePlan:
    values = {
        "name": "base",
        "description": "",
        "net_params": 1,
        "params": 1,
        "teacher_params": 0,
        "images": 6400,
        "steps": 100,
        "batch": 64,
        "epochs": None,
        "macs": 10**18,
        "memory": 10**10,
        "image_memory": 10**9,
        "micro_batch_size": 64,
        "precision": "bfloat16",
        "single_process": False,
    }
    return StagePlan(**{**values, **changes})  # type: ignore[arg-type]


def plan(*stages: StagePlan) -> Plan:
    return Plan(list(stages), None, {}, None)


def test_time_and_cost_are_peak_rate_times_utilization() -> None:
    cluster = parse_cluster("8xh100")
    (found,) = plan_on(plan(stage()), cluster)
    assert found.seconds == pytest.approx(2 * 10**18 / (8 * 989e12 * UTILIZATION))
    assert found.dollars == pytest.approx(8 * 3.0 * found.seconds / 3600)
    assert (found.batch, found.gradient_accumulation_steps, found.problem) == (8, 1, "")
    assert found.memory == 10**10 + 8 * 10**9
    (slow,) = plan_on(plan(stage(precision="float32")), cluster)
    assert slow.seconds == pytest.approx(found.seconds * 989 / 67)


def test_a_batch_is_split_until_it_fits() -> None:
    (found,) = plan_on(plan(stage(batch=512)), parse_cluster("4xA100"))
    assert found.batch == 128
    assert found.memory <= 0.9 * 80e9
    assert found.gradient_accumulation_steps == 4, "32 images of 1 GB beside 10 GB; two parts would be 74 GB"
    (never,) = plan_on(plan(stage(image_memory=10**11)), parse_cluster("A100"))
    assert never.problem == "a single image does not fit"
    (decoder,) = plan_on(plan(stage(single_process=True, batch=128)), parse_cluster("A100"))
    assert decoder.problem.startswith("its batch does not fit")
    (odd,) = plan_on(plan(stage(batch=60)), parse_cluster("64xH100"))
    assert odd.problem == "its batch of 60 is no multiple of 64 processes"


def test_a_decoder_is_trained_on_one_while_the_others_cost() -> None:
    (found,) = plan_on(plan(stage(single_process=True)), parse_cluster("8xH100"))
    assert (found.processes, found.batch) == (1, 64)
    assert found.dollars == pytest.approx(8 * 3.0 * found.seconds / 3600)


def test_every_machine_names_its_sources() -> None:
    assert all(machine.sources and machine.tflops.keys() == {"bfloat16", "float32"} for machine in machines().values())


@pytest.mark.parametrize("text", ["8xTPU", "0xH100", "x", "H100x8", "8 x H100"])
def test_an_unknown_machine_is_told(text: str) -> None:
    with pytest.raises(InputError, match="is no known machine; write e.g. 8xH100, of A100, H100".replace(".", r"\.")):
        parse_cluster(text)


def test_a_study_is_planned_candidate_by_candidate() -> None:
    config = load_config("emoji")
    one, many = (plan_study_on(config, parse_cluster(name)) for name in ("H100", "4xH100"))
    assert one.seconds_per_candidate == many.seconds_per_candidate
    protocol, base = config.protocol, config.load_space().base
    passes = 3 * protocol.steps * protocol.batch_size * len(config.first_seeds)
    assert one.macs_per_candidate == passes * cost(base, 8, context_tokens=protocol.context_tokens).macs
    assert config.trials is None or many.seconds == -(-config.trials // 4) * one.seconds_per_candidate


def test_a_search_is_planned_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["search", "emoji", "--dry-run", "--on", "4xH100"])
    assert answer.exit_code == 0, answer.exception
    config = load_config("emoji")
    assert answer.stdout.startswith(f"emoji on 4 × H100: {config.trials} candidates, one a processor at a time, ")
    assert "(an assumption, not a measurement)" in answer.stdout
    assert not (tmp_path / "runs").exists()
    refused = CliRunner().invoke(app, ["search", "emoji", "--on", "4xH100"])
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception).startswith("--on: plans for another machine, and searches nothing")


def test_the_command_plans_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    answer = CliRunner().invoke(app, ["train", "emoji", "--dry-run", "--on", "8xH100"])
    assert answer.exit_code == 0, answer.exception
    assert "on 8 × H100" in answer.stdout
    assert "35% are assumed to be reached" in answer.stdout.replace("\n", " ")
    refused = CliRunner().invoke(app, ["train", "emoji", "--on", "8xH100"])
    assert isinstance(refused.exception, InputError)
    assert "add --dry-run" in str(refused.exception)
