"""Train a recipe: its stages in order, each from the weights of the previous one; a killed run can be resumed.

The folder of a run contains ``recipe.json`` and ``architecture.json``, a result folder for every finished stage, the
checkpoint of the unfinished stage, logs, sample grids, and the pipeline of the last student.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from archsearch.studies.signals import StopRequest, stoppable
from archsearch.training import run_folder
from archsearch.training.compatibility import check_recipe, contents_of, new_teacher, resolve_shapes
from archsearch.training.evaluation import BestWeights, StageEvaluator, ema_weights, sampling_config, training_data
from archsearch.training.figure import draw_figure, is_drawn
from archsearch.training.log import TrainLog
from archsearch.training.model_card import sections
from archsearch.training.recipe import (
    Recipe,
    learns_from_teacher,
    resolutions_of,
    trains_student,
    trains_teacher,
    unet_teacher,
)
from archsearch.training.run_folder import RunFolder, writable
from snapgen import seeding
from snapgen.architecture.schema import Architecture
from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import AutoencoderWithDecoder, read_decoder
from snapgen.diffusion import process, variance_preserving
from snapgen.errors import InputError
from snapgen.io import checkpoint
from snapgen.io.cache import JSON
from snapgen.io.prediction_type import check_prediction_type
from snapgen.models.unet import TRAINING_COPIES, UNet, check_memory
from snapgen.objectives import teacher
from snapgen.objectives.build import build_objectives
from snapgen.objectives.teacher import Teacher
from snapgen.pipeline.card import write_card
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
from snapgen.progress import silence_libraries
from snapgen.training.batches import BatchStream, TimestepSampler, equal_shares, few_step_timesteps, training_timesteps
from snapgen.training.loop import MIN_REPORTS, StepStats, Trainer, make_accelerator
from snapgen.training.stages import (
    AdversarialDistillationStage,
    AnyStage,
    DecoderStage,
    FlowMatchingStage,
    NetStage,
    ProgressiveDistillationStage,
)
from snapgen.training.trackers import check_trackers

INTERRUPTED = "interrupted: saving a checkpoint after this step; Ctrl-C once more ends without it"


def train(recipe: Recipe, arch: Architecture, *, log: Callable[[str], None], stop_after: str | None = None) -> Path:
    """Train a recipe to its end, or resume its run.

    Args:
        recipe: the recipe.
        arch: architecture of the student.
        log: called with each line for the user.
        stop_after: name of the stage to stop after; None: the last.

    Returns:
        Folder of the run.

    Raises:
        InputError: if something that the recipe names is missing or does not fit, if the run was started with another
            recipe, if another process is training it, or if a gradient is not finite and the recipe says halt.
    """
    drops_blocks = any(isinstance(stage, FlowMatchingStage) and stage.block_dropout for stage in recipe.stages)
    accelerator = make_accelerator(find_unused_parameters=drops_blocks)
    run = RecipeRunner(recipe, arch, accelerator, log if accelerator.is_main_process else lambda _: None)
    run.check()
    exclusive = run.folder.exclusive() if accelerator.is_main_process else contextlib.nullcontext()
    with stoppable(INTERRUPTED) as run.stop, exclusive, writable(recipe.folder):
        run.run(stop_after)
    return recipe.folder


def check_run(recipe: Recipe, arch: Architecture) -> None:
    """Check, without training, that everything that a recipe names exists and fits together.

    Raises:
        InputError: if something is missing or does not fit.
    """
    RecipeRunner(recipe, arch, make_accelerator(), lambda _: None).check()


class RecipeRunner:
    """One run of a recipe."""

    def __init__(
        self, recipe: Recipe, arch: Architecture, accelerator: Accelerator, log: Callable[[str], None]
    ) -> None:
        self.recipe, self.arch, self.accelerator, self.log = recipe, arch, accelerator, log
        self.device: torch.device = accelerator.device
        self.data = training_data(recipe, self.device)
        self.evaluator = StageEvaluator(recipe, self.data)
        self.folder = RunFolder(recipe, arch)
        self.shapes = resolve_shapes(recipe)
        self._saved = time.monotonic()
        self.stop = StopRequest()

    def check(self) -> None:
        """Check, before anything is written, that everything that the recipe names exists and fits together.

        Raises:
            InputError: if something is missing or does not fit.
        """
        check_recipe(self.recipe, self.arch, self.shapes, processes=self.accelerator.num_processes)
        with self.recipe.error_context("log_with"):
            check_trackers(self.recipe.log_with)
        if self.recipe.init_weights is not None:
            first = next(filter(trains_student, self.recipe.stages), None)
            with self.recipe.error_context("init_weights"):
                run_folder.check_unet(Path(self.recipe.init_weights), self.arch)
                if isinstance(first, ProgressiveDistillationStage) and unet_teacher(first) is None:
                    check_prediction_type(Path(self.recipe.init_weights), self.recipe.prediction_type, required=True)
        resolutions = [resolution for stage in self.recipe.stages for resolution in resolutions_of(stage)]
        with self.accelerator.main_process_first(), self.recipe.error_context("data"):
            self.data.images("train", max(resolutions))
        if self.evaluator.data is not self.data:
            with self.accelerator.main_process_first(), self.recipe.error_context("evaluation.data"):
                self.evaluator.data.images("val", max(resolutions))

    def run(self, stop_after: str | None = None) -> None:
        """Run every unfinished stage, up to ``stop_after``, and write the pipeline."""
        if self.accelerator.is_main_process:
            self.folder.record_recipe(contents_of(self.recipe, self.shapes))
            self.folder.check_results()
        self.accelerator.wait_for_everyone()
        for number, stage in enumerate(self.recipe.stages):
            if not self.folder.result(number).is_dir():
                self._run_stage(number, stage)
                self.accelerator.wait_for_everyone()
            last = number + 1 == len(self.recipe.stages) or stage.name == stop_after
            if self._main and (last or not self.folder.result(number + 1).is_dir()):
                self._assemble(number)
            if last:
                break
        is_done = self.folder.result(len(self.recipe.stages) - 1).is_dir()
        if self._main and self.recipe.figure and is_done and not is_drawn(self.recipe, self.folder):
            draw_figure(self.recipe, self.arch, self.folder, self.evaluator, self.log)

    def _run_stage(self, number: int, stage: AnyStage) -> None:
        self._saved = time.monotonic()
        with TrainLog(self.folder, number, stage, self.log, main=self._main) as log:
            if not isinstance(stage, DecoderStage):
                self._train_net(number, stage, log)
            elif self._main:
                self._train_decoder(number, stage, log)

    def _train_decoder(self, number: int, stage: DecoderStage, log: TrainLog) -> None:
        from archsearch.training import decoder_stage

        trainer = decoder_stage.decoder_trainer(stage, self.data, self.device)
        tensors, metadata = self.folder.read_checkpoint(number)
        if metadata is not None:
            with self.folder.checkpoint_errors():
                trainer.load(tensors, metadata)
        log.start(trainer.done)
        pending: list[dict[str, Tensor]] = []
        steps, began = stage.training.steps, time.monotonic()
        interval = max(1, steps // MIN_REPORTS)
        while trainer.done < steps:
            pending.append(trainer.step())
            if self.stop.requested:
                self._save(number, trainer.state()[0], trainer.done)
                raise KeyboardInterrupt
            if trainer.done % interval and trainer.done < steps:
                continue
            losses = decoder_stage.mean_losses(pending)
            log.log_decoder_stats(trainer.done, steps, losses, seconds=time.monotonic() - began)
            pending, began = [], time.monotonic()
            if self._is_checkpoint_due and trainer.done < steps:
                self._save(number, trainer.state()[0], trainer.done)
        trainer.finish()
        log.log_evaluation(steps, decoder_stage.evaluate(trainer, self.data), decoder_stage.NO_SAMPLING)
        self.folder.write_result(number, cast(Any, trainer.model).to("cpu").save_pretrained)

    @property
    def _main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _train_net(self, number: int, stage: NetStage, log: TrainLog) -> None:
        net = self._net(number, stage)
        trainer = self._trainer(number, stage, net)
        best = BestWeights(self.folder.best_weights, stage, self.recipe.evaluation.digest())
        if self._main:
            self.evaluator.preload(stage)
        self._resume(number, trainer, log)
        interval = None if stage.evaluate_every is None else math.ceil(stage.evaluate_every / stage.batch_size)

        def due(step: int) -> bool:
            return step == stage.steps or (interval is not None and step % interval == 0)

        def pause() -> None:
            if self._main and trainer.step < stage.steps:
                with ema_weights(net, trainer.ema):
                    numbers = self.evaluator.evaluate(stage, net, log, trainer.step)
                    best.offer(trainer.step, numbers, net)
                # after the evaluation: a run killed in between evaluates again
                self._save(number, trainer.state(), trainer.step)
            self.accelerator.wait_for_everyone()

        def report(stats: StepStats) -> None:
            log.log_stats(stats)
            if self._main and self._is_checkpoint_due:
                self._save(number, trainer.state(), trainer.step)

        trainer.run(report=report, should_pause=due, pause=pause, should_stop=lambda: self.stop.requested)
        if self._main:
            self._save(number, trainer.state(), trainer.step)  # a stop may fall into the evaluation
        if trainer.step < stage.steps:
            self.log(f"saved {self.folder.checkpoint} at step {trainer.step:,}")
            raise KeyboardInterrupt
        if self._main:
            net.load_state_dict(trainer.ema.state())
            self._finish(number, stage, net, best, log)

    def _finish(self, number: int, stage: NetStage, net: UNet | Teacher, best: BestWeights, log: TrainLog) -> None:
        """Evaluate the finished stage and write its result, which replaces the checkpoint."""
        if not all(bool(tensor.isfinite().all()) for tensor in net.state_dict().values()):
            remedy = "lower learning_rate and train the stage again"
            raise InputError(f"stage {stage.name}", "ends with weights that are not finite", remedy)
        last = self.evaluator.evaluate(stage, net, log, stage.steps)
        best.offer(stage.steps, last, net)
        step = best.restore(net)
        if step != stage.steps:  # the last evaluation of a stage is that of its result
            kept = self.evaluator.evaluate(stage, net, log, step)
            self.log(f"{self.folder.label(number)}: {best.reason(step, kept, last)}")
        if isinstance(net, UNet):
            net.prediction_type = self.recipe.prediction_type
        self.folder.write_result(number, net.save_pretrained)

    def _trainer(self, number: int, stage: NetStage, net: UNet | Teacher) -> Trainer:
        seed = seeding.derive_seed(self.recipe.seed, "stage", stage.name)
        frozen_teacher = self._teacher(number, stage)
        objectives, optimizer_configs = build_objectives(
            stage, net, frozen_teacher, prediction=self.recipe.prediction_type, seed=seed
        )
        for objective in objectives.values():
            objective.to(self.device)
        with self.accelerator.main_process_first():
            data = self.data.encoded("train", stage.resolution)
        is_teacher = isinstance(net, Teacher)
        encoders = self.recipe.teacher_text_encoders if is_teacher else self.recipe.text_encoders
        batches = BatchStream(
            data.latents,
            data.teacher if is_teacher else data.student,
            teacher=data.teacher if isinstance(frozen_teacher, Teacher) else None,
            dropout=[encoder.dropout for encoder in encoders],
            batch_size=stage.batch_size,
            timesteps=self._timesteps(stage, net),
            seed=seed,
            device=self.device,
        )
        return Trainer(
            stage, net, objectives, batches, accelerator=self.accelerator, optimizer_configs=optimizer_configs
        )

    def _timesteps(self, stage: NetStage, net: UNet | Teacher) -> TimestepSampler:
        """Distribution of a stage's training timesteps."""
        if isinstance(stage, ProgressiveDistillationStage):
            return equal_shares(variance_preserving.ddim_timesteps(stage.student_steps)[:-1])
        if isinstance(stage, AdversarialDistillationStage):
            return few_step_timesteps(stage.student_steps, stage.timestep_shift_value)
        prediction = net.prediction if isinstance(net, Teacher) else self.recipe.prediction_type
        return training_timesteps(process.make_process(prediction, shift=stage.timestep_shift_value))

    def _net(self, number: int, stage: NetStage) -> UNet | Teacher:
        """The net that a stage trains, with its initial weights."""
        if trains_teacher(stage):
            previous = self.folder.previous_result(number, trains_teacher)
            net: UNet | Teacher = teacher.load_teacher(previous) if previous else self._new_teacher()
        else:
            net = self._previous_student(number) or self._new_student()
        if stage.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        net.requires_grad_(True).to(self.device)
        return net

    def _previous_student(self, number: int) -> UNet | None:
        """The student at the start of a stage: an earlier stage's result or ``init_weights``; None if it is new."""
        previous = self.folder.previous_result(number, trains_student)
        return run_folder.read_unet(previous or self.recipe.init_weights, self.arch)

    def _new_student(self) -> UNet:
        check_memory(self.arch, copies=TRAINING_COPIES, source=self.recipe.source)
        unet = UNet(self.arch)
        unet.init_weights(seeding.derive_seed(self.recipe.seed, "weights"))
        return unet

    def _new_teacher(self) -> Teacher:
        shapes, settings = self.shapes, self.recipe.teacher
        assert settings is not None
        assert settings.shape is not None
        return new_teacher(self.recipe, settings.shape, shapes.factor, shapes.latent_channels, shapes.teacher_context)

    def _teacher(self, number: int, stage: NetStage) -> Teacher | UNet | None:
        """The frozen teacher of a stage, on the device; None without one."""
        if isinstance(stage, ProgressiveDistillationStage):
            folder = unet_teacher(stage)
            arch = self.arch if folder is None else self.shapes.unets[folder]
            unet = self._previous_student(number) if folder is None else run_folder.read_unet(folder, arch)
            assert unet is not None, "recipes with a progressive stage have a net before it"
            unet.eval().requires_grad_(False).to(self.device)
            return unet
        return self._flow_teacher(number, stage) if learns_from_teacher(stage) else None

    def _flow_teacher(self, number: int, stage: FlowMatchingStage | AdversarialDistillationStage) -> Teacher:
        settings = self.recipe.teacher
        assert settings is not None
        path = stage.teacher or self.folder.previous_result(number, trains_teacher) or settings.path
        net = teacher.load_teacher(Path(str(path)), dtype=torch.bfloat16 if settings.bfloat16 else torch.float32)
        if stage.gradient_checkpointing:  # the gradient of the discriminator's features runs through the teacher
            net.enable_gradient_checkpointing()
        return net.to(self.device)

    def _resume(self, number: int, trainer: Trainer, log: TrainLog) -> None:
        """Load the checkpoint, if it belongs to this stage, and start the log."""
        tensors, metadata = self.folder.read_checkpoint(number)
        if metadata is not None:
            with self.folder.checkpoint_errors():
                trainer.load(tensors, int(metadata["step"]))
        elif self._main:
            self.folder.best_weights.unlink(missing_ok=True)
        log.start(trainer.step)

    def _save(self, number: int, tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Write the checkpoint of a stage."""
        metadata: dict[str, JSON] = {"stage": self.recipe.stages[number].name, "step": step}
        checkpoint.save_checkpoint(self.folder.checkpoint, tensors, metadata)
        self._saved = time.monotonic()

    @property
    def _is_checkpoint_due(self) -> bool:
        """Whether the last checkpoint, or the beginning of the stage, is as old as the recipe allows."""
        return time.monotonic() - self._saved >= 60 * self.recipe.checkpoint_minutes

    def _assemble(self, number: int) -> None:
        """Write the pipeline of the last student up to a stage, with the trained decoder if there is one.

        An existing pipeline of the same stages is kept; a run may be killed between a stage's result and its pipeline.
        """
        done = list(enumerate(self.recipe.stages[: number + 1]))
        students = [(i, s) for i, s in done if not isinstance(s, DecoderStage) and trains_student(s)]
        if not students:
            return
        index, stage = students[-1]
        decoders = [i for i, s in done if isinstance(s, DecoderStage)][-1:]
        stages = ", ".join(self.folder.label(i) for i in (index, *decoders))
        if self.folder.pipeline_stages() == stages:
            self.folder.check_pipeline()
            return
        unet = run_folder.read_unet(self.folder.result(index), self.arch)
        assert unet is not None
        vae = autoencoder.load_autoencoder(self.recipe.autoencoder)
        if decoders:
            vae = AutoencoderWithDecoder(vae, read_decoder(self.folder.result(decoders[0])))
        if vae.factor == 1:
            self.log("skipping the pipeline: this recipe trains in pixel space")
            return
        sampler = sampling_config(self.recipe, stage)
        with silence_libraries():
            pipeline = SnapGenPipeline.from_components(
                unet,
                vae,
                self.recipe.text_encoders,
                prediction=self.recipe.prediction_type,
                shift=sampler.timestep_shift,
                steps=sampler.num_inference_steps,
                guidance=sampler.guidance_scale,
                resolution=stage.resolution,
            )

            def write(folder: Path) -> None:
                pipeline.save_pretrained(folder)
                write_card(folder, pipeline, sections(self.folder.path, self.recipe, self.arch, self.shapes))

            self.folder.write_pipeline(write, stages)
