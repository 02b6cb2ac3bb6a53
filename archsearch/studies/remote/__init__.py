"""Latency measured by another machine."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.studies.remote.client import RemoteLatency as RemoteLatency
    from archsearch.studies.remote.server import serve as serve
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
