"""Converts a torch module to a package in the cache: exported, converted, compressed and written atomically.

This works on Linux as well as on a Mac, since nothing is compiled or run. `Target` is the format of the package, here
Core ML's ``.mlpackage``; that of Core AI is in `snapgen.coreai`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from snapgen.config import Config, rule
from snapgen.errors import InputError, first_line
from snapgen.io import cache
from snapgen.io.atomic import remove_stale

if TYPE_CHECKING:
    from snapgen.models.unet import UNet

VERSION = 2
"""Version of the conversion, raised whenever the program for the same net changes."""
# The first two passes add integer operations around a text encoder's token lookup: for negative indices, and to pass
# them on as 16 bits. The third pass turns one transposition whose result is split into two.
_REMOVED_PASSES = {"common::guard_negative_gather_indices", "common::add_int16_cast", "common::reduce_transposes"}


class PackageOptions(Config):
    """How the weights are stored. Activations are of the precision with any of them.

    Palettes are uniform, evenly spaced between a tensor's smallest and largest value. coremltools' k-means is more
    accurate, but needs a package that is not available on every machine and takes hours for a full-size net.
    """

    palette_bits: Literal[1, 2, 3, 4, 6, 8] | None = None
    """Store weights as indices of this many bits into a table of their own; None: float16."""
    int8: bool = False
    """Store weights as 8-bit integers, with one scale per output channel."""
    precision: Literal["float16", "float32"] = "float16"
    """Type of inputs, activations and uncompressed weights. The Neural Engine computes in float16 alone."""

    @rule
    def _check_exclusive(self) -> None:
        if self.int8 and self.palette_bits is not None:
            raise ValueError("weights are either int8 or in a palette; choose one of the two")


@dataclass(frozen=True)
class PackageSummary:
    """Contents of a package, and the parts of it that are known not to run where they should."""

    name: str
    size_bytes: int
    macs: int
    operations: int
    operation_counts: Mapping[str, int]
    layouts: Mapping[str, int]
    """Results of each layout, as `snapgen.coreml.mil.MILProgram.layouts` counts them."""
    violations: tuple[str, ...]
    resident_bytes: int
    """Weights as they are stored, and the peak of the live activations: an estimate of the memory that a run needs."""
    decomposed: Mapping[str, int]
    """Operators of torch that the format has not, and which were taken apart into others."""


class Target(NamedTuple):
    """A format of packages."""

    name: str
    title: str
    suffix: str
    manifest: str
    """A file that every complete package has."""
    versions: Callable[[], Mapping[str, str]]
    """Versions of what converts.

    Raises:
        InputError: if it is not installed.
    """
    unet: Callable[[UNet, tuple[int, int]], nn.Module]
    """A U-Net, which may be modified, in the form to convert for a latent's height and width. Its inputs: ``sample``,
    ``time_features``, and with cross-attention ``context``."""
    save: Callable[[nn.Module, Mapping[str, Tensor], str, PackageOptions, str, Path], None]
    """Convert a module with example inputs, the name of its output and a text that is kept in the package."""
    limits: str
    """Heading of a summary's violations."""
    summarize: Callable[[Path], PackageSummary]
    """Summary of a package.

    Raises:
        InputError: if it cannot be read.
    """


def package(
    kind: str,
    key: Mapping[str, cache.JSON],
    build: Callable[[], nn.Module],
    inputs: Mapping[str, Tensor],
    output: str,
    options: PackageOptions,
    target: Target,
) -> Path:
    """The package of a module, from the cache or newly converted.

    Args:
        kind: kind of module; the first word of the package's name.
        key: everything on which the program depends, apart from options and the conversion's version.
        build: returns the module in the options' precision; called only if the package is not cached. Its ``forward``
            takes ``inputs`` in order.
        inputs: example inputs by name, which determine the package's input shapes.
        output: name of the output.
        options: how weights are stored.
        target: the package's format.

    Raises:
        InputError: if the cache cannot be written to, or what converts is not installed.
    """
    identity = {
        **key,
        "kind": kind,
        "options": options.model_dump(exclude_defaults=True),
        "version": VERSION,
        **target.versions(),
        "torch": torch.__version__.split("+")[0],
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    folder = cache.cache_dir() / target.name
    path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}{target.suffix}"
    if (path / target.manifest).is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder, f"*.part{target.suffix}")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(folder, f"cannot hold packages ({reason})", "set ARCHSEARCH_CACHE to a folder") from None
    # Several workers may convert the same net at once. Each writes to its own folder, and the first rename wins.
    temporary = folder / f"{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part{target.suffix}"
    try:
        with quiet(), _full_disk(path):
            target.save(build(), inputs, output, options, text, temporary)
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


def coreml_versions() -> dict[str, str]:
    """coremltools' version, for `Target.versions`."""
    with quiet():
        import coremltools
    return {"coremltools": coremltools.__version__}


def save_mlpackage(
    module: nn.Module, inputs: Mapping[str, Tensor], output: str, options: PackageOptions, text: str, path: Path
) -> None:
    """Write a module as an ``.mlpackage``, for `Target.save`."""
    model = _convert(module, inputs, output, options)
    model.user_defined_metadata["archsearch"] = text
    model.save(str(path))


def _convert(module: nn.Module, inputs: Mapping[str, Tensor], output: str, options: PackageOptions) -> Any:
    """The Core ML model of a module of the options' precision."""
    import coremltools as ct

    from snapgen.coreml import custom_ops

    custom_ops.register()
    with torch.no_grad():
        program = torch.export.export(module.eval(), tuple(inputs.values()), strict=False).run_decompositions({})
    passes = ct.PassPipeline.DEFAULT
    passes.remove_passes(_REMOVED_PASSES)
    types = {torch.float16: np.float16, torch.float32: np.float32, torch.int32: np.int32}
    precision = types[getattr(torch, options.precision)]
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        inputs=[ct.TensorType(name=n, shape=tuple(t.shape), dtype=types[t.dtype]) for n, t in inputs.items()],
        outputs=[ct.TensorType(name=output, dtype=precision)],
        compute_precision=ct.precision(options.precision),
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
