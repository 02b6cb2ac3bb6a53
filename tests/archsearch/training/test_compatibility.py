from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archsearch.training.compatibility import check_recipe, resolve_shapes
from archsearch.training.recipe import load_recipe
from snapgen.errors import InputError
from snapgen.objectives import teacher
from tests.archsearch.studies.tiny_recipe import DECODER, FEW, STAGES, recipe
from tests.snapgen.nets import tiny

TURBO = {**STAGES[3], "teacher": "turbo"}


def refused(folder: Path, **changes: Any) -> str:
    found, arch = recipe(folder, **changes)
    with pytest.raises(InputError) as error:
        check_recipe(found, arch, resolve_shapes(found))
    return str(error.value)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Saves a small teacher and gives its folder."""

    def save(**values: Any) -> str:
        shape = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
        like = {"latent_channels": 4, "context_dim": 384, "pooled_width": 384, "sample_size": 8} | values
        teacher.new_teacher(shape, seed=0, **like).save_pretrained(tmp_path / "sd3")
        return str(tmp_path / "sd3")

    return save


def test_shapes_of_the_tiny_recipe(tmp_path: Path) -> None:
    found, arch = recipe(tmp_path)
    given = resolve_shapes(found)
    assert (given.factor, given.latent_channels) == (4, 4)
    assert given.context == given.teacher_context == (384, 8, 384)
    assert given.missing == []
    assert [given.teacher(stage) is None for stage in found.stages] == [False, True, False, False, True]
    check_recipe(found, arch, given)


def test_a_stage_with_a_teacher_of_its_own(tmp_path: Path, save: Callable[..., str]) -> None:
    folder = save()
    found, arch = recipe(tmp_path, stages=[STAGES[0], {**STAGES[3], "teacher": folder}])
    given = resolve_shapes(found)
    assert [getattr(given.teacher(stage), "num_layers", None) for stage in found.stages] == [2, 1]
    check_recipe(found, arch, given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"stages": [{**STAGES[1], "resolution": 36}]},
            "stages[0].resolution: 36 px does not fit the net; use a multiple of 8",
        ),
        ({"stages": [{**STAGES[4], "decoder": {**DECODER, "blocks": [1]}}]}, "stages[0]."),
        (
            {"stages": [{**STAGES[4], "decoder": {**DECODER, "widths": [8, 8], "blocks": [1, 1]}}]},
            "has a downscale factor of 2",
        ),
        ({"stages": [STAGES[0], {**STAGES[3], "adversarial": {"blocks": [5]}}]}, "adversarial.blocks names 5"),
        ({"text_encoders": [{"encoder": "minilm"}]}, "set pooled: true"),
        ({"autoencoder": "nowhere"}, "nowhere"),
        ({"text_encoders": [{"encoder": "nowhere", "pooled": True}]}, "nowhere"),
        ({"teacher": {"path": "nowhere"}, "stages": [STAGES[2]]}, "nowhere"),
        ({"stages": [STAGES[0], {**STAGES[3], "teacher": "nowhere"}]}, "nowhere"),
        (
            {"stages": [{**STAGES[1], "batch_size": 4, "gradient_accumulation_steps": 4}]},
            "batch_size 4 is not a multiple of 2 processes × 4 accumulation steps",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    found, arch = recipe(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        check_recipe(
            found,
            arch,
            resolve_shapes(found),
            processes=2 if "gradient_accumulation_steps" in str(changes) and "base" in str(changes) else 1,
        )
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"latent_channels": 16}, "takes latents of 16 channels"),
        ({"context_dim": 64}, "takes a context of width 64"),
        ({"pooled_width": 64}, "takes a pooled embedding of width 64"),
        ({"sample_size": 4}, "has positions for latents up to 4×4"),
    ],
)
def test_a_teacher_that_does_not_fit(
    tmp_path: Path, save: Callable[..., str], values: dict[str, int], says: str
) -> None:
    assert says in refused(tmp_path, teacher={"path": save(**values)}, stages=[STAGES[2]])


def test_a_truncated_teacher(tmp_path: Path, save: Callable[..., str]) -> None:
    file = Path(save()) / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    assert "cannot be read" in refused(tmp_path, teacher={"path": str(file.parent)}, stages=[STAGES[2]])


def test_a_net_for_other_latents_or_another_context(tmp_path: Path) -> None:
    found, arch = recipe(tmp_path)
    given = resolve_shapes(found)
    with pytest.raises(InputError, match="architecture: has 3 latent channels; the autoencoder gives 4"):
        check_recipe(found, tiny(), given)
    with pytest.raises(InputError, match="architecture: takes a context 384 wide; the text encoders give 12"):
        check_recipe(found, arch, dataclasses.replace(given, context=given.context._replace(context=12)))


def test_expected_stands_in_for_what_is_missing(tmp_path: Path) -> None:
    expected = {
        "downscale_factor": 4,
        "latent_channels": 4,
        "text_encoders": {"no-clip": [300, 100], "no-gemma": [384, 384]},
        "teacher": {"num_layers": 3, "num_attention_heads": 1, "attention_head_dim": 8},
    }
    clip = {"encoder": "no-clip", "tokens": 8, "pooled": True}
    text = [clip, {"encoder": "no-gemma", "tokens": 5}]
    found, arch = recipe(
        tmp_path,
        expected_shapes=expected,
        text_encoders=text,
        autoencoder="no-vae",
        teacher={"path": "no-sd3"},
        stages=[STAGES[2], TURBO],
    )
    given = resolve_shapes(found, without_files=True)
    assert given.context == (384, 13, 100)
    assert [getattr(given.teacher(stage), "num_layers", None) for stage in found.stages] == [3, 3]
    assert given.missing == ["no-vae", "no-clip", "no-gemma", "no-sd3", "turbo"]
    check_recipe(found, arch, given)
    with pytest.raises(InputError, match="no-vae"):
        resolve_shapes(found)


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        ({"downscale_factor": 8, "latent_channels": 4}, "expected_shapes.downscale_factor: is 8; the files give 4"),
        ({"downscale_factor": 4, "latent_channels": 16}, "expected_shapes.latent_channels: is 16; the files give 4"),
        (
            {"downscale_factor": 4, "latent_channels": 4, "text_encoders": {"minilm": [9, 9]}},
            "expected_shapes.text_encoders.minilm: is (9, 9)",
        ),
    ],
)
def test_files_are_held_to_what_is_expected(tmp_path: Path, expected: dict[str, Any], says: str) -> None:
    found, _ = recipe(
        tmp_path, expected_shapes=expected, stages=[{"kind": "flow_matching", "name": "base", **FEW}], teacher=None
    )
    with pytest.raises(InputError) as error:
        resolve_shapes(found)
    assert says in str(error.value)


def test_the_papers_recipe_fits_together() -> None:
    found = load_recipe("snapgen_t2i")
    given = resolve_shapes(found, without_files=True)
    assert given.context == (2304, 77 + 128, 0)
    assert given.teacher_context == (4096, 77 + 77, 768 + 1280)
    assert {t.hidden_dim for t in given.teachers.values()} == {2432}
