"""How good the net of a training is: the search's own numbers, retrieval, and a grid of samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
from snapgen.training.stages import AdversarialDistillationStage, NetStage, ProgressiveDistillationStage

BATCH = 32
"""Images drawn at once."""
GRID = (4, 8)
"""Rows and columns of a sample grid."""


@dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn."""

    steps: int
    guidance: float
    shift: float


def sampler_of(recipe: Recipe, stage: NetStage) -> SamplingConfig:
    """How the net that a stage leaves is sampled from: one that was taught by guided steps without guidance."""
    return SamplingConfig(
        steps=stage.student_steps
        if isinstance(stage, AdversarialDistillationStage | ProgressiveDistillationStage)
        else recipe.evaluation.steps,
        guidance=1 if isinstance(stage, AdversarialDistillationStage) else recipe.evaluation.guidance,
        shift=stage.timestep_shift,
    )


class RecipeEvaluator:
    """Judges nets of one recipe at one resolution, always by the same pairs, captions and noise.

    The distances' reference are the training images; captions are those of held-out concepts, as in a search.
    """

    def __init__(self, material: RecipeData, resolution: int) -> None:
        self.material, self.resolution = material, resolution
        self.settings = material.recipe.evaluation
        self._held = material.encoded("val", resolution)

    def ready(self, *, samples: bool) -> None:
        """Load what will be needed, so that what is missing is missed before anything is trained.

        Args:
            samples: whether samples will be judged, or only losses taken.

        Raises:
            InputError: if something cannot be had.
        """
        if samples and self.settings.samples:
            _ = self._extractor, self._reference, self._retriever if self.settings.retrieval else None

    def pair_losses(self, net: UNet | Teacher, *, shift: float) -> Tensor:
        """The loss of each of the fixed pairs: (pairs,) float64."""
        pairs = torch.arange(self.settings.pairs) * len(self._held.latents) // self.settings.pairs
        captions = self._held.teacher if isinstance(net, Teacher) else self._held.student
        condition = captions.condition(pairs)

        def told(x: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
            assert rows is not None
            return _said(net, x, t, _on(condition, rows, x.device))

        net.eval()
        return self._process(net, shift).validation_losses(
            told,
            self._held.latents[pairs].float().to(self.material.device),
            torch.arange(len(pairs)),
            seed=FIXED,
        )

    def _process(self, net: UNet | Teacher, shift: float) -> NoiseProcess:
        prediction = net.prediction if isinstance(net, Teacher) else self.material.recipe.prediction
        return process.make_process(prediction, shift=shift)

    def measure(self, unet: UNet, sampler: SamplingConfig) -> dict[str, Estimate]:
        """Every number of a net at the end of a stage, each with an interval for other samples and captions."""
        found = {"validation_loss": intervals.validation_estimate([self.pair_losses(unet, shift=sampler.shift)])}
        if self.settings.samples:
            images = self.samples(unet, sampler)
            drawn = self._extractor(images, resolution=self.settings.feature_resolution)
            found["frechet_distance"] = intervals.distance_estimate([distances.frechet(drawn, self._reference)])
            found["kernel_distance"] = intervals.distance_estimate([distances.kernel(drawn, self._reference)])
            if self.settings.retrieval:
                retrieval = self._retriever.score(images, self.prompts)
                found |= {"retrieval_r1": retrieval.r1, "retrieval_r10": retrieval.r10, "retrieval_mrr": retrieval.mrr}
        return found

    @property
    def prompts(self) -> list[str]:
        """Held-out captions, one a sample, in a fixed order."""
        return fixed_prompts(self._held.images.captions, self.settings.samples)

    def samples(self, unet: UNet, sampler: SamplingConfig) -> Tensor:
        """An image of each of `prompts`: (samples, 3, H, W) uint8 on the CPU."""
        return self.draw(unet, self.prompts, sampler)

    def sheet(self, unet: UNet, sampler: SamplingConfig) -> Tensor:
        """A grid of the recipe's own prompts: (3, H, W) uint8."""
        rows, columns = GRID
        named = list(self.settings.prompts)
        prompts = named or fixed_prompts(self._held.images.captions, rows * columns)
        return grid(self.draw(unet, prompts, sampler), -(-len(prompts) // columns), columns)

    @torch.no_grad()
    def draw(self, unet: UNet, prompts: Sequence[str], sampler: SamplingConfig) -> Tensor:
        """Images of prompts, each from its index's noise: (len(prompts), 3, H, W) uint8 on the CPU."""
        unet.eval()
        coder, device = self.material.autoencoder, self.material.device
        contexts = conditioning.encode(prompts, self.material.recipe.text)
        shape = tuple(self._held.latents.shape[1:])
        images = []
        for start in range(0, len(prompts), BATCH):
            indices = range(start, min(start + BATCH, len(prompts)))
            latents = self._process(unet, sampler.shift).sample(
                unet,
                rectified_flow.per_image_noise(indices, shape, seed=FIXED, name="sample").to(device),
                contexts.condition(torch.tensor(indices)).context.to(device),
                steps=sampler.steps,
                guidance=sampler.guidance,
            )
            images.append(to_uint8(coder.decode(latents)).cpu())
        return torch.cat(images)

    @functools.cached_property
    def _extractor(self) -> FeatureExtractor:
        return feature_extractors.load_extractor(self.settings.extractor).to(self.material.device)

    @functools.cached_property
    def _reference(self) -> ReferenceStats:
        return reference_of(
            self.material.images("train", self.resolution),
            self._extractor,
            digest=feature_extractors.digest(self.settings.extractor),
            feature_resolution=self.settings.feature_resolution,
            device=self.material.device,
        )

    @functools.cached_property
    def _retriever(self) -> Retriever:
        return Retriever.fitted(self.material.images("train", self.resolution), device=self.material.device)


def _said(net: UNet | Teacher, x: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
    output: Tensor = net(x, t, *condition) if isinstance(net, Teacher) else net(x, t, condition.context)
    return output


def _on(condition: Conditioning, rows: Tensor, device: torch.device) -> Conditioning:
    context, pooled = (None if x is None else x[rows.to(x.device)].to(device) for x in condition)
    assert context is not None
    return Conditioning(context, pooled)
