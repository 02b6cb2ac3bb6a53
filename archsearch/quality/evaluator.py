"""Evaluation of nets at one resolution: validation loss, samples, distances, caption retrieval, copies and grids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archsearch.protocol import EvaluationConfig
from archsearch.quality import distances, feature_extractors
from archsearch.quality.distances import MemorizationCheck, ReferenceStats
from archsearch.quality.feature_extractors import FeatureExtractor
from archsearch.quality.retrieval import Retriever
from archsearch.stats import intervals
from archsearch.stats.estimate import DistanceEstimate, Estimate
from snapgen.autoencoders.latents import ENCODE_BATCH_SIZE
from snapgen.conditioning import captions as conditioning
from snapgen.conditioning.captions import Conditioning, EncodedCaptions
from snapgen.data.pixels import grid, to_uint8
from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import NoiseProcess
from snapgen.errors import InputError
from snapgen.io.cache import JSON, cached_tensors
from snapgen.models.unet import UNet
from snapgen.objectives.teacher import Teacher
from snapgen.progress import ProgressCallback, ignore_progress
from snapgen.seeding import derive_seed
from snapgen.training.data import EncodedDataset, TrainingData

FIXED = 0
"""Seed of everything that all evaluations share: prompts, sampling noise and validation pairs."""
NORMAL_QUANTILE = 1.96
"""Standard errors on either side of a value that its 95 % interval covers."""
SAMPLE_BATCH_SIZE = 32
"""Images sampled in one batch, by default."""
SAMPLE_GRID = (4, 8)
"""Rows and columns of a grid of held-out captions."""


@dataclass(frozen=True)
class SamplingConfig:
    """Settings with which images are sampled."""

    num_inference_steps: int
    guidance_scale: float
    timestep_shift: float


class Evaluator:
    """Evaluates nets on one data set at one resolution, always with the same pairs, captions and noise.

    Captions are those of held-out concepts; distances are measured against the training images. Everything is loaded
    on first use.

    Args:
        data: the encoded data.
        resolution: height and width of the images, in pixels.
        config: numbers of pairs and samples, and the feature extractor.
        trained_on: data that the nets are trained on, of which samples may be copies; None: ``data``.
        bfloat16: whether nets are evaluated under bfloat16 autocast.
        batch_size: images sampled in one batch.
    """

    def __init__(
        self,
        data: TrainingData,
        resolution: int,
        config: EvaluationConfig,
        *,
        trained_on: TrainingData | None = None,
        bfloat16: bool = False,
        batch_size: int = SAMPLE_BATCH_SIZE,
    ) -> None:
        self.data, self.resolution, self.config = data, resolution, config
        self.trained_on = trained_on or data
        self._bfloat16, self._batch_size = bfloat16, batch_size

        @functools.lru_cache(maxsize=4)  # of this evaluator: one on a method would keep every evaluator alive
        def contexts(prompts: tuple[str, ...]) -> EncodedCaptions:
            return conditioning.encode(prompts, data.text_encoders)

        self._contexts = contexts

    def preload(self, *, samples: bool, retrieval: bool = False, memorization: bool = False) -> None:
        """Load what an evaluation needs, so that missing files are reported before the training starts.

        Args:
            samples: whether samples will be evaluated, or only validation losses.
            retrieval: whether caption retrieval will be measured.
            memorization: whether copies of training images will be counted.

        Raises:
            InputError: if a file is missing.
        """
        _ = self._validation_pairs
        if samples:
            _ = self.extractor, self._reference
            _ = self.retriever if retrieval else None, self.memorization if memorization else None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        channels, height, width = self._heldout.latents.shape[1:]
        return channels, height, width

    def validation_losses(self, net: UNet | Teacher, process: NoiseProcess) -> Tensor:
        """Loss of each of the fixed (image, timestep, noise) triples: (validation_pairs,) float64 on the CPU.

        Args:
            net: the net, on the data's device.
            process: noise process of its prediction type.
        """
        latents, student, teacher = self._validation_pairs
        condition = teacher if isinstance(net, Teacher) else student

        def denoise(x: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
            assert rows is not None
            context, pooled = (None if part is None else part[rows] for part in condition)
            output: Tensor = net(x, t, context, pooled) if isinstance(net, Teacher) else net(x, t, context)
            return output

        net.eval()
        with self._autocast():  # a pair's row stands for its context, since a teacher takes pooled embeddings, too
            rows = torch.arange(len(latents), device=latents.device)
            return process.validation_losses(denoise, latents, rows, seed=FIXED)

    def validation_loss(self, net: UNet | Teacher, process: NoiseProcess) -> Estimate:
        """Mean of `validation_losses`, with its interval.

        Raises:
            FloatingPointError: if a loss is not finite.
        """
        losses = self.validation_losses(net, process)
        if not losses.isfinite().all():
            raise FloatingPointError("validation losses")
        return intervals.validation_estimate([losses])

    def prompts(self, count: int | None = None) -> list[str]:
        """The first ``count`` held-out captions in a fixed order; None: one for each of the configured samples."""
        return fixed_prompts(self._heldout.images.captions, self.config.num_samples if count is None else count)

    def samples(
        self,
        net: UNet,
        process: NoiseProcess,
        sampling: SamplingConfig,
        count: int | None = None,
        *,
        progress: ProgressCallback = ignore_progress,
    ) -> Tensor:
        """An image for each of the first ``count`` of `prompts`: (count, 3, H, W) uint8 on the CPU.

        Raises:
            FloatingPointError: if latents are not finite, which would be invisible after conversion to bytes.
        """
        return self.sample_images(net, process, sampling, self.prompts(count), progress=progress)

    @torch.no_grad()
    def sample_images(
        self,
        net: UNet,
        process: NoiseProcess,
        sampling: SamplingConfig,
        prompts: Sequence[str],
        *,
        progress: ProgressCallback = ignore_progress,
    ) -> Tensor:
        """Sample images of prompts, each from the noise of its index: (len(prompts), 3, H, W) uint8 on the CPU.

        Raises:
            FloatingPointError: if latents are not finite.
        """
        device, images = self.data.device, []
        contexts = self._contexts(tuple(prompts))
        null = contexts.null().context.to(device)
        for start in range(0, len(prompts), self._batch_size):
            indices = range(start, min(start + self._batch_size, len(prompts)))
            with self._autocast():
                latents = process.sample(
                    net.eval(),
                    rectified_flow.per_image_noise(indices, self.latent_shape, seed=FIXED, name="sample").to(device),
                    contexts.conditioning(torch.tensor(indices)).context.to(device),
                    steps=sampling.num_inference_steps,
                    guidance=sampling.guidance_scale,
                    null=null,
                )
            if not latents.isfinite().all():
                raise FloatingPointError("samples with latents")
            images.append(to_uint8(self.data.autoencoder.decode(latents.float())).cpu())
            progress(indices.stop / len(prompts), "sampling")
        return torch.cat(images)

    def grid_samples(
        self, net: UNet, process: NoiseProcess, sampling: SamplingConfig, prompts: Sequence[str] = ()
    ) -> Tensor:
        """Samples of the prompts, or of held-out captions if there are none, for a grid: (N, 3, H, W) uint8."""
        rows, columns = SAMPLE_GRID
        prompts = list(prompts) or fixed_prompts(self._heldout.images.captions, rows * columns)
        return self.sample_images(net, process, sampling, prompts)

    def nearest_grid(self, images: Tensor) -> Tensor:
        """A grid of samples above their nearest training images, and of held-out images above theirs."""
        return self.memorization.comparison(images, self.features(images), SAMPLE_GRID[1])

    def distances(self, images: Tensor) -> tuple[DistanceEstimate, DistanceEstimate]:
        """Fréchet and kernel distance of samples to the training images.

        Raises:
            FloatingPointError: if their features are not finite.
        """
        features = self.features(images)
        return distances.frechet(features, self._reference), distances.kernel(features, self._reference)

    def features(self, images: Tensor) -> Tensor:
        """Features of samples (N, 3, H, W) in [0, 255] for the distances: (N, D).

        Raises:
            FloatingPointError: if they are not finite.
        """
        features = self.extractor(images.to(self.data.device), resolution=self.config.feature_resolution)
        if not features.isfinite().all():
            raise FloatingPointError("samples with features")
        return features

    def measure(
        self, net: UNet, process: NoiseProcess, sampling: SamplingConfig, *, retrieval: bool = False
    ) -> dict[str, Estimate]:
        """All metrics of a net by name, each with an interval over pairs, samples or captions.

        Args:
            net: the net, on the data's device.
            process: noise process of its prediction type.
            sampling: settings with which samples are drawn.
            retrieval: whether to measure how often samples retrieve their own captions.

        Raises:
            FloatingPointError: if losses, latents or features are not finite.
        """
        metrics = {"validation_loss": self.validation_loss(net, process)}
        if self.config.num_samples:
            images = self.samples(net, process, sampling)
            features = self.features(images)
            metrics["frechet_distance"] = intervals.distance_estimate([distances.frechet(features, self._reference)])
            metrics["kernel_distance"] = intervals.distance_estimate([distances.kernel(features, self._reference)])
            metrics["copied"] = self.memorization.copied(features)
            if retrieval:
                scores = self.retriever.score(images, self.prompts())
                metrics |= {"retrieval_r1": scores.r1, "retrieval_r10": scores.r10, "retrieval_mrr": scores.mrr}
        return metrics

    def retrieval(self, images: Tensor) -> DistanceEstimate:
        """Mean reciprocal rank of the captions of samples, with its standard error over the captions."""
        mrr = self.retriever.score(images, self.prompts(len(images))).mrr
        return DistanceEstimate(mrr.value, (mrr.high - mrr.low) / (2 * NORMAL_QUANTILE))

    @functools.cached_property
    def extractor(self) -> FeatureExtractor:
        """Feature extractor of the distances, on the device."""
        return feature_extractors.load_extractor(self.config.feature_extractor).to(self.data.device)

    @functools.cached_property
    def retriever(self) -> Retriever:
        """Predictor of caption embeddings from images, fitted to the training images."""
        return Retriever.fitted(self.data.images("train", self.resolution), device=self.data.device)

    @functools.cached_property
    def memorization(self) -> MemorizationCheck:
        """Check for copies of the images that the nets are trained on."""
        return MemorizationCheck.prepared(
            self.trained_on,
            self.data,
            self.resolution,
            self.extractor,
            extractor_digest=feature_extractors.digest(self.config.feature_extractor),
            feature_resolution=self.config.feature_resolution,
            examples=SAMPLE_GRID[1],
        )

    @functools.cached_property
    def _reference(self) -> ReferenceStats:
        """Statistics of the training images, read from the cache if they exist there."""
        images, side = self.data.images("train", self.resolution), self.config.feature_resolution
        if len(images) < 2:
            remedy = "add training images, or draw no samples (num_samples: 0)"
            raise InputError(images.name, "has a single training image, where distances need two or more", remedy)
        key: dict[str, JSON] = {
            "images": images.digest,
            "extractor": feature_extractors.digest(self.config.feature_extractor),
            "resolution": images.resolution,
            "feature_resolution": side,
        }
        batches = images.batches(ENCODE_BATCH_SIZE)
        features = (self.extractor(batch.to(self.data.device), resolution=side) for batch in batches)
        return ReferenceStats.from_tensors(
            cached_tensors("reference", key, lambda: distances.reference(features, len(images)).tensors())
        )

    @functools.cached_property
    def _heldout(self) -> EncodedDataset:
        return self.data.encoded("val", self.resolution)

    @functools.cached_property
    def _validation_pairs(self) -> tuple[Tensor, Conditioning, Conditioning]:
        """Latents of the pairs and their conditioning for student and teacher, on the device."""
        count = self.config.validation_pairs
        pairs = torch.arange(count) * len(self._heldout.latents) // count  # image indices, evenly spread over the split
        latents = self._heldout.latents[pairs].float().to(self.data.device)
        student = self._heldout.student.conditioning(pairs).to(self.data.device)
        shared = self._heldout.teacher is self._heldout.student
        return latents, student, student if shared else self._heldout.teacher.conditioning(pairs).to(self.data.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.data.device.type, torch.bfloat16, enabled=self._bfloat16)


def sheet(images: Tensor) -> Tensor:
    """A grid of images with as many columns as `SAMPLE_GRID`: (N, 3, H, W) → (3, H', W') uint8."""
    return grid(images, -(-len(images) // SAMPLE_GRID[1]), SAMPLE_GRID[1])


def fixed_prompts(captions: list[str], count: int) -> list[str]:
    """The first ``count`` distinct captions in a fixed shuffled order, repeated if there are too few.

    Repeated captions are sampled with other noise.
    """
    distinct = sorted(set(captions))
    order = torch.randperm(
        len(distinct), generator=torch.Generator().manual_seed(derive_seed(FIXED, "prompts"))
    ).tolist()
    return [distinct[order[i % len(order)]] for i in range(count)]
