"""Files of a study's trials: samples, weights and checkpoints in Optuna's artifact store, under names that say what.

Of the checkpoints of trainings that paused at a rung only the hopeful are kept.
"""

from __future__ import annotations

import contextlib
import mimetypes
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from optuna import Study
from optuna.artifacts import ArtifactMeta, FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from archsearch.studies.storage.record import Candidate, StoredTrial
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.errors import os_errors
from snapgen.io.atomic import atomic_write

CHECKPOINT = "checkpoint.safetensors"
"""The artifact of a paused training."""


def artifact_store(study: Study) -> FileSystemArtifactStore:
    """Artifact store of a study, for samples and weights.

    Raises:
        InputError: if its folder cannot be created.
    """
    folder = Path(study.user_attrs["artifacts"])
    with os_errors(folder, "set artifacts to a writable folder", "cannot be created"):
        folder.mkdir(parents=True, exist_ok=True)
    return FileSystemArtifactStore(folder)


def store_artifact(study: Study, trial_id: int, path: Path, *, name: str = "") -> None:
    """Store a file with a trial, as Optuna's ``upload_artifact`` does, which would name it by a random number alone.

    The file in the store is called after the study, the trial and the file; a few random digits keep it apart from that
    of another study of this name.

    Args:
        name: what the file is called; empty: as it is.
    """
    storage, name = study._storage, name or path.name
    stem, suffix = Path(name).stem, Path(name).suffix
    number = storage.get_trial(trial_id).number
    artifact_id = f"{study.study_name}-{number}-{stem}-{secrets.token_hex(4)}{suffix}"
    mimetype, encoding = mimetypes.guess_type(name)
    meta = ArtifactMeta(artifact_id, name, mimetype or "application/octet-stream", encoding)
    StoredTrial.write_artifact(storage, trial_id, meta)
    with path.open("rb") as file:
        artifact_store(study).write(artifact_id, file)


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
