"""Evaluation of a net in training: the metrics of the search, caption retrieval, and a grid of samples."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archsearch.quality import distances, feature_extractors
from archsearch.quality.distances import ReferenceStats
from archsearch.quality.evaluation_data import FIXED, fixed_prompts, reference_of
from archsearch.quality.feature_extractors import FeatureExtractor
from archsearch.quality.retrieval import Retriever
from archsearch.stats import intervals
from archsearch.stats.estimate import Estimate
from archsearch.training.data import RecipeData
from archsearch.training.recipe import Recipe
from snapgen.conditioning import captions as conditioning
from snapgen.conditioning.captions import Conditioning
from snapgen.data.pixels import grid, to_uint8
from snapgen.diffusion import process, rectified_flow
from snapgen.diffusion.process import NoiseProcess
from snapgen.models.unet import UNet
from snapgen.objectives.teacher import Teacher
from snapgen.optim.ema import EMA
from snapgen.training.stages import AdversarialDistillationStage, NetStage, ProgressiveDistillationStage

SAMPLE_BATCH_SIZE = 32
"""Images sampled in one batch."""
SAMPLE_GRID = (4, 8)
"""Rows and columns of a sample grid."""


@dataclass(frozen=True)
class SamplingConfig:
    """Settings with which images are sampled."""

    num_inference_steps: int
    guidance_scale: float
    timestep_shift: float


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


class RecipeEvaluator:
    """Evaluates nets of one recipe at one resolution, always with the same pairs, captions and noise.

    Distances are measured against the training images; captions are those of held-out concepts, as in a search.
    """

    def __init__(self, data: RecipeData, resolution: int) -> None:
        self.data, self.resolution = data, resolution
        self.settings = data.recipe.evaluation
        self._heldout = data.encoded("val", resolution)

    def preload(self, *, samples: bool) -> None:
        """Load everything that the evaluation needs, so that missing files are reported before the training starts.

        Args:
            samples: whether samples will be evaluated, or only validation losses.

        Raises:
            InputError: if a file is missing.
        """
        if samples and self.settings.num_samples:
            _ = self._extractor, self._reference, self._retriever if self.settings.retrieval else None

    def validation_losses(self, net: UNet | Teacher, *, shift: float) -> Tensor:
        """Loss of each of the fixed (image, timestep, noise) triples: (validation_pairs,) float64.

        Args:
            shift: timestep shift of the noise process.
        """
        # validation_pairs image indices, evenly spread over the split
        pairs = (
            torch.arange(self.settings.validation_pairs) * len(self._heldout.latents) // self.settings.validation_pairs
        )
        captions = self._heldout.teacher if isinstance(net, Teacher) else self._heldout.student
        conditioning_of_pairs = captions.conditioning(pairs)

        def denoise(x: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
            assert rows is not None
            return _output(net, x, t, _select(conditioning_of_pairs, rows, x.device))

        net.eval()
        return self._process(net, shift).validation_losses(
            denoise,
            self._heldout.latents[pairs].float().to(self.data.device),
            torch.arange(len(pairs)),
            seed=FIXED,
        )

    def _process(self, net: UNet | Teacher, shift: float) -> NoiseProcess:
        prediction = net.prediction if isinstance(net, Teacher) else self.data.recipe.prediction_type
        return process.make_process(prediction, shift=shift)

    def measure(self, unet: UNet, sampler: SamplingConfig) -> dict[str, Estimate]:
        """All metrics of a net at the end of a stage, each with an interval over samples and captions."""
        metrics = {
            "validation_loss": intervals.validation_estimate(
                [self.validation_losses(unet, shift=sampler.timestep_shift)]
            )
        }
        if self.settings.num_samples:
            images = self.samples(unet, sampler)
            features = self._extractor(images, resolution=self.settings.feature_resolution)
            metrics["frechet_distance"] = intervals.distance_estimate([distances.frechet(features, self._reference)])
            metrics["kernel_distance"] = intervals.distance_estimate([distances.kernel(features, self._reference)])
            if self.settings.retrieval:
                retrieval = self._retriever.score(images, self.prompts)
                metrics |= {
                    "retrieval_r1": retrieval.r1,
                    "retrieval_r10": retrieval.r10,
                    "retrieval_mrr": retrieval.mrr,
                }
        return metrics

    @property
    def prompts(self) -> list[str]:
        """Held-out captions in a fixed order, one for each sample."""
        return fixed_prompts(self._heldout.images.captions, self.settings.num_samples)

    def samples(self, unet: UNet, sampler: SamplingConfig) -> Tensor:
        """One image for each of `prompts`: (num_samples, 3, H, W) uint8 on the CPU."""
        return self.sample_images(unet, self.prompts, sampler)

    def sample_grid(self, unet: UNet, sampler: SamplingConfig) -> Tensor:
        """A grid of samples of the recipe's prompts, or of held-out captions: (3, H, W) uint8."""
        rows, columns = SAMPLE_GRID
        prompts = list(self.settings.prompts) or fixed_prompts(self._heldout.images.captions, rows * columns)
        return grid(self.sample_images(unet, prompts, sampler), -(-len(prompts) // columns), columns)

    @torch.no_grad()
    def sample_images(self, unet: UNet, prompts: Sequence[str], sampler: SamplingConfig) -> Tensor:
        """Sample images of prompts, each from the noise of its index: (len(prompts), 3, H, W) uint8 on the CPU."""
        unet.eval()
        autoencoder, device = self.data.autoencoder, self.data.device
        contexts = conditioning.encode(prompts, self.data.recipe.text_encoders)
        shape = tuple(self._heldout.latents.shape[1:])  # (C, H, W)
        images = []
        for start in range(0, len(prompts), SAMPLE_BATCH_SIZE):
            indices = range(start, min(start + SAMPLE_BATCH_SIZE, len(prompts)))
            latents = self._process(unet, sampler.timestep_shift).sample(
                unet,
                rectified_flow.per_image_noise(indices, shape, seed=FIXED, name="sample").to(device),
                contexts.conditioning(torch.tensor(indices)).context.to(device),
                steps=sampler.num_inference_steps,
                guidance=sampler.guidance_scale,
            )
            images.append(to_uint8(autoencoder.decode(latents)).cpu())
        return torch.cat(images)

    @functools.cached_property
    def _extractor(self) -> FeatureExtractor:
        return feature_extractors.load_extractor(self.settings.feature_extractor).to(self.data.device)

    @functools.cached_property
    def _reference(self) -> ReferenceStats:
        return reference_of(
            self.data.images("train", self.resolution),
            self._extractor,
            digest=feature_extractors.digest(self.settings.feature_extractor),
            feature_resolution=self.settings.feature_resolution,
            device=self.data.device,
        )

    @functools.cached_property
    def _retriever(self) -> Retriever:
        return Retriever.fitted(self.data.images("train", self.resolution), device=self.data.device)


def _output(net: UNet | Teacher, x: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
    output: Tensor = net(x, t, *condition) if isinstance(net, Teacher) else net(x, t, condition.context)
    return output


def _select(condition: Conditioning, rows: Tensor, device: torch.device) -> Conditioning:
    """Rows of a conditioning, moved to a device."""
    # context (N, T, C) -> (B, T, C), pooled (N, C) -> (B, C)
    context, pooled = (None if x is None else x[rows.to(x.device)].to(device) for x in condition)
    assert context is not None
    return Conditioning(context, pooled)


@contextlib.contextmanager
def ema_weights(net: nn.Module, average: EMA) -> Iterator[None]:
    """Use the averaged weights of a net inside the block, and restore its own afterwards."""
    original = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict(average.state())
    try:
        yield
    finally:
        net.load_state_dict(original)
