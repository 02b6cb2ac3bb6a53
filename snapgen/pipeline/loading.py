"""The pipeline that a run left behind, found and read; whatever is wrong with its files is told in one line."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from snapgen import config
from snapgen.conditioning import text_encoder
from snapgen.errors import InputError
from snapgen.pipeline.snapgen_pipeline import TEXT_ENCODERS, TOKENIZERS, SnapGenPipeline
from snapgen.progress import silence_libraries

INDEX = "model_index.json"


RUNS = Path("runs")


def load_pipeline(run: str | Path) -> SnapGenPipeline:
    """The pipeline of a run, on the CPU.

    Args:
        run: a run's folder, its name under ``runs/``, or a pipeline's folder.

    Raises:
        InputError: if there is no such run, it has no pipeline yet, or its files are damaged.
    """
    folder = find_pipeline(run)
    with silence_libraries():
        texts = _read_texts(folder)
        try:
            pipeline = SnapGenPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, **texts)
        except InputError as error:
            raise InputError(folder / INDEX, error.problem, error.remedy, place=error.place) from None
        except Exception as error:  # diffusers, transformers, safetensors and torch each raise kinds of their own
            problem = f"cannot be loaded ({' '.join(str(error).split())[:240] or type(error).__name__})"
            raise InputError(folder, problem, "save it again by its training") from None
    for name, component in pipeline.components.items():
        tensors = component.state_dict() if isinstance(component, torch.nn.Module) else {}
        for key, tensor in tensors.items():
            if tensor.is_meta or not tensor.isfinite().all():
                problem = "is missing" if tensor.is_meta else "holds values that are not finite"
                raise InputError(folder / name, problem, "save it again by its training", place=key)
    return cast(SnapGenPipeline, pipeline)


def find_pipeline(run: str | Path) -> Path:
    """The pipeline's folder of a run, which is named as `load_pipeline` takes it.

    Raises:
        InputError: if there is none, or it is not whole.
    """
    folder = next((path for path in (Path(run), RUNS / run) if path.is_dir()), None)
    if folder is None:
        raise InputError(run, "is no folder, nor the name of one under runs/", "name a run that was trained")
    for path in (folder, folder / "pipeline"):
        if (path / INDEX).is_file():
            return path
    raise InputError(folder, f"holds no pipeline/{INDEX}", "let its training finish: the same command resumes")


def _read_texts(folder: Path) -> dict[str, Any]:
    """The text encoders and tokenizers by their components' names.

    Of these diffusers would make what is missing anew: weights at random, and a tokenizer that knows no word.
    """
    components: dict[str, Any] = {}
    index = config.read_mapping(folder / INDEX)
    for name, tokenizer in zip(TEXT_ENCODERS, TOKENIZERS, strict=True):
        if index.get(name) in (None, [None, None]):
            continue
        with merged_folder(folder / name, folder / tokenizer) as whole:
            try:
                components[name], components[tokenizer] = text_encoder.load_text_encoder(str(whole))
            except InputError as error:
                raise InputError(folder / name, error.problem, "save it again by its training") from None
    return components


@contextlib.contextmanager
def merged_folder(*folders: Path) -> Iterator[Path]:
    """A folder with links to all files of several: a text encoder beside its tokenizer, as
    `snapgen.conditioning.text_encoder` takes it."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in (file for folder in folders if folder.is_dir() for file in folder.iterdir()):
            link = Path(scratch) / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
        yield Path(scratch)
