"""Cost and latency of one architecture, by its description or by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from archsearch import devices
from archsearch.cost import counter
from archsearch.latency.base import Backend
from archsearch.score import Cost, LatencyRecord
from archsearch.studies import lookup
from snapgen.architecture.schema import Architecture


def find_architecture(architecture: Architecture | str | Path) -> Architecture:
    """The architecture itself, or the one with that name.

    Args:
        architecture: a description, or what the command line takes: a preset's name, a JSON or YAML file,
            ``SPACE/REFERENCE``, ``SPACE:base``, ``STUDY:best`` or ``STUDY:TRIAL``.

    Raises:
        InputError: if there is none of that name.
    """
    if isinstance(architecture, Architecture):
        return architecture
    return lookup.find_architecture(str(architecture))


def count_cost(
    architecture: Architecture | str | Path,
    *,
    latent_size: int | None = None,
    context_tokens: int | None = None,
) -> Cost:
    """Count what one forward pass at batch 1 needs: parameters, MACs and bytes of activation memory in fp16.

    Exact, and without weights. `archsearch.cost.breakdown` has the same by stage and by kind of block.

    Args:
        architecture: a description or a name, as `find_architecture` takes it.
        latent_size: height and width of the latent; None: the study's for a study's candidate, else 128.
        context_tokens: length of the context; None: the study's for a study's candidate, else 77.

    Raises:
        InputError: for an unknown name, or a latent that the net does not take.
    """
    found, conditions = _find(architecture, latent_size=latent_size, context_tokens=context_tokens)
    return counter.cost(found, conditions.latent_size, context_tokens=conditions.context_tokens)


def measure_latency(
    architecture: Architecture | str | Path,
    *,
    device: str | None = None,
    latent_size: int | None = None,
    context_tokens: int | None = None,
    **options: Any,
) -> LatencyRecord:
    """Measure one forward pass at batch 1 on a device, or predict it with a device ``predicted:NAME``.

    The record's ``source`` says which of the two was done, and ``median_ms`` is the time in milliseconds.

    Args:
        architecture: a description or a name, as `find_architecture` takes it.
        device: ``host``, ``coreml``, ``iphone``, or ``predicted:`` and a shipped profile's name or the file of a fitted
            model; None: that of the study for a study's candidate, with its settings there, else ``host``.
        latent_size: height and width of the latent; None: the study's for a study's candidate, else 128.
        context_tokens: length of the context; None: the study's for a study's candidate, else 77.
        **options: the device's own settings, such as ``threads=2`` for ``host``.

    Raises:
        InputError: for an unknown name, device or option, or a latent that the net does not take.
        archsearch.latency.MeasurementError: if the net cannot be built, loaded or run there, or not in time.
        archsearch.latency.DeviceLostError: if the device went away.
    """
    found, conditions = _find(architecture, latent_size=latent_size, context_tokens=context_tokens, device=device)
    return conditions.backend(**options).measure(found, conditions.latent_size, conditions.context_tokens)


def latency_backend(device: str = "host", **options: Any) -> Backend:
    """Make the latency backend of a device, to time many architectures with.

    Args:
        device: as `measure_latency` takes it.
        **options: the device's own settings.

    Raises:
        InputError: for an unknown device or option.
    """
    return devices.backend(device, **options)


def _find(architecture: Architecture | str | Path, **overrides: Any) -> tuple[Architecture, lookup.Conditions]:
    found = find_architecture(architecture)
    named = lookup.Conditions() if architecture is found else lookup.find_conditions(str(architecture))
    conditions = named.with_overrides(**overrides)
    found.validate_latent_size(conditions.latent_size, source="latent_size")
    return found, conditions
