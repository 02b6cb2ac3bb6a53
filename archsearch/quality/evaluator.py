"""Quality of a candidate: a short training run a seed, samples, distances, and the fixed-pair validation loss."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
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
from snapgen.seeding import derive_seed
from snapgen.training.short_run import ShortRunConfig, TrainResult, train

ProgressCallback = Callable[[str, float], None]
"""(what is being done, share of the whole score that is done)."""


WORST = 1e6
"""Stands for every number of a run that diverged: finite, so that it can be stored, and behind every other."""


REPORTS = 20
"""Times a training run reports its progress."""


CURVE_POINTS = 4
"""Times a run's validation loss is taken for the curve, evenly spread, the last at its end."""


TRAINING_SHARE = 0.85
"""Of a seed's time, roughly; for progress alone."""


SAMPLING_BATCH = 64


GRID = (6, 8)
"""Rows and columns of samples.png, where there are so many samples."""


def _silent(stage: str, fraction: float) -> None:
    pass


@dataclass
class SeedRun:
    """One seed's training and what was measured of it."""

    outcome: TrainResult
    unet: UNet
    """With the averaged weights."""
    curve: list[tuple[int, float, float | None]]
    """Steps, training loss since the row before, validation loss where it was taken."""
    pair_losses: Tensor
    """(pairs,) float64."""
    frechet: DistanceEstimate | None = None
    kernel: DistanceEstimate | None = None
    images: Tensor | None = None
    """(samples, 3, H, W) uint8."""


