"""Qualities that other studies have measured under the same protocol: a candidate is not trained for them again.

They come from the studies on the same storage, and from what a study starts from: another study, wherever its storage
is, or a table of scores that was exported from one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna import Study
from pydantic import Field, PrivateAttr

from archsearch.protocol import ResolvedProtocol
from archsearch.score import Quality
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.remote.queue import STUDY_PREFIX
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.storage.attributes import check_attributes
from archsearch.studies.storage.database import open_study
from snapgen import files
from snapgen.architecture.schema import Architecture
from snapgen.config import Config, json_lines, parse_config
from snapgen.errors import InputError, os_errors
from snapgen.findings import note
from snapgen.io.atomic import atomic_write_text

TABLE = ".jsonl"
"""Ending of a table of scores: JSON lines, a `KnownScore` each."""

_EXPORT = f"export it again: archsearch report STUDY --out FILE{TABLE}"


class KnownScore(Config):
    """The quality of a study's candidate, with all that another training must share to give it again."""

    study: str
    """Name of the study."""
    trial: int = Field(ge=0)
    """Number of the candidate's trial."""
    scores: int = Field(ge=1)
    """Number of scores that the study has, and its table rows."""
    seed: int = Field(ge=0)
    """Seed of the study."""
    protocol_hash: str
    protocol: ResolvedProtocol
    architecture: Architecture
    trained: Architecture | None = None
    """The twin that was trained in place of the architecture, in a study with a proxy."""
    quality: Quality

    _line: str = PrivateAttr(default="")

    @property
    def net(self) -> Architecture:
        """The architecture that was trained."""
        return self.trained or self.architecture

    @property
    def source(self) -> str:
        """Where it was read: the study, or the line of a table."""
        return self._line or self.study

    @property
    def where(self) -> str:
        """The trial that has it, and where that was read."""
        return f"trial {self.trial} of {self.study}" + (f" ({self._line})" if self._line else "")


def known_scores(study: Study, settings: StudyConfig) -> dict[str, KnownScore]:
    """Scores in the studies on the same storage, and in what this one starts from, by the id of what was trained.

    Only those count that a training here would give again: of the same protocol and the same seed. If there are several
    of one architecture, that of the most training runs is taken. A network that evolves inherits its weights, so that
    its scores are neither taken nor given.
    """
    known: dict[str, KnownScore] = {}
    for score in _reachable(study, settings) if settings.evolve is None else ():
        best = known.get(score.net.id)
        if best is None or score.quality.runs > best.quality.runs:
            known[score.net.id] = score
    return known


def _reachable(study: Study, settings: StudyConfig) -> Iterator[KnownScore]:
    own = study.user_attrs
    for name in sorted({*optuna.get_all_study_names(study._storage)} - {study.study_name}):
        if name.startswith(STUDY_PREFIX):  # a queue of measurements
            continue
        other_study = optuna.load_study(study_name=name, storage=study._storage)
        try:
            attrs = check_attributes(other_study, begun=False)
        except InputError as error:
            note(error.source, f"{error.problem}; its scores are not used")
            continue
        config = attrs.get("settings", {})
        alike = attrs.get("protocol_hash") == own["protocol_hash"] and config.get("seed") == settings.seed
        if alike and not config.get("evolve"):
            yield from scores_of(other_study)
    if settings.start_from is not None:
        # It was there when this study began; what it no longer tells is trained.
        with contextlib.suppress(InputError):
            yield from (s for s in load_scores(settings.start_from) if first_difference(settings, own, s) is None)


def first_difference(settings: StudyConfig, attrs: Mapping[str, Any], score: KnownScore) -> str | None:
    """The first field in which a study's trainings differ from the one behind a score; None if they are the same.

    Args:
        settings: those of the study.
        attrs: its user attributes, with its protocol.

    Returns:
        The setting of the study, and both values after a colon.
    """
    if attrs["protocol_hash"] != score.protocol_hash:
        own = ResolvedProtocol.model_validate(attrs["protocol"])
        return f"protocol.{own.first_difference(score.protocol) or 'revision: of the code'}"
    return f"seed: {settings.seed} against {score.seed}" if settings.seed != score.seed else None


