"""Trainings that paused at a rung: their checkpoints among a study's artifacts, of which only the hopeful are kept."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from archsearch.studies.storage.artifacts import store_artifact
from archsearch.studies.storage.database import artifact_store
from archsearch.studies.storage.record import Candidate
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.io.atomic import atomic_write

if TYPE_CHECKING:
    from optuna import Study

CHECKPOINT = "checkpoint.safetensors"
"""The artifact of a paused training."""


class PausedRuns:
    """Checkpoints of one study's paused trainings.

    Args:
        keep: number of candidates whose checkpoints are kept.
    """

    def __init__(self, study: Study, *, keep: int) -> None:
        self._study, self._store, self._keep = study, artifact_store(study), keep
        self._removed: set[str] = set()

    def save(self, trial_id: int, checkpoint: Path) -> None:
        """Store the checkpoint of a training that pauses."""
        store_artifact(self._study, trial_id, checkpoint, name=CHECKPOINT)

    def restore(self, candidate: Candidate, checkpoint: Path) -> None:
        """Bring back the checkpoint of a paused candidate, unless there is one or its own was deleted.

        Without it the training begins anew, which gives the same result.
        """
        from optuna.artifacts.exceptions import ArtifactNotFound

        if checkpoint.exists() or CHECKPOINT not in candidate.artifacts:
            return
        try:
            source = self._store.open_reader(candidate.artifacts[CHECKPOINT])
        except ArtifactNotFound:
            return
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with source, atomic_write(checkpoint) as temporary, temporary.open("wb") as file:
            shutil.copyfileobj(source, file)

    def let_go(self, trials: StudyTrials, hopes: Mapping[int, float]) -> None:
        """Delete the checkpoints of all candidates but the most hopeful paused ones.

        Args:
            trials: the study's trials.
            hopes: probability that each paused candidate is on the front, by trial number, where it is known.
        """
        from optuna.artifacts.exceptions import ArtifactNotFound

        paused = {c.number: c for c in trials.candidates() if c.state == "paused"}
        order = sorted(paused.values(), key=lambda c: (-hopes.get(c.number, 1.0), c.slot))
        kept = {c.artifacts.get(CHECKPOINT) for c in order[: self._keep]}
        for t in trials.ended:
            artifact = t.artifacts.get(CHECKPOINT)
            if artifact is None or artifact in kept or artifact in self._removed:
                continue
            with contextlib.suppress(ArtifactNotFound):  # another worker was faster
                self._store.remove(artifact)
            self._removed.add(artifact)
