"""Part 3: the forward pass of the published ablation's rows on this device, beside the paper's phone.

Batch 1, bfloat16, channels-last, random weights. Eager, a pass at batch 1 may take as long as it takes to start its
kernels; replayed as a CUDA graph it takes the kernels' own time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from archsearch.cost.counter import module_cost
from archsearch.score import Cost
from archsearch.studies.config.ablation import AblationConfig, AblationRowConfig
from archsearch.studies.config.study import load_config
from benchmarks.gpu_check.section import Section, Table
from benchmarks.gpu_check.setup import Setup
from benchmarks.peers import Contestant, Entry, Setting, Storage, ours, rows
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.errors import first_line

STUDY = "ablation/snapgen"
LADDER = ("0", "1", "2a", "2b", "3", "4", "5", "6")
SMALL_LADDER = ("0", "1", "2a")
# The rows' own changes on narrow stages, for a CPU.
NARROW = {f"{way}[{level}].channels": width for way in ("down", "up") for level, width in enumerate((64, 128, 128))}
WARM_UP = 3

Timer = Callable[[], float]
"""Seconds of one pass."""


def run(section: Section, setup: Setup) -> None:
    """Every row, all of them timed in turns."""
    device = torch.device(setup.device)
    setting = Setting(device, 1, 8 if setup.small else 128, 1)
    if setup.device == "cpu":
        torch.set_num_threads(1)
    study = load_config(STUDY).ablation
    assert study is not None
    section.say(
        f"Latent {setting.latent}, 77 tokens, batch 1, {str(setting.dtype).removeprefix('torch.')}, channels-last, "
        f"random weights; medians over turns. Measured here: ms. Published: {study.published_protocol}, from "
        f"{study.published_source}; only changes of a row against another are published, and only those stand beside."
    )
    archs = {name: arch for name, arch in rows().items() if name in (SMALL_LADDER if setup.small else LADDER)}
    if setup.small:
        archs = {name: apply_overrides(arch, NARROW) for name, arch in archs.items()}
    nets = _made(archs, setting)
    turns = 2 if setup.small else 20
    found = {"eager": _timed({name: _eager(net, setting) for name, net in nets.items()}, turns)}
    replayed = _replayable(section, nets, setting)
    if replayed:
        found["CUDA graph"] = _timed(replayed, turns)
    costs = {name: _cost(arch, setting) for name, arch in archs.items()}
    for way, seconds in found.items():
        _table(section, way, seconds, costs, study)


def _made(archs: dict[str, Architecture], setting: Setting) -> dict[str, Contestant]:
    """The nets, with weights of one storage that is as large as the largest."""
    entries = {name: Entry(f"row {name}", ours(arch)) for name, arch in archs.items()}
    with torch.device("meta"):
        size = max(Storage.size(entry.make()) for entry in entries.values())
    weights = Storage(size, setting, deviation=0.02)
    return {name: Contestant(entry, setting, weights, []) for name, entry in entries.items()}


def _eager(net: Contestant, setting: Setting) -> Timer:
    def seconds() -> float:
        began = setting.now()
        with torch.inference_mode():
            net.forward()
        return setting.now() - began

    return seconds


def _replayable(section: Section, nets: dict[str, Contestant], setting: Setting) -> dict[str, Timer]:
    """The same passes as CUDA graphs; on the CPU there are none."""
    if setting.device.type != "cuda":
        section.say("CUDA graphs: skipped, there are none on this device.")
        return {}
    found: dict[str, Timer] = {}
    for name, net in nets.items():
        try:
            found[name] = _graph(net, setting)
        except RuntimeError as error:
            section.say(f"Row {name} could not be captured as a CUDA graph ({first_line(error)}).")
    return found


def _graph(net: Contestant, setting: Setting) -> Timer:
    """A captured pass, after torch's notes on CUDA graphs: warmed up on another stream, then captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                net.forward()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            net.forward()

    def seconds() -> float:
        began = setting.now()
        graph.replay()
        return setting.now() - began

    return seconds


def _timed(timers: dict[str, Timer], turns: int) -> dict[str, list[float]]:
    """Seconds of every net in every turn, the first turns thrown away."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(WARM_UP + turns):
        for name, timer in timers.items():
            seconds = timer()
            if turn >= WARM_UP:
                found[name].append(seconds)
    return found


def _cost(arch: Architecture, setting: Setting) -> Cost:
    with torch.device("meta"):
        net: nn.Module = ours(arch)()
        return module_cost(net.eval(), *setting.inputs(torch.device("meta")))


def _table(
    section: Section, way: str, seconds: dict[str, list[float]], costs: dict[str, Cost], study: AblationConfig
) -> None:
    table: Table = section.table(
        f"Forward pass, {way}",
        ["row", "change", "params, M", "GMACs", "ms", "quartiles", "against row", "here", "published, iPhone 15 Pro"],
    )
    for name, taken in seconds.items():
        row = study.rows[name]
        low, middle, high = np.percentile(np.array(taken) * 1e3, [25, 50, 75])
        over = row.over if row.over in seconds else None
        change = None if over is None else middle / (1e3 * float(np.median(seconds[over]))) - 1
        table.add(
            name,
            row.title,
            f"{costs[name].params / 1e6:.1f}",
            f"{costs[name].macs / 1e9:.1f}",
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            over,
            None if change is None else f"{change:+.0%}",
            _published(row),
        )
        section.record(
            what="forward", way=way, row=name, seconds=taken, params=costs[name].params, macs=costs[name].macs
        )


def _published(row: AblationRowConfig) -> str | None:
    """The paper's change of latency, as it is published."""
    figure = row.published.get("latency_ms")
    if figure is None:
        return None
    return figure.says or f"{figure.value:+g} %"
