"""Files of latency records as JSON lines: training and validation data of latency models."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from archsearch.cost.operations import Operation, operations
from archsearch.score import LatencyRecord, check_one_runtime
from snapgen import files
from snapgen.architecture.schema import Architecture
from snapgen.config import Config, json_lines, parse_config
from snapgen.errors import os_errors
from snapgen.io.atomic import write_errors


class LatencySample(Config):
    """A latency record with the architecture and the input size that it was measured for."""

    architecture: Architecture
    latent_size: int
    context_tokens: int
    record: LatencyRecord

    @property
    def key(self) -> tuple[str, int, int]:
        """Key of the measured net: architecture id, latent size, context tokens."""
        return self.architecture.id, self.latent_size, self.context_tokens

    def operations(self) -> list[Operation]:
        """Operations of the measured net."""
        return operations(self.architecture, self.latent_size, context_tokens=self.context_tokens)


def load_samples(path: Path) -> list[LatencySample]:
    """Load all samples of a JSON lines file; an incomplete last line, left by a killed process, is ignored.

    Raises:
        InputError: naming the file and the invalid line.
    """
    text = files.read_text(path, "name a file that archsearch latency sample made")
    lines = json_lines(text[: text.rfind("\n") + 1], path)
    return [parse_config(values, LatencySample, source=path, place=place) for place, values in lines]


def ensure_writable(path: Path) -> None:
    """Check, before measuring, that the file can be written; a missing one is not made.

    Raises:
        InputError: if it cannot be written.
    """
    existed = path.exists()
    with os_errors(path, "name a file in an existing folder"):
        path.open("ab").close()
    if not existed:
        path.unlink()


def append(path: Path, sample: LatencySample) -> None:
    """Append a sample to a file, creating the file if it is missing and removing an incomplete last line."""
    with write_errors(path, "free disk space; the same command resumes"), path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(sample.model_dump(mode="json", exclude_defaults=True), allow_nan=False).encode() + b"\n")


@dataclass(frozen=True)
class SampleFile:
    """A file of samples that measurements at one input size go on with."""

    path: Path
    latent_size: int
    context_tokens: int

    def records(self) -> dict[str, list[LatencyRecord]]:
        """Its records for that input size, by architecture id; empty lists for others, and if there is no file.

        Raises:
            InputError: like `load_samples`.
        """
        records: dict[str, list[LatencyRecord]] = defaultdict(list)
        for sample in load_samples(self.path) if self.path.exists() else []:
            if sample.key[1:] == (self.latent_size, self.context_tokens):
                records[sample.key[0]].append(sample.record)
        return records

    def append(self, arch: Architecture, record: LatencyRecord) -> None:
        """Append a record; see `append`."""
        size = {"latent_size": self.latent_size, "context_tokens": self.context_tokens}
        append(self.path, LatencySample(**size, architecture=arch, record=record))


def fastest_per_net(samples: Iterable[LatencySample]) -> list[LatencySample]:
    """Select the sample with the lowest median for each net, in the order of first occurrence.

    Disturbances can only increase a measured time, so the lowest median is the best estimate.

    Raises:
        RuntimeMismatch: if they are of several runtimes.
    """
    samples = list(samples)
    check_one_runtime((sample.record.runtime for sample in samples), "records")
    fastest: dict[tuple[str, int, int], LatencySample] = {}
    for sample in samples:
        current = fastest.setdefault(sample.key, sample)
        if sample.record.median_ms < current.record.median_ms:
            fastest[sample.key] = sample
    return list(fastest.values())


CONDITIONS = {
    "machine": ("chip", "device", "compute_units", "threads"),
    "operating system": ("os",),
    "runtime": ("engine",),
    "versions": ("runtime",),
}
"""The fields of a record that must be equal for records to share each of these."""


def shared_conditions(records: Sequence[LatencyRecord]) -> dict[str, dict[str, int]]:
    """How many records there are of each machine, operating system, runtime and set of versions."""
    return {
        what: dict(
            Counter(", ".join(str(value) for name in names if (value := getattr(record, name))) for record in records)
        )
        for what, names in CONDITIONS.items()
    }


def condition_mismatch(conditions: Iterable[tuple[str, ...]]) -> str:
    """The first difference between records of several conditions, as text."""
    first, second = sorted(conditions)[:2]
    return next(f"{a} and {b}" for a, b in zip(first, second, strict=True) if a != b)
