"""The Python interface: what each command does, as a function that returns objects and data frames."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.api.architecture import count_cost, latency_backend, measure_latency
    from archsearch.api.study import Study, ablate, audit, evolve, load_study, search
    from archsearch.api.training import TrainedRun, train
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "archsearch.api.architecture": ["count_cost", "latency_backend", "measure_latency"],
            "archsearch.api.study": ["Study", "ablate", "audit", "evolve", "load_study", "search"],
            "archsearch.api.training": ["TrainedRun", "train"],
        },
    )

__all__ = [
    "Study",
    "TrainedRun",
    "ablate",
    "audit",
    "count_cost",
    "evolve",
    "latency_backend",
    "load_study",
    "measure_latency",
    "search",
    "train",
]
