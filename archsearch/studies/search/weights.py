"""The trained networks that a study's trials left in its artifact store."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import optuna
import torch
from optuna import Study
from optuna.artifacts.exceptions import ArtifactNotFound
from safetensors import SafetensorError
from safetensors.torch import load

from archsearch.protocol import ResolvedProtocol
from archsearch.studies.search.candidates import candidate_of
from archsearch.studies.storage.artifacts import artifact_store
from archsearch.studies.storage.record import Candidate
from snapgen.config import parse_config
from snapgen.errors import InputError, first_line
from snapgen.io import pretrained
from snapgen.io.pretrained import Weights
from snapgen.models.unet import UNet
from snapgen.progress import silence_libraries

if TYPE_CHECKING:
    from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline

WEIGHTS = "unet.safetensors"
"""The artifact with the averaged weights of the first seed's run."""

_TRIAL = re.compile(r"trial (\d+) of (.+)")
"""How a trial names the one of another study whose quality it has (`known_scores.KnownScore.where`)."""


def has_weights(study: Study, candidate: Candidate) -> bool:
    """Whether a candidate's own network was trained, not a twin's, and is stored."""
    trained = _trained(study, candidate)[1]
    return trained.trained is None and WEIGHTS in trained.artifacts


def load_unet(study: Study, candidate: Candidate) -> UNet:
    """Load the trained network of a candidate, or its twin in a study with a proxy, on the CPU and in evaluation mode.

    Raises:
        InputError: if the candidate was not trained, or its artifact is missing or damaged.
    """
    study, candidate = _trained(study, candidate)
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


def load_pipeline(study: Study, candidate: Candidate) -> SnapGenPipeline:
    """Load a pipeline around the trained network of a candidate, with the protocol's settings of sampling.

    Raises:
        InputError: as `load_unet`, if what the protocol names cannot be loaded, or the network works on pixels.
    """
    from snapgen.autoencoders.autoencoder import load_autoencoder
    from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline

    unet = load_unet(study, candidate)
    source = f"study {study.study_name}"
    protocol = parse_config(study.user_attrs["protocol"], ResolvedProtocol, source=source, place="protocol").protocol
    with silence_libraries():
        return SnapGenPipeline.from_components(
            unet,
            load_autoencoder(protocol.autoencoder),
            protocol.text_encoders,
            prediction=protocol.prediction_type,
            shift=protocol.timestep_shift,
            steps=protocol.num_inference_steps,
            guidance=protocol.guidance_scale,
            resolution=protocol.resolution,
        )


def _trained(study: Study, candidate: Candidate) -> tuple[Study, Candidate]:
    """The candidate whose training gave this one its quality, and the study that has it, if that is on the storage."""
    if candidate.reused_study is not None and (found := _TRIAL.fullmatch(candidate.reused_study)):
        number, name = found.groups()
        with contextlib.suppress(KeyError):
            other = optuna.load_study(study_name=name, storage=study._storage)
            return _trained(other, candidate_of(other, int(number)))
    if candidate.reused_from is not None:
        return _trained(study, candidate_of(study, candidate.reused_from))
    return study, candidate
