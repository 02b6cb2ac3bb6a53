"""Exact cost of an architecture (params, MACs, activation memory) from a pass on the meta device, without weights.

MACs are counted with fvcore's formulas. fvcore's tracer (`torch.jit.trace`) is not used: on the meta device it records
no convolutions under torch 2.13, and it takes several times as long as the single pass used here.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from archsearch.cost.meta_device import MetaTrace, aten, on_meta_device, storage_of
from archsearch.score import Cost
from snapgen.architecture.schema import Architecture

ELEMENT_BYTES = 2
"""Size of an activation's element: fp16, which phones use."""


class CostItem(Cost):
    """Cost of one group of modules. Over all groups the costs add up to those of the net, except ``activation_bytes``.

    ``activation_bytes`` is the peak size of all live activations of the net while a module of the group runs; the net's
    is the maximum over the groups.
    """

    written_bytes: int = Field(ge=0)
    """Size of all outputs of the group's operations in fp16: a measure of memory traffic."""

    @classmethod
    def total(cls, items: Iterable[CostItem]) -> CostItem:
        """Cost of several groups together."""
        items = list(items)
        return cls(
            params=sum(item.params for item in items),
            macs=sum(item.macs for item in items),
            activation_bytes=max((item.activation_bytes for item in items), default=0),
            written_bytes=sum(item.written_bytes for item in items),
        )


class CostCount(NamedTuple):
    """Result of `count_network`."""

    by_group: dict[Hashable, CostItem]
    """Cost of each group of modules."""
    macs: dict[str, int]
    """MACs of each operator: convolution, linear, attention, matmul."""


def cost(arch: Architecture, latent_size: int, *, context_tokens: int = 77) -> Cost:
    """Cost of one forward pass at batch size 1; see `module_cost`.

    Args:
        arch: the architecture.
        latent_size: height and width of the latent; a multiple of ``arch.stride``.
        context_tokens: length of the context.
    """
    return module_cost(*on_meta_device(arch, latent_size, context_tokens))


def module_cost(net: nn.Module, *inputs: Tensor) -> Cost:
    """Cost of a forward pass of any module. The module and its inputs must be on the meta device.

    MACs are those of convolutions, linear layers and attention. Activation memory is the peak size of the live
    operations' outputs in fp16, each kept until its last use, with fused attention; inputs and weights are excluded.
    """
    total = count_network(net, *inputs, groups={}).by_group[None]
    return Cost(params=total.params, macs=total.macs, activation_bytes=total.activation_bytes)


def count_network(net: nn.Module, *inputs: Tensor, groups: Mapping[nn.Module, Hashable]) -> CostCount:
    """Cost of a forward pass like `module_cost`, broken down by groups of modules.

    Args:
        net: the module, on the meta device.
        inputs: its inputs, on the meta device.
        groups: group of each module, including its children unless they have a group of their own. Everything outside
            of these modules is counted under None.
    """
    counter = _Counter([*net.parameters(), *net.buffers(), *inputs])
    for parameter, group in _grouped_parameters(net, groups):
        counter.tallies[group]["params"] += parameter.numel()
    # In inference mode composite operations are not decomposed: attention is one operation without a score matrix.
    with torch.inference_mode(), _track_groups(groups, counter), counter:
        net(*inputs)
    items = {
        group: CostItem(**{n: tally[n] for n in CostItem.model_fields}) for group, tally in counter.tallies.items()
    }
    return CostCount(items, dict(counter.macs))


def _grouped_parameters(
    net: nn.Module, groups: Mapping[nn.Module, Hashable]
) -> Iterator[tuple[nn.Parameter, Hashable]]:
    """Every parameter once, with the group of the first module that owns it."""
    seen: set[nn.Parameter] = set()

    def visit(module: nn.Module, group: Hashable) -> Iterator[tuple[nn.Parameter, Hashable]]:
        group = groups.get(module, group)
        for parameter in module.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield parameter, group
        for child in module.children():
            yield from visit(child, group)

    return visit(net, None)


