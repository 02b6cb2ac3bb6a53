"""Training stages, their batches and the training loop."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.training.loop import StepStats, Trainer
    from snapgen.training.stages import (
        AdversarialDistillationStage,
        AnyStage,
        DecoderStage,
        FlowMatchingStage,
        ProgressiveDistillationStage,
    )
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "AdversarialDistillationStage",
    "AnyStage",
    "DecoderStage",
    "FlowMatchingStage",
    "ProgressiveDistillationStage",
    "StepStats",
    "Trainer",
]
