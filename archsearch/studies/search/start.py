"""Start of a study from the scored candidates of another one, or of a table of scores."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from typing import Any

from archsearch.score import ProtocolMismatch
from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.known_scores import KnownScore, first_difference, is_table, load_scores, read_bytes
from archsearch.studies.storage.database import (
    FIXED_SETTINGS,
    changed_setting,
    load_study,
    rename,
    same_storage,
    stored_attrs,
    study_config,
    without_password,
)
from snapgen.config import as_yaml, problem_and_remedy
from snapgen.errors import InputError

Origin = Mapping[str, str]
"""Meaning of ``start_from``: a ``study`` and its ``storage``, or the digest of a ``table``."""


CHANGEABLE = ("objectives", "constraints")
"""Settings that may change: the study then begins anew with its own scores. The sampler may change along with them."""


def start_attrs(settings: StudyConfig, space: Space, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """User attributes of what a study starts from: those with which it began, or those with which it begins now.

    Args:
        attrs: the study's user attributes, with its protocol.

    Returns:
        ``start``, the points, and ``start_from``, the origin, with a sentence on what was ``left_out`` if anything was;
        nothing in a study that starts from no other. Of one that begins anew because its objectives or limits have
        changed also ``earlier`` (`_set_aside_if_changed`).

    Raises:
        InputError: if the study began with another start, or what it names is the study itself, cannot be read, or has
            no candidate that is a point of the space.
        ProtocolMismatch: if its protocol or its seed is another one; the error names the first field that differs.
    """
    origin: Origin | None = None
    if settings.start_from is not None:
        with contextlib.suppress(InputError):  # a study that has begun goes on without it
            origin = _origin(settings.start_from)
    if origin is not None and _same(origin, _study_origin(settings)):
        problem = f"{settings.start_from} is this study, which cannot start from itself"
        raise InputError(settings.source, problem, "name another one", place="start_from")
    earlier = _set_aside_if_changed(settings, attrs)
    existing = {} if earlier else stored_attrs(settings)
    if "settings" in existing:
        stored, begun_with = existing.get("start_from"), existing["settings"].get("start_from")
        by_name = begun_with == settings.start_from  # how what is gone is compared
        if not (by_name if origin is None or stored is None else _same(origin, stored)):
            problem = f"was {as_yaml(begun_with)} when {settings.name} began"
            raise changed_setting(settings, "start_from", problem)
        return {key: existing[key] for key in ("start", "start_from") if key in existing}
    if settings.start_from is None:
        return earlier
    with settings.error_context("start_from"):
        points, left_out = starting_points(settings, space, attrs)
        origin = _origin(settings.start_from)
    return {**earlier, "start": points, "start_from": {**origin, **({"left_out": left_out} if left_out else {})}}


def _set_aside_if_changed(settings: StudyConfig, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Set a study aside whose objectives or limits have changed, so that it begins anew without training again.

    An Optuna study cannot change its objectives. The one that there is gets another name in the same storage, from
    which its qualities are reused, and its candidates come first in the new one.

    Args:
        attrs: the study's user attributes of now, with its space and its protocol.

    Returns:
        ``earlier``, to be stored with the new study: the ``study`` that was set aside, its ``points`` and what has
        ``changed``; nothing if the study has not begun, goes on, or differs in more.
    """
    existing = stored_attrs(settings)
    if "settings" not in existing or settings.evolve is not None:
        return {}
    stored = StudyConfig.model_validate(existing["settings"])
    now, before = (each.model_dump(mode="json") for each in (settings, stored))
    spaces = [{k: v for k, v in each["space"].items() if k not in ("name", "digest")} for each in (attrs, existing)]
    limits = [space.pop("constraints", {}) for space in spaces]
    changed = [name for name in CHANGEABLE if now[name] != before[name]]
    changed += ["space.constraints"] if limits[0] != limits[1] else []
    others = [name for name in FIXED_SETTINGS if name not in (*CHANGEABLE, "sampler") and now[name] != before[name]]
    same_training = settings.trains == stored.trains and attrs["protocol_hash"] == existing["protocol_hash"]
    if not changed or others or spaces[0] != spaces[1] or not same_training:
        return {}
    study = load_study(settings)
    points = [c.point for c in load_candidates(study) if c.state == "scored" and c.reused_from is None]
    name = rename(study)
    shutil.rmtree(settings.folder / "working", ignore_errors=True)  # checkpoints of the slots of before
    return {"earlier": {"study": name, "points": points, "changed": changed}}


def starting_points(
    settings: StudyConfig, space: Space, attrs: Mapping[str, Any]
) -> tuple[list[dict[str, int]], str | None]:
    """Points of a space whose networks were trained in what the settings start from, in its order.

    Returns:
        The points, and a sentence on the candidates that are not points of the space; None if all are.

    Raises:
        InputError, ProtocolMismatch: as `start_attrs`.
    """
    assert settings.start_from is not None
    points: list[dict[str, int]] = []
    left_out: list[str] = []
    scores = load_scores(settings.start_from)
    for score in scores:
        if (difference := first_difference(settings, attrs, score)) is not None:
            place, _, values = difference.partition(": ")
            remedy = "start from a study of the same protocol, or make the two alike"
            raise ProtocolMismatch(settings.source, f"differs from {score.source}, {values}", remedy, place=place)
        try:
            point = _point(space, score)
        except ValueError as error:
            left_out.append(f"{score.where}: {problem_and_remedy(error)[0]}")
        else:
            points += [point] if point not in points else []
    if not points:
        reason = f"has no candidate that is a point of {space.name}, e.g. {left_out[0]}" if left_out else "has no score"
        raise InputError(settings.start_from, reason, f"start from candidates of {space.name}")
    which = f"{len(left_out)} of {len(scores)} candidates are not points of {space.name}, e.g."
    return points, f"{which} {left_out[0]}" if left_out else None


def _point(space: Space, score: KnownScore) -> dict[str, int]:
    """The point of a space that is the candidate's, and at which the network behind its score would be trained.

    Raises:
        ValueError: if there is none; the message says why.
    """
    point: dict[str, int] = {}
    for knob in space.knobs:
        choice = knob.current_choice(score.architecture)
        if choice is None:
            raise ValueError(f"{knob.name} has none of the choices in {space.name}")
        point[knob.name] = choice
    arch = space.architecture(point)
    if arch.id != score.architecture.id:
        raise ValueError(f"it differs from the base of {space.name} in more than the knobs")
    if (space.twin(point) or arch).id != score.net.id:
        raise ValueError("another twin was trained in its place")
    return point


def _origin(where: str) -> Origin:
    """The origin that ``start_from`` names, however it is spelled.

    Raises:
        InputError: if it names nothing.
    """
    if is_table(where):
        return {"table": hashlib.sha256(read_bytes(where)).hexdigest()[:16]}
    return _study_origin(study_config(where))


def _study_origin(settings: StudyConfig) -> Origin:
    return {"study": settings.name, "storage": without_password(settings.url)}


def _same(a: Origin, b: Origin) -> bool:
    if "table" in a or "table" in b:
        return a.get("table") == b.get("table")
    return a["study"] == b["study"] and same_storage(a["storage"], b["storage"])
