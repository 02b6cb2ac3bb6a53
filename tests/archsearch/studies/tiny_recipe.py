"""A recipe of all stages that trains in seconds, on pictures of noise.

As a program it trains it: ``python -m tests.archsearch.studies.tiny_recipe FOLDER '{"checkpoint_minutes": 0}'``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from archsearch.studies.lookup import find_architecture
from archsearch.training import run as training
from archsearch.training.recipe import Recipe, load_recipe
from snapgen.architecture.schema import Architecture
from snapgen.io import checkpoint

ARCH = {
    "latent_channels": 4,
    "context_dim": 384,
    "norm_groups": 4,
    "time": {"embed_dim": 8, "hidden_dim": 16},
    "down": [
        {"channels": 8, "num_res_blocks": 1, "head_dim": 8},
        {"channels": 16, "num_res_blocks": 1, "num_transformers": 1, "head_dim": 8},
    ],
    "mid": {"num_res_blocks": 1, "head_dim": 8},
    "up": [
        {"channels": 8, "num_res_blocks": 1, "head_dim": 8},
        {"channels": 16, "num_res_blocks": 1, "head_dim": 8},
    ],
}
DECODER = {"widths": [8, 8, 8], "blocks": [1, 1, 1], "mid_blocks": 1, "norm_groups": 4}
FEW = {"resolution": 32, "batch_size": 4, "num_images": 16}
STAGES: list[dict[str, Any]] = [
    {"kind": "flow_matching", "name": "teacher", "net": "teacher", "optimizer": "adamw", **FEW},
    {
        "kind": "flow_matching",
        "name": "base",
        "gradient_accumulation_steps": 2,
        "evaluate_every": 8,
        "block_dropout": 0.3,
        **FEW,
    },
    {"kind": "flow_matching", "name": "distil", "distillation": {}, **FEW},
    {"kind": "adversarial", "name": "steps", **FEW},
    {
        "kind": "decoder",
        "name": "decoder",
        "max_images": 20,
        "decoder": DECODER,
        "training": {"steps": 4, "batch_size": 4, "resolutions": [32]},
    },
]
EVALUATION = {"validation_pairs": 8, "num_samples": 0, "num_inference_steps": 2, "prompts": ["a dot"]}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": "pictures",
    "text_encoders": [{"encoder": "minilm", "tokens": 8, "pooled": True}],
    "teacher": {"shape": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}},
    "evaluation": EVALUATION,
    "checkpoint_minutes": 0,
    "stages": STAGES,
}


def written(folder: Path, **changes: Any) -> Path:
    """The recipe's file, with the data and the architecture that it names."""
    random = np.random.default_rng(0)
    for caption in ("red dot", "blue dot", "cat"):
        (folder / "pictures" / caption).mkdir(parents=True, exist_ok=True)
        for number in range(12):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / caption / f"{number}.png")
    (folder / "tiny.json").write_text(json.dumps(ARCH))
    path = folder / "recipe.yaml"
    values = {**RECIPE, "architecture": str(folder / "tiny.json"), "data": str(folder / "pictures"), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def recipe(folder: Path, **changes: Any) -> tuple[Recipe, Architecture]:
    """The recipe and its architecture, read from such a file."""
    found = load_recipe(written(folder, **changes))
    return found, find_architecture(found.architecture)


def weights(run: Path) -> dict[str, bytes]:
    """Every file of weights that a run's stages and pipeline left, by its place."""
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("*/*.safetensors"))}


def train(folder: Path, last_write: int | None = None, **changes: Any) -> int:
    """Train the recipe in a folder; how often something was written.

    Args:
        last_write: die of SIGKILL at the so many-th write: before it, in the middle of a checkpoint, or after it.
    """
    os.chdir(folder)
    writes = 0

    def mortal(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def write(*arguments: Any, **named: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == last_write and name == "save_file":
                arguments[1].write_bytes(b"\x08" * 1000)
            if writes == last_write and (name == "save_file" or writes % 2):
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **named)
            if writes == last_write:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, write)

    if last_write is not None:
        mortal(checkpoint, "save_file")
        for name in ("replace", "rename", "unlink"):
            mortal(Path, name)
    training.train(*recipe(folder, **changes), log=print)
    return writes


if __name__ == "__main__":
    train(Path(sys.argv[1]), **json.loads(sys.argv[2]))
