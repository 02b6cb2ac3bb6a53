"""Benchmark of a step of the quick start's short run, part by part: forward, backward, optimizer and EMA.

Nets are references of the space `emoji`, trained with the default protocol's optimizer on random latents and on random
contexts of its sizes. With ``--against``, the step of another checkout is timed in the same process: the two take
turns, ratios are taken within a turn, and the losses of all steps are compared. Times are the CPU time of the one
thread.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.step_time --against ../before

Results: ``reports/results/step_time.md``.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import statistics
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

PARTS = ("forward", "backward", "optimizer", "ema", "step")
BATCH, CHANNELS, SIZE, TOKENS, DIM = 32, 4, 8, 16, 384
"""Images of a batch, their latents' channels and side, and their contexts' tokens and width, as in the quick start."""
WARMUP = 5
HERE = Path(__file__).resolve().parent.parent


class Checkout:
    """The modules of a checkout that a step needs; several checkouts can be loaded in one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        ours = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
        sys.path.insert(0, str(self.folder))
        try:
            self.spaces = self._module("archsearch.spaces.loading")
            self.unet = self._module("snapgen.models.unet")
            self.flow = self._module("snapgen.diffusion.rectified_flow")
            self.config = self._module("snapgen.optim.config")
            self.ema = self._module("snapgen.optim.ema")
        finally:
            sys.path.remove(str(self.folder))
            for name in filter(_is_ours, list(sys.modules)):
                del sys.modules[name]
            sys.modules.update(ours)

    def _module(self, name: str) -> ModuleType:
        module = importlib.import_module(name)
        if not Path(module.__file__ or "").is_relative_to(self.folder):
            raise ValueError(f"{name} was not found in {self.folder}")
        return module


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in ("snapgen", "archsearch")


class Run:
    """A net of a checkout in training."""

    def __init__(self, checkout: Checkout, reference: str) -> None:
        self._flow = checkout.flow
        space = checkout.spaces.load_space("emoji")
        self._net = checkout.unet.UNet(space.architecture(space.reference_points()[reference])).train()
        config = checkout.config.OptimizerConfig()
        self._optimizers = checkout.config.build_optimizers(self._net, config)
        self._ema = checkout.ema.EMA(self._net, config.ema_sigma_rel)
        self._random = torch.Generator().manual_seed(0)
        self.losses: list[Tensor] = []

    def step(self) -> dict[str, float]:
        """Seconds of one step and of its parts."""
        data, noise = (torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=self._random) for _ in range(2))
        context = torch.randn(BATCH, TOKENS, DIM, generator=self._random)
        t = torch.rand(BATCH, generator=self._random)
        times = [time.thread_time()]
        noisy = self._flow.interpolate(data, noise, t)
        velocity = self._flow.predict_velocity(self._net, noisy, t, context, "preconditioned")
        loss = self._flow.mse_per_image(velocity, noise - data).mean()
        times.append(time.thread_time())
        torch.autograd.backward(loss)
        times.append(time.thread_time())
        self._optimizers.step(1.0)
        times.append(time.thread_time())
        self.losses.append(loss.detach())
        self._ema.update(len(self.losses))
        times.append(time.thread_time())
        parts = [after - before for before, after in itertools.pairwise(times)]
        return dict(zip(PARTS, [*parts, times[-1] - times[0]], strict=True))


def timed(runs: dict[str, Run], *, turns: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Median seconds of every part in every turn of every run; which run is first alternates."""
    times: dict[str, dict[str, list[float]]] = {part: {name: [] for name in runs} for part in PARTS}
    for turn in range(turns + 1):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            taken = [runs[name].step() for _ in range(steps if turn else WARMUP)]
            for part in PARTS if turn else ():  # turn 0 warms up
                times[part][name].append(statistics.median(seconds[part] for seconds in taken))
        gc.collect()
    return times


def show(times: dict[str, dict[str, list[float]]]) -> None:
    """Markdown table of the parts: milliseconds of each run, and the first over the last with its quartiles."""
    names = list(next(iter(times.values())))
    print(f"| | {' | '.join(f'{name}, ms' for name in names)} | {names[0]} over {names[-1]} | quartiles |")
    print("|---" * (len(names) + 3) + "|")
    for part, of in times.items():
        low, middle, high = np.percentile(np.array(of[names[0]]) / of[names[-1]], [25, 50, 75])
        medians = " | ".join(f"{1e3 * statistics.median(seconds):.1f}" for seconds in of.values())
        print(f"| {part} | {medians} | {middle:.3f} | {low:.3f}–{high:.3f} |", flush=True)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", nargs="+", default=["base", "snapgen"], help="references of the space emoji")
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    checkouts = {"here": Checkout(HERE)}
    if options.against is not None:
        checkouts["there"] = Checkout(options.against)
    for reference in options.references:
        runs = {name: Run(checkout, reference) for name, checkout in checkouts.items()}
        print(f"\n{reference}, {options.turns} turns of {options.steps} steps\n")
        show(timed(runs, turns=options.turns, steps=options.steps))
        losses = [torch.stack(run.losses) for run in runs.values()]
        if len(losses) == 2:
            print(f"\nlargest difference between their losses: {float((losses[0] - losses[1]).abs().max()):.1e}")


if __name__ == "__main__":
    main()
