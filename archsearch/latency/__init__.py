"""Backends that measure."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.latency.base import Backend, DeviceLostError, MeasurementError
    from archsearch.latency.host import HostBackend
    from archsearch.latency.records import LatencySample, load_samples
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Backend", "DeviceLostError", "HostBackend", "LatencySample", "MeasurementError", "load_samples"]
