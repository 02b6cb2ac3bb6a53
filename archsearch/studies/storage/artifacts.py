"""Files of a study's trials: samples, weights and checkpoints in Optuna's artifact store, under names that say what."""

from __future__ import annotations

import mimetypes
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from archsearch.studies.storage.database import artifact_store
from archsearch.studies.storage.record import StoredTrial

if TYPE_CHECKING:
    from optuna import Study


def store_artifact(study: Study, trial_id: int, path: Path, *, name: str = "") -> None:
    """Store a file with a trial, as Optuna's ``upload_artifact`` does, which would name it by a random number alone.

    The file in the store is called after the study, the trial and the file; a few random digits keep it apart from that
    of another study of this name.

    Args:
        name: what the file is called; empty: as it is.
    """
    from optuna.artifacts import ArtifactMeta

    storage, name = study._storage, name or path.name
    stem, suffix = Path(name).stem, Path(name).suffix
    number = storage.get_trial(trial_id).number
    artifact_id = f"{study.study_name}-{number}-{stem}-{secrets.token_hex(4)}{suffix}"
    mimetype, encoding = mimetypes.guess_type(name)
    meta = ArtifactMeta(artifact_id, name, mimetype or "application/octet-stream", encoding)
    StoredTrial.write_artifact(storage, trial_id, meta)
    with path.open("rb") as file:
        artifact_store(study).write(artifact_id, file)
