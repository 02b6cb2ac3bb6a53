"""Run a study, or go on with it: prepare once, then score candidates in one process or in several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archsearch.studies.config.study import StudyConfig, error_context
from archsearch.studies.search import samplers
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.display import Display
from archsearch.studies.search.pool import WorkerPool, ignore_experimental_warnings, torch_threads
from archsearch.studies.search.proposer import Proposer, ProposerFactory
from archsearch.studies.search.scorer import ArchsearchScorer, ScorerFactory
from archsearch.studies.search.worker import Worker
from archsearch.studies.signals import terminable
from archsearch.studies.storage.database import artifact_store, create_or_resume, storage_errors
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study

    from archsearch.spaces.space import Space


def search(
    settings: StudyConfig,
    *,
    quiet: bool = False,
    scorer: ScorerFactory = ArchsearchScorer,
    proposer: ProposerFactory = Proposer,
) -> Study:
    """Run a study to the end of its budget, from wherever it is.

    The same call goes on with a study that was killed, and any number of processes, on any number of machines, may run
    it together. One worker alone ends with the same trials whether or when it was killed, if its scores are
    deterministic.

    Args:
        quiet: show warnings only.
        scorer: makes what scores the candidates; a function or class of a module.
        proposer: makes what proposes them, in a study of one worker.

    Returns:
        The study, as Optuna has it.

    Raises:
        InputError: if something is wrong with the settings or what they name.
        KeyboardInterrupt: once the trials under way have been put back.
    """
    with storage_errors(settings.url, settings.source), terminable(), ignore_experimental_warnings():
        space = settings.load_space()
        _check_plan(settings, space, proposer)
        samplers.build_sampler(settings.sampler, seed=0, source=settings.source)
        ready = scorer(settings, space)
        with error_context(settings, "space"):
            ready.check(space.base)
        study = create_or_resume(settings, {"space": space.to_dict(), **ready.describe()})
        artifact_store(study)  # a folder that cannot be written is told now, not after the first training
        with Display(study, settings, quiet=quiet) as display:
            display.line(f"{settings.name}: {space.size():,} points, in {settings.url}", warning=False)
            if settings.workers == 1:
                with torch_threads(settings.threads):
                    asked = proposer(settings, space)
                    worker = Worker(study, settings, space, ready, asked, tell=display.line, tick=display.tick)
                    reason = worker.run()
            else:
                del ready
                reason = WorkerPool(study, settings, scorer, display).run()
            display.tick(now=True)
            display.line(f"{settings.name}: finished, {reason}", warning=False)
        _refuse_nothing(study, settings, reason)
    return study


def _check_plan(settings: StudyConfig, space: Space, proposer: ProposerFactory) -> None:
    if settings.ablation is not None and not settings.plan:
        raise InputError(settings.source, "is an ablation", "run archsearch ablate", place="ablation")
    if settings.evolve is not None and proposer is Proposer:
        raise InputError(settings.source, "evolves a network", "run archsearch evolve", place="evolve")
    choices = {knob.name: range(len(knob.choices)) for knob in space.knobs}
    for i, point in enumerate(settings.plan):
        known = point.keys() == choices.keys() and all(point[name] in choices[name] for name in choices)
        if not known or not space.valid(point):
            remedy = "give every knob the index of one of its choices"
            raise InputError(settings.source, "is no point of the space", remedy, place=f"plan[{i}]")


def _refuse_nothing(study: Study, settings: StudyConfig, reason: str) -> None:
    """A study that scored nothing for its limits has nothing to report but how far off they were."""
    candidates = load_candidates(study)
    near = [c for c in candidates if c.state == "infeasible"]
    if near and not any(c.state == "scored" for c in candidates):
        problem = f"{reason}; none was inside, e.g. trial {near[-1].number}: {near[-1].infeasible}"
        raise InputError(settings.source, problem.replace("; widen them", ""), "widen the limits", place="limits")
