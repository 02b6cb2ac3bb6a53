"""Plan of a recipe on machines that one does not have: time, memory, batch a process, and cost of each stage."""

from __future__ import annotations

from dataclasses import dataclass

from archsearch.library.machines import Cluster
from archsearch.training.dry_run import Plan, StagePlan


@dataclass(frozen=True)
class StageOnMachines:
    """One stage on a cluster."""

    name: str
    processes: int
    """Processors that compute; a decoder is trained on one, for which the others wait."""
    batch: float
    """Images of a step in each process."""
    gradient_accumulation_steps: int
    """Parts that a process takes its batch in: as few as the memory allows, which may be fewer than the recipe's."""
    memory: int
    """Bytes in each process."""
    seconds: float
    dollars: float | None
    problem: str = ""
    """Reason why the stage cannot run so; empty if it can."""


def plan_on(plan: Plan, cluster: Cluster) -> list[StageOnMachines]:
    """Every stage of a plan on a cluster."""
    return [_stage(stage, cluster) for stage in plan.stages]


def _stage(stage: StagePlan, cluster: Cluster) -> StageOnMachines:
    processes = 1 if stage.single_process else cluster.count
    batch = stage.batch / processes
    parts, problem = 1, ""
    if batch != int(batch):
        problem = f"its batch of {stage.batch:,} is no multiple of {processes} processes"
    elif _memory(stage, 1) > cluster.usable_bytes:
        problem = "a single image does not fit"
    elif stage.single_process and _memory(stage, batch) > cluster.usable_bytes:
        problem = "its batch does not fit, and a decoder's is not split: lower training.batch_size"
    while not problem and _memory(stage, batch / parts) > cluster.usable_bytes:
        parts = next(n for n in range(parts + 1, int(batch) + 1) if batch % n == 0)
    seconds = cluster.seconds(stage.macs, stage.precision, processors=processes)
    return StageOnMachines(
        name=stage.name,
        processes=processes,
        batch=batch,
        gradient_accumulation_steps=parts,
        memory=_memory(stage, max(1, batch / parts)),
        seconds=seconds,
        dollars=cluster.dollars(seconds),
        problem=problem,
    )


def _memory(stage: StagePlan, images: float) -> int:
    return round(stage.memory + max(1, images) * stage.image_memory)
