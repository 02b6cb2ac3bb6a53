"""The loop of a training stage: from one process on a CPU to many GPUs, the same losses, to be stopped at any step.

A step is a function of the weights, the optimizers' state and its number (`snapgen.feed`), so that what goes on from a
checkpoint ends, on one machine, with the weights of the run that was never broken. Between reports nothing waits for
the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from snapgen import checkpoint
from snapgen.errors import InputError
from snapgen.feed import Batch, Feed
from snapgen.optimizers import Optimizers
from snapgen.stages import Stage
from snapgen.training import Average, Optimisation, optimizers_of, rate

REPORTS = 200
"""Reports of a stage, at least; a step each if it has fewer."""


@dataclass(frozen=True)
class Report:
    """What a stage did since the report before."""

    step: int
    steps: int
    images: int
    losses: dict[str, float]
    """Means over the steps, of what the turns give and of the gradients' norms."""
    bad: list[int]
    """Steps that were not taken, for a gradient that is not finite."""
    rate: float
    """Of learning, over its peak."""
    images_per_second: float


class Loop:
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
        feed: Feed,
        *,
        accelerator: Accelerator,
        settings: Mapping[str, Optimisation] | None = None,
    ) -> None:
        self.stage, self.net, self.turns, self._feed = stage, net, turns, feed
        self._accelerator = accelerator
        self._settings = {name: (settings or {}).get(name, stage) for name in turns}
        self.optimizers: dict[str, Optimizers] = {
            name: optimizers_of(turn, self._settings[name]) for name, turn in turns.items()
        }
        if stage.compile and accelerator.device.type == "cuda":
            for turn in turns.values():
                turn.compile()
        self._wrapped = {name: accelerator.prepare_model(turn) for name, turn in turns.items()}
        self.average = Average(net, stage.ema)
        self.step = 0
        self.report_every = max(1, stage.steps // REPORTS)
        self._names: list[str] = []

    def run(self, *, report: Callable[[Report], None], due: Callable[[int], bool], pause: Callable[[], None]) -> None:
        """Take the steps that are left.

        Args:
            report: called every ``report_every`` steps and after the last.
            due: whether to pause after a step; the same in every process.
            pause: called then, after the report: for evaluations and checkpoints.

        Raises:
            InputError: if a gradient was not finite and the stage says to halt, or no step could be taken at all.
        """
        pending: list[Tensor] = []
        began = time.perf_counter()
        for step in range(self.step + 1, self.stage.steps + 1):
            pending.append(self._take(step))
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
            began = time.perf_counter()

    def _take(self, step: int) -> Tensor:
        """One step: what every turn gives, then the norms of their gradients; (numbers,) on the device."""
        for turn in self.turns.values():
            turn.train()
        processes, parts = self._accelerator.num_processes, self.stage.accumulate
        totals: Tensor | None = None
        for part in range(parts):
            mine = part * processes + self._accelerator.process_index
            batch = self._feed.batch(step, mine, parts * processes)
            given: dict[str, Tensor] = {}
            for name, turn in self._wrapped.items():
                given |= {f"{name} {key}": value for key, value in self._backward(turn, batch, part, parts).items()}
            self._names = list(given)
            numbers = torch.stack(list(given.values()))
            totals = numbers if totals is None else totals + numbers
        assert totals is not None
        norms = [
            optimizers.step(rate(step, self._settings[name], self.stage.steps), skip_bad=True)
            for name, optimizers in self.optimizers.items()
        ]
        self.average.update(step)
        return torch.cat([totals / parts, torch.stack(norms).float()])

    def _backward(self, turn: nn.Module, batch: Batch, part: int, parts: int) -> dict[str, Tensor]:
        last = part == parts - 1
        device = self._accelerator.device.type
        with contextlib.nullcontext() if last else self._accelerator.no_sync(turn):
            with torch.autocast(device, torch.bfloat16, enabled=self.stage.precision == "bfloat16"):
                given: dict[str, Tensor] = turn(batch)
            torch.autograd.backward(given["loss"] / parts)
        return {key: value.detach().float() for key, value in given.items()}

    def _report(self, table: Tensor, seconds: float) -> Report:
        """``table`` (steps since the last report, numbers)."""
        names = [*self._names, *(f"{name} gradient" for name in self.turns)]
        good = table.isfinite().all(1)
        means = table[good].double().mean(0).tolist() if bool(good.any()) else [float("nan")] * len(names)
        first = self.step - len(table) + 1
        return Report(
            step=self.step,
            steps=self.stage.steps,
            images=self.step * self.stage.batch,
            losses=dict(zip(names, means, strict=True)),
            bad=[first + row for row, fine in enumerate(good.tolist()) if not fine],
            rate=rate(self.step, self.stage, self.stage.steps),
            images_per_second=len(table) * self.stage.batch / max(seconds, 1e-9),
        )

    def _stop_if_bad(self, report: Report) -> None:
        hopeless = len(report.bad) == min(self.report_every, self.step) and len(report.bad) > 1
        if not report.bad or (self.stage.on_bad == "skip" and not hopeless):
            return
        place = f"step {report.bad[0]}, image {(report.bad[0] - 1) * self.stage.batch:,}"
        problem = f"a gradient is not finite{self._where(report.bad[0])}"
        remedy = "lower learning_rate or clip, or set on_bad: skip; the last checkpoint is whole"
        raise InputError(f"stage {self.stage.name}", problem, remedy, place=place)

    @torch.no_grad()
    def _where(self, step: int) -> str:
        """The first module whose output is not finite when the step is taken again; nothing if it is by now."""
        found: list[str] = []

        def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                    found.append(name)

            return hook

        batch = self._feed.batch(step, self._accelerator.process_index, self._accelerator.num_processes)
        if not bool(batch.latents.isfinite().all()):
            return "; its latents are not"
        handles = [module.register_forward_hook(look(name)) for name, module in self.net.named_modules() if name]
        try:
            with contextlib.suppress(RuntimeError), torch.enable_grad():
                next(iter(self.turns.values()))(batch)
        finally:
            for handle in handles:
                handle.remove()
        return f", first in {found[0]}" if found else ""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that the next step depends on; `snapgen.checkpoint.save` takes it."""
        parts = {f"turn.{name}": turn.state_dict() for name, turn in self.turns.items()}
        parts |= {f"optimizer.{name}": optimizers.state() for name, optimizers in self.optimizers.items()}
        return parts | {"average": self.average.state(), "random": checkpoint.random_state()}

    def load(self, parts: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Go on from what `state` gave after so many steps."""
        for name, turn in self.turns.items():
            turn.load_state_dict(parts[f"turn.{name}"])
            self.optimizers[name].load(parts[f"optimizer.{name}"])
        self.average.load(parts["average"])
        checkpoint.set_random_state(parts["random"])
        self.step = step
