"""The loop of a training stage: from one process on a CPU to many GPUs, the same losses, to be stopped at any step.

A step is a function of the weights, the optimizers' state and its number (`snapgen.training.batches`), so that what
goes on from a checkpoint ends, on one machine, with the weights of the run that was never broken. Between reports
nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from snapgen.errors import InputError
from snapgen.io import checkpoint
from snapgen.optim.config import OptimizerConfig, build_optimizers
from snapgen.optim.ema import EMA
from snapgen.optim.schedule import lr_scale
from snapgen.training.batches import Batch, BatchStream, MicroBatch
from snapgen.training.stages import Stage

REPORTS = 200
"""Reports of a stage, at least; a step each if it has fewer."""
LONGEST = 100
"""Steps between reports, at most."""
HOPELESS = 20
"""Steps one after another that could not be taken, at which a stage that skips them halts nevertheless."""


@dataclass(frozen=True)
class StepStats:
    """What a stage did since the report before."""

    step: int
    steps: int
    images: int
    losses: dict[str, float]
    """Means over the steps that were taken, of what the turns give and of the gradients' norms."""
    bad: list[int]
    """Steps in which a turn was not taken, for a gradient that is not finite."""
    rate: float
    """Of learning, over its peak."""
    images_per_second: float


class Trainer:
    """One stage's moving parts.

    Args:
        stage: its settings.
        net: the net whose weights are averaged.
        turns: what is trained in turn on every batch, by name: modules that take a `Batch` and give scalars, of which
            ``loss`` is minimised and the others are told. A turn trains its own parameters that require gradients.
        settings: of a turn's optimizer, where they are not the stage's.
        feed: its batches.
    """

    def __init__(
        self,
        stage: Stage,
        net: nn.Module,
        turns: Mapping[str, nn.Module],
        feed: BatchStream,
        *,
        accelerator: Accelerator,
        settings: Mapping[str, OptimizerConfig] | None = None,
    ) -> None:
        self.stage, self.net, self.turns, self._feed = stage, net, turns, feed
        self._accelerator = accelerator
        self._settings = {name: (settings or {}).get(name, stage) for name in turns}
        for turn in turns.values():
            turn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if stage.compile and accelerator.device.type == "cuda":
                turn.compile()
        self._wrapped = {name: accelerator.prepare_model(turn) for name, turn in turns.items()}
        self.optimizers = {name: build_optimizers(turn, self._settings[name]) for name, turn in turns.items()}
        self.average = EMA(net, stage.ema)
        self.step = 0
        self.report_every = min(max(1, stage.steps // REPORTS), LONGEST)
        self._names: list[str] = []
        self._last_taken = 0

    def run(
        self, *, report: Callable[[StepStats], None], due: Callable[[int], bool], pause: Callable[[], None]
    ) -> None:
        """Take the steps that are left.

        Args:
            report: called every ``report_every`` steps and after the last.
            due: whether to pause after a step; the same in every process.
            pause: called then, after the report: for evaluations and checkpoints.

        Raises:
            InputError: if a gradient was not finite and the stage says to halt, or none was for many steps.
        """
        steps = range(self.step + 1, self.stage.steps + 1)
        pending: list[Tensor] = []
        with contextlib.closing(self._feed.batches(part for step in steps for part in self._parts(step))) as batches:
            self._begin()
            began = time.perf_counter()
            for step in steps:
                pending.append(self._take(step, batches))
                self.step = step
                stops = due(step)
                if not stops and step % self.report_every and step < self.stage.steps:
                    continue
                table = self._accelerator.reduce(torch.stack(pending), reduction="mean").cpu()
                told = self._report(table, time.perf_counter() - began)
                self._stop_if_bad(told)
                report(told)
                pending = []
                if stops:
                    pause()
                    self._begin()
                began = time.perf_counter()

    def _begin(self) -> None:
        for turn in self._wrapped.values():
            turn.train()

    def _parts(self, step: int) -> list[MicroBatch]:
        """This process's share of a step."""
        processes, mine = self._accelerator.num_processes, self._accelerator.process_index
        count = self.stage.accumulate
        return [MicroBatch(step, part * processes + mine, count * processes) for part in range(count)]

    def _take(self, step: int, batches: Iterator[Batch]) -> Tensor:
        """One step: what every turn gives, then the norms of their gradients; (numbers,) on the device."""
        parts = self.stage.accumulate
        sums: list[Tensor] = []
        for part in range(parts):
            batch, given = next(batches), dict[str, Tensor]()
            for name, turn in self._wrapped.items():
                found = self._backward(turn, batch, parts, last=part == parts - 1)
                given |= {f"{name} {key}": value for key, value in found.items()}
            self._names = list(given)
            sums.append(torch.stack(list(given.values())))
        norms = [
            optimizers.step(lr_scale(step, self._settings[name], self.stage.steps), skip_bad=True)
            for name, optimizers in self.optimizers.items()
        ]
        self.average.update(step)
        return torch.cat([torch.stack(sums).mean(0), torch.stack(norms).float()])

    def _backward(self, turn: nn.Module, batch: Batch, parts: int, *, last: bool) -> dict[str, Tensor]:
        """Adds a part's gradients, which processes share with each other after the last."""
        with contextlib.nullcontext() if last else self._accelerator.no_sync(turn):
            given = self._given(turn, batch)
            torch.autograd.backward(given["loss"] / parts)
        return {key: value.detach().float() for key, value in given.items()}

    def _given(self, turn: nn.Module, batch: Batch) -> dict[str, Tensor]:
        device = self._accelerator.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.stage.precision == "bfloat16"):
            given: dict[str, Tensor] = turn(batch)
        return given

    def _report(self, table: Tensor, seconds: float) -> StepStats:
        """``table`` (steps since the last report, numbers)."""
        names = [*self._names, *(f"{name} gradient" for name in self.turns)]
        fine = table[:, -len(self.turns) :].isfinite().all(1)
        means = table[fine].double().mean(0).tolist()  # NaN if none was taken
        steps = range(self.step - len(table) + 1, self.step + 1)
        taken = [step for step, good in zip(steps, fine.tolist(), strict=True) if good]
        self._last_taken = taken[-1] if taken else self._last_taken
        return StepStats(
            step=self.step,
            steps=self.stage.steps,
            images=self.step * self.stage.batch,
            losses=dict(zip(names, means, strict=True)),
            bad=sorted({*steps} - {*taken}),
            rate=lr_scale(self.step, self.stage, self.stage.steps),
            images_per_second=len(table) * self.stage.batch / max(seconds, 1e-9),
        )

    def _stop_if_bad(self, report: StepStats) -> None:
        lost = report.step - self._last_taken
        hopeless = lost >= min(HOPELESS, self.stage.steps)
        if not report.bad or (self.stage.on_bad == "skip" and not hopeless):
            return
        step = report.bad[0]
        problem, remedy = "a gradient is not finite", "begin anew with a lower learning_rate"
        if hopeless:
            problem += f" for {lost} steps on end"
        elif self.stage.on_bad == "halt":
            remedy = f"set on_bad: skip to go on from the last checkpoint, or {remedy}"
        place = f"step {step}, image {(step - 1) * self.stage.batch + 1:,}"
        found = [where for where in gather_object([self._where(step)]) if where is not None]
        problem = f"{problem}; {found[0] if found else 'taken again, all outputs are'}"
        raise InputError(f"stage {self.stage.name}", problem, remedy, place=place)

    def _where(self, step: int) -> str | None:
        """The first module whose output is not finite when this process's share of a step is taken again, if any."""
        found: list[str] = []

        def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                    found.append(name)

            return hook

        named = [(name, module) for turn in self.turns.values() for name, module in turn.named_modules() if name]
        handles = [module.register_forward_hook(look(name)) for name, module in named]
        try:
            for part in self._parts(step):
                batch = self._feed.batch(part)
                if not bool(batch.latents.isfinite().all()):
                    return "its latents are not"
                for turn in self.turns.values():
                    self._given(turn, batch)
                if found:
                    return f"the first output that is not is that of {found[0]}"
        finally:
            for handle in handles:
                handle.remove()
        return None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that the next step depends on; `snapgen.io.checkpoint.save_checkpoint` takes it."""
        parts = {f"turn.{name}": turn.state_dict() for name, turn in self.turns.items()}
        parts |= {f"optimizer.{name}": optimizers.state() for name, optimizers in self.optimizers.items()}
        return parts | {"average": self.average.state(), "random": checkpoint.rng_state()}

    def load(self, parts: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Go on from what `state` gave after so many steps."""
        for name, turn in self.turns.items():
            turn.load_state_dict(parts[f"turn.{name}"])
            self.optimizers[name].load(parts[f"optimizer.{name}"])
        self.average.load(parts["average"])
        checkpoint.set_random_state(parts["random"])
        self.step = self._last_taken = step
