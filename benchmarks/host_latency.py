"""Benchmark of methods to measure the host's latency: ONNX Runtime and PyTorch, and repeatability next to other load.

Exporters to ONNX have a benchmark of their own (``benchmarks/onnx_export.py``).

Every method runs the same net in one process on one thread, round-robin in slices of 50 ms, so that changes of the
machine's speed affect all methods alike. Times are the CPU time of the thread (see
`archsearch.latency.host.HostBackend`); "prepare" is the wall-clock time from the net to the first output, the second
time, when libraries are loaded.

    python benchmarks/host_latency.py compare emoji emoji-large [--seconds 20]
    python benchmarks/host_latency.py repeat emoji [--times 10] [--busy 1]
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from archsearch import devices
from archsearch.latency import base, host, onnx_export
from archsearch.machine import chip, operating_system
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import Space
from snapgen.architecture.schema import Architecture
from snapgen.models.unet import UNet

SLICE_SECONDS = 0.05
# Load like that of a second worker: convolutions and their gradients on one thread.
LOAD_SCRIPT = """
import torch
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(64, 32, 3, padding=1))
images = torch.randn(64, 32, 16, 16)
while True:
    net(images).square().mean().backward()
"""

Inputs = dict[str, torch.Tensor]
Run = Callable[[], object]


def net_of(arch: Architecture) -> UNet:
    """A net without zero weights."""
    net = UNet(arch).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight) * weight[0].numel() ** -0.5 if weight.dim() > 1 else 0)
    return net


def ours(net: UNet, inputs: Inputs, folder: Path) -> Run:
    """ONNX Runtime with the graph used for latency records."""
    onnx_export.export(net, inputs, folder / "ours.onnx")
    return session_run(folder / "ours.onnx", inputs)


def session_run(path: Path, inputs: Inputs) -> Run:
    """A run of a graph in ONNX Runtime on one thread; it gives a list of one output."""
    session = host.open_session(path, threads=1)
    feed = {node.name: inputs[node.name].numpy() for node in session.get_inputs()}
    return lambda: session.run(["output"], feed)


def eager(net: UNet, inputs: Inputs, _folder: Path) -> Run:
    """Eager PyTorch."""
    return lambda: net(*inputs.values())


def compiled(net: UNet, inputs: Inputs, _folder: Path) -> Run:
    """PyTorch with ``torch.compile``."""
    torch.compiler.reset()
    fast = torch.compile(net)
    return lambda: fast(*inputs.values())


WAYS = {"ONNX Runtime": ours, "PyTorch": eager, "torch.compile": compiled}


def compare(space: Space, seconds: float) -> None:
    """Print each method's time for a net, and the deviation of its output from PyTorch's."""
    net, inputs = net_of(space.base), base.sample_inputs(space.base, space.latent_size, space.context_tokens)
    wanted = net(*inputs.values())
    prepared: dict[str, float] = {}
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in WAYS.items():
            for _ in range(2):
                began = time.perf_counter()
                runs[name] = way(net, inputs, Path(folder))
                answer = runs[name]()
                prepared[name] = time.perf_counter() - began
            found = torch.from_numpy(answer[0]) if isinstance(answer, list) else answer
            assert isinstance(found, torch.Tensor)
            error = float((found - wanted).abs().max() / wanted.abs().max())
            assert error < 1e-3, f"{name} is {error:.1e} away from PyTorch"
        times: dict[str, list[float]] = {name: [] for name in runs}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for name, run in runs.items():
                times[name] += turn(run)
    print(f"{'':26}{'ms':>8}  {'quartiles':>15} {'runs':>6} {'prepare s':>10}")
    for name, taken in times.items():
        lower, median, upper = np.percentile(taken, [25, 50, 75]) * 1e3
        print(f"{name:26}{median:8.3f}  {lower:7.3f}–{upper:7.3f} {len(taken):6} {prepared[name]:10.1f}")


def turn(run: Run) -> list[float]:
    """CPU times of repeated runs during `SLICE_SECONDS`."""
    taken: list[float] = []
    while sum(taken) < SLICE_SECONDS:
        began = time.thread_time()
        run()
        taken.append(time.thread_time() - began)
    return taken


def repeat(space: Space, times: int, busy: int) -> None:
    """Measure a net's latency several times next to a number of competing processes, and print the records."""
    competitors = [subprocess.Popen([sys.executable, "-c", LOAD_SCRIPT]) for _ in range(busy)]
    medians, seconds = [], []
    try:
        for i in range(times + 1):
            began = time.perf_counter()
            record = devices.backend("host").measure(space.base, space.latent_size, space.context_tokens)
            if i == 0:  # loads the libraries
                continue
            seconds.append(time.perf_counter() - began)
            medians.append(record.median_ms)
            quartiles = f"{record.lower_quartile_ms:.3f}–{record.upper_quartile_ms:.3f}"
            steady = "steady" if record.steady else "not steady"
            print(f"{record.median_ms:8.3f} ms  {quartiles}  {record.runs:5} runs  {seconds[-1]:.1f} s  {steady}")
    finally:
        for competitor in competitors:
            competitor.kill()
    spread = max(medians) / min(medians) - 1
    deviation = np.std(medians, ddof=1) / np.mean(medians)
    print(f"medians: largest over smallest +{spread:.1%}, standard deviation {deviation:.1%}")
    print(f"a measurement takes {np.median(seconds):.1f} s")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "repeat"])
    parser.add_argument("spaces", nargs="+", help="whose base is timed")
    parser.add_argument("--seconds", type=float, default=20, help="for all ways together")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--busy", type=int, default=1, help="competing processes on one thread each")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(f"{chip()}, {operating_system()}, torch {torch.__version__}, 1 thread")
    for name in options.spaces:
        space = load_space(name)
        print(f"\n{name}: {UNet(space.base).num_parameters() / 1e6:.2f} M, {space.latent_size}² latent")
        if options.what == "compare":
            with torch.inference_mode():
                compare(space, options.seconds)
        else:
            repeat(space, options.times, options.busy)


if __name__ == "__main__":
    main()
