"""Core ML compute plans: the preferred compute unit and the estimated cost of each operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from archsearch.score import LatencyRecord

if TYPE_CHECKING:
    from coremltools.models.compute_device import MLComputeDevice
    from coremltools.models.compute_plan import (
        MLComputePlan,
        MLModelStructureProgramBlock,
        MLModelStructureProgramOperation,
    )

NEURAL_ENGINE = "Neural Engine"


class PlacedOp(NamedTuple):
    """An operation of a Core ML program with its compute unit."""

    name: str
    operator: str
    unit: str
    """Compute unit that Core ML prefers: ``Neural Engine``, ``GPU`` or ``CPU``."""
    weight: float
    """Fraction of the program's time, estimated by the plan; it is not measured."""

    def estimate(self, ms: float) -> dict[str, str | float]:
        """The operation as JSON, with its estimated share of a measured latency."""
        return {"name": self.name, "operator": self.operator, "unit": self.unit, "estimated_ms": self.weight * ms}


class DetailedRecord(NamedTuple):
    """A latency record, with the plan's operations; empty if Core ML provided no plan."""

    record: LatencyRecord
    operations: tuple[PlacedOp, ...]


def placed_operations(plan: MLComputePlan) -> tuple[PlacedOp, ...]:
    """Operations that a plan assigns to compute units, in program order; constants are not assigned."""
    program = plan.model_structure.program
    assert program is not None, "packages that this project writes contain an ML program"
    placed = []
    for function in program.functions.values():
        for operation in _operations(function.block):
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            if usage is None:
                continue
            cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
            name = operation.outputs[0].name if operation.outputs else ""
            unit = _unit(usage.preferred_compute_device)
            placed.append(PlacedOp(name, operation.operator_name, unit, cost.weight if cost else 0.0))
    return tuple(placed)


def neural_engine_share(operations: Sequence[PlacedOp]) -> tuple[float | None, float | None]:
    """Fractions of the estimated cost (None if the plan has none) and of the operations that run on the Neural Engine.

    Both are None without operations.
    """
    on_engine = [op for op in operations if op.unit == NEURAL_ENGINE]
    total = sum(op.weight for op in operations)
    share = len(on_engine) / len(operations) if operations else None
    return sum(op.weight for op in on_engine) / total if total else None, share


def by_operator(operations: Sequence[PlacedOp]) -> dict[str, str]:
    """Compute units of each operator, with the number of operations on each.

    >>> by_operator([PlacedOp("a", "conv", "Neural Engine", 0.9), PlacedOp("b", "conv", "CPU", 0.1)])
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
    from coremltools.models import compute_device as devices

    names = {
        devices.MLNeuralEngineComputeDevice: NEURAL_ENGINE,
        devices.MLGPUComputeDevice: "GPU",
        devices.MLCPUComputeDevice: "CPU",
    }
    # A phone's plan uses subclasses of these classes.
    return next((name for kind, name in names.items() if isinstance(device, kind)), type(device).__name__)
