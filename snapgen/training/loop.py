"""The training loop of a stage, from one CPU process to many GPUs with the same losses, interruptible at any step.

A step is a function of the weights, the optimizers' state and its number (`snapgen.training.batches`). A run that
resumes from a checkpoint therefore ends, on the same machine, with the weights of an uninterrupted run. Between reports
nothing synchronizes with the device.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn

from snapgen.devices import default_device
from snapgen.errors import InputError
from snapgen.io import checkpoint
from snapgen.optim.config import OptimizerConfig, build_optimizers
from snapgen.optim.ema import EMA
from snapgen.optim.schedule import lr_scale
from snapgen.training.batches import Batch, BatchStream, MicroBatch
from snapgen.training.stages import Stage

MIN_REPORTS = 200
"""Reports of a stage, at least; a shorter stage reports every step."""
MAX_REPORT_INTERVAL = 100
"""Steps between reports, at most."""
PROCESS_TIMEOUT = datetime.timedelta(days=7)
"""Longest time that a process waits for the others."""
MAX_SKIPPED_STEPS = 20
"""Consecutive skipped steps after which a stage halts even if ``on_nonfinite_grad`` is skip."""


class NonfiniteGradientError(InputError):
    """Gradients that are not finite."""


def make_accelerator(*, find_unused_parameters: bool = False) -> Accelerator:
    """The processes that train together, as launched by ``accelerate launch`` or as a single one.

    Args:
        find_unused_parameters: whether parameters may have no gradient in a step, as with block dropout.
    """
    # While the main process evaluates or trains a decoder, the others wait.
    process_group = InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
    # The stage sets the precision, not the launcher.
    return Accelerator(cpu=default_device().type == "cpu", mixed_precision="no", kwargs_handlers=[process_group, ddp])


@dataclass(frozen=True)
class StepStats:
    """Statistics of the steps since the last report."""

    step: int
    steps: int
    images: int
    losses: dict[str, float]
    """The objectives' outputs and gradient norms, averaged over the steps that were not skipped."""
    step_losses: list[float]
    """Loss of the first objective in each step since the last report."""
    skipped: list[int]
    """Steps in which at least one objective was not updated, because its gradient was not finite."""
    lr_scale: float
    """Learning rate relative to its peak."""
    images_per_second: float


