"""A net as an ONNX file, for ONNX Runtime: traced by ``torch.export``, written operation by operation.

Every operation that `snapgen.models.unet` uses has its own lines here; one that has none is refused by name, and the
tests hold the result against PyTorch's. ``torch.onnx`` can write the same nets, but takes many times as long and leaves
the runtime more operations to run (``benchmarks/host_latency.py`` compares the two).
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
# Weights are mapped into memory from their file page by page; what is smaller than a page stands in the graph itself.
PAGE = 4096

Value = Any
"""An operation's input: a `Weight`, a tensor or number known before the run, the name of an ONNX value, a list."""

aten = torch.ops.aten


class Unsupported(NotImplementedError):
    """The net uses an operation that has no lines here."""


class Weight(NamedTuple):
    """A parameter or buffer, or a view of one."""

    name: str
    tensor: Tensor
    spread: float
    """Standard deviation of random values in its place."""
    centre: float

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Weight:
        """As named by the net; matrices keep the variance of what they multiply, norms are about the identity."""
        if tensor.dim() > 1:
            return cls(name, tensor, spread=float(tensor[0].numel()) ** -0.5, centre=0.0)
        return cls(name, tensor, spread=0.1, centre=1.0 if name.endswith("weight") else 0.0)


def export(net: nn.Module, inputs: dict[str, Tensor], path: Path, *, random_weights: bool = False) -> None:
    """Write a net for inputs of fixed shapes; large weights go, one at a time, to ``<path>.weights`` beside it.

    Args:
        net: float32, on the CPU; its forward takes ``inputs`` in their order and gives one tensor, named ``output``.
        path: the ONNX file.
        random_weights: write random weights of ordinary size in place of the net's, which are then never read: they
            may be memory that nothing was written to.

    Raises:
        Unsupported: naming the operation.
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
        [_described(name, tensor) for name, tensor in inputs.items()],
        [_described("output", output)],
        graph.initializers,
    )
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(body, opset_imports=opsets, ir_version=11)
    path.write_bytes(model.SerializeToString())


def _described(name: str, tensor: Tensor) -> onnx.ValueInfoProto:
    import onnx

    assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(tensor.shape))


def _write(program: torch.export.ExportedProgram, graph: Graph, names: list[str]) -> Tensor:
    """Every traced operation into ``graph``, in order; returns the output, as traced."""
    values: dict[Node, Value] = {}
    known = _known(program)
    inputs = iter(names)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = known[node.name] if node.name in known else next(inputs)
            continue
        if node.op == "output":
            (output,) = node.args[0]
            graph.add("Identity", values[output], out="output")
            return output.meta["val"]  # type: ignore[no-any-return]
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if not _waits([*args, *kwargs.values()]):
            values[node] = node.target(*args, **kwargs)
        elif node.target in WRITERS:
            values[node] = WRITERS[node.target](graph, node.meta.get("val"), *args, **kwargs)
        else:
            raise Unsupported(f"{node.target} cannot be written as ONNX yet")
    raise AssertionError("a trace ends with its output")


def _known(program: torch.export.ExportedProgram) -> dict[str, Weight | Tensor]:
    """What stands behind each placeholder that is not an input."""
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found: dict[str, Weight | Tensor] = {
        place: Weight.of(name, program.state_dict[name]) for place, name in weights.items()
    }
    return found | {
        place: program.constants[name] for place, name in signature.inputs_to_lifted_tensor_constants.items()
    }


def _waits(args: Iterable[Value]) -> bool:
    """Whether any argument is known only in a run, or is a weight."""
    return any(
        _waits(a) if isinstance(a, list | tuple) and not isinstance(a, Weight) else isinstance(a, str | Weight)
        for a in args
    )


class Graph:
    """The nodes and initializers of an ONNX graph under construction.

    Args:
        file: takes the large weights.
        rng: draws weights; None: the weights' own values.
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
        """A node; returns the name of its output, or the names of several."""
        import onnx

        names = [out or f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        node = onnx.helper.make_node(kind, [self.named(v) for v in inputs], names, domain=domain, **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def ints(self, values: Sequence[int]) -> Tensor:
        """A shape or a list of axes, as an input."""
        return torch.tensor(list(values), dtype=torch.int64)

    def named(self, value: Value) -> str:
        """The name of an ONNX value that holds ``value``."""
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
        return np.resize(self._pool, tuple(weight.tensor.shape)) * np.float32(weight.spread) + np.float32(weight.centre)

    def _initializer(self, name: str, array: np.ndarray[Any, Any]) -> None:
        import onnx

        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        proto = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
        self.initializers.append(proto)
        if array.nbytes < PAGE:
            proto.raw_data = array.tobytes()
            return
        self._file.seek(-(-self._file.tell() // PAGE) * PAGE)
        proto.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": Path(self._file.name).name, "offset": self._file.tell(), "length": array.nbytes}
        proto.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in place.items())
        self._file.write(array.data)


Writer = Callable[..., Value]
WRITERS: dict[object, Writer] = {}
"""Operation to the function that writes it: takes the graph, the traced result, and the operation's arguments."""


def writes(*operations: object) -> Callable[[Writer], Writer]:
    """Registers a function as the writer of these operations."""

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


@writes(aten.add.Tensor)
def _add(graph: Graph, _result: Tensor, a: Value, b: Value) -> Value:
    return graph.add("Add", a, b)


@writes(aten.mul.Tensor)
def _mul(graph: Graph, _result: Tensor, a: Value, b: Value) -> Value:
    return graph.add("Mul", a, b)


@writes(aten.cos.default)
def _cos(graph: Graph, _result: Tensor, x: Value) -> Value:
    return graph.add("Cos", x)


@writes(aten.sin.default)
def _sin(graph: Graph, _result: Tensor, x: Value) -> Value:
    return graph.add("Sin", x)


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
    return graph.add("Transpose", x, perm=order)


@writes(aten.chunk.default)
def _chunk(graph: Graph, result: Sequence[Tensor], x: Value, _chunks: int, dim: int = 0) -> Value:
    sizes = graph.ints([part.shape[dim] for part in result])
    return graph.add("Split", x, sizes, outputs=len(result), axis=dim)


@writes(aten.cat.default)
def _cat(graph: Graph, _result: Tensor, parts: Sequence[Value], dim: int = 0) -> Value:
    return graph.add("Concat", *parts, axis=dim)


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
    product = graph.add("MatMul", x, weight._replace(tensor=weight.tensor.t()))
    return product if bias is None else graph.add("Add", product, bias)


@writes(aten.group_norm.default)
def _group_norm(
    graph: Graph, result: Tensor, x: Value, groups: int, weight: Weight, bias: Weight, eps: float = 1e-5, *_: Value
) -> Value:
    # ONNX Runtime has no kernel of its own for GroupNormalization on the CPU.
    rows = graph.add("Reshape", x, graph.ints([result.shape[0], groups, -1]))
    rows = graph.add("InstanceNormalization", rows, torch.ones(groups), torch.zeros(groups), epsilon=eps)
    normal = graph.add("Reshape", rows, graph.ints(result.shape))
    scale, shift = (w._replace(tensor=w.tensor.view(-1, 1, 1)) for w in (weight, bias))
    return graph.add("Add", graph.add("Mul", normal, scale), shift)


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


@writes(aten.scaled_dot_product_attention.default)
def _attention(graph: Graph, _result: Tensor, queries: Value, keys: Value, values: Value) -> Value:
    return graph.add("Attention", queries, keys, values)
