"""Reads the operations of a Core ML program from its MIL representation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from snapgen.coreml.package import quiet
from snapgen.errors import InputError


class MILValue(NamedTuple):
    """A value of the program; ``shape`` is () for scalars and for values that are not tensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    constant: bool
    ints: tuple[int, ...] = ()
    """Elements of a small integer constant."""

    @property
    def size_bytes(self) -> int:
        """Size of the elements in memory."""
        return math.prod(self.shape) * int("".join(filter(str.isdigit, self.dtype)) or 8) // 8


class MILOp(NamedTuple):
    """One operation that is executed; constants are not operations."""

    kind: str
    name: str
    inputs: Mapping[str, tuple[MILValue, ...]]
    outputs: tuple[MILValue, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions, linear layers, matrix products and attention; 0 for other operations."""
        return MAC_COUNTERS[self.kind](self) if self.kind in MAC_COUNTERS else 0

    @property
    def operands(self) -> Iterator[MILValue]:
        """Inputs that are not constant."""
        return (tensor for tensors in self.inputs.values() for tensor in tensors if not tensor.constant)


class MILProgram(NamedTuple):
    """The program of a package."""

    inputs: tuple[MILValue, ...]
    operations: tuple[MILOp, ...]
    outputs: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of one run."""
        return sum(operation.macs for operation in self.operations)

    @property
    def peak_bytes(self) -> int:
        """Peak size of the inputs and results that are live at once; results of views are counted like any other."""
        last = {name: position for position, op in enumerate(self.operations) for name in {t.name for t in op.operands}}
        sizes = {tensor.name: tensor.size_bytes for tensor in self.inputs}
        live = peak = sum(sizes.values())
        for position, op in enumerate(self.operations):
            sizes.update({tensor.name: tensor.size_bytes for tensor in op.outputs})
            live += sum(tensor.size_bytes for tensor in op.outputs)
            peak = max(peak, live)
            live -= sum(sizes[name] for name in {t.name for t in op.operands} if last[name] == position)
        return peak

    def counts(self) -> Counter[str]:
        """Number of operations by kind."""
        return Counter(operation.kind for operation in self.operations)

    def layouts(self) -> Counter[str]:
        """Number of results by layout: images, tokens, heads before and within attention, and other ranks."""
        width_last = {tensor.name: False for tensor in self.inputs}
        counts: Counter[str] = Counter()
        for op in self.operations:
            # Tokens have their width last between a transposition or linear layer and the next transposition.
            is_last = any(width_last[t.name] or len(t.shape) == 3 for t in op.operands) != (op.kind == "transpose")
            is_last = is_last and op.kind != "conv"
            for tensor in op.outputs:
                width_last[tensor.name] = is_last and len(tensor.shape) == 4
                counts[_layout(tensor.shape, width_last=width_last[tensor.name])] += 1
        return counts


def read_program(package: Path) -> MILProgram:
    """The program of an ``.mlpackage``.

    Raises:
        InputError: if it is not a package, or has no ML program.
    """
    with quiet():
        from coremltools.models.utils import load_spec

    try:
        spec = load_spec(str(package))
    except Exception as error:  # coremltools and protobuf raise various errors
        text = " ".join(str(error).split())[:120]
        raise InputError(package, f"cannot be read as a Core ML package ({text})", "name an .mlpackage") from None
    functions = spec.mlProgram.functions
    if "main" not in functions:
        raise InputError(package, "has no ML program", "convert it again")
    main = functions["main"]
    block = main.block_specializations[main.opset]
    inputs = tuple(_tensor(value, constant=False) for value in main.inputs)
    return MILProgram(inputs, tuple(_operations(block.operations, inputs)), tuple(block.outputs))


def _operations(block: Any, inputs: tuple[MILValue, ...]) -> Iterator[MILOp]:
    values = {tensor.name: tensor for tensor in inputs}
    for op in block:
        constant = op.type == "const" or op.type.startswith("constexpr_")
        outputs = tuple(_tensor(value, constant=constant, attributes=op.attributes) for value in op.outputs)
        values.update({tensor.name: tensor for tensor in outputs})
        if constant:
            continue
        arguments = {
            key: tuple(values[a.name] if a.name else _immediate(a.value) for a in value.arguments)
            for key, value in op.inputs.items()
        }
        yield MILOp(op.type, op.attributes["name"].immediateValue.tensor.strings.values[0], arguments, outputs)


def _tensor(value: Any, *, constant: bool, attributes: Mapping[str, Any] | None = None) -> MILValue:
    from coremltools.proto import MIL_pb2

    kind = value.type.tensorType
    shape = tuple(dimension.constant.size for dimension in kind.dimensions)
    numbers = attributes["val"].immediateValue.tensor.ints.values if attributes and "val" in attributes else ()
    return MILValue(value.name, MIL_pb2.DataType.Name(kind.dataType), shape, constant, tuple(numbers))


def _immediate(value: Any) -> MILValue:
    return MILValue("", "", (), True, tuple(value.immediateValue.tensor.ints.values))


def _layout(shape: tuple[int, ...], *, width_last: bool) -> str:
    if len(shape) != 4:
        return f"{len(shape)} axes"
    if width_last:
        return "(1, heads, N, D)"
    if shape[2] > 1:
        return "(1, C, H, W)"
    return "(1, C, 1, N)" if shape[0] == 1 else "(heads, D, 1, N)"


def _conv(op: MILOp) -> int:
    """Every output element needs one kernel of the weight (O, I / groups, height, width)."""
    return math.prod(op.outputs[0].shape) * math.prod(op.inputs["weight"][0].shape[1:])


def _linear(op: MILOp) -> int:
    return math.prod(op.outputs[0].shape) * op.inputs["weight"][0].shape[-1]


def _matmul(op: MILOp) -> int:
    transposed = op.inputs.get("transpose_x")
    assert transposed is None or transposed[0].constant
    shape, result = op.inputs["x"][0].shape, op.outputs[0].shape
    return math.prod(result) * (shape[-1] if shape[-2] == result[-2] else shape[-2])


def _attention(op: MILOp) -> int:
    """softmax(QKᵀ)V with Q (…, N, D), K (…, M, D), V (…, M, E): N·M·(D + E) per head."""
    queries, values = op.inputs["query"][0].shape, op.inputs["value"][0].shape
    return math.prod(queries[:-1]) * values[-2] * (queries[-1] + values[-1])


MAC_COUNTERS: Mapping[str, Callable[[MILOp], int]] = {
    "conv": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
}
"""Functions that count the multiply-adds of an operation, by its kind."""