class Trainer:
    """Nets, objectives, optimizers and EMA of one stage.

    Args:
        stage: the stage's configuration.
        net: the net whose weights are averaged.
        objectives: modules by name, all trained on every batch in this order. Each takes a `Batch` and returns scalars:
            ``loss`` is minimized, the others are logged. An objective trains its own parameters that require gradients.
        stream: the stage's batches.
        accelerator: the processes that train.
        optimizer_configs: optimizer configurations of objectives that do not use the stage's.
        report_every: steps between reports; None: at least `MIN_REPORTS` reports.
    """

    def __init__(
        self,
        stage: Stage,
        net: nn.Module,
        objectives: Mapping[str, nn.Module],
        stream: BatchStream,
        *,
        accelerator: Accelerator,
        optimizer_configs: Mapping[str, OptimizerConfig] | None = None,
        report_every: int | None = None,
    ) -> None:
        self.stage, self.net, self.objectives, self._stream = stage, net, objectives, stream
        self._accelerator, self._device = accelerator, stream.device
        self._configs = {name: (optimizer_configs or {}).get(name, stage) for name in objectives}
        for objective in objectives.values():
            objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if stage.compile and self._device.type == "cuda":
                objective.compile()
        self._wrapped = {
            name: accelerator.prepare_model(objective, device_placement=False) for name, objective in objectives.items()
        }
        self.optimizers = {
            name: build_optimizers(objective, self._configs[name]) for name, objective in objectives.items()
        }
        self.ema = EMA(net, stage.ema_sigma_rel)
        self.step = 0
        self.report_every = report_every or min(max(1, stage.steps // MIN_REPORTS), MAX_REPORT_INTERVAL)
        self._names: list[str] = []
        self._last_updated = 0

    def run(
        self,
        *,
        report: Callable[[StepStats], None],
        should_pause: Callable[[int], bool] = lambda _: False,
        pause: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run the remaining steps, or those up to a stop, after which ``step`` is less than the stage's steps.

        Args:
            report: called every ``report_every`` steps and after the last one.
            should_pause: whether to pause after a step; must return the same in every process.
            pause: called at a pause, after the report, for evaluations and checkpoints.
            should_stop: whether the user has asked to stop. One process asks after every step; several agree on it at
                every report.

        Raises:
            NonfiniteGradientError: if a gradient is not finite and the stage halts on that, or too many steps in a row
                were skipped.
        """
        steps = range(self.step + 1, self.stage.steps + 1)
        pending: list[Tensor] = []
        is_alone = self._accelerator.num_processes == 1
        micro_batches = (micro_batch for step in steps for micro_batch in self._micro_batches(step))
        with contextlib.closing(self._stream.batches(micro_batches)) as batches:
            self._train_mode()
            started = time.perf_counter()
            for step in steps:
                pending.append(self._step(step, batches))
                self.step = step
                pausing, stopping = should_pause(step), is_alone and should_stop()
                if not (pausing or stopping) and step % self.report_every and step < self.stage.steps:
                    continue
                # (steps since the last report, metrics): the only point at which the host waits for the device
                table = self._accelerator.reduce(torch.stack(pending), reduction="mean").cpu()
                stats = self._stats(table, time.perf_counter() - started)
                self._halt_on_nonfinite(stats)
                report(stats)
                pending = []
                if pausing:
                    pause()
                    self._train_mode()
                if stopping or (not is_alone and self._any(should_stop())):
                    return
                started = time.perf_counter()

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self._accelerator.reduce(torch.tensor(float(flag), device=self._device)).item())

    def _train_mode(self) -> None:
        for objective in self._wrapped.values():
            objective.train()

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step."""
        processes, rank = self._accelerator.num_processes, self._accelerator.process_index
        accumulated = self.stage.gradient_accumulation_steps
        return [MicroBatch(step, i * processes + rank, accumulated * processes) for i in range(accumulated)]

    def _step(self, step: int, batches: Iterator[Batch]) -> Tensor:
        """One step: every objective's outputs, then the norms of their gradients; (metrics,) on the device."""
        accumulated = self.stage.gradient_accumulation_steps
        rows: list[Tensor] = []
        for index in range(accumulated):
            batch, outputs = next(batches), dict[str, Tensor]()
            for name, objective in self._wrapped.items():
                scalars = self._backward(objective, batch, accumulated, last=index == accumulated - 1)
                outputs |= {f"{name} {key}": value for key, value in scalars.items()}
            self._names = list(outputs)
            rows.append(torch.stack(list(outputs.values())))
        norms = [
            optimizers.step(lr_scale(step, self._configs[name], self.stage.steps), skip_nonfinite=True)
            for name, optimizers in self.optimizers.items()
        ]
        self.ema.update(step)
        # (micro-batches, outputs) → (outputs,), joined with (objectives,)
        return torch.cat([torch.stack(rows).mean(0), torch.stack(norms).float()])

    def _backward(self, objective: nn.Module, batch: Batch, accumulated: int, *, last: bool) -> dict[str, Tensor]:
        """Add a micro-batch's gradients. Processes reduce them once, after the last micro-batch of the step."""
        with contextlib.nullcontext() if last else self._accelerator.no_sync(objective):
            outputs = self._forward(objective, batch)
            torch.autograd.backward(outputs["loss"] / accumulated)
        return {key: value.detach().float() for key, value in outputs.items()}

    def _forward(self, objective: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.stage.precision == "bfloat16"):
            outputs: dict[str, Tensor] = objective(batch)
        return outputs

    def _stats(self, table: Tensor, seconds: float) -> StepStats:
        """Statistics from ``table``: (steps since the last report, metrics), the gradient norms in the last columns."""
        names = [*self._names, *(f"{name} gradient" for name in self.objectives)]
        finite = table[:, -len(self.objectives) :].isfinite().all(1)
        means = table[finite].double().mean(0).tolist()  # NaN if every step was skipped
        steps = range(self.step - len(table) + 1, self.step + 1)
        updated = [step for step, is_finite in zip(steps, finite.tolist(), strict=True) if is_finite]
        self._last_updated = updated[-1] if updated else self._last_updated
        return StepStats(
            step=self.step,
            steps=self.stage.steps,
            images=self.step * self.stage.batch_size,
            losses=dict(zip(names, means, strict=True)),
            step_losses=table[:, names.index(f"{next(iter(self.objectives))} loss")].tolist(),
            skipped=sorted({*steps} - {*updated}),
            lr_scale=lr_scale(self.step, self.stage, self.stage.steps),
            images_per_second=len(table) * self.stage.batch_size / max(seconds, 1e-9),
        )

    def _halt_on_nonfinite(self, stats: StepStats) -> None:
        consecutive = stats.step - self._last_updated
        too_many = consecutive >= min(MAX_SKIPPED_STEPS, self.stage.steps)
        if not stats.skipped or (self.stage.on_nonfinite_grad == "skip" and not too_many):
            return
        step = stats.skipped[0]
        problem, remedy = "a gradient is not finite", "start over with a lower learning_rate"
        if too_many:
            problem += f" for {consecutive} consecutive steps"
        elif self.stage.on_nonfinite_grad == "halt":
            remedy = f"set on_nonfinite_grad: skip to resume from the last checkpoint, or {remedy}"
        place = f"step {step}, image {(step - 1) * self.stage.batch_size + 1:,}"
        causes = [cause for cause in gather_object([self._nonfinite_source(step)]) if cause is not None]
        problem = f"{problem}; {causes[0] if causes else 'when the step is repeated, all outputs are finite'}"
        raise NonfiniteGradientError(f"stage {self.stage.name}", problem, remedy, place=place)

    def _nonfinite_source(self, step: int) -> str | None:
        """The first module with a non-finite output when this process's share of a step is repeated, as a phrase."""
        modules: list[str] = []

        def check(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if not modules and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                    modules.append(name)

            return hook

        named = [(name, m) for objective in self.objectives.values() for name, m in objective.named_modules() if name]
        handles = [module.register_forward_hook(check(name)) for name, module in named]
        try:
            for micro_batch in self._micro_batches(step):
                batch = self._stream.batch(micro_batch)
                if not bool(batch.latents.isfinite().all()):
                    return "its latents are not finite"
                for objective in self.objectives.values():
                    self._forward(objective, batch)
                if modules:
                    return f"the first non-finite output comes from {modules[0]}"
        finally:
            for handle in handles:
                handle.remove()
        return None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that the next step depends on, for `snapgen.io.checkpoint.save_checkpoint`."""
        # "turn." and "average" are keys of existing checkpoint files.
        groups = {f"turn.{name}": objective.state_dict() for name, objective in self.objectives.items()}
        groups |= {f"optimizer.{name}": optimizers.state() for name, optimizers in self.optimizers.items()}
        return groups | {"average": self.ema.state(), "random": checkpoint.rng_state()}

    def load(self, groups: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Resume from the `state` that was saved after ``step`` steps."""
        for name, objective in self.objectives.items():
            objective.load_state_dict(groups[f"turn.{name}"])
            self.optimizers[name].load(groups[f"optimizer.{name}"])
        self.ema.load(groups["average"])
        checkpoint.set_rng_state(groups["random"])
        self.step = self._last_updated = step
