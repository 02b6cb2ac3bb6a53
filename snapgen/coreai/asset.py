"""Converts a torch module to a Core AI asset (``.aimodel``) with Apple's own packages, and reads what is in one.

``coreai-torch`` converts (the extra ``coreai``) and ``coreai-opt`` compresses (the extra ``coreai-opt``), on Linux as
on a Mac. Their runtime runs on macOS alone, so that here no output has been compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import operator
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snapgen.coreai import composites, program
from snapgen.coreml import custom_ops
from snapgen.coreml.compatibility import summarize_program
from snapgen.coreml.package import PackageOptions, PackageSummary, Target
from snapgen.errors import InputError, first_line

if TYPE_CHECKING:
    from snapgen.models.unet import UNet

MAX_COMPONENT_BYTES = 4 * 2**30
"""Size of an asset from which on it ends the app that loads it (github.com/apple/coreai-models, issue 129)."""

_KEY, _DECOMPOSED = "archsearch", "archsearch.decomposed"


def versions() -> dict[str, str]:
    """Versions of Apple's packages, for `Target.versions`.

    Raises:
        InputError: if one is missing.
    """
    return {name: _version(name, "coreai") for name in ("coreai-core", "coreai-torch")}


def _version(package: str, extra: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        remedy = f"install the extra: pip install 'archsearch[{extra}]'"
        raise InputError("Core AI", f"{package} is not installed", remedy) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the packages' progress bars; their warnings are suppressed by `snapgen.coreml.package.package`."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def save(
    module: nn.Module, inputs: Mapping[str, Tensor], output: str, options: PackageOptions, text: str, path: Path
) -> None:
    """Write a module as an asset, for `Target.save`.

    Raises:
        InputError: if the weights are to be compressed, and what compresses is not installed.
    """
    if options.int8 or options.palette_bits is not None:
        _version("coreai-opt", "coreai-opt")
    with quiet():
        coreai_torch = importlib.import_module("coreai_torch")
        with torch.no_grad():
            exported = torch.export.export(module.eval(), tuple(inputs.values()), strict=False)
            lowered = exported.run_decompositions(_decompositions(coreai_torch.get_decomp_table()))
        converter = coreai_torch.TorchConverter()
        converter.register_torch_lowering(composites.RMS_NORM)(composites.lower_rms_norm)
        converter.add_exported_program(lowered, input_names=list(inputs), output_names=[output])
        compressed = _compress(converter.to_coreai(), options)
        runtime = importlib.import_module("coreai.runtime")
        facts = runtime.AIModelAssetMetadata()
        facts.set_custom(_KEY, text)
        facts.set_custom(_DECOMPOSED, decomposed(lowered))
        compressed.save_asset(path, metadata=facts)


def decomposed(lowered: torch.export.ExportedProgram) -> dict[str, int]:
    """Number of each of torch's operators that a table has taken apart into several."""
    parts: Counter[tuple[str, str]] = Counter()
    for node in lowered.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            (source,) = node.meta["from_node"]
            parts[source.name, str(source.target)] += 1
    apart = Counter(target for (_, target), count in parts.items() if count > 1 and target.startswith("aten."))
    return dict(apart.most_common())


def _decompositions(table: dict[Any, Any]) -> dict[Any, Any]:
    """Core AI's own table, which leaves its composites alone, with our operators for Core ML as those of torch."""
    table.pop(torch.ops.aten.rms_norm.default, None)
    table[torch.ops.snapgen.group_norm.default] = custom_ops.group_norm._init_fn
    table[torch.ops.snapgen.layer_norm.default] = custom_ops.layer_norm._init_fn
    return table


def _compress(converted: Any, options: PackageOptions) -> Any:
    if not options.int8 and options.palette_bits is None:
        return converted
    with contextlib.redirect_stderr(io.StringIO()):
        tools = importlib.import_module("coreai_opt.coreai_utils")
    if options.int8:
        return tools.quantize_weights(converted, tools.DType.INT8, in_place=True)
    return tools.palettize_weights(converted, None, n_bits=options.palette_bits, num_kmeans_workers=1, in_place=True)


def summarize(path: Path) -> PackageSummary:
    """The summary of an asset, for `Target.summarize`."""
    versions()
    try:  # the bindings end the process if the program is missing or damaged
        whole = hashlib.sha256((path / "main.mlirb").read_bytes()).digest() == (path / "main.hash").read_bytes()
    except OSError:
        whole = False
    if not whole:
        raise InputError(path, "is no asset, or a damaged one", "name an .aimodel, or convert it again")
    with quiet():
        authoring = importlib.import_module("coreai.authoring")
        try:
            read = program.read_program(authoring.AIModelAsset.load(path).program)
            kept = json.loads((path / "metadata.json").read_text())["creatorDefinedMetadata"]
        except Exception as error:  # the bindings raise various errors
            raise InputError(path, f"cannot be read as an asset ({first_line(error)})", "name an .aimodel") from None
    return _checked(summarize_program(read, path, (), kept[_DECOMPOSED]))


def _checked(summary: PackageSummary) -> PackageSummary:
    if summary.size_bytes <= MAX_COMPONENT_BYTES:
        return summary
    problem = f"is {summary.size_bytes / 2**30:.2f} GiB, and a component over 4.00 GiB ends the app; store fewer bits"
    return PackageSummary(**{**vars(summary), "violations": (problem,)})


def _unet(net: UNet, latent_size: tuple[int, int]) -> nn.Module:  # noqa: ARG001 - the plain net takes any
    from snapgen.coreai.unet import CoreAIUNet

    return CoreAIUNet(net)


COREAI = Target(
    name="coreai",
    title="Core AI",
    suffix=".aimodel",
    manifest="main.hash",
    versions=versions,
    unet=_unet,
    save=save,
    limits="Known to end the app",
    summarize=summarize,
)
