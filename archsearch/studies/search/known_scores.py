"""Qualities that other studies have measured under the same protocol: a candidate is not trained for them again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from archsearch.protocol import ResolvedProtocol
from archsearch.score import ProtocolMismatch, Quality
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import eligible, load_candidates
from archsearch.studies.storage.database import open_study
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study

    from archsearch.spaces.space import Space


@dataclass(frozen=True)
class KnownScore:
    """A quality, and where it was measured.

    Attributes:
        quality: over the first seeds of the protocol, one or more.
        study: name of the study.
        number: number of the trial.
    """

    quality: Quality
    study: str
    number: int


def known_scores(study: Study, settings: StudyConfig) -> dict[str, KnownScore]:
    """Qualities in the studies on the same storage, and in the one that this one starts from, by architecture.

    Only those count that a training here would give again: of the same protocol and the same seed. If several studies
    have one, that of the most training runs is taken.

    Returns:
        By the id of the architecture that was trained, which is the twin's in a study with a proxy.
    """
    known: dict[str, KnownScore] = {}
    for other_study in _others(study, settings):
        if _difference(settings, study.user_attrs, other_study.user_attrs) is not None:
            continue
        for c in load_candidates(other_study):
            quality = c.score.quality
            if c.state != "scored" or c.is_reused or quality is None:
                continue
            arch_id = (c.trained or c.architecture).id
            if arch_id not in known or c.runs > len(known[arch_id].quality.validation_loss.by_seed):
                known[arch_id] = KnownScore(quality, other_study.study_name, c.number)
    return known


def starting_points(settings: StudyConfig, space: Space, attrs: Mapping[str, Any]) -> list[dict[str, int]]:
    """Points of a space whose architectures are scored in the study that the settings start from, in its order.

    Args:
        settings: those of a study with ``start_from``.
        space: its space.
        attrs: its user attributes, with its protocol.

    Raises:
        InputError: if there is no such study, or it has no candidate that is a point of the space.
        ProtocolMismatch: if its protocol or its seed is another one; the error names the first field that differs.
    """
    assert settings.start_from is not None
    with settings.error_context("start_from"):
        other_study = open_study(settings.start_from)
    if not other_study.user_attrs.get("protocol_hash"):
        problem = f"{settings.start_from} trains nothing"
        raise InputError(settings.source, problem, "start from a study with a quality number", place="start_from")
    if (difference := _difference(settings, attrs, other_study.user_attrs)) is not None:
        place, _, problem = difference.partition(": ")
        remedy = "start from a study of the same protocol, or make the two alike"
        raise ProtocolMismatch(
            settings.source,
            f"differs from {other_study.study_name}, {problem}",
            remedy,
            place=place if place == "seed" else f"protocol.{place}",
        )
    scored = eligible(load_candidates(other_study))
    points = [point for c in scored if (point := space.point_of(c.architecture)) is not None]
    if not points:
        problem = f"{settings.start_from} has no scored candidate that is a point of {space.name}"
        raise InputError(settings.source, problem, "start from a study in this space", place="start_from")
    return points


def _others(study: Study, settings: StudyConfig) -> Iterable[Study]:
    import optuna

    for name in optuna.get_all_study_names(study._storage):
        if name != study.study_name:
            yield optuna.load_study(study_name=name, storage=study._storage)
    if settings.start_from is not None:
        # It was there when this study began; what it no longer tells is trained.
        with contextlib.suppress(InputError):
            yield open_study(settings.start_from)


def _difference(settings: StudyConfig, own: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first field in which two studies' trainings differ, with both values, after a colon; None if in none."""
    if not own.get("protocol_hash") or not other.get("protocol_hash") or "settings" not in other:
        return "protocol: one of the two trains nothing"
    if own["protocol_hash"] != other["protocol_hash"]:
        here, there = (ResolvedProtocol.model_validate(attrs["protocol"]) for attrs in (own, other))
        return here.first_difference(there) or "revision: of the code"
    seed = other["settings"]["seed"]
    return f"seed: {settings.seed} against {seed}" if settings.seed != seed else None
