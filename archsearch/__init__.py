"""Search text-to-image diffusion U-Nets for quality and measured latency, ablate them, and train the one you pick.

A function here does what the command of its name does; docs/python.md shows them in a notebook. The names below are
imported when they are first used: ``import archsearch`` loads neither torch nor optuna nor pandas.

`count_cost` and `measure_latency` are not called ``cost`` and ``latency``, as their commands are: those are subpackages
of this one, and Python makes a subpackage an attribute of its package whenever anything imports it.
"""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.api.architecture import count_cost, latency_backend, measure_latency
    from archsearch.api.study import Study, ablate, audit, evolve, load_study, search
    from archsearch.api.training import TrainedRun, train
    from archsearch.protocol import EvaluationProtocol
    from archsearch.quality.candidate_evaluator import CandidateEvaluator
    from archsearch.reports.study_report import write_report
    from archsearch.score import LatencyRecord, Score
    from archsearch.spaces.loading import load_space
    from archsearch.spaces.space import Space
    from archsearch.stats.estimate import Estimate
    from archsearch.studies.config.study import StudyConfig
    from archsearch.training.recipe import Recipe, load_recipe
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "CandidateEvaluator",
    "Estimate",
    "EvaluationProtocol",
    "LatencyRecord",
    "Recipe",
    "Score",
    "Space",
    "Study",
    "StudyConfig",
    "TrainedRun",
    "ablate",
    "audit",
    "count_cost",
    "evolve",
    "latency_backend",
    "load_recipe",
    "load_space",
    "load_study",
    "measure_latency",
    "search",
    "train",
    "write_report",
]
