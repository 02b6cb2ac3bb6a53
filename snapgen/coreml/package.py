"""Converts a torch module to an ``.mlpackage`` in the cache: exported, converted, compressed and written atomically.

This works on Linux as well as on a Mac, since nothing is compiled or run. Everything in the package is float16.
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
from snapgen.errors import InputError, first_line
from snapgen.io import cache

VERSION = 1
"""Version of the conversion, raised whenever the program for the same net changes."""
# The first two passes add integer operations around a text encoder's token lookup: for negative indices, and to pass
# them on as 16 bits. The third pass turns one transposition whose result is split into two.
_REMOVED_PASSES = {"common::guard_negative_gather_indices", "common::add_int16_cast", "common::reduce_transposes"}
_STALE_SECONDS = 24 * 3600.0


class PackageOptions(Config):
    """How the weights are stored. Activations are float16 with either option.

    Palettes are uniform, evenly spaced between a tensor's smallest and largest value. coremltools' k-means is more
    accurate, but needs a package that is not available on every machine and takes hours for a full-size net.
    """

    palette_bits: Literal[1, 2, 3, 4, 6, 8] | None = None
    """Store weights as indices of this many bits into a table of their own; None: float16."""
    int8: bool = False
    """Store weights as 8-bit integers, with one scale per output channel."""

    @model_validator(mode="after")
    def _check_exclusive(self) -> Self:
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
    """The package of a module, from the cache or newly converted.

    Args:
        kind: kind of module; the first word of the package's name.
        key: everything on which the program depends, apart from options and the conversion's version.
        build: returns the module in float16; called only if the package is not cached. Its ``forward`` takes ``inputs``
            in order.
        inputs: example inputs by name, which determine the package's input shapes.
        output: name of the output.
        options: how weights are stored.

    Raises:
        InputError: if the cache cannot be written to.
    """
    with quiet():
        import coremltools

    identity = {
        **key,
        "kind": kind,
        "options": options.model_dump(),
        "version": VERSION,
        "coremltools": coremltools.__version__,
        "torch": torch.__version__.split("+")[0],
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
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
    # Several workers may convert the same net at once. Each writes to its own folder, and the first rename wins.
    temporary = folder / f"{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part.mlpackage"
    try:
        with quiet(), _full_disk(path):
            model = _convert(build(), inputs, output, options)
            model.user_defined_metadata["archsearch"] = text
            model.save(str(temporary))
        with contextlib.suppress(OSError):
            temporary.rename(path)
        if not path.is_dir():
            raise InputError(path, "could not be written", "set ARCHSEARCH_CACHE to a folder with space")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


@contextlib.contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """Report weights that cannot be written; while a net is converted, they go to the folder for temporary files."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and "FileWriter" not in str(error):  # coremltools' own
            raise
        problem = f"cannot be written ({first_line(error)})"
        raise InputError(path, problem, "free disk space, there or in the folder for temporary files") from None


def _convert(module: nn.Module, inputs: Mapping[str, Tensor], output: str, options: PackageOptions) -> Any:
    """The Core ML model of a float16 module."""
    import coremltools as ct

    from snapgen.coreml import custom_ops

    custom_ops.register()
    with torch.no_grad():
        program = torch.export.export(module.eval(), tuple(inputs.values()), strict=False).run_decompositions({})
    passes = ct.PassPipeline.DEFAULT
    passes.remove_passes(_REMOVED_PASSES)
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
    return _compress(model, options)


def _compress(model: Any, options: PackageOptions) -> Any:
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
    """Suppress coremltools' progress bars and warnings about untested versions and about features of a Mac."""
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
    """Remove the temporary packages of killed processes."""
    for temporary in folder.glob("*.part.mlpackage"):
        with contextlib.suppress(OSError):  # another worker may have removed it
            if time.time() - temporary.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(temporary)
