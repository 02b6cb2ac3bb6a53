"""Evaluation of candidates: a short training run per seed, samples, distances and validation loss."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol
from archsearch.quality import distances
from archsearch.quality.evaluation_data import FIXED, EvaluationData, load_evaluation_data
from archsearch.quality.supernet import Supernet
from archsearch.score import Quality
from archsearch.stats import intervals
from archsearch.stats.estimate import DistanceEstimate, Estimate
from snapgen import devices
from snapgen.architecture.schema import Architecture
from snapgen.data.pixels import grid, to_uint8
from snapgen.diffusion import rectified_flow
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write
from snapgen.models.unet import UNet
from snapgen.optim.ema import EMA
from snapgen.progress import ProgressCallback, ignore_progress, subtask
from snapgen.seeding import derive_seed
from snapgen.training.short_run import ShortRunConfig, TrainResult, train

WORST = 1e6
"""Value of every metric of a diverged run: finite, so that it can be stored, and worse than every other value."""

PROGRESS_REPORTS = 20
"""Number of progress reports per training run."""

CURVE_POINTS = 4
"""Number of evenly spaced steps at which the curve has a validation loss, including the last."""

TRAINING_SHARE = 0.85
"""Approximate fraction of a seed's time that is spent on training; only used for progress."""

SAMPLING_BATCH_SIZE = 64
"""Number of images that are generated at once."""

GRID = (6, 8)
"""Rows and columns of samples.png, if there are that many samples."""


def _silent(phase: str, fraction: float) -> None:
    pass


@dataclass
class SeedRun:
    """Training run of one seed, with its evaluation."""

    outcome: TrainResult
    unet: UNet
    """The net with the EMA weights."""
    curve: list[tuple[int, float, float | None]]
    """Step, mean training loss since the previous row, and validation loss if it was measured."""
    pair_losses: Tensor
    """Loss of each validation pair, (pairs,) float64."""
    frechet: DistanceEstimate | None = None
    kernel: DistanceEstimate | None = None
    images: Tensor | None = None
    """Generated samples, (samples, 3, H, W) uint8."""


