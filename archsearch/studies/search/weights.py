"""The trained networks that a study's trials left in its artifact store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from optuna.artifacts.exceptions import ArtifactNotFound
from safetensors import SafetensorError
from safetensors.torch import load

from archsearch.studies.storage.database import artifact_store
from archsearch.studies.storage.record import Candidate
from snapgen.errors import InputError, first_line
from snapgen.io import pretrained
from snapgen.io.pretrained import Weights
from snapgen.models.unet import UNet

if TYPE_CHECKING:
    from optuna import Study

WEIGHTS = "unet.safetensors"
"""The artifact with the averaged weights of the first seed's run."""


def load_unet(study: Study, candidate: Candidate) -> UNet:
    """Load the trained network of a candidate, or its twin in a study with a proxy, on the CPU and in evaluation mode.

    Raises:
        InputError: if the candidate was not trained, or its artifact is missing or damaged.
    """
    name = f"trial {candidate.number} of {study.study_name}"
    if WEIGHTS not in candidate.artifacts:
        raise InputError(name, "has no weights: it was not trained in this study", "name one that was")
    protocol = study.user_attrs["protocol"]["protocol"]
    with torch.device("meta"):
        unet = UNet(candidate.trained or candidate.architecture, protocol["prediction_type"])
    try:
        with artifact_store(study).open_reader(candidate.artifacts[WEIGHTS]) as file:
            pretrained.fill(unet, Weights.in_memory(load(file.read()), name))
    except (OSError, ArtifactNotFound, SafetensorError, InputError) as error:
        problem = f"its weights cannot be read ({first_line(error)})"
        remedy = "restore the study's artifacts, or begin it anew"
        raise InputError(name, problem, remedy, place=str(study.user_attrs["artifacts"])) from None
    unet.to(memory_format=torch.channels_last)
    return unet
