"""Part 2: a training step of our nets beside diffusers', eager and compiled, with and without checkpointing.

A step is what the training loop does with a batch: forward and backward under bfloat16's autocast, weights in float32
and channels-last, clipping, fused AdamW, the weights' average. All nets of a case are timed in one process, in turns;
a time is that of several steps, the device waited for before and after.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu_check import kinds
from benchmarks.gpu_check.nets import AS_PLAIN, DREAMLITE, OURS, UNET2D, Fed, families, peak_of, setting_of, synchronise
from benchmarks.gpu_check.place import flops_of
from benchmarks.gpu_check.section import Section, Table
from benchmarks.gpu_check.setup import Setup
from benchmarks.train_step import macs, utilisation
from benchmarks.train_step_nets import Contestant, Entry
from snapgen.errors import first_line

ALL = (OURS, AS_PLAIN, UNET2D, DREAMLITE)
PROFILED = (OURS, AS_PLAIN, UNET2D)
RESERVE = 8.0
"""Seconds left under which no case is begun."""
_COUNTED: dict[tuple[str, int, str], tuple[int, int]] = {}


@dataclass(frozen=True)
class Case:
    """What is timed together."""

    family: str
    latent: int
    batch: int
    names: tuple[str, ...] = ALL
    compiled: bool = False
    checkpointed: bool = False
    profiled: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The case, for people."""
        way = "compiled" if self.compiled else "eager"
        return f"{self.family}, latent {self.latent}, {way}{', checkpointed' if self.checkpointed else ''}"


def cases(*, small: bool) -> list[Case]:
    """In the order of their worth: a time limit cuts the last ones."""
    if small:
        emoji = Case("snapgen-emoji", 8, 2, profiled=(OURS,))
        return [
            emoji,
            replace(emoji, names=(OURS,), profiled=(), checkpointed=True),
            replace(emoji, names=(OURS,), profiled=(), compiled=True),
        ]
    imagenet, t2i = (Case(name, 128, 8) for name in ("snapgen-imagenet", "snapgen-t2i"))
    low = {"latent": 32, "batch": 128}
    ours = {"names": (OURS,)}
    return [
        replace(imagenet, **low, profiled=(OURS,)),  # type: ignore[arg-type]
        replace(imagenet, profiled=PROFILED),
        replace(t2i, names=(OURS, UNET2D, DREAMLITE)),
        replace(t2i, **low, names=(OURS, UNET2D, DREAMLITE)),  # type: ignore[arg-type]
        replace(imagenet, names=(OURS, UNET2D), checkpointed=True),
        replace(t2i, **ours, checkpointed=True),  # type: ignore[arg-type]
        replace(imagenet, **ours, compiled=True, profiled=(OURS,)),  # type: ignore[arg-type]
        replace(imagenet, **low, **ours, compiled=True),  # type: ignore[arg-type]
        replace(imagenet, names=(UNET2D,), compiled=True),
        replace(t2i, **ours, compiled=True),  # type: ignore[arg-type]
        replace(imagenet, names=(AS_PLAIN,), compiled=True),
        replace(imagenet, names=(DREAMLITE,), compiled=True),
        replace(t2i, **low, **ours, compiled=True),  # type: ignore[arg-type]
        replace(imagenet, **low, names=(OURS, UNET2D), checkpointed=True),  # type: ignore[arg-type]
        replace(imagenet, **ours, compiled=True, checkpointed=True),  # type: ignore[arg-type]
    ]


def run(section: Section, setup: Setup) -> None:
    """Every case there is time for."""
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
            "GMACs an image",
            "batch",
            "ms a step",
            "quartiles",
            "images/s",
            "MFU",
            "peak GiB",
        ],
    )
    where = section.table("Where the time of a step goes, per cent", ["case", "net", *kinds.KINDS])
    sizes = families(small=setup.small)
    for case in cases(small=setup.small):
        if setup.left() < RESERVE:
            section.say(f"Not taken for want of time: {case.words}, and what would have come after it.")
            return
        bench = Bench(section, case, sizes[case.family].entries, times, where, peak, small=setup.small)
        bench.run(setting_of(sizes[case.family], device, latent=case.latent, batch=case.batch))


