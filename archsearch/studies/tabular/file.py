"""The file of a table: CSV, one training run a line, gzipped where its name ends in ``.gz``.

The first line is a comment that holds what all rows share as JSON; ``pandas.read_csv(path, skiprows=1)`` skips it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from archsearch.score import Cost, Curve
from archsearch.spaces.space import Space
from archsearch.studies.tabular.checks import RESTORE, check_complete, check_run, check_runs, check_space
from archsearch.studies.tabular.table import ERROR_OF, SCORES, BenchmarkTable, Entry, Run, TableHeader
from snapgen import files
from snapgen.config import parse_config
from snapgen.errors import InputError, os_errors
from snapgen.io.atomic import atomic_write, write_errors

BINS = 4
"""Timestep bins of a point."""

COMMENT = "# "
MAX_BYTES = 1 << 26
"""Largest table, unpacked."""
MAX_HEADER = 1 << 20
"""Longest first line."""
LARGEST = 1e12
"""Largest number that a cell may hold."""

Parser = Callable[[str], Any]


def write_table(table: BenchmarkTable, path: Path) -> None:
    """Write a table.

    Raises:
        InputError: if the file cannot be written.
    """
    text = io.StringIO()
    text.write(f"{COMMENT}{table.header.model_dump_json()}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns(table.header, table.space))
    for run in table.runs:
        writer.writerow(_cells(table, run))
    content = text.getvalue().encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    with write_errors(path, "name a writable file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)


def shipped_tables() -> dict[str, Path]:
    """Files of the tables that come with archsearch, by name."""
    paths = sorted((Path(__file__).parent / "tables").glob("*.csv.gz"))
    return {path.name.removesuffix(".csv.gz"): path for path in paths}


def load_table(path: str | Path) -> BenchmarkTable:
    """Read and check a table.

    Args:
        path: the file, or the name of a shipped table.

    Raises:
        InputError: if the file is missing or damaged, lacks runs, or is of another version of the evaluation.
    """
    path = shipped_tables().get(str(path), Path(path))
    lines = io.StringIO(_read(path), newline="")
    header = _header(path, lines.readline())
    space = Space.from_dict(header.space, source=str(path))
    entries: dict[str, Entry] = {}
    runs: dict[tuple[str, str, int], Run] = {}
    for place, row in _rows(path, lines, columns(header, space)):
        try:
            entry, run = _entry(header, space, row), _run(header, row)
            check_run(run, header.protocols)
        except ValueError as error:
            raise InputError(path, str(error), RESTORE, place=place) from None
        key = (run.architecture_id, run.protocol_hash, run.seed)
        if entries.setdefault(entry.id, entry) != entry:
            raise InputError(path, f"architecture {entry.id} has other numbers in an earlier row", RESTORE, place=place)
        if key in runs:
            raise InputError(path, "is the same run as an earlier row", RESTORE, place=place)
        runs[key] = run
    check_space(path, space, entries.values())
    table = BenchmarkTable(str(path), header, space, entries, tuple(runs.values()))
    check_runs(table)
    check_complete(table)
    return table


def columns(header: TableHeader, space: Space) -> dict[str, Parser]:
    """Names of the columns in their order, each with the function that reads a cell."""
    parsers: dict[str, Parser] = {"architecture_id": _text, "protocol_hash": _text, "seed": _count}
    parsers |= {f"knob {knob.name}": _choice(knob.choices) for knob in space.knobs}
    parsers |= {"seconds": _positive, "diverged": _flag}
    parsers |= {name: _error if name in ERROR_OF.values() else _optional for name in SCORES}
    parsers |= dict.fromkeys(_curve_columns(header.curve_points), _optional)
    parsers |= dict.fromkeys(_cost_columns(""), _cost)
    parsers |= dict.fromkeys(("latency_lower_ms", "latency_ms", "latency_upper_ms"), _positive)
    if header.full_size is not None:
        parsers |= dict.fromkeys(_cost_columns("full_size_"), _cost)
        parsers |= dict.fromkeys((_predicted(name) for name in header.profiles), _positive)
    return parsers


def _curve_columns(points: int) -> list[str]:
    """The loss at each point, followed by its parts."""
    names = [f"loss_{point}_of_{points}" for point in range(1, points + 1)]
    return [f"{name}{part}" for name in names for part in ("", *(f"_t{i}" for i in range(1, BINS + 1)))]


def _cost_columns(prefix: str) -> list[str]:
    return [f"{prefix}{name}" for name in Cost.model_fields]


def _predicted(profile: str) -> str:
    return f"predicted_{profile}_ms"


def _cells(table: BenchmarkTable, run: Run) -> list[object]:
    """One line."""
    entry = table.entries[run.architecture_id]
    cells: list[object] = [run.architecture_id, run.protocol_hash, run.seed]
    cells += table.space.labels(entry.point).values()
    cells += [f"{run.seconds:.3f}", str(run.diverged).lower()]
    cells += [_shown(run.scores.get(name)) for name in SCORES]
    numbers: list[float | None] = [None] * len(_curve_columns(table.header.curve_points))
    if len(run.curve.steps) == table.header.curve_points:  # a run that diverged has fewer
        pairs = zip(run.curve.validation_loss, run.curve.by_timestep, strict=True)
        numbers = [number for loss, parts in pairs for number in (loss, *parts)]
    cells += map(_shown, numbers)
    cells += entry.cost.model_dump().values()
    cells += map(_shown, entry.quartiles_ms)
    if entry.full_size is not None:
        cells += entry.full_size.model_dump().values()
        cells += [_shown(entry.predicted_ms[name]) for name in table.header.profiles]
    return cells


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"


def _read(path: Path) -> str:
    with os_errors(path, f"name a readable table, or a shipped one: {', '.join(shipped_tables())}", "cannot be read"):
        content = files.read_bytes(path, MAX_BYTES)
    try:
        if path.suffix == ".gz":
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_BYTES + 1)
        text = content.decode()
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError):
        raise InputError(path, "is damaged or not a table", RESTORE) from None
    if len(content) > MAX_BYTES:
        raise InputError(path, f"holds more than {MAX_BYTES:,} bytes", RESTORE)
    return text


def _header(path: Path, line: str) -> TableHeader:
    if len(line) > MAX_HEADER:
        raise InputError(path, f"its first line has more than {MAX_HEADER:,} characters", RESTORE)
    try:
        values = json.loads(line.removeprefix(COMMENT)) if line.startswith(COMMENT) else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(path, "is not a table: its first line does not describe it", RESTORE)
    header = parse_config(values, TableHeader, source=path)
    for key, protocol in header.protocols.items():
        if protocol.hash != key:
            problem = f"is {key}, but the protocol's hash is {protocol.hash} in this version of archsearch"
            raise InputError(path, problem, "export the table again", place="protocols")
    return header


def _rows(path: Path, lines: Iterable[str], parsers: Mapping[str, Parser]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and parsed cells of each row."""
    reader = csv.reader(lines)
    try:
        names = next(reader, [])
        _check_names(path, names, parsers)
        for number, cells in enumerate(reader, start=3):
            if len(cells) != len(names):
                raise InputError(path, f"has {len(cells)} cells, not {len(names)}", RESTORE, place=f"line {number}")
            row = {}
            for name, cell in zip(names, cells, strict=True):
                try:
                    row[name] = parsers[name](cell)
                except ValueError as error:
                    raise InputError(path, str(error), RESTORE, place=f"line {number}, {name}") from None
            yield f"line {number}", row
    except csv.Error as error:
        raise InputError(path, f"cannot be read ({error})", RESTORE, place=f"line {reader.line_num + 1}") from None