class Evaluator:
    """Scores candidates under one protocol.

    Latents, text embeddings and reference statistics are computed once, or read from the cache. Samples are generated
    for captions of held-out concepts; the reference of the distances is the training images. Everything except a
    candidate's own training (prompts, sampling noise, validation pairs) is the same for all candidates.

    Args:
        protocol: training and evaluation settings.
        device: device to train and sample on; None: the default device.

    Raises:
        InputError: if data or models of the protocol cannot be loaded.
    """

    def __init__(self, protocol: EvaluationProtocol, device: torch.device | None = None) -> None:
        self.protocol = protocol
        self.device = device or devices.default_device()
        self._data: EvaluationData = load_evaluation_data(protocol, self.device)
        self._supernet = None
        if protocol.init_from is not None:
            self._supernet = Supernet(protocol.init_from, prediction=protocol.prediction_type)
            self._supernet.unet.to(self.device)

    @property
    def resolved(self) -> ResolvedProtocol:
        """The protocol with the digests of its files."""
        return self._data.resolved

    @property
    def latent_channels(self) -> int:
        """Number of latent channels that an architecture must have."""
        return self._data.latent_shape[0]

    @property
    def latent_size(self) -> int:
        """Height and width of the latents; must be divisible by an architecture's stride."""
        return self._data.latent_shape[1]

    @property
    def context_dim(self) -> int:
        """Context dimension that an architecture with cross-attention must have."""
        return int(self._data.validation_context.shape[2])

    @property
    def context_tokens(self) -> int:
        """Length of every context."""
        return int(self._data.validation_context.shape[1])

    def check(self, arch: Architecture) -> None:
        """Check that an architecture can be trained under this protocol.

        Raises:
            InputError: if its latent channels, context dimension or stride do not fit, or it is not a sub-network of
                the supernetwork (`EvaluationProtocol.init_from`).
        """
        source = f"architecture {arch.id}"
        if arch.latent_channels != self.latent_channels:
            problem = f"is {arch.latent_channels}; the protocol's autoencoder has {self.latent_channels}"
            raise InputError(source, problem, "make them equal", place="latent_channels")
        if arch.has_cross_attention and arch.context_dim != self.context_dim:
            problem = f"is {arch.context_dim}; the protocol's text encoder has {self.context_dim}"
            raise InputError(source, problem, "make them equal", place="context_dim")
        if self.latent_size % arch.stride:
            problem = f"has {len(arch.down)} levels, but a latent of size {self.latent_size} cannot be halved as often"
            raise InputError(source, problem, "remove levels or raise the resolution", place="down")
        if self._supernet is not None:
            self._supernet.check(arch)

    def score(
        self,
        arch: Architecture,
        *,
        study_seed: int,
        progress: ProgressCallback = ignore_progress,
        artifacts: Path | None = None,
    ) -> Quality:
        """Train a candidate with each seed of the protocol, and evaluate it.

        The result is deterministic for a canonical architecture, protocol and ``study_seed``, on one machine with a
        fixed number of threads. Each metric is the mean over seeds; see `archsearch.stats.intervals` for its interval.

        Args:
            arch: the candidate.
            study_seed: seed from which the seeds of the runs are derived.
            progress: called with the current phase and the completed fraction.
            artifacts: folder for the artifacts of the first seed: ``samples.png``, ``curve.csv`` and ``unet/`` (EMA
                weights for `UNet.from_pretrained`, and the protocol).

        Raises:
            InputError: like `check`.
        """
        self.check(arch)
        runs, seeds = [], self.protocol.train_seeds
        for number, seed in enumerate(seeds):
            part = subtask(progress, number / len(seeds), (number + 1) / len(seeds))
            run = self._run(arch, seed, derive_seed(study_seed, "run", seed), part)
            if artifacts is not None and number == 0:
                self.write(run, artifacts)
            run.images = None
            runs.append(run)
            if run.outcome.diverged:
                break
        return self.quality(runs)

    def _run(self, arch: Architecture, seed: int, derived: int, progress: ProgressCallback) -> SeedRun:
        unet = self.initial_network(arch, derive_seed(derived, "weights"))
        return self.run(unet, self.protocol, number=seed, seed=derived, progress=progress)

    def initial_network(self, arch: Architecture, seed: int) -> UNet:
        """The net to train, with its initial weights."""
        if self._supernet is not None:
            return self._supernet.net(arch, seed=seed)
        unet = self.net(arch)
        unet.init_weights(seed)
        return unet

    def run(
        self,
        unet: UNet,
        training: ShortRunConfig,
        *,
        number: int,
        seed: int,
        block_dropout: float = 0,
        progress: ProgressCallback = ignore_progress,
    ) -> SeedRun:
        """Train a net on the protocol's data, and evaluate it with its EMA weights.

        Args:
            unet: net on the evaluator's device; trained in place.
            training: the protocol itself, or other training settings for its data.
            number: number of the run in progress messages.
            seed, block_dropout: see `snapgen.training.short_run.train`.
            tell: progress callback.
        """
        ema_unet = self.net(unet.arch)
        curve: list[tuple[int, float, float | None]] = []
        steps = training.steps
        every = max(1, steps // PROGRESS_REPORTS)

        def report(step: int, losses: list[float], average: EMA) -> None:
            validation = None
            if step // every % max(1, PROGRESS_REPORTS // CURVE_POINTS) == 0 and step < steps:
                ema_unet.load_state_dict(average.state())
                validation = float(self.pair_losses(ema_unet).mean())
            curve.append((step, sum(losses) / len(losses), validation))
            progress(TRAINING_SHARE * step / steps, f"training seed {number}")

        outcome = train(
            unet,
            self._data.training,
            training,
            seed=seed,
            block_dropout=block_dropout,
            report=report,
            report_every=every,
        )
        ema_unet.load_state_dict(outcome.ema_weights)
        outcome.ema_weights = {}
        run = self.evaluate(ema_unet, number=number, progress=progress)
        outcome.diverged |= run.outcome.diverged
        if curve and not outcome.diverged:
            curve[-1] = (*curve[-1][:2], float(run.pair_losses.mean()))
        return dataclasses.replace(run, outcome=outcome, curve=curve)

    def evaluate(self, unet: UNet, *, number: int, progress: ProgressCallback = ignore_progress) -> SeedRun:
        """Evaluate a net without training it."""
        pair_losses = self.pair_losses(unet)
        finite = all(bool(tensor.isfinite().all()) for tensor in [pair_losses, *unet.state_dict().values()])
        run = SeedRun(TrainResult(ema_weights={}, diverged=not finite), unet, [], pair_losses)
        if finite:
            self._sample(run, number, subtask(progress, TRAINING_SHARE, 1))
        progress(1.0, f"seed {number} done")
        return run

    def net(self, arch: Architecture) -> UNet:
        """The uninitialized net of a compatible architecture, on the evaluator's device."""
        # Nets without cross-attention accept and ignore a context; give it the protocol's dimension.
        compatible = arch.model_copy(update={"context_dim": self.context_dim})
        unet: UNet = UNet(compatible).to(self.device)
        return unet

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.protocol.precision == "bfloat16")

    def pair_losses(self, unet: UNet) -> Tensor:
        """Loss of the net on each of the protocol's validation pairs: (pairs,) float64."""
        unet.eval()
        with self._autocast():
            return rectified_flow.validation_losses(
                unet,
                self._data.validation,
                self._data.validation_context,
                seed=FIXED,
                prediction_type=self.protocol.prediction_type,
                shift=self.protocol.timestep_shift,
            )

    def _sample(self, run: SeedRun, seed: int, progress: ProgressCallback) -> None:
        """Generate the samples, and compute their distances to the reference."""
        if self._data.extractor is None:
            return

        def sampling_progress(fraction: float, message: str = "sampling") -> None:
            progress(fraction, f"{message} seed {seed}")

        try:
            run.images = self.samples(run.unet, self.protocol.num_samples, sampling_progress)
            run.frechet, run.kernel = self.distances(run.images)
        except FloatingPointError:
            run.outcome.diverged = True

    @property
    def prompts(self) -> list[str]:
        """Captions of held-out concepts, one per sample."""
        return self._data.prompts

    def samples(self, unet: UNet, count: int, progress: ProgressCallback = ignore_progress) -> Tensor:
        """Generate the first ``count`` of the protocol's samples: (count, 3, H, W) uint8 on the CPU.

        Raises:
            FloatingPointError: like `sample_images`.
        """
        images = []
        for start in range(0, count, SAMPLING_BATCH_SIZE):
            images.append(self.sample_images(unet, range(start, min(start + SAMPLING_BATCH_SIZE, count))).cpu())
            progress((start + len(images[-1])) / count, "sampling")
        return torch.cat(images)

    def distances(self, images: Tensor) -> tuple[DistanceEstimate, DistanceEstimate]:
        """Fréchet and kernel distance of samples to the reference; the protocol must generate samples.

        Raises:
            FloatingPointError: if their features are not finite.
        """
        extractor, real = self._data.extractor, self._data.reference
        assert extractor is not None, "the protocol generates no samples"
        assert real is not None
        features = extractor(images.to(self.device), resolution=self.protocol.feature_resolution)
        if not features.isfinite().all():
            raise FloatingPointError("features")
        return distances.frechet(features, real), distances.kernel(features, real)

    @torch.no_grad()
    def sample_images(self, unet: UNet, indices: Sequence[int]) -> Tensor:
        """Generate samples for the prompts with these indices: (len(indices), 3, H, W) uint8.

        Raises:
            FloatingPointError: if the latents are not finite, which would be invisible after conversion to bytes.
        """
        noise = rectified_flow.per_image_noise(indices, self._data.latent_shape, seed=FIXED, name="sample").to(
            self.device
        )
        with self._autocast():
            latents = rectified_flow.sample(
                unet.eval(),
                noise,
                self._data.prompt_context[list(indices)],
                steps=self.protocol.num_inference_steps,
                guidance=self.protocol.guidance_scale,
                prediction_type=self.protocol.prediction_type,
                shift=self.protocol.timestep_shift,
            )
        if not latents.isfinite().all():
            raise FloatingPointError("latents")
        return to_uint8(self._data.decoder.decode(latents.float()))

    def quality(self, runs: Sequence[SeedRun]) -> Quality:
        """Combine the runs of one candidate, one per seed."""
        diverged = any(run.outcome.diverged for run in runs)
        sampled = self._data.extractor is not None
        worst = Estimate(value=WORST, low=WORST, high=WORST)
        return Quality(
            validation_loss=worst if diverged else intervals.validation_estimate([run.pair_losses for run in runs]),
            frechet_distance=(worst if diverged else _estimate([run.frechet for run in runs])) if sampled else None,
            kernel_distance=(worst if diverged else _estimate([run.kernel for run in runs])) if sampled else None,
            extractor=self._data.extractor.name if self._data.extractor else "none",
            protocol_hash=self.resolved.hash,
            training_seconds=sum(run.outcome.seconds for run in runs),
            diverged=diverged,
        )

    def write(self, run: SeedRun, folder: Path) -> None:
        """Write a run's samples, curve and weights to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "curve.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "training_loss", "validation_loss"])
            writer.writerows(
                [step, loss, "" if validation is None else validation] for step, loss, validation in run.curve
            )
        run.unet.prediction_type = self.protocol.prediction_type
        run.unet.save_pretrained(folder / "unet")
        (folder / "unet" / "protocol.json").write_text(self.resolved.model_dump_json(indent=2) + "\n")
        if run.images is not None:
            with atomic_write(folder / "samples.png") as temporary:
                Image.fromarray(grid(run.images, *GRID).permute(1, 2, 0).numpy()).save(temporary, format="png")


def _estimate(measured: Sequence[DistanceEstimate | None]) -> Estimate:
    return intervals.distance_estimate([estimate for estimate in measured if estimate is not None])
