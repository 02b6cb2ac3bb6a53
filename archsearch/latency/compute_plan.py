"""Where Core ML means to run each operation, and what it reckons each to cost: a compute plan, read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from archsearch.score import LatencyRecord
from snapgen.architecture.schema import Architecture

if TYPE_CHECKING:
    from coremltools.models.compute_device import MLComputeDevice
    from coremltools.models.compute_plan import (
        MLComputePlan,
        MLModelStructureProgramBlock,
        MLModelStructureProgramOperation,
    )

NEURAL_ENGINE = "Neural Engine"


class PlacedOp(NamedTuple):
    """An operation of the program, by its result's name and its operator."""

    name: str
    operator: str
    unit: str
    """``Neural Engine``, ``GPU`` or ``CPU``: the one that Core ML prefers."""
    weight: float
    """Its share of the whole program's time, as the plan estimates it; nothing measures it."""

    def estimate(self, ms: float) -> dict[str, str | float]:
        """Its part of a measured time, and where it is, as JSON."""
        return {"name": self.name, "operator": self.operator, "unit": self.unit, "estimated_ms": self.weight * ms}


class DetailedRecord(NamedTuple):
    """A record, and what Core ML reckons of each operation; nothing if it told no plan."""

    record: LatencyRecord
    operations: tuple[PlacedOp, ...]


@runtime_checkable
class ReportsOperations(Protocol):
    """A backend that knows of single operations."""

    def detailed(self, arch: Architecture, latent_size: int, context_tokens: int) -> DetailedRecord:
        """A measurement, with its operations; raises as `archsearch.latency.base.Backend.measure`."""
        ...


class NeuralEngineShare(NamedTuple):
    """Of the Neural Engine: of the estimated cost (None where the plan has none), and of the operations' number."""

    cost: float | None
    operations: float


def placed(plan: MLComputePlan) -> tuple[PlacedOp, ...]:
    """The operations that a plan places, in the program's order; constants have no place."""
    program = plan.model_structure.program
    assert program is not None, "a package of ours holds a program"
    found = []
    for function in program.functions.values():
        for operation in _operations(function.block):
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            if usage is None:
                continue
            cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
            name = operation.outputs[0].name if operation.outputs else ""
            unit = _unit(usage.preferred_compute_device)
            found.append(PlacedOp(name, operation.operator_name, unit, cost.weight if cost else 0.0))
    return tuple(found)


def shares(operations: Sequence[PlacedOp]) -> NeuralEngineShare:
    """How much of a program of at least one operation is on the Neural Engine."""
    there = [op for op in operations if op.unit == NEURAL_ENGINE]
    whole = sum(op.weight for op in operations)
    return NeuralEngineShare(sum(op.weight for op in there) / whole if whole else None, len(there) / len(operations))


def by_operator(operations: Sequence[PlacedOp]) -> dict[str, str]:
    """Each operator's units with the number of its operations there.

    >>> by_operator([Placed("a", "conv", "Neural Engine", 0.9), Placed("b", "conv", "CPU", 0.1)])
    {'conv': 'CPU 1, Neural Engine 1'}
    """
    counts: dict[str, Counter[str]] = {}
    for op in operations:
        counts.setdefault(op.operator, Counter())[op.unit] += 1
    return {
        operator: ", ".join(f"{unit} {count}" for unit, count in sorted(units.items()))
        for operator, units in sorted(counts.items())
    }


def _operations(block: MLModelStructureProgramBlock) -> Iterator[MLModelStructureProgramOperation]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _unit(device: MLComputeDevice) -> str:
    from coremltools.models import compute_device as kinds

    named = {
        kinds.MLNeuralEngineComputeDevice: NEURAL_ENGINE,
        kinds.MLGPUComputeDevice: "GPU",
        kinds.MLCPUComputeDevice: "CPU",
    }
    # A phone's plan has subclasses of coremltools' own.
    return next((name for kind, name in named.items() if isinstance(device, kind)), type(device).__name__)