def _check_names(path: Path, names: list[str], parsers: Mapping[str, Parser]) -> None:
    for problem, odd in (("unknown", set(names) - parsers.keys()), ("missing", parsers.keys() - set(names))):
        if odd:
            raise InputError(path, f"{problem} column {min(odd)!r:.80}", RESTORE, place="line 2")
    if len(names) != len(parsers):
        raise InputError(path, "a column is there twice", RESTORE, place="line 2")


def _entry(header: TableHeader, space: Space, row: Mapping[str, Any]) -> Entry:
    def cost(prefix: str) -> Cost:
        return Cost(**{name: row[f"{prefix}{name}"] for name in Cost.model_fields})

    quartiles = row["latency_lower_ms"], row["latency_ms"], row["latency_upper_ms"]
    if [*quartiles] != sorted(quartiles):
        raise ValueError("the quartiles of its latency are not in order")
    return Entry(
        id=row["architecture_id"],
        point={knob.name: row[f"knob {knob.name}"] for knob in space.knobs},
        cost=cost(""),
        quartiles_ms=quartiles,
        full_size=None if header.full_size is None else cost("full_size_"),
        predicted_ms={name: row[_predicted(name)] for name in header.profiles},
    )


def _run(header: TableHeader, row: Mapping[str, Any]) -> Run:
    values = [row[name] for name in _curve_columns(header.curve_points)]
    points = [values[i : i + 1 + BINS] for i in range(0, len(values), 1 + BINS)]
    if any(None in point for point in points) and any(value is not None for value in values):
        raise ValueError("its curve has gaps")
    known = [] if None in values else [*enumerate(points, start=1)]
    return Run(
        architecture_id=row["architecture_id"],
        protocol_hash=row["protocol_hash"],
        seed=row["seed"],
        seconds=row["seconds"],
        diverged=row["diverged"],
        scores={name: row[name] for name in SCORES if row[name] is not None},
        curve=Curve(
            steps=tuple(number for number, _ in known),
            validation_loss=tuple(point[0] for _, point in known),
            by_timestep=tuple(tuple(point[1:]) for _, point in known),
        ),
    )


def _text(cell: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{8,64}", cell):
        raise ValueError(f"{cell!r:.40} is not a hash")
    return cell


def _count(cell: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", cell):
        raise ValueError(f"{cell!r:.40} is not a whole number of at most 18 digits")
    return int(cell)


def _cost(cell: str) -> int:
    if (value := _count(cell)) == 0:
        raise ValueError("is 0")
    return value


def _number(cell: str) -> float:
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", cell):
        raise ValueError(f"{cell!r:.40} is not a number")
    if not abs(value := float(cell)) <= LARGEST:
        raise ValueError(f"{cell!r:.40} is larger than {LARGEST:g}")
    return value


def _positive(cell: str) -> float:
    if (value := _number(cell)) <= 0:
        raise ValueError(f"{cell!r:.40} is not above 0")
    return value


def _optional(cell: str) -> float | None:
    return _number(cell) if cell else None


def _error(cell: str) -> float | None:
    if (value := _optional(cell)) is not None and value < 0:
        raise ValueError(f"{cell!r:.40} is below 0")
    return value


def _flag(cell: str) -> bool:
    if cell not in ("true", "false"):
        raise ValueError(f"{cell!r:.40} is neither true nor false")
    return cell == "true"


def _choice(choices: tuple[str, ...]) -> Parser:
    def index(cell: str) -> int:
        if cell not in choices:
            raise ValueError(f"{cell!r:.40} is not a choice of the knob")
        return choices.index(cell)

    return index
