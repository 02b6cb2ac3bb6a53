"""Block table of an evolving study: loaded from the study, or measured and stored."""

from __future__ import annotations

import json
from typing import Any

from archsearch.block_latency.fitting import fit_block_table
from archsearch.block_latency.table import BlockTable
from archsearch.latency.base import Backend
from archsearch.score import LatencyRecord
from archsearch.spaces.space import Space
from archsearch.studies.config.evolution import EvolutionConfig
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.storage.database import load_study
from snapgen import files
from snapgen.architecture import block_index
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write
from snapgen.progress import ProgressLog

MEASUREMENTS_FILE = "block_table.json"
"""File in the run's folder with every measurement behind the block table, so that an interrupted fit resumes."""


def evolution_config(settings: StudyConfig) -> EvolutionConfig:
    """Evolution settings of a study.

    Raises:
        InputError: if it has none, or its other settings do not allow evolution.
    """
    if settings.evolve is None:
        remedy = "add evolve, or run archsearch search"
        raise InputError(settings.source, "has no settings for evolution", remedy)
    if settings.workers != 1:
        raise InputError(settings.source, "each round needs the one before it", "use one worker", place="workers")
    if settings.latency.remote:
        remedy = "remove it; the block table is measured by the process that evolves"
        raise InputError(settings.source, "cannot be used by an evolving study", remedy, place="latency.remote")
    if len(settings.protocol.train_seeds) != 1:
        remedy = "give one seed; for more, run studies with other names and seeds"
        raise InputError(
            settings.source, "a network evolves from a single training run", remedy, place="protocol.train_seeds"
        )
    return settings.evolve


def load_or_fit_block_table(settings: StudyConfig, space: Space, backend: Backend) -> BlockTable:
    """The block table stored with the study, else a new one from measurements that resume where they stopped.

    Raises:
        InputError: if the space has no knobs for blocks, or the device is not available.
    """
    table = stored_block_table(settings)
    if table is not None:
        return table
    if not any(max_block_counts(space).values()):
        problem = f"{space.name} has no knob for any block"
        raise InputError(settings.source, problem, "add blocks to it, e.g. {extra_copies: 1}", place="space")
    path = settings.folder / MEASUREMENTS_FILE
    latency = settings.latency.model_dump(mode="json")
    try:
        saved = json.loads(files.read_bytes(path))
    except (OSError, ValueError, RecursionError):
        saved = None
    records: dict[str, Any] = saved["records"] if isinstance(saved, dict) and saved.get("latency") == latency else {}

    def save(arch: Architecture, record: LatencyRecord) -> None:
        records.setdefault(arch.id, []).append(record.model_dump(mode="json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write_text(json.dumps({"latency": latency, "records": records}, indent=1))

    percent = ProgressLog(settings.name, "timed", "% of the nets behind the block table", 100)
    with settings.error_context("space"):
        return fit_block_table(
            backend,
            space.base,
            space.latent_size,
            space.context_tokens,
            evolution_config(settings).table,
            existing={
                key: [LatencyRecord.model_validate(record) for record in saved] for key, saved in records.items()
            },
            save=save,
            progress=percent.items(100),
        )


def stored_block_table(settings: StudyConfig) -> BlockTable | None:
    """Block table stored with a study; None if the study has not begun or has none."""
    try:
        attrs = load_study(settings).user_attrs
    except InputError:
        return None
    return BlockTable.model_validate(attrs["block_table"]) if "block_table" in attrs else None


def max_block_counts(space: Space) -> dict[block_index.BlockSite, int]:
    """Largest number of blocks that the space allows at each site of the base."""
    max_counts: dict[block_index.BlockSite, int] = {}
    for block in block_index.blocks(space.base):
        field = f"{block.site}.layers[{block.layer}].{block_index.FIELDS[block.kind]}"
        knob = next((knob for knob in space.knobs if knob.name == field), None)
        max_counts[block.block_site] = 0 if knob is None else int(knob.choices[-1])
    return max_counts
