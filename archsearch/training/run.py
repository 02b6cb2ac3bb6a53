"""Runs a recipe: stage after stage, each from the weights of the one before; killed at any moment, it goes on.

A run's folder holds ``recipe.json`` and ``architecture.json``, a folder of results for every stage that is done, the
checkpoint of the one that is not, logs, sample grids, and the pipeline of the last student.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import filelock
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from archsearch.studies.signals import terminable
from archsearch.training import run_folder
from archsearch.training.compatibility import check_recipe, new_teacher, shapes
from archsearch.training.data import RecipeData
from archsearch.training.evaluation import RecipeEvaluator, sampler_of
from archsearch.training.log import TrainLog
from archsearch.training.recipe import Recipe, learns_from_teacher, resolutions_of, trains_student, unet_teacher
from archsearch.training.run_folder import RunFolder
from snapgen import devices, seeding
from snapgen.architecture.schema import Architecture
from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import AutoencoderWithDecoder, read_decoder
from snapgen.diffusion import process, variance_preserving
from snapgen.errors import InputError
from snapgen.io import checkpoint
from snapgen.io.cache import JSON
from snapgen.models.unet import UNet
from snapgen.objectives import teacher
from snapgen.objectives.build import build_objectives
from snapgen.objectives.teacher import Teacher
from snapgen.optim.ema import EMA
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
from snapgen.progress import silence_libraries
from snapgen.training.batches import BatchStream, TimestepSampler, equal_shares, few_step_timesteps, training_timesteps
from snapgen.training.loop import StepStats, Trainer
from snapgen.training.stages import (
    AdversarialDistillationStage,
    AnyStage,
    DecoderStage,
    FlowMatchingStage,
    NetStage,
    ProgressiveDistillationStage,
)

Tell = Callable[[str], None]
LONGEST_WAIT = datetime.timedelta(days=7)
"""Of a process for the others."""


def train(recipe: Recipe, arch: Architecture, *, tell: Tell, until: str | None = None) -> Path:
    """Train a recipe to its end, or go on with it.

    Args:
        arch: the student's.
        tell: takes a line of progress.
        until: the stage to stop after; None: the last.

    Returns:
        The run's folder.

    Raises:
        InputError: if something that the recipe names cannot be had or does not fit, if the run was begun with another
            recipe, if it is being trained by another process, or if a gradient was not finite and the recipe says halt.
    """
    # While one process evaluates or trains a decoder, the others wait.
    patient = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    drops = any(isinstance(stage, FlowMatchingStage) and stage.block_dropout for stage in recipe.stages)
    shared = DistributedDataParallelKwargs(find_unused_parameters=drops)  # a block that is left out has no gradient
    # The recipe decides on the precision, not how processes are launched.
    accelerator = Accelerator(
        cpu=devices.default_device().type == "cpu", mixed_precision="no", kwargs_handlers=[patient, shared]
    )
    run = RecipeRunner(recipe, arch, accelerator, tell if accelerator.is_main_process else lambda _: None)
    run.check()
    with terminable(), run.alone(), _writable(recipe.folder):
        run.run(until)
    return recipe.folder


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Says of a disk that is full, wherever in the run's folder, what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "make room; the same command goes on from the last checkpoint"
        raise InputError(folder, "cannot be written (no space left on device)", remedy) from None


class RecipeRunner:
    """One run of a recipe."""

    def __init__(self, recipe: Recipe, arch: Architecture, accelerator: Accelerator, tell: Tell) -> None:
        self.recipe, self.arch, self.accelerator, self.tell = recipe, arch, accelerator, tell
        self.device: torch.device = accelerator.device
        self.material = RecipeData(recipe, self.device)
        self.folder = RunFolder(recipe, arch)
        self.shapes = shapes(recipe)
        self._judges: dict[int, RecipeEvaluator] = {}
        self._saved = time.monotonic()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """As the only process that trains this run, beside those that were launched with it."""
        if not self.accelerator.is_main_process:
            yield
            return
        lock = filelock.FileLock(self.folder.prepared() / ".lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            problem = "is being trained by another process"
            raise InputError(self.folder.path, problem, "wait for it, or name another run (--name)") from None
        try:
            yield
        finally:
            lock.release()

    def check(self) -> None:
        """Whether everything is there and fits, before anything is written.

        Raises:
            InputError: if not.
        """
        check_recipe(self.recipe, self.arch, self.shapes, processes=self.accelerator.num_processes)
        if self.recipe.weights is not None:
            run_folder.check_unet(Path(self.recipe.weights), self.arch)
            first = next(filter(trains_student, self.recipe.stages), None)
            if isinstance(first, ProgressiveDistillationStage) and unet_teacher(first) is None:
                run_folder.check_prediction(Path(self.recipe.weights), self.recipe.prediction)
        sides = [side for stage in self.recipe.stages for side in resolutions_of(stage)]
        with self.accelerator.main_process_first():
            self.material.images("train", max(sides))

    def run(self, until: str | None = None) -> None:
        """Every stage that is not done."""
        if self.accelerator.is_main_process:
            self.folder.begin()
        self.accelerator.wait_for_everyone()
        for number, stage in enumerate(self.recipe.stages):
            if not self.folder.result(number).is_dir():
                self._take(number, stage)
                self.accelerator.wait_for_everyone()
            last = number + 1 == len(self.recipe.stages) or stage.name == until
            if self._main and (last or not self.folder.result(number + 1).is_dir()):
                self._assemble(number)
            if last:
                break

    def _take(self, number: int, stage: AnyStage) -> None:
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(TrainLog(self.folder, number, stage, self.tell, main=self._main))
            if isinstance(stage, DecoderStage):
                from archsearch.training.decoder_stage import train_decoder

                if self._main:
                    train_decoder(
                        stage,
                        log,
                        number=number,
                        material=self.material,
                        folder=self.folder,
                        device=self.device,
                        save=lambda training: self.save(number, training.state()[0], training.done),
                        save_seconds=60 * self.recipe.checkpoint_minutes,
                    )
            else:
                self._train(number, stage, log)

    @property
    def _main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _train(self, number: int, stage: NetStage, log: TrainLog) -> None:
        net = self._net(number, stage)
        loop = self._loop(number, stage, net)
        if self._main:
            self._judge(stage.resolution).ready(samples=isinstance(net, UNet))
        self._resume(number, loop, log)
        every = None if stage.evaluate_every is None else max(1, stage.evaluate_every // stage.batch)

        def due(step: int) -> bool:
            return step == stage.steps or (every is not None and step % every == 0)

        def pause() -> None:
            if self._main and loop.step < stage.steps:
                with averaged(net, loop.average):
                    self._look(stage, net, log, loop.step)
                self._save(number, loop)  # after it: a run killed in between looks again
            self.accelerator.wait_for_everyone()

        def report(told: StepStats) -> None:
            log.report(told)
            if self._main and time.monotonic() - self._saved >= 60 * self.recipe.checkpoint_minutes:
                self._save(number, loop)

        self._saved = time.monotonic()
        loop.run(report=report, due=due, pause=pause)
        if self._main:
            net.load_state_dict(loop.average.state())
            self._finish(number, stage, net, log)

    def _finish(self, number: int, stage: NetStage, net: UNet | Teacher, log: TrainLog) -> None:
        """The stage's last evaluation and its result; the checkpoint is of no more use then."""
        if not all(bool(tensor.isfinite().all()) for tensor in net.state_dict().values()):
            remedy = "lower learning_rate and train the stage again"
            raise InputError(f"stage {stage.name}", "ends with weights that are not finite", remedy)
        self._look(stage, net, log, stage.steps)
        self.folder.finish(number, net.save_pretrained if isinstance(net, Teacher) else self._writer(net))

    def _writer(self, net: UNet) -> Callable[[Path], None]:
        return lambda folder: run_folder.write_unet(net, self.recipe.prediction, folder)

    def _judge(self, resolution: int) -> RecipeEvaluator:
        if resolution not in self._judges:
            self._judges[resolution] = RecipeEvaluator(self.material, resolution)
        return self._judges[resolution]

    def _look(self, stage: NetStage, net: UNet | Teacher, log: TrainLog, step: int) -> None:
        """Evaluate the averaged weights: in full at the stage's end."""
        judge = self._judge(stage.resolution)
        sampler = sampler_of(self.recipe, stage)
        if isinstance(net, Teacher) or step < stage.steps:
            log.validated(step, judge.pair_losses(net, shift=sampler.shift))
        else:
            log.measured(step, judge.measure(net, sampler), sampler)
        if isinstance(net, UNet):
            log.grid(step, judge.sheet(net, sampler), sampler)
            if isinstance(stage, AdversarialDistillationStage):
                twice = dataclasses.replace(sampler, steps=2 * sampler.steps)
                log.grid(step, judge.sheet(net, twice), twice)

    def _loop(self, number: int, stage: NetStage, net: UNet | Teacher) -> Trainer:
        seed = seeding.derive_seed(self.recipe.seed, "stage", stage.name)
        teaches = self._teacher(number, stage)
        found, settings = build_objectives(stage, net, teaches, prediction=self.recipe.prediction, seed=seed)
        for turn in found.values():
            turn.to(self.device)
        with self.accelerator.main_process_first():
            data = self.material.encoded("train", stage.resolution)
        is_teacher = isinstance(net, Teacher)
        text = self.recipe.teacher_text if is_teacher else self.recipe.text
        feed = BatchStream(
            data.latents,
            data.teacher if is_teacher else data.student,
            teacher=data.teacher if isinstance(teaches, Teacher) else None,
            dropout=[encoder.dropout for encoder in text],
            batch=stage.batch,
            times=self._times(stage, net),
            seed=seed,
            device=self.device,
        )
        return Trainer(stage, net, found, feed, accelerator=self.accelerator, settings=settings)

    def _times(self, stage: NetStage, net: UNet | Teacher) -> TimestepSampler:
        if isinstance(stage, ProgressiveDistillationStage):
            return equal_shares(variance_preserving.ddim_timesteps(stage.student_steps)[:-1])
        if isinstance(stage, AdversarialDistillationStage):
            return few_step_timesteps(stage.student_steps, stage.timestep_shift)
        prediction = net.prediction if isinstance(net, Teacher) else self.recipe.prediction
        return training_timesteps(process.make_process(prediction, shift=stage.timestep_shift))

    def _net(self, number: int, stage: NetStage) -> UNet | Teacher:
        """The net to train, with the weights that it begins with."""
        if isinstance(stage, FlowMatchingStage) and stage.net == "teacher":
            before = self.folder.before(number, lambda s: isinstance(s, FlowMatchingStage) and s.net == "teacher")
            net: UNet | Teacher = teacher.load_teacher(before) if before else self._new_teacher()
        else:
            net = self._before(number) or self._new_student()
        if stage.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        net.requires_grad_(True).to(self.device)
        return net

    def _before(self, number: int) -> UNet | None:
        """The student as a stage finds it, if it is not new."""
        return run_folder.read_unet(self.folder.before(number, trains_student) or self.recipe.weights, self.arch)

    def _new_student(self) -> UNet:
        unet = UNet(self.arch)
        unet.initialise(seeding.derive_seed(self.recipe.seed, "weights"))
        return unet

    def _new_teacher(self) -> Teacher:
        given, settings = self.shapes, self.recipe.teacher
        assert settings is not None
        assert settings.shape is not None
        return new_teacher(self.recipe, settings.shape, given.factor, given.latent_channels, given.teacher_context)

    def _teacher(self, number: int, stage: NetStage) -> Teacher | UNet | None:
        """The frozen teacher of a stage, if it has one, once on the device."""
        if isinstance(stage, ProgressiveDistillationStage):
            folder = unet_teacher(stage)
            arch = self.arch if folder is None else self.shapes.unets[folder]
            unet = self._before(number) if folder is None else run_folder.read_unet(folder, arch)
            assert unet is not None, "a recipe says what stands before"
            unet.eval().requires_grad_(False).to(self.device)
            return unet
        return self._flow_teacher(number, stage) if learns_from_teacher(stage) else None

    def _flow_teacher(self, number: int, stage: FlowMatchingStage | AdversarialDistillationStage) -> Teacher:
        settings = self.recipe.teacher
        assert settings is not None
        trained = self.folder.before(number, lambda s: isinstance(s, FlowMatchingStage) and s.net == "teacher")
        path = stage.teacher or trained or settings.path
        found = teacher.load_teacher(Path(str(path)), dtype=torch.bfloat16 if settings.bfloat16 else torch.float32)
        if stage.gradient_checkpointing:  # the discriminator's gradient runs through it
            found.enable_gradient_checkpointing()
        return found.to(self.device)

    def _resume(self, number: int, loop: Trainer, log: TrainLog) -> None:
        """Go on from the checkpoint, if it is of this stage."""
        parts, facts = self.folder.read_checkpoint(number)
        if facts is not None:
            with self.folder.fitting_checkpoint():
                loop.load(parts, int(facts["step"]))
        log.begin(loop.step)

    def _save(self, number: int, loop: Trainer) -> None:
        self.save(number, loop.state(), loop.step)

    def save(self, number: int, parts: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Write the checkpoint of a stage."""
        facts: dict[str, JSON] = {"stage": self.recipe.stages[number].name, "step": step}
        checkpoint.save_checkpoint(self.folder.checkpoint, parts, facts)
        self._saved = time.monotonic()

    def _assemble(self, number: int) -> None:
        """The pipeline of the last student up to a stage, with the trained decoder if there is one.

        Nothing is done where it lies there already: a run may have been killed between a stage's result and this.
        """
        done = list(enumerate(self.recipe.stages[: number + 1]))
        students = [(i, s) for i, s in done if not isinstance(s, DecoderStage) and trains_student(s)]
        if not students:
            return
        index, stage = students[-1]
        decoders = [i for i, s in done if isinstance(s, DecoderStage)][-1:]
        made_of = ", ".join(self.folder.label(i) for i in (index, *decoders))
        if self.folder.pipeline_made_of() == made_of:
            return
        unet = run_folder.read_unet(self.folder.result(index), self.arch)
        assert unet is not None
        coder = autoencoder.load_autoencoder(self.recipe.autoencoder)
        if decoders:
            coder = AutoencoderWithDecoder(coder, read_decoder(self.folder.result(decoders[0])))
        if coder.factor == 1:
            self.tell("no pipeline is written: its latents are pixels")
            return
        sampler = sampler_of(self.recipe, stage)
        with silence_libraries():
            pipeline = SnapGenPipeline.assembled(
                unet,
                coder,
                self.recipe.text,
                prediction=self.recipe.prediction,
                shift=sampler.shift,
                steps=sampler.steps,
                guidance=sampler.guidance,
                resolution=stage.resolution,
            )
            self.folder.write_pipeline(pipeline.save_pretrained, made_of)


@contextlib.contextmanager
def averaged(net: nn.Module, average: EMA) -> Iterator[None]:
    """The net with its averaged weights, and then with its own again."""
    own = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict(average.state())
    try:
        yield
    finally:
        net.load_state_dict(own)
