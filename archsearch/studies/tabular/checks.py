"""Checks that what a table's cells say fits together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from archsearch.protocol import ResolvedProtocol
from archsearch.spaces.space import LARGEST_COUNT, Space
from archsearch.studies.tabular.table import ERROR_OF, SCORES, BenchmarkTable, Entry, Run, without_seeds
from snapgen.errors import InputError

RESTORE = "restore the file, or export the table again"


def check_run(run: Run, protocols: Mapping[str, ResolvedProtocol]) -> None:
    """Check one run.

    Raises:
        ValueError: if its protocol is unknown or does not list its seed, or its scores are not those of a run that
            diverged or did not.
    """
    if run.protocol_hash not in protocols:
        raise ValueError(f"{run.protocol_hash} is none of the table's protocols")
    if run.seed not in (seeds := protocols[run.protocol_hash].protocol.train_seeds):
        raise ValueError(f"has seed {run.seed}, but its protocol has {', '.join(map(str, seeds))}")
    if run.diverged and (run.scores or run.curve.steps):
        raise ValueError("has scores, though it diverged")
    if not run.diverged and "validation_loss" not in run.scores:
        raise ValueError("has no validation_loss, though it did not diverge")
    for metric, error in ERROR_OF.items():
        if error in run.scores and metric not in run.scores:
            raise ValueError(f"has {error}, but no {metric}")


def check_space(path: Path, space: Space, entries: Iterable[Entry]) -> None:
    """Check that a space is small, and that every architecture has the choices that its row names.

    Raises:
        InputError: if the space has too many points, or an id is not that of the choices.
    """
    if space.size() > LARGEST_COUNT:
        raise InputError(path, f"its space has more than {LARGEST_COUNT:,} points", RESTORE, place="space")
    for entry in entries:
        try:
            found = space.architecture(entry.point).id
        except ValueError:
            found = "none"
        if found != entry.id:
            problem = f"architecture {entry.id} does not have the choices that its row names, whose id is {found}"
            raise InputError(path, problem, RESTORE)


def check_runs(table: BenchmarkTable) -> None:
    """Check that no run was cut off, that runs under one protocol have the same scores, and that none stands twice.

    Raises:
        InputError: if one was, they do not, or two protocols that differ only in their seeds share one.
    """
    if len(table.runs) != (wanted := table.header.num_runs):
        raise InputError(table.source, f"has {len(table.runs):,} runs, but its first line says {wanted:,}", RESTORE)
    shared = shared_seed(table.header.protocols)
    if shared is not None:
        first, second, seed = shared
        raise InputError(table.source, f"{first} and {second} differ only in their seeds, but share {seed}", RESTORE)
    for key in table.header.protocols:
        runs = [run for run in table.runs if run.protocol_hash == key and not run.diverged]
        for name in SCORES:
            lacking = [run for run in runs if name not in run.scores]
            if 0 < len(lacking) < len(runs):
                some = f"the first with seed {lacking[0].seed} of architecture {lacking[0].architecture_id}"
                problem = f"{len(lacking):,} of {len(runs):,} runs under {key} lack {name}, {some}"
                raise InputError(table.source, problem, RESTORE)


def shared_seed(protocols: Mapping[str, ResolvedProtocol]) -> tuple[str, str, int] | None:
    """Two protocols, by their hashes, that differ only in their seeds and share one; None if there are none."""
    seen: dict[tuple[str, int], str] = {}
    for key, resolved in protocols.items():
        for seed in resolved.protocol.train_seeds:
            other = seen.setdefault((without_seeds(resolved).hash, seed), key)
            if other != key:
                return other, key, seed
    return None


def check_complete(table: BenchmarkTable) -> None:
    """Check that every architecture of the space has a run of each of the first protocol's seeds.

    Raises:
        InputError: if one is missing; it says how many.
    """
    ids = [table.space.architecture(point).id for point in table.space.distinct_points()]
    missing = [(i, s) for i in ids for s in table.seeds if s not in table.short_runs.get(i, {})]
    if missing:
        problem = f"lacks {len(missing):,} of {len(ids) * len(table.seeds):,} runs, the first of architecture "
        problem += f"{missing[0][0]} with seed {missing[0][1]}"
        raise InputError(table.source, problem, "let its study end, and export it again")
