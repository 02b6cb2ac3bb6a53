"""Find what a name stands for wherever one is given: an architecture, or a study that has begun."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optuna import Study

from archsearch import devices
from archsearch.latency.base import Backend
from archsearch.library import is_run
from archsearch.predictor import reference_nets
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import BASE
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.search.candidates import candidate_of
from archsearch.studies.storage.attributes import check_attributes
from archsearch.studies.storage.database import FIXED_SETTINGS, load_study, open_study
from archsearch.studies.storage.record import Candidate
from snapgen.architecture.schema import Architecture
from snapgen.config import as_yaml
from snapgen.errors import InputError

ARCHITECTURES = ("SPACE/REFERENCE", "SPACE:base", "STUDY:best", "STUDY:TRIAL")
"""Names of architectures beside those of presets and files."""


def find_architecture(name: str, *, other_names: Sequence[str] = ()) -> Architecture:
    """Load an architecture: a preset, a file, ``SPACE/REFERENCE``, ``SPACE:base``, ``STUDY:best`` or ``STUDY:TRIAL``.

    Args:
        name: the name; a study is named as `find_config` takes it.
        other_names: further names that the caller accepts, for the error message.

    Raises:
        InputError: if the name is none of these, or the study has no such trial.
    """
    owner, colon, which = name.rpartition(":")
    if not colon or Path(name).exists():
        return reference_nets.architecture(name, other_names=(*ARCHITECTURES, *other_names))
    return load_space(owner).base if which == BASE else find_candidate(name)[1].architecture


def find_candidate(name: str) -> tuple[Study, Candidate]:
    """The study and the candidate that ``STUDY:best``, ``STUDY:TRIAL`` or ``STUDY:NAME`` names.

    Raises:
        InputError: if there is no such study, or it has no such candidate.
    """
    owner, _, which = name.rpartition(":")
    study = load_study(find_config(owner))
    return study, candidate_of(study, int(which) if which.isdecimal() else which)


@dataclass(frozen=True)
class Conditions:
    """Conditions under which cost and latency are determined. The defaults are for an architecture of no study.

    Attributes:
        latent_size: height and width of the latent.
        context_tokens: length of the context.
        device: device that the latency comes from, as `archsearch.devices.backend` takes it.
        options: settings of that device.
    """

    latent_size: int = 128
    context_tokens: int = 77
    device: str = "host"
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_overrides(
        self, *, latent_size: int | None = None, context_tokens: int | None = None, device: str | None = None
    ) -> Conditions:
        """The conditions with those that are not None replaced; another device loses the settings of this one."""
        given = {"latent_size": latent_size, "context_tokens": context_tokens, "device": device}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(self, **changes, options=self.options if device in (None, self.device) else {})

    def backend(self, **options: Any) -> Backend:
        """The device's backend, with further settings.

        Raises:
            InputError: for an unknown device or setting.
        """
        return devices.backend(self.device, **{**self.options, **options})


def is_candidate(name: str) -> bool:
    """Whether a name is that of a study's candidate, ``STUDY:best`` or ``STUDY:TRIAL``."""
    owner, colon, which = name.rpartition(":")
    return bool(owner and colon) and which != BASE and not Path(name).exists()


def find_conditions(name: str) -> Conditions:
    """The conditions under which a study measures the candidate ``STUDY:best`` or ``STUDY:TRIAL``; else the defaults.

    Raises:
        InputError: if there is no such study.
    """
    if not is_candidate(name):
        return Conditions()
    study = load_study(find_config(name.rpartition(":")[0]))
    latency, space = stored_config(study).latency, study.user_attrs["space"]
    return Conditions(space["latent_size"], space["context_tokens"], latency.device, latency.backend_options)


def find_config(name: str, *, storage: str | None = None) -> StudyConfig:
    """Load the settings of a study that has begun.

    Args:
        name: a shipped study, a YAML file, or the name of a run under ``runs/``, which has the settings it began with.
        storage: where the study is, if not where its settings say.

    Raises:
        InputError: if there is none.
    """
    config = stored_config(open_study(name)) if is_run(name) else load_config(name)
    return config.with_overrides(storage=storage)


def stored_config(study: Study) -> StudyConfig:
    """The settings that a study began with.

    Raises:
        InputError: if it has none yet.
    """
    return StudyConfig.parse(check_attributes(study)["settings"], f"study {study.study_name}")


def changed_settings(settings: StudyConfig, study: Study) -> list[str]:
    """A sentence for each setting of a file whose value is not that with which the study was searched.

    Settings that change no score and no choice of candidates, such as the budget, do not count.
    """
    stored = stored_config(study)
    now, before = (each.model_dump(mode="json") for each in (settings, stored))
    by_rows = ("initial_points", "sampler") if settings.ablation is not None else ()  # set by the rows
    names = [name for name in FIXED_SETTINGS if name not in (*by_rows, "evolve") and now[name] != before[name]]
    pairs = [(name, now[name], before[name]) for name in names]
    protocols = now["protocol"], before["protocol"]
    pairs += [(f"protocol.{k}", v, protocols[1][k]) for k, v in protocols[0].items() if v != protocols[1][k]]
    lines = [
        f"{name} is {as_yaml(a, max_length=60)}, but {as_yaml(b, max_length=60)} in the study" for name, a, b in pairs
    ]
    with contextlib.suppress(InputError):  # a space that is gone says nothing
        if settings.load_space().digest != study.user_attrs["space"]["digest"]:
            lines.append("space has changed since the study began")
    return [f"{settings.source}: {line}; search again to apply it" for line in lines]
