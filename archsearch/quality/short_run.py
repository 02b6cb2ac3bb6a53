"""Short training run of a candidate, by which a search scores it. A run that was killed resumes from its checkpoint.

On a CPU, the same seed, machine and number of threads give bit-identical results, whether or not the run was killed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator

from archsearch.protocol import EvaluationProtocol
from archsearch.score import Curve
from snapgen.diffusion.process import make_process
from snapgen.io.cache import JSON
from snapgen.io.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from snapgen.io.digests import digest_tensors
from snapgen.models.unet import UNet
from snapgen.objectives.build import build_objectives
from snapgen.objectives.teacher import Teacher
from snapgen.optim.ema import EMA
from snapgen.training.batches import BatchStream, training_timesteps
from snapgen.training.data import EncodedDataset
from snapgen.training.loop import NonfiniteGradientError, StepStats, Trainer
from snapgen.training.stages import FlowMatchingStage

DIVERGENCE_FACTOR = 4.0
"""A run has diverged when its recent mean loss is this many times its first loss."""
REPORTS = 24
"""Number of progress reports, which are the only points that wait for the device."""


@dataclass(frozen=True)
class Checkpoints:
    """Where runs are saved, and how often."""

    folder: Path
    seconds: float
    """Time between two checkpoints; 0: at every report."""

    def path(self, number: int) -> Path:
        """The checkpoint of the run with that number."""
        return self.folder / f"{number}.safetensors"


@dataclass
class TrainResult:
    """Result of a run besides its weights; a checkpoint records it beside the trainer's state."""

    curve: list[tuple[int, float, float | None]] = field(default_factory=list)
    """Step, mean training loss since the previous row, and validation loss if it was measured."""
    timestep_losses: list[tuple[float, ...]] = field(default_factory=list)
    """Parts of each of those validation losses, by timestep (`archsearch.score.Curve`)."""
    first_loss: float | None = None
    """Training loss of the first step."""
    seconds: float = 0.0
    """Time spent training, without validation and checkpoints."""
    diverged: bool = False

    def validate(self, losses: Sequence[float]) -> None:
        """Give the last row a validation loss and its parts by timestep, in place of those that it may have."""
        step, loss, before = self.curve[-1]
        self.curve[-1] = (step, loss, losses[0])
        self.timestep_losses[len(self.timestep_losses) - (before is not None) :] = [tuple(losses[1:])]

    def passes_point(self, step: int, steps: int, points: int) -> bool:
        """Whether one of a curve's evenly spaced points, but for the last, lies after its last row and up to a step."""
        before = self.curve[-1][0] if self.curve else 0
        return step < steps and step * points // steps > before * points // steps

    def to_curve(self) -> Curve:
        """The validation losses, of which seven digits are kept; those that are not finite are left out."""
        rows = [(step, loss) for step, _, loss in self.curve if loss is not None]
        points = [
            (step, _rounded(loss), tuple(map(_rounded, parts)))
            for (step, loss), parts in zip(rows, self.timestep_losses, strict=True)
            if all(map(math.isfinite, (loss, *parts)))
        ]
        steps, losses, parts = zip(*points, strict=True) if points else ((), (), ())
        return Curve(steps=steps, validation_loss=losses, by_timestep=parts)


def _rounded(loss: float) -> float:
    return float(f"{loss:.7g}")


class _DivergedError(Exception):
    pass


class _PausedError(Exception):
    pass


