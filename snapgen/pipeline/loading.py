"""Finds and loads the pipeline of a training run; damaged files raise an `InputError` of one line."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline

from snapgen import config
from snapgen.autoencoders.autoencoder import load_vae, read_decoder
from snapgen.conditioning import text_encoder
from snapgen.errors import InputError
from snapgen.models.unet import load_unet
from snapgen.pipeline.snapgen_pipeline import TEXT_ENCODERS, TOKENIZERS, SnapGenPipeline
from snapgen.progress import silence_libraries

INDEX = "model_index.json"
"""File in which diffusers lists a pipeline's components."""

RUNS = Path("runs")
"""Folder of the training runs, relative to the working directory."""

RESTORE = "remove the pipeline and run its training again, which writes it"
"""Remedy for a damaged pipeline."""


def load_pipeline(run: str | Path) -> SnapGenPipeline:
    """Load the pipeline of a run, on the CPU.

    Args:
        run: a run's folder, its name under ``runs/``, or a pipeline's folder.

    Raises:
        InputError: if there is no such run, it has no pipeline yet, or its files are damaged.
    """
    folder = find_pipeline(run)
    index = config.read_mapping(folder / INDEX)
    components: dict[str, Any] = {"unet": load_unet(folder / "unet")}
    if index.get("decoder") not in (None, [None, None]):
        components["decoder"] = read_decoder(folder / "decoder")
    return cast(SnapGenPipeline, assemble(SnapGenPipeline, folder, components))


def assemble(pipeline_class: type[DiffusionPipeline], folder: Path, components: dict[str, Any]) -> DiffusionPipeline:
    """Load a pipeline around components that are loaded already; its autoencoder and text encoders are loaded first.

    Raises:
        InputError: if files are missing or damaged, or the components do not fit each other.
    """
    components = {"vae": load_vae(folder / "vae"), **components}
    with silence_libraries():
        components |= _load_text_components(folder)
        try:
            return pipeline_class.from_pretrained(folder, local_files_only=True, use_safetensors=True, **components)
        except InputError as error:
            raise InputError(folder / INDEX, error.problem, error.remedy, place=error.place) from None
        except Exception as error:  # diffusers, transformers, safetensors and torch raise various errors
            problem = f"cannot be loaded ({' '.join(str(error).split())[:240] or type(error).__name__})"
            raise InputError(folder, problem, RESTORE) from None


def is_run(run: str | Path) -> bool:
    """Whether there is such a folder, as `load_pipeline` takes it; one with a ``config.json`` is a single net's."""
    return (Path(run).is_dir() and not (Path(run) / "config.json").is_file()) or (RUNS / run).is_dir()


def find_pipeline(run: str | Path) -> Path:
    """The folder of a run's pipeline.

    Args:
        run: a run's folder, its name under ``runs/``, or a pipeline's folder.

    Raises:
        InputError: if there is none, or it is incomplete.
    """
    folders = [path for path in (Path(run), RUNS / run) if path.is_dir()]
    if not folders:
        raise InputError(run, "is neither a folder nor the name of one under runs/", "name a trained run")
    for path in (path for folder in folders for path in (folder, folder / "pipeline")):
        if (path / INDEX).is_file():
            return path
    raise InputError(folders[-1], f"has no pipeline/{INDEX}", "finish its training; the same command resumes it")


def _load_text_components(folder: Path) -> dict[str, Any]:
    """Text encoders and tokenizers by component name.

    They are loaded here because diffusers silently replaces missing files by random weights and an empty tokenizer.
    """
    components: dict[str, Any] = {}
    index = config.read_mapping(folder / INDEX)
    for name, tokenizer in zip(TEXT_ENCODERS, TOKENIZERS, strict=True):
        if index.get(name) in (None, [None, None]):
            continue
        with merged_folder(folder / name, folder / tokenizer) as merged:
            try:
                components[name], components[tokenizer] = text_encoder.load_text_encoder(str(merged))
            except InputError as error:
                damaged, place = (tokenizer, "") if error.place == "tokenizer" else (name, error.place)
                problem = error.problem.replace(f"{merged}/", "")
                raise InputError(folder / damaged, problem, RESTORE, place=place) from None
    return components


@contextlib.contextmanager
def merged_folder(*folders: Path) -> Iterator[Path]:
    """A temporary folder with links to the files of several folders.

    `snapgen.conditioning.text_encoder` expects a text encoder and its tokenizer in one folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for file in (file for folder in folders if folder.is_dir() for file in folder.iterdir()):
            link = Path(scratch) / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
        yield Path(scratch)
