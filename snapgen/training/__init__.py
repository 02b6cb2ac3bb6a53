"""Training stages, their batches and the training loop."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.training.loop import StepStats as StepStats, Trainer as Trainer
    from snapgen.training.stages import (
        AdversarialDistillationStage as AdversarialDistillationStage,
        AnyStage as AnyStage,
        DecoderStage as DecoderStage,
        FlowMatchingStage as FlowMatchingStage,
        ProgressiveDistillationStage as ProgressiveDistillationStage,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