@contextmanager
def _track_groups(groups: Mapping[nn.Module, Hashable], counter: _Counter) -> Iterator[None]:
    """Keep the counter's stack of groups up to date by hooks on the modules."""

    def enter(group: Hashable) -> Callable[..., None]:
        return lambda *_: counter.stack.append(group)

    def leave(*_: object) -> None:
        counter.stack.pop()

    with ExitStack() as hooks:
        for module, group in groups.items():
            hooks.callback(module.register_forward_pre_hook(enter(group)).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield


class _Counter(MetaTrace):
    """Sums MACs and tracks the memory of operations' outputs. Views and ``existing`` tensors cost no memory.

    Attributes:
        stack: groups of the modules that are running, innermost last.
        tallies: cost of each group so far, by the fields of `CostItem`.
        macs: MACs of each operator so far.
    """

    def __init__(self, existing: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[Hashable] = [None]
        self.tallies: defaultdict[Hashable, Counter[str]] = defaultdict(Counter)
        self.macs: Counter[str] = Counter()
        self._formulas = _mac_formulas()
        self._existing = {storage_of(tensor) for tensor in existing}
        self._live: dict[StorageWeakRef, int] = {}

    def on_operation(self, func: Callable[..., Any], args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        """See `MetaTrace.on_operation`."""
        tally = self.tallies[self.stack[-1]]
        if func in self._formulas:
            operator, formula = self._formulas[func]
            macs = formula(args, outputs)
            tally["macs"] += macs
            self.macs[operator] += macs
        self._track_memory(outputs, tally)

    def _track_memory(self, outputs: Sequence[Tensor], tally: Counter[str]) -> None:
        # a weak reference expires once the last tensor on its storage is gone: the activation is no longer live
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}  # type: ignore[no-untyped-call]
        for tensor in outputs:
            reference = storage_of(tensor)
            if reference not in self._existing and reference not in self._live:
                size = tensor.untyped_storage().nbytes() // tensor.element_size() * ELEMENT_BYTES
                self._live[reference] = size
                tally["written_bytes"] += size
        tally["activation_bytes"] = max(tally["activation_bytes"], sum(self._live.values()))


MacFormula = Callable[[Sequence[Any], Sequence[Tensor]], int]
"""MACs of an operation from its arguments and outputs."""


def _mac_formulas() -> dict[object, tuple[str, MacFormula]]:
    """Name and MAC formula of every counted operator."""
    from fvcore.nn import jit_handles

    def sizes(values: Sequence[Any]) -> list[Any]:
        return [_Sized(list(value.shape)) if isinstance(value, Tensor) else value for value in values]

    def conv(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
        return int(jit_handles.conv_flop_count(args[0].shape, args[1].shape, outputs[0].shape))

    def product(formula: Callable[[list[Any], list[Any]], float]) -> MacFormula:
        return lambda args, outputs: int(formula(sizes(args), sizes(outputs)))

    return {
        aten.conv2d.default: ("convolution", conv),
        aten.linear.default: ("linear", product(jit_handles.linear_flop_jit)),
        aten.matmul.default: ("matmul", product(jit_handles.matmul_flop_jit)),
        aten.scaled_dot_product_attention.default: ("attention", _attention),
    }


class _Sized(NamedTuple):
    """Stand-in for a value of a traced graph with known sizes, which fvcore's formulas expect."""

    shape: list[int]

    def isCompleteTensor(self) -> bool:
        return True

    def type(self) -> _Sized:
        return self

    def sizes(self) -> list[int]:
        return self.shape


def _attention(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:  # noqa: ARG001 - a MacFormula
    """MACs of softmax(QKᵀ)V for (…, N, D), (…, M, D), (…, M, E): N·M·(D + E) per head. fvcore has no formula for it."""
    queries, _, values = (value.shape for value in args[:3])
    return int(math.prod(queries[:-1]) * values[-2] * (queries[-1] + values[-1]))
