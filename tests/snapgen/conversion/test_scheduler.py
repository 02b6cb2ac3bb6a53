"""What a converted net predicts: told by its pipeline's scheduler, by the user, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from typer.testing import CliRunner

from archsearch.cli import app
from snapgen.conversion.scheduler import from_scheduler
from snapgen.diffusion.process import PREDICTION_TYPES, NoiseProcess, make_process
from snapgen.diffusion.variance_preserving import SCHEDULE
from snapgen.errors import InputError
from snapgen.io.prediction_type import check_prediction_type, read_prediction_type
from tests.snapgen.diffusers_nets import SMALL, reference

SD15 = {
    **SCHEDULE,
    "_class_name": "PNDMScheduler",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
"""As SD-1.5's own file has it, without ``prediction_type``."""


def said(config: Any) -> tuple[str | None, str]:
    found = from_scheduler(config)
    return found.prediction, found.reason


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [
        (PNDMScheduler(**SCHEDULE), "noise"),
        (DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"), "v"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "velocity"),
        (FlowMatchEulerDiscreteScheduler(shift=3), "velocity"),
        (FlowMatchHeunDiscreteScheduler(), "velocity"),
    ],
)
def test_a_scheduler_says_what_is_predicted(scheduler: SchedulerMixin, prediction: str, tmp_path: Path) -> None:
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert said(config)[0] == prediction
    assert type(scheduler).__name__ in said(config)[1]


def test_a_type_that_is_not_written_is_the_classs_own() -> None:
    assert said(SD15) == ("noise", "PNDMScheduler with prediction_type 'epsilon'")


@pytest.mark.parametrize("prediction", ["noise", "v", "velocity"])
def test_our_own_schedulers_say_what_they_were_made_for(prediction: Any) -> None:
    process: NoiseProcess = make_process(prediction)
    config = {**process.scheduler().config, "_class_name": type(process.scheduler()).__name__}
    assert said(config)[0] == prediction


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**SD15, "prediction_type": "sample"}, "its scheduler is PNDMScheduler with prediction_type 'sample'"),
        ({**SD15, "prediction_type": ["v"]}, "with prediction_type ['v'], which is not supported"),
        ({**SD15, "beta_schedule": "linear"}, "its scheduler's beta_schedule is 'linear', not Stable Diffusion 1.5's"),
        ({**SD15, "trained_betas": [0.1]}, "its scheduler's trained_betas is [0.1], not"),
        ({**SD15, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        (dict(EDMEulerScheduler().config) | {"_class_name": "EDMEulerScheduler"}, "beta_start is None, not"),
        (dict(IPNDMScheduler().config) | {"_class_name": "IPNDMScheduler"}, "with prediction_type None"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "with invert_sigmas, which is not"),
        ({"_class_name": "MyScheduler"}, "its scheduler is MyScheduler, which diffusers does not have"),
        ({}, "its scheduler is None, which"),
    ],
)
def test_a_scheduler_of_another_process_says_nothing(config: dict[str, Any], reason: str) -> None:
    prediction, why = said(config)
    assert prediction is None
    assert reason in why


# --- the command ---


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    reference(SMALL).save_pretrained(folder / "unet")
    return folder / "unet"


def pipeline(folder: Path, net: Path, config: Any) -> Path:
    (folder / "scheduler").mkdir(parents=True)
    (folder / "unet").symlink_to(net)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    return folder


def converted(source: Path, out: Path, *options: str) -> str:
    answer = CliRunner().invoke(app, ["convert", str(source), "--out", str(out), *options], env={"COLUMNS": "200"})
    if answer.exception:
        raise answer.exception
    return answer.stdout


def test_a_converted_pipelines_net_may_teach(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours"
    assert "noise (PNDMScheduler with prediction_type 'epsilon')" in converted(
        pipeline(tmp_path / "in", net, SD15), out
    )
    assert read_prediction_type(out) == "noise"
    check_prediction_type(out, "noise", required=True)
    told = json.loads(converted(tmp_path / "in", tmp_path / "again", "--json", "--prediction", "noise"))
    assert told["prediction"] == "noise"
    with pytest.raises(InputError, match=r"--prediction: is 'v', but .* says 'noise'") as error:
        converted(tmp_path / "in", tmp_path / "more", "--prediction", "v")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "more").exists()


def test_a_net_alone_is_of_what_the_user_says(net: Path, tmp_path: Path) -> None:
    told = converted(net, tmp_path / "silent")
    said = [line for line in told.splitlines() if "--prediction" in line]
    assert said == [
        "Not noted what it predicts: without scheduler/scheduler_config.json it is not stated; "
        "convert it with --prediction before it teaches."
    ]
    assert read_prediction_type(tmp_path / "silent") is None
    assert json.loads(converted(net, tmp_path / "json", "--json"))["prediction"] is None
    for prediction in PREDICTION_TYPES:
        converted(net, tmp_path / prediction, "--prediction", prediction, "--quiet")
        assert read_prediction_type(tmp_path / prediction) == prediction
    with pytest.raises(InputError, match=r"--prediction: 'epsilon' is not a prediction type; use one of: velocity, "):
        converted(net, tmp_path / "wrong", "--prediction", "epsilon")


def test_a_scheduler_that_says_nothing_leaves_it_to_the_user(net: Path, tmp_path: Path) -> None:
    other = pipeline(tmp_path / "other", net, {**SD15, "beta_schedule": "linear"})
    assert "beta_schedule is 'linear'" in converted(other, tmp_path / "silent")
    assert read_prediction_type(tmp_path / "silent") is None
    assert "v (by --prediction)" in converted(other, tmp_path / "v", "--prediction", "v")
    with pytest.raises(InputError, match=r"scheduler_config\.json: is not valid JSON"):
        converted(pipeline(tmp_path / "damaged", net, "{"), tmp_path / "none")
