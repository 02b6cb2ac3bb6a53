"""Evaluation of a recipe's nets: on which data, how they are sampled, what is logged, and which weights are kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from archsearch.quality.evaluator import Evaluator, SamplingConfig, sheet
from archsearch.stats.estimate import Estimate
from archsearch.training.log import TrainLog
from archsearch.training.recipe import Recipe, trains_student
from snapgen.diffusion.process import NoiseProcess, make_process
from snapgen.errors import InputError
from snapgen.io.cache import JSON
from snapgen.io.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from snapgen.models.unet import UNet
from snapgen.objectives.teacher import Teacher
from snapgen.optim.ema import EMA
from snapgen.training.data import TrainingData
from snapgen.training.stages import (
    HIGHER_IS_BETTER,
    AdversarialDistillationStage,
    NetStage,
    ProgressiveDistillationStage,
)


def training_data(recipe: Recipe, device: torch.device, data: str | None = None) -> TrainingData:
    """A data set as a recipe's nets take it, on a device; None: the one that they are trained on."""
    return TrainingData(
        data or recipe.data,
        recipe.autoencoder,
        recipe.text_encoders,
        teacher_text_encoders=recipe.teacher_text_encoders,
        device=device,
    )


def sampling_config(recipe: Recipe, stage: NetStage) -> SamplingConfig:
    """Sampling settings of the net that a stage produces.

    A stage that distills steps uses its own number of steps. Adversarial distillation learns from a guided teacher, so
    its net is sampled without guidance.
    """
    return SamplingConfig(
        num_inference_steps=stage.student_steps
        if isinstance(stage, AdversarialDistillationStage | ProgressiveDistillationStage)
        else recipe.evaluation.num_inference_steps,
        guidance_scale=1 if isinstance(stage, AdversarialDistillationStage) else recipe.evaluation.guidance_scale,
        timestep_shift=stage.timestep_shift_value,
    )


def process_of(recipe: Recipe, net: UNet | Teacher, sampling: SamplingConfig) -> NoiseProcess:
    """Noise process of a recipe's student or teacher."""
    prediction_type = net.prediction if isinstance(net, Teacher) else recipe.prediction_type
    return make_process(prediction_type, shift=sampling.timestep_shift)


class StageEvaluator:
    """Evaluates the nets of a recipe's stages, always on the same held-out images, captions and noise.

    Args:
        recipe: the recipe.
        data: the data that the nets are trained on.
    """

    def __init__(self, recipe: Recipe, data: TrainingData) -> None:
        self.recipe = recipe
        other = recipe.evaluation.data
        self.data = data if other in (None, recipe.data) else training_data(recipe, data.device, other)
        self.trained_on = data
        self._evaluators: dict[int, Evaluator] = {}

    def at(self, resolution: int) -> Evaluator:
        """The evaluator of nets at a resolution."""
        if resolution not in self._evaluators:
            settings = self.recipe.evaluation
            self._evaluators[resolution] = Evaluator(self.data, resolution, settings, trained_on=self.trained_on)
        return self._evaluators[resolution]

    def preload(self, stage: NetStage) -> None:
        """Load what the evaluations of a stage need, so that missing files are reported before it is trained."""
        settings, evaluator = self.recipe.evaluation, self.at(stage.resolution)
        samples = trains_student(stage) and settings.num_samples > 0
        with self.recipe.error_context("evaluation"):
            evaluator.preload(samples=samples, retrieval=settings.retrieval, memorization=samples)

    def evaluate(self, stage: NetStage, net: UNet | Teacher, log: TrainLog, step: int) -> dict[str, Estimate]:
        """Evaluate and log a net after a step: all metrics and a sample grid of a student, the loss of a teacher.

        Raises:
            InputError: if losses or samples are not finite.
        """
        evaluator = self.at(stage.resolution)
        sampling = sampling_config(self.recipe, stage)
        process = process_of(self.recipe, net, sampling)
        with finite_outputs(f"stage {stage.name}"):
            if isinstance(net, Teacher):
                numbers = {"validation_loss": evaluator.validation_loss(net, process)}
                log.log_evaluation(step, numbers, None)
                return numbers
            numbers = evaluator.measure(net, process, sampling, retrieval=self.recipe.evaluation.retrieval)
            log.log_evaluation(step, numbers, sampling)
            # After adversarial distillation, one more grid with twice the steps.
            for factor in (1, 2) if isinstance(stage, AdversarialDistillationStage) else (1,):
                steps = factor * sampling.num_inference_steps
                grid_sampling = dataclasses.replace(sampling, num_inference_steps=steps)
                images = evaluator.grid_samples(net, process, grid_sampling, self.recipe.evaluation.prompts)
                log.log_image(step, sheet(images), f"{steps}-steps")
                if "copied" in numbers and factor == 1:
                    log.log_image(step, evaluator.nearest_grid(images), "nearest")
            return numbers


@contextlib.contextmanager
def finite_outputs(source: str | Path) -> Iterator[None]:
    """Convert the error of a net's evaluation whose numbers are not finite into an `InputError` of ``source``."""
    try:
        yield
    except FloatingPointError as error:
        remedy = "lower learning_rate and train the stage again"
        raise InputError(source, f"gives {error} that are not finite", remedy) from None


@contextlib.contextmanager
def ema_weights(net: nn.Module, average: EMA) -> Iterator[None]:
    """Use the averaged weights of a net inside the block, and restore its own afterwards."""
    original = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict(average.state())
    try:
        yield
    finally:
        net.load_state_dict(original)


class BestWeights:
    """The best evaluated weights of a stage, in a file beside its checkpoint.

    Without a metric (``keep_best_by: null``) the last weights count as the best, and no file is written.

    Args:
        path: the file.
        stage: the stage.
        protocol: digest of the evaluation's settings; weights that were kept by others are not compared with these.
    """

    def __init__(self, path: Path, stage: NetStage, protocol: str) -> None:
        self.path, self.stage, self.protocol = path, stage, protocol

    def offer(self, step: int, numbers: Mapping[str, Estimate], net: nn.Module) -> None:
        """Keep the net's weights if they are better than all that were evaluated before."""
        metric = self.stage.keep_best_by
        if metric is None:
            return
        loss = -numbers[metric].value if metric in HIGHER_IS_BETTER else numbers[metric].value
        kept = read_metadata(self.path) if self.path.exists() else {}
        if kept.get("protocol") == self.protocol and loss >= kept["loss"]:
            return
        notes: dict[str, JSON] = {"stage": self.stage.name, "step": step, "loss": loss, "protocol": self.protocol}
        save_checkpoint(self.path, {"net": net.state_dict()}, notes)

    def reason(self, step: int, kept: Mapping[str, Estimate], last: Mapping[str, Estimate]) -> str:
        """Why the weights of a step are kept, from the evaluations of them and of the last step."""
        metric = self.stage.keep_best_by
        assert metric is not None
        is_clear = not kept[metric].low <= last[metric].value <= kept[metric].high
        doubt = "" if is_clear else ", though its interval includes the last step's"
        return f"step {step:,} is the best by {metric} and is kept{doubt}"

    def restore(self, net: nn.Module) -> int:
        """Load the best weights into the net after the last step; returns the step that they are of."""
        if self.stage.keep_best_by is None:
            return self.stage.steps
        tensors, metadata = load_checkpoint(self.path)
        net.load_state_dict(tensors["net"])
        return int(metadata["step"])