def _definitions(peak: float | None) -> str:
    share = (
        f"MFU is 6 FLOPs a MAC (2 forward, 4 backward) of our own count, times images a second, over {peak / 1e12:.0f} "
        "TFLOP/s, the device's dense bfloat16 peak by its data sheet; what checkpointing computes again does not count."
        if peak
        else "No MFU: the dense bfloat16 peak of this device is not known here."
    )
    return (
        "bfloat16 autocast over float32 weights, channels-last, fused AdamW, the weights' average; times are medians "
        f"over turns in which all nets of a case take the same steps. {share} Peak memory is what torch's tensors take "
        "at most: weights, gradients, moments, average, activations."
    )


class Bench:
    """One case: its nets, made and timed together; a batch that does not fit is halved for all of them."""

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
        self.turns, self.steps = (2, 1) if small else (5, 4)
        # Inductor takes minutes on a CPU; what is before it is the same.
        self.backend = "aot_eager" if small else "inductor"

    def run(self, setting: Fed) -> None:
        """Time the case, and add its rows."""
        while True:
            try:
                self._timed(setting)
                return
            except torch.OutOfMemoryError:
                batch = setting.stage.batch
            gc.collect()
            torch.cuda.empty_cache()
            if batch == 1:
                self.section.say(f"{self.case.words}: not even one image fits into the memory.")
                return
            setting = replace(setting, stage=setting.stage.model_copy(update={"batch": batch // 2}))

    def _timed(self, setting: Fed) -> None:
        gc.collect()  # the nets of the case before
        made: dict[str, Contestant] = {}
        held: dict[str, int | None] = {}
        for entry in self.entries:
            with peak_of(setting.device) as peak:
                contestant = self._made(entry, setting)
            if contestant is not None:
                made[entry.name], held[entry.name] = contestant, peak[0] if peak else None
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(self.turns):
            for name, contestant in made.items():
                seconds[name].append(self._window(contestant, setting.device))
        for entry in self.entries:
            if entry.name in made:
                self._row(entry, setting, seconds[entry.name], held[entry.name])
        for name in self.case.profiled:
            if name in made:
                self._kinds(name, made[name], setting.device)

    def _made(self, entry: Entry, setting: Fed) -> Contestant | None:
        """A net that has taken its first steps; None, and a line, if it cannot be compiled."""
        contestant = Contestant(entry, setting)
        began = time.monotonic()
        try:
            if self.case.compiled:
                contestant.turn.compile(backend=self.backend)
            for _ in range(2):
                contestant.step()
            synchronise(setting.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler raises anything
            if not self.case.compiled:
                raise
            self.section.say(f"{self.case.words}, {entry.name}: could not be compiled ({first_line(error)}).")
            return None
        if self.case.compiled:
            self.section.record(what="compile", case=self.case.words, net=entry.name, seconds=time.monotonic() - began)
        return contestant

    def _window(self, contestant: Contestant, device: torch.device) -> float:
        """Seconds of a step, over some that are not waited for between."""
        synchronise(device)
        began = time.perf_counter()
        for _ in range(self.steps):
            contestant.step()
        synchronise(device)
        return (time.perf_counter() - began) / self.steps

    def _row(self, entry: Entry, setting: Fed, seconds: list[float], held: int | None) -> None:
        count, params = self._counted(entry, setting)
        batch, middle = setting.stage.batch, statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        share = utilisation(count, batch, middle, self.peak) if self.peak else None
        self.times.add(
            self.case.words,
            entry.name,
            f"{params / 1e6:.1f}",
            f"{count / 1e9:.1f}",
            batch,
            f"{1e3 * middle:.1f}",
            f"{1e3 * low:.1f} to {1e3 * high:.1f}",
            f"{batch / middle:.1f}",
            None if share is None else f"{share:.1%}",
            None if held is None else f"{held / 2**30:.1f}",
        )
        self.section.record(
            what="step", case=self.case.words, net=entry.name, params=params, macs=count, batch=batch,
            seconds=seconds, utilisation=share, peak_bytes=held,
        )  # fmt: skip

    def _counted(self, entry: Entry, setting: Fed) -> tuple[int, int]:
        """MACs of an image and parameters, counted once for all cases of a net at a latent."""
        key = (self.case.family, self.case.latent, entry.name)
        if key not in _COUNTED:
            _COUNTED[key] = macs(entry, setting)
        return _COUNTED[key]

    def _kinds(self, name: str, contestant: Contestant, device: torch.device) -> None:
        found = kinds.shares(contestant.step, device)
        self.where.add(self.case.words, name, *(f"{100 * found.get(kind, 0):.1f}" for kind in kinds.KINDS))
        self.section.record(what="kinds", case=self.case.words, net=name, shares=found)
