"""The latency backends by the name of their device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from archsearch.latency.base import Backend
from archsearch.latency.host import HostBackend, HostConfig
from snapgen import config
from snapgen.errors import InputError


def backend(device: str = "host", **options: Any) -> Backend:
    """The backend of a device, from a study's ``latency`` settings; ``predicted:x`` predicts the device x.

    Raises:
        InputError: for an unknown device or option.
    """
    kind, _, predicted = device.partition(":")
    if kind == "predicted" and predicted:
        from archsearch.predictor import backend  # built on this module

        return backend.predicted_backend(predicted, options)
    if device not in BACKENDS:
        known = ", ".join([*BACKENDS, "predicted:…"])
        raise InputError("latency", f"unknown device {device!r:.80}", f"use one of: {known}", place="device")
    return BACKENDS[device](options)


def _host(options: Mapping[str, Any]) -> HostBackend:
    return HostBackend(config.parse_config(dict(options), HostConfig, source="latency"))


def _coreml(options: Mapping[str, Any]) -> Backend:
    from archsearch.latency import coreml  # built on this module

    return coreml.on_mac(options)


def _iphone(options: Mapping[str, Any]) -> Backend:
    from archsearch.latency import coreml

    return coreml.on_phone(options)


BACKENDS: Mapping[str, Callable[[Mapping[str, Any]], Backend]] = {"host": _host, "coreml": _coreml, "iphone": _iphone}
"""Device to what makes its backend of a study's options."""
