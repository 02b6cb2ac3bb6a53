"""Attributes of a study, parsed as input is: the storage may be another program's, damaged, or of another version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

from optuna import Study
from pydantic import AfterValidator, ConfigDict, Field

from archsearch.block_latency.table import BlockTable
from archsearch.protocol import ResolvedProtocol
from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig
from snapgen.config import Config, parse_config
from snapgen.errors import InputError, first_line, printable

FORMAT = 1
"""Version of what a study stores, which every change that another version would misread raises.

Studies of before it was stored have format 1.
"""

Printable = Annotated[str, AfterValidator(partial(printable, newlines=True))]
"""A text without characters that control a terminal, which an error or a name may hold."""

_REMEDY = "name another study, or restore the storage"


class _Nothing(Config):
    """The protocol of a study that trains nothing."""


class StudyAttributes(Config):
    """User attributes that a search stores with its study."""

    model_config = ConfigDict(extra="ignore")

    format: int = 1
    settings: StudyConfig
    space: dict[str, Any]
    protocol: ResolvedProtocol | _Nothing
    protocol_hash: str | None
    trained_latent_size: int | None = Field(default=None, ge=1)
    machine: dict[str, Any]
    artifacts: str
    start: tuple[dict[str, int], ...] = ()
    start_from: dict[str, str] | None = None
    block_table: BlockTable | None = None


@contextmanager
def parse_errors(source: str, what: str = "an attribute") -> Iterator[None]:
    """Convert the errors that Optuna and SQLAlchemy raise where they parse what is stored: JSON, dates, names."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, LookupError, TypeError) as error:
        problem = f"{what} is not JSON" if isinstance(error, json.JSONDecodeError) else "is damaged"
        raise InputError(source, f"{problem} ({first_line(error)})", _REMEDY) from None


def check_attributes(study: Study, *, begun: bool = True) -> dict[str, Any]:
    """User attributes of a study, which are sound.

    Args:
        begun: whether a study that was killed before it had begun is an error; else it has no attributes.

    Raises:
        InputError: if it has not begun, another program made it, or an attribute is damaged; it names the attribute.
    """
    source = f"study {study.study_name}"
    with parse_errors(source):
        attrs: dict[str, Any] = study.user_attrs
        directions = [direction.name for direction in study.directions]
    check_format(study)
    if "settings" not in attrs:
        with parse_errors(source):
            foreign = "MAXIMIZE" in directions or bool(study.get_trials(deepcopy=False))
            attrs = study.user_attrs  # again: another process may have begun it, and asked for these trials, since
    if "settings" not in attrs:
        if foreign or attrs.keys() - StudyAttributes.model_fields.keys():
            raise InputError(source, "was not made by archsearch", _REMEDY)
        if begun:
            raise InputError(source, "was killed before it began", "run it again")
        return {}
    try:
        parsed = parse_config(attrs, StudyAttributes, source=source)
        Space.from_dict(parsed.space, source=source)
    except InputError as error:  # nobody wrote it by hand: the first mistake tells that it is damaged
        raise InputError(error.source, error.problem, _REMEDY, place=error.place) from None
    if directions != ["MINIMIZE"] * len(parsed.settings.objectives):
        problem = f"is to {', '.join(directions).lower()}, not to minimize {', '.join(parsed.settings.objectives)}"
        raise InputError(source, problem, _REMEDY)
    return attrs


def has_format(study: Study) -> bool:
    """Whether this version of archsearch reads and writes a study as the version did that began it."""
    return bool(study.user_attrs.get("format", 1) == FORMAT)


def check_format(study: Study) -> None:
    """Raise if another version of archsearch, which stores other things, began a study.

    Raises:
        InputError: naming both formats.
    """
    if not has_format(study):
        problem = f"has format {study.user_attrs['format']!r:.20}, and this version of archsearch format {FORMAT}"
        raise InputError(f"study {study.study_name}", problem, "use the version that began it, or another name")
