"""What a recipe names by a path counts by its content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from archsearch.studies.lookup import find_architecture
from archsearch.training.compatibility import contents_of, resolve_shapes
from archsearch.training.recipe import load_recipe
from archsearch.training.run_folder import RunFolder
from snapgen.autoencoders.training import new_autoencoder
from snapgen.conditioning import text_encoder
from snapgen.errors import InputError
from snapgen.models.unet import UNet
from snapgen.objectives.teacher import new_teacher
from tests.archsearch.studies.tiny_recipe import ARCH, FEW, written
from tests.snapgen.encoders import bert

WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = {
    "autoencoder": f"vae/{WEIGHTS}",
    "text_encoders[0].encoder": "bert/model.safetensors",
    "teacher.text_encoders[0].encoder": "bert/model.safetensors",
    "teacher.path": f"teacher/{WEIGHTS}",
    "init_weights": f"unet/{WEIGHTS}",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    bert(root / "bert")
    sizes: dict[str, Any] = {f"{part}_widths": (8, 8, 8) for part in ("encoder", "decoder")}
    sizes |= {f"{part}_blocks": (0, 1, 1) for part in ("encoder", "decoder")}
    new_autoencoder(0, **sizes, mid_blocks=0, norm_groups=4).save_pretrained(root / "vae")
    UNet({**ARCH, "context_dim": 16}, "velocity").save_pretrained(root / "unet")
    shape = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    fits = {"latent_channels": 4, "context_dim": 16, "pooled_width": 16, "sample_size": 8}
    new_teacher(shape, **fits, seed=0).save_pretrained(root / "teacher")
    return root


def recipe_of(root: Path, models: Path) -> tuple[Any, Any]:
    path = written(
        root,
        autoencoder=str(models / "vae"),
        text_encoders=[{"encoder": str(models / "bert"), "tokens": 8, "pooled": True}],
        teacher={"path": str(models / "teacher")},
        init_weights=str(models / "unet"),
        stages=[{"kind": "flow_matching", "name": "distil", "distillation": {}, **FEW}],
    )
    arch = root / "tiny.json"
    arch.write_text(json.dumps({**ARCH, "context_dim": 16}))
    recipe = load_recipe(path)
    return recipe, find_architecture(recipe.architecture)


@pytest.mark.parametrize("place", MODELS)
def test_changed_weights_are_named_and_moved_ones_are_not(models: Path, tmp_path: Path, place: str) -> None:
    own = Path(shutil.copytree(models, tmp_path / "models"))
    recipe, arch = recipe_of(tmp_path, own)
    folder = RunFolder(recipe, arch)
    before = contents_of(recipe, resolve_shapes(recipe))
    assert {*MODELS, "data (train, 32 px)", "data (val, 32 px)"} == set(before)
    moved, _ = recipe_of(tmp_path / "elsewhere", Path(shutil.copytree(own, tmp_path / "moved")))
    assert contents_of(moved, resolve_shapes(moved)) == before
    file = own / MODELS[place]
    weights = load_file(file)
    first = next(iter(weights))
    save_file({**weights, first: weights[first] + torch.ones_like(weights[first])}, file, metadata={"format": "pt"})
    text_encoder.digest.cache_clear()
    after = contents_of(recipe, resolve_shapes(recipe))
    changed = [name for name in before if before[name] != after[name]]
    assert changed == [name for name in before if MODELS.get(name) == MODELS[place]]
    with pytest.raises(InputError, match="has other contents than when this run was begun"):
        folder._check_contents(before, after)
    folder._check_contents({}, after)
