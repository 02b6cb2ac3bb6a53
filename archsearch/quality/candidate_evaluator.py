"""Evaluation of candidates: a short training run per seed, samples, distances and validation loss."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol
from archsearch.quality import processes, resolve
from archsearch.quality.evaluator import FIXED, Evaluator, SamplingConfig
from archsearch.quality.processes import TrainingJob
from archsearch.quality.short_run import Checkpoints, ShortRun, TrainResult
from archsearch.quality.supernet import Supernet
from archsearch.score import Quality
from archsearch.stats import intervals
from archsearch.stats.estimate import DistanceEstimate, Estimate
from snapgen import devices
from snapgen.architecture.schema import Architecture
from snapgen.data.pixels import grid
from snapgen.diffusion.process import make_process
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write
from snapgen.models.unet import TRAINING_COPIES, UNet, check_memory
from snapgen.objectives.teacher import Teacher, load_teacher
from snapgen.optim.ema import EMA
from snapgen.progress import ProgressCallback, ignore_progress, subtask
from snapgen.seeding import derive_seed
from snapgen.training.data import TrainingData
from snapgen.training.loop import make_accelerator

WORST = 1e6
"""Value of every metric of a diverged run: finite, so that it can be stored, and worse than every other value."""

TRAINING_SHARE = 0.85
"""Approximate fraction of a seed's time that is spent on training; only used for progress."""

SAMPLING_BATCH_SIZE = 64
"""Number of images that are generated at once."""

TIMESTEP_BINS = 4
"""Number of parts of a validation loss, by timestep."""

GRID = (6, 8)
"""Rows and columns of samples.png, if there are that many samples."""


@dataclass
class SeedRun:
    """Training run of one seed, with its evaluation."""

    unet: UNet
    """The net with the EMA weights."""
    pair_losses: Tensor
    """Loss of each validation pair, (pairs,) float64."""
    training: TrainResult = field(default_factory=TrainResult)
    """How the training went."""
    frechet: DistanceEstimate | None = None
    kernel: DistanceEstimate | None = None
    retrieval: DistanceEstimate | None = None
    """Mean reciprocal rank of the samples' captions."""
    images: Tensor | None = None
    """Generated samples, (samples, 3, H, W) uint8."""


