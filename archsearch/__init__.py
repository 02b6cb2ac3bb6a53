"""Search text-to-image diffusion U-Nets for quality and measured latency, ablate them, and train the one you pick.

A function here does what the command of its name does; docs/python.md shows them in a notebook. The names below are
imported when they are first used: ``import archsearch`` loads neither torch nor optuna nor pandas.

`count_cost` and `measure_latency` are not called ``cost`` and ``latency``, as their commands are: those are subpackages
of this one, and Python makes a subpackage an attribute of its package whenever anything imports it.
"""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.api.architecture import (
        count_cost as count_cost,
        latency_backend as latency_backend,
        measure_latency as measure_latency,
    )
    from archsearch.api.study import (
        Study as Study,
        ablate as ablate,
        audit as audit,
        evolve as evolve,
        load_study as load_study,
        search as search,
    )
    from archsearch.api.tabular import Table as Table, load_table as load_table, replay as replay, tabulate as tabulate
    from archsearch.api.training import TrainedRun as TrainedRun, train as train
    from archsearch.protocol import EvaluationProtocol as EvaluationProtocol
    from archsearch.quality.candidate_evaluator import CandidateEvaluator as CandidateEvaluator
    from archsearch.reports.study_report import write_report as write_report
    from archsearch.score import LatencyRecord as LatencyRecord, Score as Score
    from archsearch.spaces.loading import load_space as load_space
    from archsearch.spaces.space import Space as Space
    from archsearch.stats.estimate import Estimate as Estimate
    from archsearch.studies.config.study import StudyConfig as StudyConfig
    from archsearch.training.recipe import Recipe as Recipe, load_recipe as load_recipe
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
