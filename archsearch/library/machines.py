"""Machines that one does not have: public peak rates, memory, prices, and how long so many MACs take on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from snapgen.config import Config, parse_config, read_mapping
from snapgen.errors import InputError

UTILIZATION = 0.35
"""Share of the peak rate that a training is assumed to reach; ours to guess, since no GPU has run one."""

USABLE_MEMORY = 0.9
"""Share of the memory that is planned with; the rest is for buffers of the libraries and for fragmentation."""

FLOPS_PER_MAC = 2

Positive = Annotated[float, Field(gt=0)]
Precision = Literal["bfloat16", "float32"]


class Machine(Config):
    """One graphics processor."""

    title: str
    tflops: dict[Precision, Positive]
    memory_gb: Positive
    dollars_per_hour: Positive | None
    sources: tuple[str, ...]


class _Machines(Config):
    machines: dict[str, Machine]


@dataclass(frozen=True)
class Cluster:
    """A number of equal processors."""

    count: int
    name: str
    machine: Machine

    @property
    def usable_bytes(self) -> int:
        """Memory of one processor to plan with."""
        return int(USABLE_MEMORY * self.machine.memory_gb * 1e9)

    def seconds(self, macs: float, precision: Precision, *, processors: int | None = None) -> float:
        """Time of so many multiply-adds on all processors, or on some of them."""
        flops = self.machine.tflops[precision] * 1e12 * UTILIZATION * (processors or self.count)
        return FLOPS_PER_MAC * macs / flops

    def dollars(self, seconds: float) -> float | None:
        """Price of all processors for so long; None if no price is known."""
        hourly = self.machine.dollars_per_hour
        return None if hourly is None else self.count * hourly * seconds / 3600

    @property
    def assumptions(self) -> str:
        """The assumed numbers, in a sentence each."""
        rates = ", ".join(f"{rate:g} in {precision}" for precision, rate in self.machine.tflops.items())
        price = self.machine.dollars_per_hour
        return (
            f"{self.machine.title}: peak TFLOPS {rates}, of which {UTILIZATION:.0%} are assumed to be reached "
            f"(an assumption, not a measurement); {self.machine.memory_gb:g} GB, of which {USABLE_MEMORY:.0%} are "
            f"planned with; {'no price is known' if price is None else f'${price:.2f} an hour'}. "
            f"Sources: {', '.join(self.machine.sources)}."
        )


def machines() -> dict[str, Machine]:
    """The machines that are known, by name."""
    with resources.as_file(resources.files(__package__) / "machines.yaml") as path:
        return parse_config({"machines": read_mapping(Path(path))}, _Machines, source=path).machines


def parse_cluster(text: str, *, source: str = "--on") -> Cluster:
    """A cluster by its name, such as ``8xH100``.

    Raises:
        InputError: if there is no such machine.
    """
    known = machines()
    found = re.fullmatch(r"(?:(\d{1,6})[x×])?([A-Za-z]\w*)", text)
    names = {name.lower(): name for name in known}
    if found is None or found[2].lower() not in names or (found[1] is not None and int(found[1]) < 1):
        raise InputError(source, f"{text!r:.40} is no known machine", f"write e.g. 8xH100, of {', '.join(known)}")
    name = names[found[2].lower()]
    return Cluster(int(found[1] or 1), name, known[name])
