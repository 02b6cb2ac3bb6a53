from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from snapgen.training.stages import AdversarialDistillationStage, AnyStage, DecoderStage, FlowMatchingStage

STAGE: TypeAdapter[Any] = TypeAdapter(AnyStage)


def stage(kind: str = "flow_matching", **values: Any) -> Any:
    if kind != "decoder":
        values = {"resolution": 256, "num_images": 100, "batch_size": 8, **values}
    return STAGE.validate_python({"kind": kind, "name": "some", **values})


@pytest.mark.parametrize(
    ("kind", "made"),
    [("flow_matching", FlowMatchingStage), ("adversarial", AdversarialDistillationStage), ("decoder", DecoderStage)],
)
def test_a_stage_is_known_by_its_kind(kind: str, made: type) -> None:
    assert type(stage(kind)) is made


def test_every_image_is_seen() -> None:
    assert stage(num_images=100).steps == 13
    assert stage(num_images=96).steps == 12
    assert stage(num_images=1).steps == 1


@pytest.mark.parametrize(("resolution", "shift"), [(256, 1), (512, 3**0.5), (1024, 3), (64, 1 / 3)])
def test_the_shift_goes_through_sd3s_points(resolution: int, shift: float) -> None:
    assert stage(resolution=resolution, timestep_shift="resolution").timestep_shift_value == pytest.approx(shift)
    assert stage(resolution=resolution, timestep_shift=2.5).timestep_shift_value == 2.5


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"gradient_accumulation_steps": 3},
            "gradient_accumulation_steps 3 does not divide batch_size 8; use a divisor",
        ),
        ({"timestep_shift": 0}, "shift cannot be 0"),
        ({"timestep_shift": float("nan")}, "shift"),
        ({"timestep_shift": float("inf")}, "shift"),
        ({"name": "../x"}, "name"),
        ({"net": "teacher", "distillation": {}}, "a teacher cannot be distilled into"),
        ({"distillation": {"output": False, "features": False}}, "both off"),
        ({"kind": "adversarial", "adversarial": {"blocks": []}}, "at least 1 item"),
        ({"kind": "adversarial", "adversarial": {"renoise_mean_std": [1, 0]}}, "must be above 0"),
        ({"kind": "adversarial", "student_steps": 65}, "student_steps"),
        ({"num_images": 0}, "images"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        stage(**values)
