"""Studies, an ablation and an evolution that really train, for a second or so each, on the embedded emoji."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from archsearch import library
from tests.archsearch.studies import tiny_recipe

SPACE: dict[str, Any] = {
    "latent_size": 8,
    "context_tokens": 16,
    "base": {
        "latent_channels": 4,
        "context_dim": 384,
        "norm_groups": 4,
        "time": {"embed_dim": 8, "hidden_dim": 16},
        "down": [
            {"channels": 8, "num_res_blocks": 2, "head_dim": 4},
            {"channels": 16, "num_res_blocks": 1, "num_transformers": 1, "head_dim": 4},
        ],
        "mid": {"num_res_blocks": 1, "num_transformers": 1, "head_dim": 4},
        "up": [
            {"channels": 8, "num_res_blocks": 1, "head_dim": 4},
            {"channels": 16, "num_res_blocks": 1, "num_transformers": 1, "head_dim": 4},
        ],
    },
}
KNOBS = {"levels[1].self_attention": [True, False], "all.ffn_ratio": [2, 3, 4], "levels[1].channels": [16, 24, 32]}
STUDY: dict[str, Any] = {
    "space": "tiny.yml",
    "objectives": ["validation_loss", "latency_ms"],
    "sampler": "random",
    "latency": {"device": "predicted:iphone-16-pro-max"},
    "protocol": {"steps": 3, "batch_size": 4, "train_seeds": [0], "num_samples": 0, "validation_pairs": 8},
}
ABLATION: dict[str, Any] = {
    "final_row": "2",
    "rows": {
        "0": {"title": "base"},
        "1": {"title": "narrow", "baseline": "0", "overrides": {"all.ffn_ratio": 2}},
        "2": {"title": "separable", "baseline": "1", "overrides": {"all.conv": "separable", "all.expansion": 1}},
    },
}
EVOLUTION: dict[str, Any] = {
    "target_ratio": 0.9,
    "tolerance": 0.2,
    "round_steps": 2,
    "rounds": 1,
    "table": {"validation_nets": 0},
}


def write(folder: Path) -> None:
    """Write them as the shipped ones lie: ``studies/search/emoji.yaml`` and so on, and a recipe of all stages.

    A study's space lies beside it, with a suffix that keeps it from being taken for a study.
    """

    def put(place: str, values: dict[str, Any]) -> None:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values))

    for kind in ("search", "ablation"):
        put(f"studies/{kind}/tiny.yml", {**SPACE, "knobs": KNOBS})
    put("spaces/emoji.yaml", {**SPACE, "knobs": KNOBS})
    put("studies/evolution/tiny.yml", {**SPACE, "blocks": {"extra_copies": 1}})
    put("studies/search/emoji.yaml", {**STUDY, "trials": 3})
    put("studies/search/factorial.yaml", {**STUDY, "sampler": "grid", "trials": 18})
    costs = ["params", "latency_ms"]
    put("studies/ablation/emoji.yaml", {**STUDY, "objectives": costs, "ablation": ABLATION})
    put("studies/evolution/emoji.yaml", {**STUDY, "evolve": EVOLUTION})
    recipe = yaml.safe_load(tiny_recipe.written(folder).read_text())
    put("studies/training/emoji.yaml", {**recipe, "name": "training-emoji"})


def ship(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Put them in the place of the shipped ones, and work in an empty folder."""
    write(folder / "shipped")
    patch.setattr(library, "_folder", lambda name: folder / "shipped" / name)
    patch.chdir(folder)
