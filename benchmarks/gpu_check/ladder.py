"""Part 3: forward passes of the published ablation's rows on this device, compared with the paper's phone.

Batch size 1, bfloat16, channels-last, random weights. In eager mode, launching the kernels may dominate a pass at batch
size 1; as a replayed CUDA graph it takes the time of the kernels only.
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
# The same rows with narrow levels, for a CPU.
NARROW = {f"{way}[{level}].channels": width for way in ("down", "up") for level, width in enumerate((64, 128, 128))}
WARM_UP = 3

Timer = Callable[[], float]
"""Runs one pass and returns its seconds."""


def run(section: Section, setup: Setup) -> None:
    """Time all rows round-robin."""
    device = torch.device(setup.device)
    setting = Setting(device, 1, 8 if setup.small else 128, 1)
    if setup.device == "cpu":
        torch.set_num_threads(1)
    study = load_config(STUDY).ablation
    assert study is not None
    section.say(
        f"Latent {setting.latent}, 77 tokens, batch 1, {str(setting.dtype).removeprefix('torch.')}, channels-last, "
        f"random weights; medians over repeats. Published: {study.published_protocol}, from "
        f"{study.published_source}. The paper gives only changes of one row relative to another, so only these are "
        "compared."
    )
    archs = {name: arch for name, arch in rows().items() if name in (SMALL_LADDER if setup.small else LADDER)}
    if setup.small:
        archs = {name: apply_overrides(arch, NARROW) for name, arch in archs.items()}
    nets = _build(archs, setting)
    repeats = 2 if setup.small else 20
    seconds_by_mode = {"eager": _timed({name: _eager(net, setting) for name, net in nets.items()}, repeats)}
    graphs = _cuda_graphs(section, nets, setting)
    if graphs:
        seconds_by_mode["CUDA graph"] = _timed(graphs, repeats)
    costs = {name: _cost(arch, setting) for name, arch in archs.items()}
    for mode, seconds in seconds_by_mode.items():
        _table(section, mode, seconds, costs, study)


def _build(archs: dict[str, Architecture], setting: Setting) -> dict[str, Contestant]:
    """Build the networks; all share one storage of weights, which is as large as the largest network."""
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


def _cuda_graphs(section: Section, nets: dict[str, Contestant], setting: Setting) -> dict[str, Timer]:
    """Capture the same passes as CUDA graphs; empty on a CPU."""
    if setting.device.type != "cuda":
        section.say("CUDA graphs: skipped, this device has none.")
        return {}
    timers: dict[str, Timer] = {}
    for name, net in nets.items():
        try:
            timers[name] = _graph(net, setting)
        except RuntimeError as error:
            section.say(f"Row {name} could not be captured as a CUDA graph ({first_line(error)}).")
    return timers


def _graph(net: Contestant, setting: Setting) -> Timer:
    """Capture one pass: warm up on a side stream, then capture, as in torch's notes on CUDA graphs."""
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


def _timed(timers: dict[str, Timer], repeats: int) -> dict[str, list[float]]:
    """Seconds of every network in every repeat, without the first `WARM_UP` repeats."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for repeat in range(WARM_UP + repeats):
        for name, timer in timers.items():
            seconds = timer()
            if repeat >= WARM_UP:
                samples[name].append(seconds)
    return samples


def _cost(arch: Architecture, setting: Setting) -> Cost:
    with torch.device("meta"):
        net: nn.Module = ours(arch)()
        return module_cost(net.eval(), *setting.inputs(torch.device("meta")))


def _table(
    section: Section, mode: str, seconds: dict[str, list[float]], costs: dict[str, Cost], study: AblationConfig
) -> None:
    table: Table = section.table(
        f"Forward pass, {mode}",
        [
            "row",
            "change",
            "params, M",
            "GMACs",
            "ms",
            "quartiles",
            "baseline row",
            "change",
            "published, iPhone 15 Pro",
        ],
    )
    for name, samples in seconds.items():
        row = study.rows[name]
        low, median, high = np.percentile(np.array(samples) * 1e3, [25, 50, 75])
        baseline = row.baseline if row.baseline in seconds else None
        change = None if baseline is None else median / (1e3 * float(np.median(seconds[baseline]))) - 1
        table.add(
            name,
            row.title,
            f"{costs[name].params / 1e6:.1f}",
            f"{costs[name].macs / 1e9:.1f}",
            f"{median:.2f}",
            f"{low:.2f} to {high:.2f}",
            baseline,
            None if change is None else f"{change:+.0%}",
            _published(row),
        )
        section.record(
            what="forward", way=mode, row=name, seconds=samples, params=costs[name].params, macs=costs[name].macs
        )


def _published(row: AblationRowConfig) -> str | None:
    """Change of latency as published in the paper."""
    figure = row.published.get("latency_ms")
    if figure is None:
        return None
    return figure.quote or f"{figure.value:+g} %"