class ShortRun:
    """Training of one net on a protocol's data.

    Args:
        unet: trained in place.
        data: the training images, encoded.
        protocol: the training's settings.
        seed: seed of the images' order, the timesteps, the noise and the dropout; not of the weights.
        order_seed: seed of the images' order, if it is another one.
        accelerator: the processes that train.
        block_dropout: probability of leaving each block out of a step (`snapgen.models.subnetworks`).
        teacher: the frozen teacher, on the net's device, if the protocol distills from one.
    """

    def __init__(
        self,
        unet: UNet,
        data: EncodedDataset,
        protocol: EvaluationProtocol,
        *,
        seed: int,
        order_seed: int | None = None,
        accelerator: Accelerator,
        block_dropout: float = 0,
        teacher: Teacher | None = None,
    ) -> None:
        self.result = TrainResult()
        self._main = bool(accelerator.is_main_process)
        self._curve_points = protocol.curve_points
        stage = training_stage(protocol, block_dropout=block_dropout)
        device = next(unet.parameters()).device
        if stage.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        objectives, _ = build_objectives(
            stage, unet.requires_grad_(True), teacher, prediction=protocol.prediction_type, seed=seed
        )
        for objective in objectives.values():
            objective.to(device)
        batches = BatchStream(
            data.latents,
            data.student,
            teacher=None if teacher is None else data.teacher,
            dropout=[protocol.caption_dropout],
            batch_size=protocol.batch_size,
            timesteps=training_timesteps(make_process(protocol.prediction_type, shift=protocol.timestep_shift)),
            seed=seed,
            order_seed=order_seed,
            device=device,
        )
        self._trainer = Trainer(
            stage,
            unet,
            objectives,
            batches,
            accelerator=accelerator,
            report_every=max(1, stage.steps // REPORTS),
        )
        self._settings: dict[str, JSON] = {
            "protocol": protocol.model_dump(mode="json"),
            "seed": seed,
            "order_seed": order_seed,
            "block_dropout": block_dropout,
        }

    @property
    def ema(self) -> EMA:
        """Moving average of the weights so far."""
        return self._trainer.ema

    def train(
        self,
        *,
        validate: Callable[[EMA], Sequence[float]] = lambda _: (math.nan,),
        progress: Callable[[int], None] = lambda _: None,
        checkpoint: Path | None = None,
        checkpoint_seconds: float = 300,
        until: int | None = None,
    ) -> TrainResult:
        """Train to the end, or to a step, from the checkpoint if there is one of this run.

        Args:
            validate: gives the validation loss of averaged weights and its parts by timestep, in the main process.
            progress: called with the steps that are done.
            checkpoint: file in which the run is saved; None: none.
            checkpoint_seconds: time between two checkpoints; 0: at every report.
            until: step after which the run pauses, which is saved; another call goes on from there, as if the run had
                not paused. None: it does not pause.

        Returns:
            The result. A run that diverges stops at the next report; whether the last step's weights are finite is
            for the evaluation to see.
        """
        identity = {} if checkpoint is None else self._identity()
        if checkpoint is not None:
            self._resume(checkpoint, identity)
        trainer, result = self._trainer, self.result
        if until is not None and trainer.step >= until:
            return result
        saved = started = time.monotonic()

        def report(stats: StepStats) -> None:
            nonlocal saved, started
            result.seconds += time.monotonic() - started
            result.first_loss = stats.step_losses[0] if result.first_loss is None else result.first_loss
            due = result.passes_point(stats.step, stats.steps, self._curve_points)
            loss = sum(stats.step_losses) / len(stats.step_losses)
            if not loss < DIVERGENCE_FACTOR * result.first_loss:  # negated, so that NaN counts as diverged
                raise _DivergedError
            result.curve.append((stats.step, loss, None))
            if due and self._main:
                result.validate(validate(trainer.ema))
            old = time.monotonic() - saved >= checkpoint_seconds
            if checkpoint is not None and self._main and (old or stats.step == until):
                metadata: dict[str, JSON] = {"identity": identity, "step": stats.step, "result": asdict(result)}
                save_checkpoint(checkpoint, trainer.state(), metadata)
                saved = time.monotonic()
            progress(stats.step)
            started = time.monotonic()

        def pause() -> None:
            raise _PausedError

        try:
            trainer.run(report=report, should_pause=lambda step: step == until, pause=pause)
        except _PausedError:
            pass
        except (_DivergedError, NonfiniteGradientError):
            result.diverged = True
        return result

    def _identity(self) -> dict[str, JSON]:
        """All that the run depends on, before its first step."""
        # The trainer has given every process the same weights.
        weights = ((name, tensor.cpu()) for name, tensor in self._trainer.net.state_dict().items())
        return {**self._settings, "weights": digest_tensors(weights)}

    def _resume(self, checkpoint: Path, identity: Mapping[str, JSON]) -> None:
        """Load the checkpoint if it is of this run; a checkpoint of another run will be overwritten."""
        if not checkpoint.is_file() or read_metadata(checkpoint).get("identity") != identity:
            return
        components, metadata = load_checkpoint(checkpoint)
        self._trainer.load(components, metadata["step"])
        self.result = TrainResult(**metadata["result"])
        self.result.curve = [(step, loss, validation) for step, loss, validation in self.result.curve]
        self.result.timestep_losses = [tuple(losses) for losses in self.result.timestep_losses]


def training_stage(protocol: EvaluationProtocol, *, block_dropout: float = 0) -> FlowMatchingStage:
    """The short run as a training stage, by which `snapgen.training.loop.Trainer` trains it.

    Block dropout, which changes the graph at every step, is not compiled.
    """
    shared = {name: getattr(protocol, name) for name in FlowMatchingStage.model_fields if hasattr(protocol, name)}
    shared |= {"num_images": protocol.steps * protocol.batch_size, "compile": protocol.compile and not block_dropout}
    return FlowMatchingStage(**shared, name="short-run", block_dropout=block_dropout)
