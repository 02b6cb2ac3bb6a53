"""Registry of latency backends, by device name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from archsearch.latency import coreai, coreml, host
from archsearch.latency.base import Backend
from snapgen.errors import InputError


def backend(device: str = "host", **options: Any) -> Backend:
    """Build the latency backend for a device, from the ``latency`` section of a study.

    Args:
        device: a key of `BACKENDS`, or ``predicted:x`` for the latency model of device ``x``.
        options: settings of that backend.

    Raises:
        InputError: for an unknown device or option.
    """
    kind, _, predicted_device = device.partition(":")
    if kind == "predicted" and predicted_device:
        from archsearch.predictor import backend  # imports this module

        return backend.predicted_backend(predicted_device, options)
    if device not in BACKENDS:
        names = ", ".join([*BACKENDS, "predicted:…"])
        raise InputError("latency", f"unknown device {device!r:.80}", f"use one of: {names}", place="device")
    return BACKENDS[device](options)


BACKENDS: Mapping[str, Callable[[Mapping[str, Any]], Backend]] = {
    "host": host.on_host,
    "coreml": coreml.on_mac,
    "coreai": coreai.on_mac,
    "iphone": coreml.on_phone,
}
"""Factory of each device's backend; it receives the study's options."""
