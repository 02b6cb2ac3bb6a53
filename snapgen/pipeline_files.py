"""The pipeline that a run left behind, found and read; whatever is wrong with its files is told in one line."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import diffusers
import torch
import transformers

from snapgen.errors import InputError
from snapgen.pipeline import SnapGenPipeline

INDEX = "model_index.json"
RUNS = Path("runs")


def load(run: str | Path) -> SnapGenPipeline:
    """The pipeline of a run, on the CPU.

    Args:
        run: a run's folder, its name under ``runs/``, or a pipeline's folder.

    Raises:
        InputError: if there is no such run, it has no pipeline yet, or its files are damaged.
    """
    folder = find(run)
    with _quiet():
        try:
            pipeline = SnapGenPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except InputError as error:
            raise InputError(folder / INDEX, error.problem, error.remedy, place=error.place) from None
        except Exception as error:  # diffusers, transformers, safetensors and torch each raise kinds of their own
            problem = f"cannot be loaded ({' '.join(str(error).split())[:160] or type(error).__name__})"
            raise InputError(folder, problem, "save it again by its training") from None
    for name, component in pipeline.components.items():
        tensors = component.state_dict() if isinstance(component, torch.nn.Module) else {}
        for key, tensor in tensors.items():
            if tensor.is_meta or not tensor.isfinite().all():
                problem = "is missing" if tensor.is_meta else "holds values that are not finite"
                raise InputError(folder / name, problem, "save it again by its training", place=key)
    return cast(SnapGenPipeline, pipeline)


def find(run: str | Path) -> Path:
    """The pipeline's folder of a run, which is named as `load` takes it.

    Raises:
        InputError: if there is none, or it is not whole.
    """
    folder = next((path for path in (Path(run), RUNS / run) if path.is_dir()), None)
    if folder is None:
        raise InputError(run or "RUN", "is no folder, nor the name of one under runs/", "name a run that was trained")
    for path in (folder, folder / "pipeline"):
        if (path / INDEX).is_file():
            return path
    raise InputError(folder, f"holds no pipeline/{INDEX}", "let its training finish: the same command resumes")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' and transformers' bars and remarks."""
    logs = [diffusers.utils.logging, transformers.utils.logging]
    levels = [log.get_verbosity() for log in logs]
    bars = [log for log in logs if log.is_progress_bar_enabled()]
    for log in logs:
        log.set_verbosity(logging.CRITICAL)
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        for log in bars:
            log.enable_progress_bar()
