"""Export of a net to ONNX for ONNX Runtime: traced by ``torch.export``, converted operation by operation.

Every operation that `snapgen.models.unet` uses has a writer here; other operations raise an error. The tests compare
the result with PyTorch's output. ``torch.onnx`` can export the same nets, but takes five to eight times as long,
and its graphs of small nets run more slowly (``benchmarks/onnx_export.py``, reports/results/onnx_export.md).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx
    from torch.fx import Node

OPSET = 23
PAGE = 4096
"""Alignment of weights in their file, which is memory-mapped. Weights smaller than a page are stored in the graph."""

Value = Any
"""Input of an operation: a `Weight`, a constant tensor or number, the name of an ONNX value, or a list of these."""

aten = torch.ops.aten


class Unsupported(NotImplementedError):
    """Raised if the net uses an operation without a writer."""


class Weight(NamedTuple):
    """A parameter or buffer, or a view of one."""

    name: str
    tensor: Tensor
    spread: float
    """Standard deviation of random values that replace it."""
    center: float
    """Mean of random values that replace it."""

    @classmethod
    def from_tensor(cls, name: str, tensor: Tensor) -> Weight:
        """A weight with random statistics that preserve the variance (matrices) or are near the identity (norms)."""
        if tensor.dim() > 1:
            return cls(name, tensor, spread=float(tensor[0].numel()) ** -0.5, center=0.0)
        return cls(name, tensor, spread=0.1, center=1.0 if name.endswith("weight") else 0.0)


def export(net: nn.Module, inputs: dict[str, Tensor], path: Path, *, random_weights: bool = False) -> None:
    """Export a net for inputs of fixed shapes; large weights are written, one at a time, to ``<path>.weights``.

    Args:
        net: float32 net on the CPU; its forward takes ``inputs`` in order and returns one tensor, named ``output``.
        inputs: example inputs by name.
        path: the ONNX file.
        random_weights: write random weights with typical statistics instead of the net's, which are then never read
            and may be uninitialized memory.

    Raises:
        Unsupported: if the net uses an operation without a writer.
    """
    import onnx

    with torch.no_grad():
        program = torch.export.export(net, tuple(inputs.values()), strict=False)
    with path.with_suffix(path.suffix + ".weights").open("wb") as file:
        graph = Graph(file, np.random.default_rng(0) if random_weights else None)
        output = _write(program, graph, list(inputs))
    body = onnx.helper.make_graph(
        graph.nodes,
        type(net).__name__,
        [_value_info(name, tensor) for name, tensor in inputs.items()],
        [_value_info("output", output)],
        graph.initializers,
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(body, opset_imports=opsets, ir_version=11)
    path.write_bytes(model.SerializeToString())


def _value_info(name: str, tensor: Tensor) -> onnx.ValueInfoProto:
    import onnx

    assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(tensor.shape))


def _write(program: torch.export.ExportedProgram, graph: Graph, names: list[str]) -> Tensor:
    """Write every traced operation to ``graph``, in order; returns the traced output."""
    values: dict[Node, Value] = {}
    constants = _weights_and_constants(program)
    inputs = iter(names)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = constants[node.name] if node.name in constants else next(inputs)
            continue
        if node.op == "output":
            (output,) = node.args[0]
            graph.add("Identity", values[output], out="output")
            return output.meta["val"]  # type: ignore[no-any-return]
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if not _depends_on_run([*args, *kwargs.values()]):
            values[node] = node.target(*args, **kwargs)
        elif node.target in WRITERS:
            values[node] = WRITERS[node.target](graph, node.meta.get("val"), *args, **kwargs)
        else:
            raise Unsupported(f"{node.target} has no ONNX writer yet")
    raise AssertionError("a trace ends with its output")


def _weights_and_constants(program: torch.export.ExportedProgram) -> dict[str, Weight | Tensor]:
    """The weight or constant of each placeholder that is not an input of the net."""
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    values: dict[str, Weight | Tensor] = {
        placeholder: Weight.from_tensor(name, program.state_dict[name]) for placeholder, name in weights.items()
    }
    return values | {
        placeholder: program.constants[name]
        for placeholder, name in signature.inputs_to_lifted_tensor_constants.items()
    }


def _depends_on_run(args: Iterable[Value]) -> bool:
    """Whether any argument is a weight or a value that is only known when the net runs; others are constant-folded."""
    return any(
        _depends_on_run(a) if isinstance(a, list | tuple) and not isinstance(a, Weight) else isinstance(a, str | Weight)
        for a in args
    )


class Graph:
    """The nodes and initializers of an ONNX graph under construction.

    Args:
        file: file that large weights are written to.
        rng: draws random weights; None: write the weights' own values.
    """

    def __init__(self, file: IO[bytes], rng: np.random.Generator | None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._file = file
        self._names: dict[object, str] = {}
        self._pool = None if rng is None else rng.standard_normal(1 << 20, dtype=np.float32)

    def add(
        self, kind: str, *inputs: Value, out: str = "", outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Add a node; returns the name of its output, or the list of names if it has several."""
        import onnx

        names = [out or f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        node = onnx.helper.make_node(kind, [self.name_of(v) for v in inputs], names, domain=domain, **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def ints(self, values: Sequence[int]) -> Tensor:
        """A shape or a list of axes as an int64 tensor, the form in which ONNX operations take it."""
        return torch.tensor(list(values), dtype=torch.int64)

    def name_of(self, value: Value) -> str:
        """Name of the ONNX value for ``value``; constants and weights become initializers."""
        if isinstance(value, str):
            return value
        if isinstance(value, int | float):
            value = torch.tensor(float(value))
        weight = value if isinstance(value, Weight) else None
        tensor = value.tensor if weight else value
        key = (
            (weight.name, tensor.shape, tensor.stride())
            if weight
            else (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
        )
        if key not in self._names:
            self._names[key] = f"w{len(self._names)}"
            self._initializer(self._names[key], self._values(weight) if weight else tensor.contiguous().numpy())
        return self._names[key]

    def _values(self, weight: Weight) -> np.ndarray[Any, np.dtype[np.float32]]:
        if self._pool is None:
            return weight.tensor.detach().contiguous().numpy()
        return np.resize(self._pool, tuple(weight.tensor.shape)) * np.float32(weight.spread) + np.float32(weight.center)

    def _initializer(self, name: str, array: np.ndarray[Any, Any]) -> None:
        import onnx

        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        proto = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
        self.initializers.append(proto)
        if array.nbytes < PAGE:
            proto.raw_data = array.tobytes()
            return
        # start at the next multiple of PAGE
        self._file.seek(-(-self._file.tell() // PAGE) * PAGE)
        proto.data_location = onnx.TensorProto.EXTERNAL
        location = {"location": Path(self._file.name).name, "offset": self._file.tell(), "length": array.nbytes}
        proto.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in location.items())
        self._file.write(array.data)


Writer = Callable[..., Value]
WRITERS: dict[object, Writer] = {}
"""Writer of each operation: a function of the graph, the traced result and the operation's arguments."""


def writes(*operations: object) -> Callable[[Writer], Writer]:
    """Register a function as the writer of these operations."""

    def register(writer: Writer) -> Writer:
        WRITERS.update(dict.fromkeys(operations, writer))
        return writer

    return register


@writes(operator.getitem)
def _getitem(_graph: Graph, _result: Tensor, values: Sequence[Value], index: int) -> Value:
    return values[index]


@writes(aten._assert_tensor_metadata.default)
def _nothing(*_args: Value, **_options: Value) -> None:
    return None


@writes(aten.contiguous.default, aten.to.dtype, aten.to.device)
def _same(_graph: Graph, result: Tensor, x: Value, *_args: Value, **_options: Value) -> Value:
    assert result.dtype == torch.float32
    return x


def _same_in_onnx(kind: str) -> Writer:
    return lambda graph, _result, *inputs: graph.add(kind, *inputs)


WRITERS |= {
    aten.add.Tensor: _same_in_onnx("Add"),
    aten.mul.Tensor: _same_in_onnx("Mul"),
    aten.cos.default: _same_in_onnx("Cos"),
    aten.sin.default: _same_in_onnx("Sin"),
    aten.scaled_dot_product_attention.default: _same_in_onnx("Attention"),
}


@writes(aten.silu.default)
def _silu(graph: Graph, _result: Tensor, x: Value) -> Value:
    return graph.add("Mul", x, graph.add("Sigmoid", x))


@writes(aten.gelu.default)
def _gelu(graph: Graph, _result: Tensor, x: Value, *, approximate: str = "none") -> Value:
    return graph.add("Gelu", x, approximate=approximate)


@writes(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default)
def _reshape(graph: Graph, result: Tensor, x: Value, *_args: Value) -> Value:
    return graph.add("Reshape", x, graph.ints(result.shape))


@writes(aten.expand.default)
def _expand(graph: Graph, result: Tensor, x: Value, *_args: Value) -> Value:
    return graph.add("Expand", x, graph.ints(result.shape))


@writes(aten.permute.default)
def _permute(graph: Graph, _result: Tensor, x: Value, order: Sequence[int]) -> Value:
    return graph.add("Transpose", x, perm=list(order))


@writes(aten.transpose.int)
def _transpose(graph: Graph, result: Tensor, x: Value, a: int, b: int) -> Value:
    order = list(range(result.dim()))
    order[a], order[b] = order[b], order[a]
    return _permute(graph, result, x, order)


@writes(aten.chunk.default)
def _chunk(graph: Graph, result: Sequence[Tensor], x: Value, _chunks: int, dim: int = 0) -> Value:
    sizes = graph.ints([chunk.shape[dim] for chunk in result])
    return graph.add("Split", x, sizes, outputs=len(result), axis=dim)


@writes(aten.cat.default)
def _cat(graph: Graph, _result: Tensor, tensors: Sequence[Value], dim: int = 0) -> Value:
    return graph.add("Concat", *tensors, axis=dim)


@writes(aten.upsample_nearest2d.vec)
def _nearest(graph: Graph, _result: Tensor, x: Value, _size: Value, scales: Sequence[float]) -> Value:
    factors = torch.tensor([1.0, 1.0, *scales])
    return graph.add(
        "Resize", x, "", factors, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


@writes(aten.conv2d.default)
def _conv(
    graph: Graph,
    _result: Tensor,
    x: Value,
    weight: Weight,
    bias: Weight | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Value:
    biases = [] if bias is None else [bias]
    pads = [*padding, *padding]
    return graph.add(
        "Conv", x, weight, *biases, strides=list(stride), pads=pads, dilations=list(dilation), group=groups
    )


@writes(aten.linear.default)
def _linear(graph: Graph, result: Tensor, x: Value, weight: Weight, bias: Weight | None = None) -> Value:
    if result.dim() == 2 and bias is not None:
        return graph.add("Gemm", x, weight, bias, transB=1)
    product = graph.add("MatMul", x, weight._replace(tensor=weight.tensor.t()))  # weight: (out, in) -> (in, out)
    return product if bias is None else graph.add("Add", product, bias)


@writes(aten.group_norm.default)
def _group_norm(
    graph: Graph, result: Tensor, x: Value, groups: int, weight: Weight, bias: Weight, eps: float = 1e-5, *_: Value
) -> Value:
    # ONNX Runtime has no CPU kernel for GroupNormalization: use instance normalization of the groups.
    grouped = graph.add("Reshape", x, graph.ints([result.shape[0], groups, -1]))  # (B, C, H, W) -> (B, G, C/G·H·W)
    grouped = graph.add("InstanceNormalization", grouped, torch.ones(groups), torch.zeros(groups), epsilon=eps)
    normalized = graph.add("Reshape", grouped, graph.ints(result.shape))  # (B, G, C/G·H·W) -> (B, C, H, W)
    scale, shift = (w._replace(tensor=w.tensor.view(-1, 1, 1)) for w in (weight, bias))
    return graph.add("Add", graph.add("Mul", normalized, scale), shift)


@writes(aten.layer_norm.default)
def _layer_norm(
    graph: Graph,
    _result: Tensor,
    x: Value,
    shape: Sequence[int],
    weight: Weight,
    bias: Weight,
    eps: float = 1e-5,
    *_: Value,
) -> Value:
    return graph.add("LayerNormalization", x, weight, bias, axis=-len(shape), epsilon=eps)


@writes(aten.rms_norm.default)
def _rms_norm(graph: Graph, _result: Tensor, x: Value, shape: Sequence[int], weight: Weight, eps: float) -> Value:
    return graph.add("RMSNormalization", x, weight, axis=-len(shape), epsilon=eps)