def load_scores(where: str) -> list[KnownScore]:
    """Scores of what ``start_from`` names: a study, or a table.

    Raises:
        InputError: if it does not exist, is damaged or has no scores.
    """
    return _read_table(where) if is_table(where) else scores_of(open_study(where))


def is_table(where: str | Path) -> bool:
    """Whether a name is that of a table, rather than of a study."""
    return Path(where).suffix == TABLE


def read_bytes(table: str) -> bytes:
    """Content of a table.

    Raises:
        InputError: if it cannot be read.
    """
    with os_errors(table, "name a table that archsearch report wrote", "cannot be read"):
        return files.read_bytes(Path(table))


def scores_of(study: Study) -> list[KnownScore]:
    """Scores of a study's trained candidates, by slot.

    Raises:
        InputError: if it trains nothing, or evolves a network.
    """
    attrs, source = check_attributes(study), f"study {study.study_name}"
    if not attrs.get("protocol_hash"):
        raise InputError(source, "trains nothing", "name a study with a quality number")
    if attrs["settings"].get("evolve"):
        raise InputError(source, "evolves a network, which inherits its weights", "name a study that searches")
    protocol = parse_config(attrs["protocol"], ResolvedProtocol, source=source, place="protocol")
    scored = [
        (c, c.score.quality)
        for c in load_candidates(study)
        if c.state == "scored" and c.reused_from is None and c.score.quality
    ]
    return [
        KnownScore(
            study=study.study_name,
            trial=c.number,
            scores=len(scored),
            seed=attrs["settings"]["seed"],
            protocol_hash=attrs["protocol_hash"],
            protocol=protocol,
            architecture=c.architecture,
            trained=c.trained,
            quality=quality,
        )
        for c, quality in scored
    ]


def write_table(study: Study, path: Path) -> None:
    """Write the scores of a study as a table, from which a study without access to its storage can start.

    Raises:
        InputError: as `scores_of`, if nothing is scored yet, or the file cannot be written.
    """
    scores = scores_of(study)
    if not scores:
        problem, remedy = "no candidate is scored yet", "run archsearch search, or wait for its first trial"
        raise InputError(f"study {study.study_name}", problem, remedy)
    atomic_write_text(path, "".join(f"{score.model_dump_json()}\n" for score in scores))


def _read_table(table: str) -> list[KnownScore]:
    """Scores of one table, or of several that were put together.

    Raises:
        InputError: naming the first line that is damaged or, of a table that was cut off, the last one.
    """
    scores = [_checked(values, table, place) for place, values in json_lines(read_bytes(table), table, _EXPORT)]
    if not scores:
        raise InputError(table, "has no scores", _EXPORT)
    trials: dict[tuple[str, int], set[int]] = {}
    for score in scores:
        trials.setdefault((score.study, score.scores), set()).add(score.trial)
    for (study, count), found in trials.items():
        if len(found) < count:
            problem = f"the table ends with {len(found)} of the {count} scores of study {study}"
            raise InputError(table, problem, _EXPORT, place=f"line {len(scores)}")
    return scores


def _checked(values: object, table: str, line: str) -> KnownScore:
    try:
        score = parse_config(values, KnownScore, source=table)
    except InputError as error:
        place = ": ".join(text for text in (line, error.place) if text)
        raise InputError(table, error.problem, _EXPORT, place=place) from None
    problem, seeds = "", len(score.protocol.protocol.train_seeds)
    if not score.protocol_hash == score.protocol.hash == score.quality.protocol_hash:
        problem = f"protocol_hash {score.protocol_hash} is not that of the protocol and the quality"
    elif score.quality.runs > seeds:
        problem = f"the quality has {score.quality.runs} values by seed, but the protocol {seeds} seeds"
    if problem:
        raise InputError(table, problem, _EXPORT, place=line)
    score._line = f"{line} of {table}"
    return score
