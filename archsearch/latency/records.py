"""Latency records with what they are of, one to a line of a file: what a prediction is learned from and held to."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from archsearch.cost.operations import Operation, operations
from archsearch.score import LatencyRecord
from snapgen import config
from snapgen.architecture.schema import Architecture
from snapgen.config import Config
from snapgen.errors import InputError


class LatencySample(Config):
    """One architecture's latency record, and the input that it was taken with."""

    architecture: Architecture
    latent_size: int
    context_tokens: int
    record: LatencyRecord

    @property
    def key(self) -> tuple[str, int, int]:
        """What was timed: architecture id, latent size, context tokens."""
        return self.architecture.id, self.latent_size, self.context_tokens

    def operations(self) -> list[Operation]:
        """What was timed, operation by operation."""
        return operations(self.architecture, self.latent_size, context_tokens=self.context_tokens)


def load_samples(path: Path) -> list[LatencySample]:
    """Every record of a JSON-lines file; a last line that a killed writer left torn is passed over.

    Raises:
        InputError: naming the file and the line that is no record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(path, "does not exist", "make it with archsearch latency sample") from None
    except UnicodeDecodeError:
        raise InputError(path, "is not text (not UTF-8)", "name a file of JSON lines") from None
    except OSError as error:
        raise InputError(path, (error.strerror or "cannot be read").lower(), "name a readable file") from None
    return [_parsed(line, path, number) for number, line in enumerate(_whole_lines(text), start=1) if line.strip()]


def _whole_lines(text: str) -> list[str]:
    return text[: text.rfind("\n") + 1].splitlines()


def _parsed(line: str, path: Path, number: int) -> LatencySample:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(path, "is not JSON", "remove or mend the line", place=f"line {number}") from None
    return config.parse_config(values, LatencySample, source=path, place=f"line {number}")


def ensure_writable(path: Path) -> None:
    """Make the file, if it is missing, before anything is spent on what goes there.

    Raises:
        InputError: if it can not be written.
    """
    try:
        path.open("ab").close()
    except OSError as error:
        raise InputError(
            path, (error.strerror or "can not be written").lower(), "name a file in a folder that is there"
        ) from None


def append(path: Path, timed: LatencySample) -> None:
    """Add a record to a file, which is made if it is missing; a torn last line is cut off first."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(timed.model_dump(mode="json", exclude_defaults=True), allow_nan=False).encode() + b"\n")


def group_by_architecture(path: Path, latent_size: int, context_tokens: int) -> dict[str, list[LatencyRecord]]:
    """A file's records of such an input, by architecture id; none where there is no file.

    Raises:
        InputError: as `load_samples`.
    """
    found: dict[str, list[LatencyRecord]] = defaultdict(list)
    for timed in load_samples(path) if path.exists() else []:
        if timed.key[1:] == (latent_size, context_tokens):
            found[timed.key[0]].append(timed.record)
    return found


def fastest_per_net(records: Iterable[LatencySample]) -> list[LatencySample]:
    """Of several records of one thing the one with the lowest median, in the order of their first.

    What disturbs a measurement only ever adds to it.
    """
    best: dict[tuple[str, int, int], LatencySample] = {}
    for timed in records:
        known = best.setdefault(timed.key, timed)
        if timed.record.median_ms < known.record.median_ms:
            best[timed.key] = timed
    return list(best.values())
