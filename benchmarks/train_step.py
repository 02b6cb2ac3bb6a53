"""Benchmark of a training step: our nets compared with diffusers' `UNet2DConditionModel` of equal widths and blocks.

A step consists of what `snapgen.training.loop` does with a batch: forward and backward pass of an objective
(`snapgen.objectives.flow_matching`), gradient clipping, the optimizer (`snapgen.optim.optimizers`) and the EMA, with
the same settings for every net. Nets are timed round-robin in one process, with the median of several steps per round;
ratios are taken within a round. ``--alone`` keeps one net at a time in memory and rebuilds it every round. With one
thread, times are the CPU time of that thread.

Peak memory is measured in a fresh process that builds a net and takes three steps: the growth of the peak resident size
since all imports (weights, gradients, averages, activations and allocator overhead; memory freed after importing may
hide some of it).

    python -m benchmarks.train_step --size embedded --latent 8 16 --batch 32 --optimizer adamw muon
    python -m benchmarks.train_step --size full --latent 16 --batch 1 --optimizer adamw --alone
    python -m benchmarks.train_step --size embedded --latent 8 --batch 32 --what loop

All of it runs on the CPU; `benchmarks.gpu_check` times such steps on CUDA. Results: ``reports/results/train_step.md``.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import re
import resource
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator

from archsearch.cost.counter import module_cost
from archsearch.machine import chip, operating_system
from benchmarks.peers import Times, compare
from benchmarks.train_step_nets import SIZES, Contestant, Entry, Setting
from snapgen.training.batches import MicroBatch
from snapgen.training.loop import Trainer
from snapgen.training.stages import FlowMatchingStage

LOOP_STEPS = 10


def timed(entries: Sequence[Entry], setting: Setting, *, turns: int, steps: int, alone: bool) -> Times:
    """Median step time of every net in every round, after two warm-up steps."""
    times: Times = {}
    kept: dict[str, Contestant] = {}
    for _ in range(turns):
        for entry in entries:
            contestant = kept.pop(entry.name, None)
            if contestant is None:
                contestant = Contestant(entry, setting)
                for _ in range(2):
                    contestant.step()
            for part, seconds in _medians(contestant, steps).items():
                times.setdefault(part, {}).setdefault(entry.name, []).append(seconds)
            if not alone:
                kept[entry.name] = contestant
            del contestant
            gc.collect()
    return times


def _medians(contestant: Contestant, steps: int) -> dict[str, float]:
    taken = [contestant.step() for _ in range(steps)]
    return {part: statistics.median(seconds[part] for seconds in taken) for part in taken[0]}


def peak_memory(entry: Entry, setting: Setting) -> int:
    """Peak memory of a net's training in bytes, measured in a separate process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(_peak_here, entry, setting).result()


def _peak_here(entry: Entry, setting: Setting) -> int:
    torch.set_num_threads(setting.threads)
    before = _largest()
    contestant = Contestant(entry, setting)
    for _ in range(3):
        contestant.step()
    return _largest() - before


def _largest() -> int:
    """Peak memory of this process so far, in bytes."""
    if sys.platform == "linux":  # here ru_maxrss begins with the parent's
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def looped(setting: Setting, turns: int) -> Times:
    """A step of the training loop, with data loading and a report every ten steps, compared with the bare step."""
    contestant = Contestant(setting.size.entries[0], setting)
    stage = setting.stage.model_copy(update={"num_images": setting.stage.batch_size * LOOP_STEPS * (turns + 1)})
    accelerator = Accelerator(cpu=True)
    loop = Trainer(stage, contestant.net, {"flow": contestant.objective}, contestant.feed, accelerator=accelerator)
    loop.report_every = LOOP_STEPS
    began, found = [setting.now()], Times(step={"the loop": [], "bare": [], "its feed alone": []})

    def pause() -> None:
        seconds = setting.now() - began[0]
        bare = statistics.mean(contestant.step()["train step"] for _ in range(LOOP_STEPS))
        fed = setting.now()
        for number in range(LOOP_STEPS):
            contestant.feed.batch(MicroBatch(number + 1))
        if loop.step > LOOP_STEPS:  # a first turn warms up
            feeding = (setting.now() - fed) / LOOP_STEPS
            for name, one in zip(found["step"], (seconds / LOOP_STEPS, bare, feeding), strict=True):
                found["step"][name].append(one)
        began[0] = setting.now()

    loop.run(report=lambda _: None, should_pause=lambda step: step % LOOP_STEPS == 0, pause=pause)
    return found


def macs(entry: Entry, setting: Setting) -> tuple[int, int]:
    """Cost of a forward pass of one image, and number of parameters."""
    with torch.device("meta"):
        sample = torch.empty(1, setting.size.channels, setting.latent, setting.latent)
        context = torch.empty(1, setting.size.captions.tokens, setting.size.captions.context)
        cost = module_cost(entry.make().eval(), sample, torch.empty(1), context)
    return cost.macs, cost.params


def show(entries: Sequence[Entry], setting: Setting) -> None:
    """Markdown table of the nets and the memory of their training."""
    print("| | params, M | GMACs an image | peak memory, MiB | first over it |\n|---|---|---|---|---|")
    first = 0
    for entry in entries:
        count, params = macs(entry, setting)
        held = peak_memory(entry, setting)
        first = first or held
        row = f"| {entry.name} | {params / 1e6:.2f} | {count / 1e9:.2f} | {held / 2**20:.0f} | {first / held:.2f} |"
        print(row, flush=True)


def settings_of(options: argparse.Namespace) -> Iterator[tuple[str, Setting]]:
    """Markdown tables of the results."""
    for latent in options.latent:
        for optimizer in options.optimizer:
            stage = FlowMatchingStage(
                name="timed",
                resolution=8 * latent,
                num_images=options.batch,
                batch_size=options.batch,
                optimizer=optimizer,
            )
            yield optimizer, Setting(SIZES[options.size], torch.device("cpu"), options.threads, latent, stage)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="embedded")
    parser.add_argument("--latent", type=int, nargs="+", default=[8], help="height and width, a multiple of 4")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--optimizer", nargs="+", choices=["adamw", "muon"], default=["adamw"])
    parser.add_argument("--only", nargs="+", type=int, help="nets by number, from 0; others compare to the first")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="one net at a time in memory")
    parser.add_argument("--what", nargs="+", choices=["memory", "time", "loop"], default=["memory", "time"])
    options = parser.parse_args()
    if any(latent < 4 or latent % 4 for latent in options.latent):
        parser.error("--latent must be a multiple of 4")
    if min(options.batch, options.turns, options.steps, options.threads) < 1:
        parser.error("--batch, --turns, --steps and --threads must be at least 1")
    entries = SIZES[options.size].entries
    if not all(0 <= number < len(entries) for number in options.only or ()):
        parser.error(f"--only takes numbers from 0 to {len(entries) - 1}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    chosen = [entries[number] for number in options.only] if options.only else list(entries)
    for optimizer, setting in settings_of(options):
        about = f"{options.size}, batch {options.batch}, {optimizer}, {setting.stage.precision}"
        where = f"{chip()}, {options.threads} thread(s), {operating_system()}, torch {torch.__version__}"
        print(f"\n{where}; {about}", flush=True)
        print(f"latent {setting.latent}, {options.turns} turns of {options.steps} steps\n", flush=True)
        if "loop" in options.what:
            compare(looped(setting, options.turns))
        if "memory" in options.what:
            show(chosen, setting)
        if "time" in options.what:
            compare(timed(chosen, setting, turns=options.turns, steps=options.steps, alone=options.alone))


if __name__ == "__main__":
    main()
