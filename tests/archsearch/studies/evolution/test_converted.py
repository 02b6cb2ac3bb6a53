"""SnapFusion's own case: search and evolution begin with a converted Stable Diffusion U-Net, whatever it predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from archsearch.cli import app
from archsearch.studies.config.study import load_config
from archsearch.studies.evolution.run import evolve
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.search.weights import load_unet
from archsearch.studies.storage.database import load_study
from snapgen.errors import InputError
from snapgen.models.unet import UNet

SD15: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 384,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
"""Stable Diffusion 1.5's U-Net with fewer levels and channels, for the embedded data's latents and captions."""

EVOLVE = {"target_ratio": 0.9, "tolerance": 0.2, "round_steps": 2, "rounds": 1, "table": {"validation_nets": 0}}


@pytest.fixture(params=["noise", "v"])
def study(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a study whose candidates begin with the converted net, which predicts noise or v."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    UNet2DConditionModel(**SD15).save_pretrained("theirs")
    done = CliRunner().invoke(app, ["convert", "theirs", "--out", "ours", "--prediction", request.param, "--quiet"])
    assert done.exit_code == 0, done.output
    Path("sd15.json").write_text(UNet.from_pretrained("ours").arch.to_json())
    space = {"latent_size": 8, "context_tokens": 16, "base": "sd15.json", "blocks": {"extra_copies": 1}}
    Path("space.yml").write_text(yaml.safe_dump(space))
    return {
        "name": "converted",
        "space": "space.yml",
        "objectives": ["validation_loss", "latency_ms"],
        "sampler": "random",
        "latency": {"device": "predicted:iphone-16-pro-max"},
        "protocol": {
            "prediction_type": request.param,
            "init_from": "ours",
            "steps": 2,
            "batch_size": 4,
            "train_seeds": [0],
            "num_samples": 8,
            "num_inference_steps": 2,
            "validation_pairs": 8,
            "learning_rate": 1e-6,
        },
    }


def written(values: dict[str, Any]) -> Any:
    Path("study.yaml").write_text(yaml.safe_dump(values))
    return load_config("study.yaml")


def test_a_search_begins_with_it(study: dict[str, Any]) -> None:
    found = load_candidates(search(written({**study, "trials": 3}), quiet=True))
    base = next(c for c in found if c.name == "base")
    trained, given = load_unet(load_study_of(study), base), UNet.from_pretrained("ours")
    assert trained.prediction_type == given.prediction_type == study["protocol"]["prediction_type"]
    distances = [float((a - b).norm() / b.norm().clamp(min=1)) for a, b in pairs(trained, given)]
    assert 0 < max(distances) < 1e-2, "trained a little from the given weights"
    assert all(c.score.quality is not None and not c.score.quality.diverged for c in found)


def test_an_evolution_begins_with_it(study: dict[str, Any]) -> None:
    evolve(written({**study, "evolve": EVOLVE}), quiet=True)
    first = min(load_candidates(load_study_of(study)), key=lambda c: c.slot)
    kept, given = load_unet(load_study_of(study), first), UNet.from_pretrained("ours")
    assert kept.prediction_type == given.prediction_type
    assert all(torch.equal(a, b) for a, b in pairs(kept, given)), "the first round only values the given net's blocks"


def test_another_prediction_is_refused(study: dict[str, Any]) -> None:
    study["protocol"]["prediction_type"] = "velocity"
    with pytest.raises(InputError, match=r"predicts '.*', not 'velocity'"):
        search(written({**study, "trials": 1}), quiet=True)


def pairs(first: UNet, second: UNet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ours = dict(second.named_parameters())
    return [(weight.detach(), ours[name].detach()) for name, weight in first.named_parameters()]


def load_study_of(values: dict[str, Any]) -> Any:

    return load_study(written({**values, "trials": 3}))