class CandidateEvaluator:
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
        distillation = protocol.distillation
        self.data = TrainingData(
            protocol.data,
            protocol.autoencoder,
            protocol.text_encoders,
            teacher_text_encoders=protocol.teacher_text_encoders,
            device=self.device,
        )
        self.resolved: ResolvedProtocol = resolve.resolved(protocol, self.data)
        """The protocol with the digests of its files."""
        bfloat16 = protocol.precision == "bfloat16"
        self.evaluator = Evaluator(
            self.data, protocol.resolution, protocol, bfloat16=bfloat16, batch_size=SAMPLING_BATCH_SIZE
        )
        self.evaluator.preload(samples=protocol.num_samples > 0, retrieval=protocol.retrieval)
        self._training = self.data.encoded("train", protocol.resolution)
        self._process = make_process(protocol.prediction_type, shift=protocol.timestep_shift)
        self._sampling = SamplingConfig(
            protocol.num_inference_steps, protocol.guidance_scale, timestep_shift=protocol.timestep_shift
        )
        self._supernet = None
        if protocol.init_from is not None:
            self._supernet = Supernet(protocol.init_from, prediction=protocol.prediction_type)
            self._supernet.unet.to(self.device)
        self._teacher: Teacher | None = None
        if distillation is not None:
            dtype = torch.bfloat16 if distillation.teacher_bfloat16 else torch.float32
            self._teacher = load_teacher(distillation.teacher, dtype=dtype).to(self.device)
            captions, (channels, size, _) = self._training.teacher, self.evaluator.latent_shape
            self._teacher.check(
                latent_channels=channels,
                latent_size=size,
                context_dim=captions.context_dim,
                pooled_width=captions.pooled_width,
            )

    @property
    def context_dim(self) -> int:
        """Context dimension that an architecture with cross-attention must have."""
        return self._training.student.context_dim

    def check(self, arch: Architecture) -> None:
        """Check that an architecture can be trained under this protocol.

        Raises:
            InputError: if its latent channels, context dimension or stride do not fit, or it is not a sub-network of
                the supernetwork (`EvaluationProtocol.init_from`).
        """
        source, (channels, size, _) = f"architecture {arch.id}", self.evaluator.latent_shape
        if arch.latent_channels != channels:
            problem = f"is {arch.latent_channels}; the protocol's autoencoder has {channels}"
            raise InputError(source, problem, "make them equal", place="latent_channels")
        if arch.has_cross_attention and arch.context_dim != self.context_dim:
            problem = f"is {arch.context_dim}; the protocol's text encoder has {self.context_dim}"
            raise InputError(source, problem, "make them equal", place="context_dim")
        if size % arch.stride:
            problem = f"has {len(arch.down)} levels, but a latent of size {size} cannot be halved as often"
            raise InputError(source, problem, "remove levels or raise the resolution", place="down")
        if self._supernet is not None:
            self._supernet.check(arch)

    def score(
        self,
        arch: Architecture,
        *,
        study_seed: int,
        seeds: Sequence[int] | None = None,
        progress: ProgressCallback = ignore_progress,
        artifacts: Path | None = None,
        checkpoints: Checkpoints | None = None,
        until: int | None = None,
        samples: bool = True,
    ) -> Quality:
        """Train a candidate with each seed, and evaluate it.

        The result is deterministic for a canonical architecture, protocol and ``study_seed``, on one machine with a
        fixed number of threads. Each metric is the mean over seeds; see `archsearch.stats.intervals` for its interval.

        Args:
            arch: the candidate.
            study_seed: seed from which the seeds of the runs are derived.
            seeds: those of the protocol's seeds to train with; None: all.
            progress: called with the current phase and the completed fraction.
            artifacts: folder for the artifacts of the protocol's first seed: ``samples.png``, ``curve.csv`` and
                ``unet/`` (EMA weights for `UNet.from_pretrained`, and the protocol).
            checkpoints: where the runs are saved, and the same call resumes them; None: nowhere.
            until: step after which the runs pause, saved in ``checkpoints`` and evaluated as they are, without
                artifacts; None: they run to the end.
            samples: whether samples are drawn, if the protocol draws any; without, the quality has no distances.

        Raises:
            InputError: like `check`.
        """
        self.check(arch)
        runs, seeds = [], seeds or self.protocol.train_seeds
        for number, seed in enumerate(seeds):
            weights, order, noise = self._run_seeds(study_seed, seed)
            run = self.run(
                self.initial_network(arch, derive_seed(weights, "weights")),
                self.protocol,
                number=seed,
                seed=noise,
                order_seed=order,
                progress=subtask(progress, number / len(seeds), (number + 1) / len(seeds)),
                checkpoints=checkpoints,
                until=until,
                samples=samples,
            )
            if artifacts is not None and until is None and seed == self.protocol.train_seeds[0]:
                self.write(run, artifacts)
            run.images = None
            runs.append(run)
            if run.training.diverged:
                break
        return self.quality(runs)

    def _run_seeds(self, study_seed: int, seed: int) -> list[int]:
        """Seeds of a run's initial weights, of its images' order, and of its noise (`EvaluationProtocol.varied`)."""
        first, own = (derive_seed(study_seed, "run", s) for s in (self.protocol.train_seeds[0], seed))
        return [own if self.protocol.varied in ("all", part) else first for part in ("weights", "order", "noise")]

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
        training: EvaluationProtocol,
        *,
        number: int,
        seed: int,
        order_seed: int | None = None,
        block_dropout: float = 0,
        progress: ProgressCallback = ignore_progress,
        checkpoints: Checkpoints | None = None,
        until: int | None = None,
        samples: bool = True,
    ) -> SeedRun:
        """Train a net on the protocol's data, and evaluate it with its EMA weights.

        Args:
            unet: net on the evaluator's device; trained in place.
            training: the protocol itself, or other training settings for its data.
            number: number of the run, in progress messages and for its checkpoint.
            seed: see `ShortRun`.
            order_seed: see `ShortRun`.
            block_dropout: see `ShortRun`.
            progress: progress callback.
            checkpoints: where the training is saved; None: nowhere.
            until: step after which it pauses; see `score`.
            samples: whether samples are drawn; see `score`.
        """
        ema_unet = self.net(unet.arch)

        def validate(average: EMA) -> list[float]:
            ema_unet.load_state_dict(average.state())
            return self._by_timestep(self.pair_losses(ema_unet))

        checkpoint = None if checkpoints is None else checkpoints.path(number)
        job = TrainingJob(unet.arch, training, seed, block_dropout, checkpoint, until, order_seed)
        processes.announce(job)
        short_run = self.short_run(unet, job)
        result = short_run.train(
            validate=validate,
            progress=lambda step: progress(TRAINING_SHARE * step / training.steps, f"training seed {number}"),
            checkpoint=checkpoint,
            checkpoint_seconds=checkpoints.seconds if checkpoints else 0,
            until=until,
        )
        ema_unet.load_state_dict(short_run.ema.state())
        run = self.evaluate(ema_unet, number=number, samples=samples, progress=progress)
        result.diverged |= run.training.diverged
        if result.curve and not result.diverged:
            result.validate(self._by_timestep(run.pair_losses))
        run.training = result
        return run

    def short_run(self, unet: UNet, job: TrainingJob) -> ShortRun:
        """The training of a net on the protocol's data, by all processes together."""
        accelerator = make_accelerator(find_unused_parameters=job.block_dropout > 0)
        return ShortRun(
            unet,
            self._training,
            job.protocol,
            seed=job.seed,
            order_seed=job.order_seed,
            accelerator=accelerator,
            block_dropout=job.block_dropout,
            teacher=self._teacher,
        )

    def evaluate(
        self, unet: UNet, *, number: int, samples: bool = True, progress: ProgressCallback = ignore_progress
    ) -> SeedRun:
        """Evaluate a net without training it."""
        run = SeedRun(unet, self.pair_losses(unet))
        tensors = [run.pair_losses, *unet.state_dict().values()]
        run.training.diverged = not all(bool(tensor.isfinite().all()) for tensor in tensors)
        if samples and self.protocol.num_samples and not run.training.diverged:
            part = subtask(progress, TRAINING_SHARE, 1)
            try:
                run.images = self.samples(
                    unet, progress=lambda fraction, message="": part(fraction, f"{message} seed {number}")
                )
                run.frechet, run.kernel = self.evaluator.distances(run.images)
                run.retrieval = self.evaluator.retrieval(run.images) if self.protocol.retrieval else None
            except FloatingPointError:
                run.training.diverged = True
        progress(1.0, f"seed {number} done")
        return run

    def net(self, arch: Architecture) -> UNet:
        """The uninitialized net of a compatible architecture, on the evaluator's device."""
        # Nets without cross-attention accept and ignore a context; give it the protocol's dimension.
        compatible = arch.model_copy(update={"context_dim": self.context_dim})
        check_memory(compatible, copies=TRAINING_COPIES)
        unet: UNet = UNet(compatible).to(self.device)
        return unet

    def pair_losses(self, unet: UNet) -> Tensor:
        """Loss of the net on each of the protocol's validation pairs: (pairs,) float64."""
        return self.evaluator.validation_losses(unet, self._process)

    def _by_timestep(self, pair_losses: Tensor) -> list[float]:
        """The mean loss, then the means over the pairs of the lowest timesteps, the next, …: 1 + `TIMESTEP_BINS`."""
        order = self._process.validation_times(len(pair_losses), seed=FIXED).argsort()
        return [
            float(part.mean())
            for part in (pair_losses, *pair_losses[order].tensor_split(min(TIMESTEP_BINS, len(order))))
        ]

    def samples(self, unet: UNet, count: int | None = None, progress: ProgressCallback = ignore_progress) -> Tensor:
        """Generate the first ``count`` of the protocol's samples (None: all): (count, 3, H, W) uint8 on the CPU.

        Raises:
            FloatingPointError: if the latents are not finite.
        """
        return self.evaluator.samples(unet, self._process, self._sampling, count, progress=progress)

    def quality(self, runs: Sequence[SeedRun]) -> Quality:
        """Combine the runs of one candidate, one per seed."""
        diverged = any(run.training.diverged for run in runs)
        sampled = self.protocol.num_samples > 0 and (diverged or all(run.frechet is not None for run in runs))
        worst = Estimate(value=WORST, low=WORST, high=WORST)
        return Quality(
            validation_loss=worst if diverged else intervals.validation_estimate([run.pair_losses for run in runs]),
            frechet_distance=(worst if diverged else _estimate([run.frechet for run in runs])) if sampled else None,
            kernel_distance=(worst if diverged else _estimate([run.kernel for run in runs])) if sampled else None,
            retrieval_mrr=_estimate([run.retrieval for run in runs])
            if self.protocol.retrieval and not diverged
            else None,
            extractor=self.evaluator.extractor.name if sampled else "none",
            protocol_hash=self.resolved.hash,
            training_seconds=sum(run.training.seconds for run in runs),
            diverged=diverged,
            curves=tuple(run.training.to_curve() for run in runs),
        )

    def write(self, run: SeedRun, folder: Path) -> None:
        """Write a run's samples, curve and weights to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "curve.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "training_loss", "validation_loss"])
            writer.writerows(
                [step, loss, "" if validation is None else validation] for step, loss, validation in run.training.curve
            )
        run.unet.prediction_type = self.protocol.prediction_type
        run.unet.save_pretrained(folder / "unet")
        (folder / "unet" / "protocol.json").write_text(self.resolved.model_dump_json(indent=2) + "\n")
        if run.images is not None:
            with atomic_write(folder / "samples.png") as temporary:
                Image.fromarray(grid(run.images, *GRID).permute(1, 2, 0).numpy()).save(temporary, format="png")


def follow(protocol: EvaluationProtocol) -> None:
    """Take part in the main process's trainings until there are no more (`archsearch.quality.processes`)."""
    evaluator: CandidateEvaluator | None = None
    while (job := processes.receive()) is not None:
        # Built only now: the main process has computed and cached all data.
        evaluator = evaluator or CandidateEvaluator(protocol)
        evaluator.short_run(evaluator.net(job.architecture), job).train(checkpoint=job.checkpoint, until=job.until)


def _estimate(measured: Sequence[DistanceEstimate | None]) -> Estimate:
    return intervals.distance_estimate([estimate for estimate in measured if estimate is not None])
