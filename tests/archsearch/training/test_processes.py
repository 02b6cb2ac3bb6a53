"""Training in two processes."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.archsearch.launching import launched
from tests.snapgen.nets import TINY

TEACHER = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
STAGES = [
    {"kind": "flow_matching", "name": "teacher", "net": "teacher"},
    {
        "kind": "flow_matching",
        "name": "base",
        "gradient_accumulation_steps": 2,
        "evaluate_every": 16,
        "block_dropout": 0.3,
    },
    {"kind": "flow_matching", "name": "distil", "distillation": {}, "optimizer": "adamw", "learning_rate": 1e-3},
    {
        "kind": "adversarial",
        "name": "steps",
        "gradient_accumulation_steps": 2,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
    },
]
DECODER = {
    "kind": "decoder",
    "name": "decoder",
    "max_images": 64,
    "decoder": {"widths": [8, 8, 8], "blocks": [1, 1, 1], "mid_blocks": 1, "norm_groups": 4},
    "training": {"steps": 2, "batch_size": 4},
}
VARYING = ("images/s", "seconds", "student balance")
"""Columns that are not to be equal: times, and a ratio of norms of a part."""


def written(folder: Path, name: str, *, batch: int = 8) -> Path:
    """A recipe of every kind of stage, a few steps each, and its student."""
    stages = [{"resolution": 32, "num_images": 4 * batch, "batch_size": batch, **stage} for stage in STAGES]
    arch = folder / "arch.yaml"
    arch.write_text(yaml.safe_dump({**TINY, "latent_channels": 4, "context_dim": 384}))
    recipe = folder / f"{name}.yaml"
    values = {
        "architecture": str(arch),
        "prediction_type": "preconditioned",
        "data": "emoji",
        "text_encoders": [{"encoder": "minilm", "tokens": 4, "pooled": True}],
        "teacher": {"shape": TEACHER},
        "evaluation": {"validation_pairs": 4, "num_samples": 0, "num_inference_steps": 1, "prompts": ["a red apple"]},
        "stages": [*stages, DECODER],
    }
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def train(recipe: Path, *, processes: int) -> subprocess.CompletedProcess[str]:
    return launched("train", str(recipe), processes=processes, cwd=recipe.parent)


def numbers(log: Path) -> list[dict[str, float]]:
    with log.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [{name: value for name, value in row.items() if name not in VARYING} for row in rows]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for name, processes in [("one", 1), ("two", 2)]:
        done = train(written(tmp_path, name), processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("01-teacher: starts") == 1
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    logs = sorted(path.name for path in (one / "logs").glob("*.csv"))
    assert [log.split("-", 1)[1] for log in logs] == [f"{s['name']}.csv" for s in (*STAGES, DECODER)]
    for log in logs:
        alone, shared = numbers(one / "logs" / log), numbers(two / "logs" / log)
        assert len(alone) == len(shared) >= 1
        for mine, its in zip(shared, alone, strict=True):
            assert mine == pytest.approx(its, rel=2e-3, abs=1e-4), log
    assert (two / "pipeline" / "model_index.json").exists()


@pytest.mark.slow
def test_a_batch_that_does_not_fall_into_equal_parts_is_one_line(tmp_path: Path) -> None:
    done = train(written(tmp_path, "odd", batch=6), processes=2)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("archsearch:")]
    expected = (
        "stages[1].batch_size: batch_size 6 is not a multiple of 2 processes × 2 accumulation steps; use a multiple"
    )
    assert len(told) == 1
    assert expected in told[0]
    assert "archsearch" not in done.stderr.replace(told[0], "").split("Traceback")[0]
