"""Backends that measure."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.latency.base import (
        Backend as Backend,
        DeviceLostError as DeviceLostError,
        MeasurementError as MeasurementError,
    )
    from archsearch.latency.host import HostBackend as HostBackend
    from archsearch.latency.records import LatencySample as LatencySample, load_samples as load_samples
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
