"""Part 2: training steps of our networks and diffusers', eager and compiled, with and without checkpointing.

A step is that of the training loop: forward and backward under bfloat16 autocast with float32 weights in channels-last
format, gradient clipping, fused AdamW, EMA. All networks of a case are timed in one process, round-robin; each time is
the mean of several steps between two synchronizations with the device.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu_check import kinds
from benchmarks.gpu_check.nets import (
    DREAMLITE,
    OURS,
    OURS_STANDARD,
    UNET2D,
    families,
    halving,
    peak_of,
    setting_of,
    synchronize,
)
from benchmarks.gpu_check.section import Section, Table
from benchmarks.gpu_check.setup import Setup
from benchmarks.gpu_check.system_info import flops_of
from benchmarks.train_step import macs
from benchmarks.train_step_nets import Contestant, Entry, Setting
from snapgen.errors import first_line

ALL = (OURS, OURS_STANDARD, UNET2D, DREAMLITE)
PROFILED = (OURS, OURS_STANDARD, UNET2D)
FLOPS_PER_MAC = 6
MIN_CASE_SECONDS = 8.0
"""Remaining time below which no further case is started."""
_COUNTED: dict[tuple[str, int, str], tuple[int, int]] = {}


@dataclass(frozen=True)
class Case:
    """Networks that are timed together."""

    family: str
    latent: int
    batch: int
    names: tuple[str, ...] = ALL
    compiled: bool = False
    checkpointed: bool = False
    profiled: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Display name of the case."""
        mode = "compiled" if self.compiled else "eager"
        return f"{self.family}, latent {self.latent}, {mode}{', checkpointed' if self.checkpointed else ''}"


def cases(*, small: bool) -> list[Case]:
    """Cases to time, the most important first, because the time limit may cut off the last ones."""
    if small:
        emoji = Case("snapgen-emoji", 8, 2, profiled=(OURS,))
        return [
            emoji,
            replace(emoji, names=(OURS,), profiled=(), checkpointed=True),
            replace(emoji, names=(OURS,), profiled=(), compiled=True),
        ]
    imagenet, t2i = (Case(name, 128, 8) for name in ("snapgen-imagenet", "snapgen-t2i"))
    low_resolution = {"latent": 32, "batch": 128}
    ours = {"names": (OURS,)}
    return [
        replace(imagenet, **low_resolution, profiled=(OURS,)),  # type: ignore[arg-type]
        replace(imagenet, profiled=PROFILED),
        replace(t2i, names=(OURS, UNET2D, DREAMLITE)),
        replace(t2i, **low_resolution, names=(OURS, UNET2D, DREAMLITE)),  # type: ignore[arg-type]
        replace(imagenet, names=(OURS, UNET2D), checkpointed=True),
        replace(t2i, **ours, checkpointed=True),  # type: ignore[arg-type]
        replace(imagenet, **ours, compiled=True, profiled=(OURS,)),  # type: ignore[arg-type]
        replace(imagenet, **low_resolution, **ours, compiled=True),  # type: ignore[arg-type]
        replace(imagenet, names=(UNET2D,), compiled=True),
        replace(t2i, **ours, compiled=True),  # type: ignore[arg-type]
        replace(imagenet, names=(OURS_STANDARD,), compiled=True),
        replace(imagenet, names=(DREAMLITE,), compiled=True),
        replace(t2i, **low_resolution, **ours, compiled=True),  # type: ignore[arg-type]
        replace(imagenet, **low_resolution, names=(OURS, UNET2D), checkpointed=True),  # type: ignore[arg-type]
        replace(imagenet, **ours, compiled=True, checkpointed=True),  # type: ignore[arg-type]
    ]


def run(section: Section, setup: Setup) -> None:
    """Time all cases while time is left."""
    device = torch.device(setup.device)
    torch.set_num_threads(1 if setup.device == "cpu" else torch.get_num_threads())
    peak = flops_of(torch.cuda.get_device_name(device)) if setup.device == "cuda" else None
    section.say(_definitions(peak))
    times = section.table(
        "A training step",
        [
            "case",
            "net",
            "params, M",
            "GMACs per image",
            "batch",
            "ms per step",
            "quartiles",
            "images/s",
            "MFU",
            "peak GiB",
        ],
    )
    where = section.table("Time of a step by kind of operation, percent", ["case", "net", *kinds.KINDS])
    sizes = families(small=setup.small)
    for case in cases(small=setup.small):
        if setup.left() < MIN_CASE_SECONDS:
            section.say(f"Skipped for lack of time: {case.label} and all cases after it.")
            return
        bench = Bench(section, case, sizes[case.family].entries, times, where, peak, small=setup.small)
        bench.run(setting_of(sizes[case.family], device, latent=case.latent, batch=case.batch))


def utilisation(macs: int, images: int, seconds: float, peak: float) -> float:
    """Fraction of a device's peak FLOP/s that a step reaches; ``macs`` are those of one image's forward pass."""
    return FLOPS_PER_MAC * macs * images / (seconds * peak)


