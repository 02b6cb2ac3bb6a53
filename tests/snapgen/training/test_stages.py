from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from snapgen.training.stages import AdversarialDistillationStage, AnyStage, DecoderStage, FlowMatchingStage

STAGE: TypeAdapter[Any] = TypeAdapter(AnyStage)


def stage(kind: str = "flow", **values: Any) -> Any:
    if kind != "decoder":
        values = {"resolution": 256, "images": 100, "batch": 8, **values}
    return STAGE.validate_python({"kind": kind, "name": "some", **values})


@pytest.mark.parametrize(
    ("kind", "made"), [("flow", FlowMatchingStage), ("steps", AdversarialDistillationStage), ("decoder", DecoderStage)]
)
def test_a_stage_is_known_by_its_kind(kind: str, made: type) -> None:
    assert type(stage(kind)) is made


def test_every_image_is_seen() -> None:
    assert stage(images=100).steps == 13
    assert stage(images=96).steps == 12
    assert stage(images=1).steps == 1


@pytest.mark.parametrize(("resolution", "shift"), [(256, 1), (512, 3**0.5), (1024, 3), (64, 1 / 3)])
def test_the_shift_goes_through_sd3s_points(resolution: int, shift: float) -> None:
    assert stage(resolution=resolution, shift="resolution").timestep_shift == pytest.approx(shift)
    assert stage(resolution=resolution, shift=2.5).timestep_shift == 2.5


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"accumulate": 3}, "accumulate 3 does not divide batch 8; use a divisor"),
        ({"shift": 0}, "shift can not be 0"),
        ({"shift": float("nan")}, "shift"),
        ({"shift": float("inf")}, "shift"),
        ({"name": "../x"}, "name"),
        ({"net": "teacher", "distillation": {}}, "a teacher has no teacher"),
        ({"distillation": {"output": False, "features": False}}, "both off"),
        ({"kind": "steps", "adversarial": {"blocks": []}}, "at least 1 item"),
        ({"kind": "steps", "adversarial": {"noise": [1, 0]}}, "must be above 0"),
        ({"kind": "steps", "student_steps": 65}, "student_steps"),
        ({"images": 0}, "images"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        stage(**values)