class Evaluator:
    """Scores candidates under one protocol.

    Latents, text embeddings and the reference's features are computed (or read from the cache) here, once. Samples are
    drawn for captions of held-out concepts; the reference of the distances is the training images. Everything that is
    not a candidate's own training (prompts, sampling noise, validation pairs) is the same for all candidates.

    Raises:
        InputError: if something that the protocol names cannot be had.
    """

    def __init__(self, protocol: EvaluationProtocol, device: torch.device | None = None) -> None:
        self.protocol = protocol
        self.device = device or devices.default_device()
        self._materials: EvaluationData = load_evaluation_data(protocol, self.device)
        self._supernet = None
        if protocol.inherit is not None:
            self._supernet = Supernet(protocol.inherit, prediction=protocol.prediction)
            self._supernet.unet.to(self.device)

    @property
    def resolved(self) -> ResolvedProtocol:
        """The protocol with its digests."""
        return self._materials.resolved

    @property
    def latent_channels(self) -> int:
        """That an architecture must have."""
        return self._materials.latent_shape[0]

    @property
    def latent_size(self) -> int:
        """Side of the latents; an architecture's stride must divide it."""
        return self._materials.latent_shape[1]

    @property
    def context_width(self) -> int:
        """That an architecture with cross-attention must have."""
        return int(self._materials.validation_context.shape[2])

    @property
    def context_tokens(self) -> int:
        """Tokens of every context."""
        return int(self._materials.validation_context.shape[1])

    def check(self, arch: Architecture) -> None:
        """Refuse an architecture that this protocol cannot train.

        Raises:
            InputError: if its latent channels, context width or stride do not fit, or it is none of the nets that take
                the weights of the trained one (`EvaluationProtocol.inherit`).
        """
        source = f"architecture {arch.id}"
        if arch.latent_channels != self.latent_channels:
            problem = f"is {arch.latent_channels}; the protocol's autoencoder gives {self.latent_channels}"
            raise InputError(source, problem, "make them equal", place="latent_channels")
        if arch.has_cross_attention and arch.context_width != self.context_width:
            problem = f"is {arch.context_width}; the protocol's text encoder gives {self.context_width}"
            raise InputError(source, problem, "make them equal", place="context_width")
        if self.latent_size % arch.stride:
            problem = f"has {len(arch.down)} stages, which a latent of {self.latent_size} cannot be halved for"
            raise InputError(source, problem, "remove stages or raise the resolution", place="down")
        if self._supernet is not None:
            self._supernet.check(arch)

    def score(
        self,
        arch: Architecture,
        *,
        study_seed: int,
        progress: ProgressCallback | None = None,
        artifacts: Path | None = None,
    ) -> Quality:
        """Train the candidate once a seed of the protocol, and judge it.

        Equal for equal canonical architecture, protocol and ``study_seed`` on one machine with one number of threads.
        Each number is the mean over seeds; how its interval is made: `intervals`.

        Args:
            artifacts: folder that gets, of the first seed, ``samples.png``, ``curve.csv`` and ``unet/`` (averaged
                weights, as `UNet.from_pretrained` reads them, with the protocol beside them).

        Raises:
            InputError: as `check`.
        """
        self.check(arch)
        tell = progress or _silent
        runs = []
        for number, seed in enumerate(self.protocol.seeds):
            run = self._run(
                arch, seed, derive_seed(study_seed, "run", seed), _part(tell, number, len(self.protocol.seeds))
            )
            if artifacts is not None and number == 0:
                self.write(run, artifacts)
            run.images = None
            runs.append(run)
            if run.outcome.diverged:
                break
        return self.quality(runs)

    def _run(self, arch: Architecture, seed: int, derived: int, tell: ProgressCallback) -> SeedRun:
        unet = self.begun(arch, derive_seed(derived, "weights"))
        return self.run(unet, self.protocol, number=seed, seed=derived, tell=tell)

    def begun(self, arch: Architecture, seed: int) -> UNet:
        """The net to train, with the weights that it begins with."""
        if self._supernet is not None:
            return self._supernet.net(arch, seed=seed)
        unet = self.net(arch)
        unet.initialise(seed)
        return unet

    def run(
        self,
        unet: UNet,
        training: ShortRunConfig,
        *,
        number: int,
        seed: int,
        block_dropout: float = 0,
        tell: ProgressCallback = _silent,
    ) -> SeedRun:
        """Train a net on the protocol's data from where it stands, and measure it with its averaged weights.

        Args:
            unet: on the evaluator's device; trained in place.
            training: the protocol itself, or other settings for its data.
            number: what the run is called in progress.
            seed: as `snapgen.training.short_run.train`, as is ``block_dropout``.
        """
        judge = self.net(unet.arch)
        curve: list[tuple[int, float, float | None]] = []
        steps = training.steps
        every = max(1, steps // REPORTS)

        def report(step: int, losses: list[float], average: EMA) -> None:
            due = step // every % max(1, REPORTS // CURVE_POINTS) == 0 and step < steps
            validation = None
            if due:
                judge.load_state_dict(average.state())
                validation = float(self.pair_losses(judge).mean())
            curve.append((step, sum(losses) / len(losses), validation))
            tell(f"training seed {number}", TRAINING_SHARE * step / steps)

        outcome = train(
            unet,
            self._materials.training,
            training,
            seed=seed,
            block_dropout=block_dropout,
            report=report,
            report_every=every,
        )
        judge.load_state_dict(outcome.average)
        outcome.average = {}
        run = self.measured(judge, number=number, tell=tell)
        outcome.diverged |= run.outcome.diverged
        if curve and not outcome.diverged:
            curve[-1] = (*curve[-1][:2], float(run.pair_losses.mean()))
        return dataclasses.replace(run, outcome=outcome, curve=curve)

    def measured(self, unet: UNet, *, number: int, tell: ProgressCallback = _silent) -> SeedRun:
        """What is measured of a run, of a net that is not trained."""
        pair_losses = self.pair_losses(unet)
        finite = all(bool(tensor.isfinite().all()) for tensor in [pair_losses, *unet.state_dict().values()])
        run = SeedRun(TrainResult(average={}, diverged=not finite), unet, [], pair_losses)
        if finite:
            self._sample(run, number, tell)
        tell(f"seed {number} done", 1.0)
        return run

    def net(self, arch: Architecture) -> UNet:
        """The untrained net of an architecture that fits, on the evaluator's device."""
        # Without cross-attention a net has no context width of its own: with this one it takes a context, unused.
        fitting = arch.model_copy(update={"context_width": self.context_width})
        unet: UNet = UNet(fitting).to(self.device)
        return unet

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.protocol.precision == "bfloat16")

    def pair_losses(self, unet: UNet) -> Tensor:
        """The loss of each of the protocol's fixed pairs: (pairs,) float64."""
        unet.eval()
        with self._autocast():
            return rectified_flow.validation_losses(
                unet,
                self._materials.validation,
                self._materials.validation_context,
                seed=FIXED,
                prediction=self.protocol.prediction,
                shift=self.protocol.shift,
            )

    def _sample(self, run: SeedRun, seed: int, tell: ProgressCallback) -> None:
        """Draws the samples, and measures how far they are from the reference."""
        if self._materials.extractor is None:
            return

        def drawn(_: str, fraction: float) -> None:
            tell(f"sampling seed {seed}", TRAINING_SHARE + (1 - TRAINING_SHARE) * fraction)

        try:
            run.images = self.samples(run.unet, self.protocol.samples, drawn)
            run.frechet, run.kernel = self.distances(run.images)
        except FloatingPointError:
            run.outcome.diverged = True

    @property
    def prompts(self) -> list[str]:
        """Captions of held-out concepts, one a sample."""
        return self._materials.prompts

    def samples(self, unet: UNet, count: int, progress: ProgressCallback | None = None) -> Tensor:
        """The first so many of the protocol's samples: (count, 3, H, W) uint8 on the CPU.

        Raises:
            FloatingPointError: as `draw`.
        """
        images = []
        for start in range(0, count, SAMPLING_BATCH):
            images.append(self.draw(unet, range(start, min(start + SAMPLING_BATCH, count))).cpu())
            if progress is not None:
                progress("sampling", (start + len(images[-1])) / count)
        return torch.cat(images)

    def distances(self, images: Tensor) -> tuple[DistanceEstimate, DistanceEstimate]:
        """Fréchet and kernel distance of samples to the reference, under a protocol that draws samples.

        Raises:
            FloatingPointError: if their features are not finite.
        """
        extractor, real = self._materials.extractor, self._materials.reference
        assert extractor is not None, "a protocol without samples"
        assert real is not None
        found = extractor(images.to(self.device), resolution=self.protocol.feature_resolution)
        if not found.isfinite().all():
            raise FloatingPointError("features")
        return distances.frechet(found, real), distances.kernel(found, real)

    @torch.no_grad()
    def draw(self, unet: UNet, indices: Sequence[int]) -> Tensor:
        """The samples of so many indices of the protocol's prompts: (len(indices), 3, H, W) uint8.

        Raises:
            FloatingPointError: if the net gives latents that are not finite; as bytes they would look like images.
        """
        noise = rectified_flow.per_image_noise(indices, self._materials.latent_shape, seed=FIXED, name="sample").to(
            self.device
        )
        with self._autocast():
            latents = rectified_flow.sample(
                unet.eval(),
                noise,
                self._materials.prompt_context[list(indices)],
                steps=self.protocol.sampler_steps,
                guidance=self.protocol.guidance,
                prediction=self.protocol.prediction,
                shift=self.protocol.shift,
            )
        if not latents.isfinite().all():
            raise FloatingPointError("latents")
        return to_uint8(self._materials.decoder.decode(latents.float()))

    def quality(self, runs: Sequence[SeedRun]) -> Quality:
        """What runs of one candidate, a seed each, come to."""
        diverged = any(run.outcome.diverged for run in runs)
        sampled = self._materials.extractor is not None
        worst = Estimate(value=WORST, low=WORST, high=WORST)
        return Quality(
            validation_loss=worst if diverged else intervals.validation_estimate([run.pair_losses for run in runs]),
            frechet_distance=(worst if diverged else _estimate([run.frechet for run in runs])) if sampled else None,
            kernel_distance=(worst if diverged else _estimate([run.kernel for run in runs])) if sampled else None,
            extractor=self._materials.extractor.name if self._materials.extractor else "none",
            protocol_hash=self.resolved.hash,
            training_seconds=sum(run.outcome.seconds for run in runs),
            diverged=diverged,
        )

    def write(self, run: SeedRun, folder: Path) -> None:
        """Leave a run's samples, curve and weights in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "curve.csv") as part, part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "training_loss", "validation_loss"])
            writer.writerows(
                [step, loss, "" if validation is None else validation] for step, loss, validation in run.curve
            )
        run.unet.save_pretrained(folder / "unet")
        (folder / "unet" / "protocol.json").write_text(self.resolved.model_dump_json(indent=2) + "\n")
        if run.images is not None:
            with atomic_write(folder / "samples.png") as part:
                Image.fromarray(grid(run.images, *GRID).permute(1, 2, 0).numpy()).save(part, format="png")


def _estimate(measured: Sequence[DistanceEstimate | None]) -> Estimate:
    return intervals.distance_estimate([one for one in measured if one is not None])


def _part(tell: ProgressCallback, number: int, parts: int) -> ProgressCallback:
    """Progress of one of several equal parts."""
    return lambda stage, fraction: tell(stage, (number + fraction) / parts)