def _definitions(peak: float | None) -> str:
    mfu = (
        f"MFU: 6 FLOPs per MAC (2 forward, 4 backward) times images per second, over the device's dense bfloat16 peak "
        f"of {peak / 1e12:.0f} TFLOP/s from its data sheet; recomputation by checkpointing does not count."
        if peak
        else "No MFU: the dense bfloat16 peak of this device is unknown."
    )
    return (
        "bfloat16 autocast with float32 weights, channels-last, fused AdamW, EMA; times are medians over repeats, in "
        f"each of which all networks of a case take the same steps. {mfu} Peak memory is the peak of torch's "
        "allocations: weights, gradients, optimizer moments, EMA, activations."
    )


class Bench:
    """Benchmark of one case; if a batch does not fit into memory, it is halved for all networks of the case."""

    def __init__(
        self,
        section: Section,
        case: Case,
        entries: tuple[Entry, ...],
        times: Table,
        where: Table,
        peak: float | None,
        *,
        small: bool,
    ) -> None:
        self.section, self.case, self.times, self.where, self.peak = section, case, times, where, peak
        chosen = [entry for entry in entries if entry.name in case.names]
        self.entries = [replace(entry, checkpointed=case.checkpointed) for entry in chosen]
        self.repeats, self.steps = (2, 1) if small else (5, 4)
        # Inductor takes minutes on a CPU; aot_eager runs the same stages before it.
        self.backend = "aot_eager" if small else "inductor"

    def run(self, setting: Setting) -> None:
        """Time the case and add its rows to the tables."""
        for fitting in halving(setting):
            with contextlib.suppress(torch.OutOfMemoryError):
                self._timed(fitting)
                return
        self.section.say(f"{self.case.label}: not even a batch of one image fits into memory.")

    def _timed(self, setting: Setting) -> None:
        gc.collect()  # free the networks of the previous case
        contestants: dict[str, Contestant] = {}
        peak_bytes: dict[str, int | None] = {}
        for entry in self.entries:
            with peak_of(setting.device) as peak:
                contestant = self._build(entry, setting)
            if contestant is not None:
                contestants[entry.name], peak_bytes[entry.name] = contestant, peak[0] if peak else None
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(self.repeats):
            for name, contestant in contestants.items():
                seconds[name].append(self._window(contestant, setting.device))
        for entry in self.entries:
            if entry.name in contestants:
                self._row(entry, setting, seconds[entry.name], peak_bytes[entry.name])
        for name in self.case.profiled:
            if name in contestants:
                self._kinds(name, contestants[name], setting.device)

    def _build(self, entry: Entry, setting: Setting) -> Contestant | None:
        """Build a network and run its first steps; None, with a note in the section, if it cannot be compiled."""
        contestant = Contestant(entry, setting)
        began = time.monotonic()
        try:
            if self.case.compiled:
                contestant.objective.compile(backend=self.backend)
            for _ in range(2):
                contestant.step()
            synchronize(setting.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may raise any exception
            if not self.case.compiled:
                raise
            self.section.say(f"{self.case.label}, {entry.name}: could not be compiled ({first_line(error)}).")
            return None
        if self.case.compiled:
            self.section.record(what="compile", case=self.case.label, net=entry.name, seconds=time.monotonic() - began)
        return contestant

    def _window(self, contestant: Contestant, device: torch.device) -> float:
        """Mean seconds per step over several steps without synchronization between them."""
        synchronize(device)
        began = time.perf_counter()
        for _ in range(self.steps):
            contestant.step()
        synchronize(device)
        return (time.perf_counter() - began) / self.steps

    def _row(self, entry: Entry, setting: Setting, seconds: list[float], peak_bytes: int | None) -> None:
        count, params = self._counted(entry, setting)
        batch, median = setting.stage.batch_size, statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        mfu = utilisation(count, batch, median, self.peak) if self.peak else None
        self.times.add(
            self.case.label,
            entry.name,
            f"{params / 1e6:.1f}",
            f"{count / 1e9:.1f}",
            batch,
            f"{1e3 * median:.1f}",
            f"{1e3 * low:.1f} to {1e3 * high:.1f}",
            f"{batch / median:.1f}",
            None if mfu is None else f"{mfu:.1%}",
            None if peak_bytes is None else f"{peak_bytes / 2**30:.1f}",
        )
        self.section.record(
            what="step", case=self.case.label, net=entry.name, params=params, macs=count, batch=batch,
            seconds=seconds, utilisation=mfu, peak_bytes=peak_bytes,
        )  # fmt: skip

    def _counted(self, entry: Entry, setting: Setting) -> tuple[int, int]:
        """MACs per image and number of parameters, computed once per network and latent size."""
        key = (self.case.family, self.case.latent, entry.name)
        if key not in _COUNTED:
            _COUNTED[key] = macs(entry, setting)
        return _COUNTED[key]

    def _kinds(self, name: str, contestant: Contestant, device: torch.device) -> None:
        shares = kinds.shares(contestant.step, device)
        self.where.add(self.case.label, name, *(f"{100 * shares.get(kind, 0):.1f}" for kind in kinds.KINDS))
        self.section.record(what="kinds", case=self.case.label, net=name, shares=shares)
