"""Reads the operations of a Core AI program in the form of `snapgen.coreml.mil`.

``coreai._compiler.ir`` is what coreai-core offers for this; it has no stable interface, so the extra pins the version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from snapgen.coreml.mil import MILOp, MILProgram, MILValue

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "conv": ("x", "weight"),
    "matmul": ("x", "y"),
    "scaled_dot_product_attention": ("query", "key", "value"),
}
"""Names of the operands that `snapgen.coreml.mil` counts multiply-adds by."""

_KINDS = {"conv2d": "conv", "batch_matmul": "matmul", "invoke": ""}
_COMPRESSED = ("blockwise_shift_scale", "lut_to_dense", "sparse_to_dense")
_TYPE = re.compile(r"tensor<((?:\d+x)*)([a-z]+\d+)")


def read_program(asset: Any) -> MILProgram:
    """The program of an ``AIProgram``. A composite is one operation, by its own name, whatever its graph holds.

    Operations on constants alone, such as the transposition of a weight, are not executed and not among them.
    """
    graphs = {_text(op, "sym_name"): op for op in asset._module._mlir_module.body.operations}
    main = graphs["main"]
    names = [str(value) for value in _argument_names(main)]
    block = main.regions[0].blocks[0]
    values: dict[Any, MILValue] = {}
    for name, argument in zip(names, block.arguments, strict=True):
        values[argument] = _value(name, argument.type, constant=False)
    inputs = tuple(values.values())
    return MILProgram(inputs, tuple(_operations(block.operations, values, graphs)), ("output",))


def _operations(block: Any, values: dict[Any, MILValue], graphs: Mapping[str, Any]) -> Iterator[MILOp]:
    for number, op in enumerate(block):
        operands = [values[operand] for operand in op.operands]
        constant = all(value.constant for value in operands)
        results = tuple(
            _value(f"v{number}_{position}", result.type, constant=constant)
            for position, result in enumerate(op.results)
        )
        values.update(zip(op.results, results, strict=True))
        if not constant and results:
            yield _operation(op, number, operands, results, graphs)


def _operation(
    op: Any, number: int, operands: list[MILValue], results: tuple[MILValue, ...], graphs: Mapping[str, Any]
) -> MILOp:
    kind = op.operation.name.removeprefix("coreai.").removeprefix("decomposable.").removeprefix("broadcasting_")
    if kind == "invoke":
        callee = re.findall(r"@([^> ]+)", str(op.attributes["callee"]))[0].strip('"')
        kind = _composite(graphs[callee]) or "invoke"
    kind = _KINDS.get(kind, kind)
    names = ARGUMENTS.get(kind, ())
    named: dict[str, tuple[MILValue, ...]] = {name: (value,) for name, value in zip(names, operands, strict=False)}
    if len(operands) > len(names):
        named["others"] = tuple(operands[len(names) :])
    return MILOp(kind, f"{kind}_{number}", named, results)


def _composite(graph: Any) -> str:
    """Name of the composite that a private graph stands for; empty for any other graph."""
    if "composite_decl" not in graph.attributes:
        return ""
    return str(re.findall(r'"(\w+)"', str(graph.attributes["composite_decl"]))[0])


def _argument_names(graph: Any) -> list[str]:
    return re.findall(r'coreai\.name = "([^"]*)"', str(graph.attributes["arg_attrs"]))


def _value(name: str, kind: Any, *, constant: bool) -> MILValue:
    found = _TYPE.match(str(kind))
    if found is None:
        return MILValue(name, "", (), constant)
    shape = tuple(int(side) for side in found[1].split("x") if side)
    element = found[2]
    dtype = {"f": "FLOAT", "si": "INT", "ui": "UINT"}.get(element.rstrip("0123456789"), element.upper())
    return MILValue(name, f"{dtype}{''.join(filter(str.isdigit, element))}", shape, constant)


def _text(op: Any, name: str) -> str:
    return str(op.attributes[name]).strip('"')
