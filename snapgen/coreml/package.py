"""From a torch module to an ``.mlpackage`` in the cache: traced, converted, compressed, written aside and renamed.

Works on Linux as on a Mac: nothing is compiled or run here. Everything in the package is float16.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from snapgen.config import Config
from snapgen.errors import InputError
from snapgen.io import cache

VERSION = 1
"""Of the conversion: raised whenever it writes another program for the same net."""
# The first two put operations on integers around a text encoder's lookup of tokens: for indices that count from the
# end, and to pass them on in 16 bits. The third makes two transpositions of one whose result is split.
_LEFT_OUT = {"common::guard_negative_gather_indices", "common::add_int16_cast", "common::reduce_transposes"}
_STALE_SECONDS = 24 * 3600.0


class PackageOptions(Config):
    """How the weights are stored; both options leave activations in float16.

    Palettes are uniform (evenly spaced between a tensor's least and greatest value): coremltools' k-means, which keeps
    more of the weights, wants a package that is not built for every machine, and takes hours for a full-size net.
    """

    palette_bits: Literal[1, 2, 3, 4, 6, 8] | None = None
    """Weights as indices of so many bits into a table of their own."""
    int8: bool = False
    """Weights as 8-bit integers, with one scale for each output channel."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.int8 and self.palette_bits is not None:
            raise ValueError("weights are either int8 or in a palette; choose one of the two")
        return self


def package(
    kind: str,
    key: Mapping[str, cache.JSON],
    build: Callable[[], nn.Module],
    inputs: Mapping[str, Tensor],
    output: str,
    options: PackageOptions,
) -> Path:
    """The package of a module, from the cache if it is there.

    Args:
        kind: of module; the first word of the package's name.
        key: everything that the program depends on, beside options and the conversion's version.
        build: gives the module in float16; called only when there is no package yet. Its forward takes ``inputs`` in
            their order.
        inputs: examples; their shapes are the package's.
        output: the result's name.
        options: how weights are stored.

    Raises:
        InputError: if the cache cannot be written to.
    """
    with quiet():
        import coremltools

    described = {
        **key,
        "kind": kind,
        "options": options.model_dump(),
        "version": VERSION,
        "coremltools": coremltools.__version__,
        "torch": torch.__version__.split("+")[0],
    }
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    folder = cache.cache_dir() / "coreml"
    path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.mlpackage"
    if (path / "Manifest.json").is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(folder, f"cannot hold packages ({reason})", "set ARCHSEARCH_CACHE to a folder") from None
    # Several workers may convert the same net at once: each has a folder of its own, and the first rename wins.
    part = folder / f"{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part.mlpackage"
    try:
        with quiet():
            model = _converted(build(), inputs, output, options)
            model.user_defined_metadata["archsearch"] = text
            model.save(str(part))
        with contextlib.suppress(OSError):
            part.rename(path)
        if not path.is_dir():
            raise InputError(path, "could not be put in its place", "set ARCHSEARCH_CACHE to a folder with space")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def _converted(module: nn.Module, inputs: Mapping[str, Tensor], output: str, options: PackageOptions) -> Any:
    """The Core ML model of a float16 module."""
    import coremltools as ct

    from snapgen.coreml import custom_ops

    custom_ops.register()
    with torch.no_grad():
        program = torch.export.export(module.eval(), tuple(inputs.values()), strict=False).run_decompositions({})
    passes = ct.PassPipeline.DEFAULT
    passes.remove_passes(_LEFT_OUT)
    types = {torch.float16: np.float16, torch.int32: np.int32}
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        inputs=[ct.TensorType(name=n, shape=tuple(t.shape), dtype=types[t.dtype]) for n, t in inputs.items()],
        outputs=[ct.TensorType(name=output, dtype=np.float16)],
        pass_pipeline=passes,
        skip_model_load=True,
    )
    return _compressed(model, options)


def _compressed(model: Any, options: PackageOptions) -> Any:
    from coremltools.optimize import coreml as compress

    if options.palette_bits is not None:
        palette = compress.OpPalettizerConfig(mode="uniform", nbits=options.palette_bits)
        return compress.palettize_weights(model, compress.OptimizationConfig(global_config=palette))
    if options.int8:
        linear = compress.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
        return compress.linear_quantize_weights(model, compress.OptimizationConfig(global_config=linear))
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' bars and remarks: on versions it does not know, and on what only a Mac has."""
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _remove_stale(folder: Path) -> None:
    for part in folder.glob("*.part.mlpackage"):
        with contextlib.suppress(OSError):  # another worker was faster
            if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(part)
