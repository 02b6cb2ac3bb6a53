"""Exact cost of an architecture: params, MACs and activation memory, from the meta device, without weights.

fvcore's formulas count the MACs. Its own tracer (`torch.jit.trace`) is not used: on the meta device it records no
convolution under torch 2.13, and it takes several times as long as the single pass here.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from archsearch.cost.meta_device import MetaTrace, aten, on_meta_device, storage_of
from archsearch.score import Cost
from snapgen.architecture.schema import Architecture

BYTES = 2  # an activation's element in fp16, as phones run it


class CostItem(Cost):
    """What a part of a net needs. Over all parts the numbers add up to the net's own, but for one.

    That one is ``activation_bytes``: the peak of the net's live activations, wherever they come from, while this part
    ran. The net's is the largest of them.
    """

    written_bytes: int = Field(ge=0)
    """All that its operations write, in fp16: a measure of memory traffic."""


class CostCount(NamedTuple):
    """What a pass came to."""

    parts: dict[Hashable, CostItem]
    """By place."""
    macs: dict[str, int]
    """By operator: convolution, linear, attention, matmul."""


def cost(arch: Architecture, latent_size: int, *, context_tokens: int = 77) -> Cost:
    """What one forward pass at batch 1 needs; see `module_cost`.

    Args:
        arch: the architecture.
        latent_size: height and width of the latent; a multiple of ``arch.stride``.
        context_tokens: length of the context.
    """
    return module_cost(*on_meta_device(arch, latent_size, context_tokens))


def module_cost(net: nn.Module, *inputs: Tensor) -> Cost:
    """What a forward pass of a module and its inputs needs, both on the meta device.

    MACs are those of convolutions, linear layers and attention. Activation memory is the peak of live operations'
    outputs in fp16, each kept until its last use, with fused attention; inputs and weights are not in it.
    """
    whole = count_network(net, *inputs, places={}).parts[None]
    return Cost(params=whole.params, macs=whole.macs, activation_bytes=whole.activation_bytes)


def count_network(net: nn.Module, *inputs: Tensor, places: Mapping[nn.Module, Hashable]) -> CostCount:
    """As `module_cost`, told apart by place.

    Args:
        net: the module, on the meta device.
        inputs: what it takes, on the meta device.
        places: of modules; what is in none of them is at None. The innermost decides.
    """
    counter = _Counter([*net.parameters(), *net.buffers(), *inputs])
    for parameter, place in _placed(net, places):
        counter.tallies[place].params += parameter.numel()
    # In inference mode composite operations arrive whole: attention as one, without its matrix of scores.
    with torch.inference_mode(), _followed(places, counter), counter:
        net(*inputs)
    return CostCount({place: CostItem(**asdict(tally)) for place, tally in counter.tallies.items()}, dict(counter.macs))


def _placed(net: nn.Module, places: Mapping[nn.Module, Hashable]) -> Iterator[tuple[nn.Parameter, Hashable]]:
    """Every parameter once, at the place of the first module that has it."""
    seen: set[nn.Parameter] = set()

    def below(module: nn.Module, place: Hashable) -> Iterator[tuple[nn.Parameter, Hashable]]:
        place = places.get(module, place)
        for parameter in module.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield parameter, place
        for child in module.children():
            yield from below(child, place)

    return below(net, None)


@contextmanager
def _followed(places: Mapping[nn.Module, Hashable], counter: _Counter) -> Iterator[None]:
    """The counter told whenever one of the modules begins and ends."""

    def enter(place: Hashable) -> Callable[..., None]:
        return lambda *_: counter.stack.append(place)

    def leave(*_: object) -> None:
        counter.stack.pop()

    with ExitStack() as hooks:
        for module, place in places.items():
            hooks.callback(module.register_forward_pre_hook(enter(place)).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield


@dataclass
class _Tally:
    """A `CostItem` in the making."""

    params: int = 0
    macs: int = 0
    activation_bytes: int = 0
    written_bytes: int = 0


class _Counter(MetaTrace):
    """Adds up MACs and follows the memory of operations' outputs; views cost nothing, nor what was ``there`` before.

    Attributes:
        stack: the places that the pass is in, the innermost last.
        tallies: what each place has come to.
        macs: by operator.
    """

    def __init__(self, there: Sequence[Tensor]) -> None:
        super().__init__()
        self.stack: list[Hashable] = [None]
        self.tallies: defaultdict[Hashable, _Tally] = defaultdict(_Tally)
        self.macs: Counter[str] = Counter()
        self._handles = _handles()
        self._there = {storage_of(tensor) for tensor in there}
        self._live: dict[StorageWeakRef, int] = {}

    def see(self, func: Callable[..., Any], args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        """See `MetaTrace.see`."""
        here = self.tallies[self.stack[-1]]
        if func in self._handles:
            operator, handle = self._handles[func]
            macs = handle(args, outputs)
            here.macs += macs
            self.macs[operator] += macs
        self._remember(outputs, here)

    def _remember(self, outputs: Sequence[Tensor], here: _Tally) -> None:
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}  # type: ignore[no-untyped-call]
        for tensor in outputs:
            reference = storage_of(tensor)
            if reference not in self._there and reference not in self._live:
                size = tensor.untyped_storage().nbytes() // tensor.element_size() * BYTES
                self._live[reference] = size
                here.written_bytes += size
        here.activation_bytes = max(here.activation_bytes, sum(self._live.values()))


MacFormula = Callable[[Sequence[Any], Sequence[Tensor]], int]


def _handles() -> dict[object, tuple[str, MacFormula]]:
    """Operators' names, and their MACs from arguments and outputs."""
    from fvcore.nn import jit_handles

    def sizes(values: Sequence[Any]) -> list[Any]:
        return [_Sized(list(value.shape)) if isinstance(value, Tensor) else value for value in values]

    def conv(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
        return int(jit_handles.conv_flop_count(args[0].shape, args[1].shape, outputs[0].shape))

    def linear(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
        return int(jit_handles.linear_flop_jit(sizes(args), sizes(outputs)))

    def matmul(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
        return int(jit_handles.matmul_flop_jit(sizes(args), sizes(outputs)))

    return {
        aten.conv2d.default: ("convolution", conv),
        aten.linear.default: ("linear", linear),
        aten.matmul.default: ("matmul", matmul),
        aten.scaled_dot_product_attention.default: ("attention", _attention),
    }


class _Sized(NamedTuple):
    """A tensor as fvcore's handles expect it: a value of a traced graph that knows its sizes."""

    shape: list[int]

    def isCompleteTensor(self) -> bool:
        return True

    def type(self) -> _Sized:
        return self

    def sizes(self) -> list[int]:
        return self.shape


def _attention(args: Sequence[Any], outputs: Sequence[Tensor]) -> int:  # noqa: ARG001 - a handle
    """softmax(QKᵀ)V of sizes (…, N, D), (…, M, D), (…, M, E): N·M·(D + E) a head; fvcore has no handle for it."""
    queries, _, values = (value.shape for value in args[:3])
    return int(math.prod(queries[:-1]) * values[-2] * (queries[-1] + values[-1]))
