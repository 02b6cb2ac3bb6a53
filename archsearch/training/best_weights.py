"""The best of the weights that are evaluated during a stage, by the metric that the stage names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from archsearch.stats.estimate import Estimate
from snapgen.io.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from snapgen.training.stages import HIGHER_IS_BETTER, NetStage


class BestWeights:
    """The best evaluated weights of a stage, in a file beside its checkpoint.

    Without a metric (``keep_best_by: null``) the last weights count as the best, and no file is written.

    Args:
        path: the file.
        stage: the stage.
    """

    def __init__(self, path: Path, stage: NetStage) -> None:
        self.path, self.stage = path, stage

    def offer(self, step: int, numbers: Mapping[str, Estimate], net: nn.Module) -> None:
        """Keep the net's weights if they are better than all that were evaluated before."""
        metric = self.stage.keep_best_by
        if metric is None:
            return
        loss = -numbers[metric].value if metric in HIGHER_IS_BETTER else numbers[metric].value
        if self.path.exists() and loss >= read_metadata(self.path)["loss"]:
            return
        save_checkpoint(self.path, {"net": net.state_dict()}, {"stage": self.stage.name, "step": step, "loss": loss})

    def restore(self, net: nn.Module) -> int:
        """Load the best weights into the net after the last step; returns the step that they are of."""
        if self.stage.keep_best_by is None:
            return self.stage.steps
        tensors, metadata = load_checkpoint(self.path)
        net.load_state_dict(tensors["net"])
        return int(metadata["step"])
