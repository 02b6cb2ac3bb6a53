"""Run or resume a study: prepare once, then score candidates in one process or in several."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from optuna import Study

from archsearch.latency.timed_pass import TimedPass
from archsearch.quality import processes
from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.remote.client import measurement_spec
from archsearch.studies.remote.queue import MeasurementQueue
from archsearch.studies.search import samplers
from archsearch.studies.search.candidates import check_any_feasible, load_candidates
from archsearch.studies.search.display import Display
from archsearch.studies.search.pool import WorkerPool, ignore_experimental_warnings
from archsearch.studies.search.proposer import Proposer, ProposerFactory
from archsearch.studies.search.scorer import ArchsearchScorer, ScorerFactory
from archsearch.studies.search.start import start_attrs
from archsearch.studies.search.worker import Worker
from archsearch.studies.signals import terminable
from archsearch.studies.storage.artifacts import artifact_store
from archsearch.studies.storage.database import (
    create_or_resume,
    load_study,
    open_storage,
    storage_errors,
    stored_attrs,
    without_password,
)
from archsearch.studies.storage.record import Candidate
from archsearch.studies.storage.trial_queue import TrialQueue
from snapgen.devices import torch_threads
from snapgen.errors import InputError

MOST_LISTED = 10
"""Candidates that were given up of which each gets a line."""


def search(
    settings: StudyConfig,
    *,
    quiet: bool = False,
    scorer: ScorerFactory = ArchsearchScorer,
    proposer: ProposerFactory = Proposer,
) -> Study:
    """Run a study to the end of its budget, or resume it.

    The same call resumes a study that was killed, and any number of processes on any number of machines may run it
    together. With one worker and deterministic scores the trials are the same whether or not the study was killed.

    Args:
        quiet: whether to show warnings only.
        scorer: builds the scorer; a module-level function or class.
        proposer: builds the proposer, in a study of one worker.

    Returns:
        Optuna's study.

    Raises:
        InputError: if the settings, or something that they name, are invalid.
        KeyboardInterrupt: after the running trials have been released.
    """
    if processes.is_follower():
        from archsearch.quality.candidate_evaluator import follow  # slow to import

        follow(settings.protocol)
        return load_study(settings)
    with (
        storage_errors(settings.url, settings.source),
        terminable(),
        ignore_experimental_warnings(),
        processes.leading(),
    ):
        space = settings.load_space()
        _check_plan(settings, space, proposer)
        built_scorer = scorer(settings, space)
        with settings.error_context("space" if space.proxy is None else "proxy"):
            built_scorer.check((space.proxy or space).base)
        attrs = {"space": space.to_dict(), **built_scorer.describe()}
        start = start_attrs(settings, space, attrs)
        study = create_or_resume(settings, {**attrs, **start})
        # Fail before the first training, not after it, if a trial is damaged or the artifacts' folder not writable.
        load_candidates(study)
        artifact_store(study)
        with Display(study, settings, quiet=quiet) as display:
            _announce(display, settings, space, {**attrs, **start})
            if settings.workers == 1:
                worker = functools.partial(Worker, log=display.line, tick=display.tick)
                with torch_threads(settings.threads_per_worker):
                    reason = worker(study, settings, space, built_scorer, proposer(settings, space, study)).run()
            else:
                del built_scorer
                reason = WorkerPool(study, settings, scorer, display).run()
            candidates = load_candidates(study)
            _conclude(display, settings, reason, candidates)
        files = settings.source, space.source
        check_any_feasible(study, candidates, files=files, reason=reason.partition("; ")[0])
    return study


def retry_given_up(settings: StudyConfig) -> None:
    """Let the next search of a study try again what was given up: candidates, and measurements of a remote device."""
    if not stored_attrs(settings):
        return
    with storage_errors(settings.url, settings.source):
        study = load_study(settings)
        TrialQueue(study, settings).reopen()
        if settings.latency.remote:
            space = settings.load_space()
            spec = measurement_spec(settings.latency, space.latent_size, space.context_tokens)
            MeasurementQueue(open_storage(settings.url, source=settings.source), spec).reopen()


def _conclude(display: Display, settings: StudyConfig, reason: str, candidates: Sequence[Candidate]) -> None:
    """Say why the search is over, and what was given up."""
    display.tick(now=True)
    display.line(f"{settings.name}: finished, {reason}", warning=False)
    given_up = [c for c in candidates if c.state == "failed"]
    for c in given_up[:MOST_LISTED]:
        name = f" ({c.name})" if c.name else ""
        display.line(f"{settings.name}: trial {c.number}{name} was given up: {c.error or 'it did not end'}")
    if given_up:
        more = f"and {len(given_up) - MOST_LISTED} more; " if len(given_up) > MOST_LISTED else ""
        display.line(f"{settings.name}: {more}the same command with --retry tries what was given up again")


def _announce(display: Display, settings: StudyConfig, space: Space, attrs: Mapping[str, Any]) -> None:
    where = without_password(settings.url)
    display.line(f"{settings.name}: {space.size():,} points, in {where}", warning=False)
    if (earlier := attrs.get("earlier")) is not None:
        changed, kept = " and ".join(earlier["changed"]), earlier["study"]
        count = len(earlier["points"])
        display.line(f"{settings.name}: {changed} changed; its {count} scored candidates are kept as study {kept}")
        display.line(f"{settings.name}: they come first, and are not trained again")
    if (left_out := attrs.get("start_from", {}).get("left_out")) is not None:
        display.line(f"{settings.name}: {left_out}")
    if mismatch := TimedPass.of_study(attrs).mismatch:
        display.line(mismatch)


def _check_plan(settings: StudyConfig, space: Space, proposer: ProposerFactory) -> None:
    if settings.ablation is not None and not settings.initial_points:
        raise InputError(settings.source, "is an ablation", "run archsearch ablate", place="ablation")
    count = processes.num_processes()
    if count > 1 and settings.workers > 1:
        problem = f"is {settings.workers}, but {count} processes were launched, which train each candidate together"
        raise InputError(settings.source, problem, "set it to 1, or launch one process", place="workers")
    micro_batches = count * settings.protocol.gradient_accumulation_steps
    if settings.protocol.batch_size % micro_batches:
        problem = f"is {settings.protocol.batch_size}, which {count} processes cannot divide"
        remedy = f"use a multiple of {micro_batches}, the number of their micro-batches"
        raise InputError(settings.source, problem, remedy, place="protocol.batch_size")
    if settings.evolve is not None and proposer is Proposer:
        raise InputError(settings.source, "evolves a network", "run archsearch evolve", place="evolve")
    choices = {knob.name: range(len(knob.choices)) for knob in space.knobs}
    for i, point in enumerate(settings.initial_points):
        has_every_knob = point.keys() == choices.keys() and all(point[name] in choices[name] for name in choices)
        if not has_every_knob or not space.valid(point):
            remedy = "give every knob the index of one of its choices"
            raise InputError(settings.source, "is not a point of the space", remedy, place=f"initial_points[{i}]")
    samplers.build_sampler(settings.sampler, seed=0, source=settings.source)
