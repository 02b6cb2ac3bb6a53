"""The table of blocks of a study that evolves: loaded, or measured and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.score import LatencyRecord
from archsearch.studies.config.evolution import EvolutionConfig
from archsearch.studies.config.study import StudyConfig, error_context
from archsearch.studies.storage.database import load_study
from snapgen.architecture import block_index
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write
from snapgen.progress import Progress

if TYPE_CHECKING:
    from archsearch.block_latency.table import BlockTable
    from archsearch.latency.base import Backend
    from archsearch.spaces.space import Space
if TYPE_CHECKING:
    from archsearch.block_latency.table import BlockTable
    from archsearch.spaces.space import Space


TABLE = "block_table.json"
"""In the run's folder: every measurement behind the table of blocks, so that filling it goes on where it was."""


def evolution_of(settings: StudyConfig) -> EvolutionConfig:
    """How a study evolves.

    Raises:
        InputError: if it does not, or cannot.
    """
    if settings.evolve is None:
        remedy = "add evolve, or run archsearch search"
        raise InputError(settings.source, "does not say how to evolve a network", remedy)
    if settings.workers != 1:
        raise InputError(settings.source, "each round needs the one before it", "use one worker", place="workers")
    if settings.latency.remote:
        remedy = "remove it; the table of blocks is measured by the process that evolves"
        raise InputError(settings.source, "is not for an evolving study", remedy, place="latency.remote")
    if len(settings.protocol.seeds) != 1:
        remedy = "give one; for more, run studies of other names and seeds"
        raise InputError(settings.source, "a network evolves from one training", remedy, place="protocol.seeds")
    return settings.evolve


def load_or_fit_block_table(settings: StudyConfig, space: Space, backend: Backend) -> BlockTable:
    """The study's table of blocks: its own, or one that is measured now, from where a killed one was.

    Raises:
        InputError: if the space has no knobs for blocks, or the device is not there.
    """
    from archsearch.block_latency.fitting import fit_block_table

    known = table_of(settings)
    if known is not None:
        return known
    if not any(max_block_counts(space).values()):
        problem = f"{space.name} has no knob for any block"
        raise InputError(settings.source, problem, "add blocks to it, e.g. {copies: 1}", place="space")
    path = settings.folder / TABLE
    where = settings.latency.model_dump(mode="json")
    kept = _kept(path)
    records: dict[str, Any] = kept["records"] if kept.get("latency") == where else {}

    def keep(arch: Architecture, record: LatencyRecord) -> None:
        records.setdefault(arch.id, []).append(record.model_dump(mode="json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(json.dumps({"latency": where, "records": records}, indent=1))

    progress, reached = Progress(settings.name, "timed", "% of the nets behind the table of blocks", 100), 0

    def tell(share: float) -> None:
        nonlocal reached
        if round(100 * share) > reached:
            progress.add(round(100 * share) - reached)
            reached = round(100 * share)

    with error_context(settings, "space"):
        return fit_block_table(
            backend,
            space.base,
            space.latent_size,
            space.context_tokens,
            evolution_of(settings).table,
            known={key: [LatencyRecord.model_validate(one) for one in found] for key, found in records.items()},
            keep=keep,
            tell=tell,
        )


def table_of(settings: StudyConfig) -> BlockTable | None:
    """The table of a study that has begun."""
    from archsearch.block_latency.table import BlockTable

    try:
        attrs = load_study(settings).user_attrs
    except InputError:
        return None
    return BlockTable.model_validate(attrs["block_table"]) if "block_table" in attrs else None


def _kept(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def max_block_counts(space: Space) -> dict[block_index.BlockSite, int]:
    """Blocks that may stand in each place of the base."""
    most: dict[block_index.BlockSite, int] = {}
    for block in block_index.blocks(space.base):
        field = f"{block.site}.layers[{block.layer}].{block_index.FIELDS[block.kind]}"
        knob = next((knob for knob in space.knobs if knob.name == field), None)
        most[block.place] = 0 if knob is None else int(knob.choices[-1])
    return most
