"""Benchmark of exporters to ONNX: `archsearch.latency.onnx_export`, and the two of ``torch.onnx``.

Every net is exported by every exporter in turn, in one process on one thread, several times over; the first net's
first exports, which load the libraries, are not counted. The graphs then run in ONNX Runtime on one thread, round-robin
in slices of 50 ms, so that changes of the machine's speed affect all of them alike; their outputs are compared with
PyTorch's. Export times are wall-clock and processor times, latencies processor times.

    python -m benchmarks.onnx_export emoji --num 10
    python -m benchmarks.onnx_export snapgen-emoji --latent-size 16 --context-tokens 16
"""

from __future__ import annotations

import argparse
import io
import logging
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import torch

from archsearch.latency import base, host, onnx_export, repeats
from archsearch.machine import chip, installed, operating_system
from archsearch.spaces.loading import load_space
from snapgen.architecture.presets import NAMES, preset
from snapgen.architecture.schema import Architecture
from snapgen.models.unet import UNet

SLICE_SECONDS = 0.05

Inputs = dict[str, torch.Tensor]
Run = Callable[[], object]
Exporter = Callable[[UNet, Inputs, Path], None]


def net_of(arch: Architecture) -> UNet:
    """A net without zero weights."""
    net = UNet(arch).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight) * weight[0].numel() ** -0.5 if weight.dim() > 1 else 0)
    return net


def session_run(path: Path, inputs: Inputs) -> Run:
    """A run of a graph in ONNX Runtime on one thread; it gives a list of one output."""
    session = host.open_session(path, threads=1)
    feed = {node.name: inputs[node.name].numpy() for node in session.get_inputs()}
    return lambda: session.run(["output"], feed)


def by_torch(**options: object) -> Exporter:
    """An exporter of ``torch.onnx``, without what it prints."""

    def export(net: UNet, inputs: Inputs, path: Path) -> None:
        names = {"input_names": list(inputs), "output_names": ["output"]}
        with torch.no_grad(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            torch.onnx.export(net, tuple(inputs.values()), path, **names, **options, verbose=False)  # type: ignore[arg-type]

    return export


EXPORTERS: dict[str, Exporter] = {
    "ours": onnx_export.export,  # the one behind latency records
    "torch.onnx": by_torch(dynamo=True, external_data=True),
    "torch.onnx, opset 23": by_torch(dynamo=True, external_data=True, opset_version=23),
    "torch.onnx, not optimized": by_torch(dynamo=True, external_data=True, optimize=False),
    "TorchScript": by_torch(dynamo=False),
}


def latencies(paths: dict[str, Path], net: UNet, inputs: Inputs, seconds: float) -> dict[str, list[float]]:
    """Times of every graph, round-robin; each output must agree with PyTorch's."""
    with torch.no_grad():
        expected = net(*inputs.values()).numpy()
    runs = {name: session_run(path, inputs) for name, path in paths.items()}
    for name, run in runs.items():
        error = np.abs(run()[0] - expected).max() / np.abs(expected).max()  # type: ignore[index]
        assert error < 1e-3, f"{name} is {error:.1e} away from PyTorch"
    times: dict[str, list[float]] = defaultdict(list)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            times[name] += turn(run)
    return times


def turn(run: Run) -> list[float]:
    """CPU times of repeated runs during `SLICE_SECONDS`."""
    taken: list[float] = []
    while sum(taken) < SLICE_SECONDS:
        began = time.thread_time()
        run()
        taken.append(time.thread_time() - began)
    return taken


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    return f"{np.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> None:
    """Parse the command line, measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", help="a space, of which architectures are sampled, or a preset")
    parser.add_argument("--num", type=int, default=10, help="number of architectures sampled from a space")
    parser.add_argument("--latent-size", type=int, default=16)
    parser.add_argument("--context-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="exports of each net by each exporter")
    parser.add_argument("--seconds", type=float, default=5, help="running each net's graphs, all together")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if options.net in NAMES:
        archs, latent, tokens = [preset(options.net)], options.latent_size, options.context_tokens
    else:
        space = load_space(options.net)
        archs = repeats.sample_architectures(space, options.num, seed=0)
        latent, tokens = space.latent_size, space.context_tokens
    wall, processor, milliseconds, ratios, nodes = (defaultdict[str, list[float]](list) for _ in range(5))
    for number, arch in enumerate(archs):
        net, inputs = net_of(arch), base.sample_inputs(arch, latent, tokens)
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder) / f"{i}.onnx" for i, name in enumerate(EXPORTERS)}
            if arch.qk_norm:
                del paths["TorchScript"]  # it has no RMSNorm
            for repeat in range(options.repeats + (number == 0)):
                for name, path in paths.items():
                    began = time.perf_counter(), time.process_time()
                    EXPORTERS[name](net, inputs, path)
                    if number or repeat:
                        wall[name].append(time.perf_counter() - began[0])
                        processor[name].append(time.process_time() - began[1])
            times = latencies(paths, net, inputs, options.seconds)
            for name, path in paths.items():
                milliseconds[name].append(float(np.median(times[name])) * 1e3)
                ratios[name].append(milliseconds[name][-1] / milliseconds["ours"][-1])
                nodes[name].append(len(onnx.load(path, load_external_data=False).graph.node))
    versions = ", ".join(f"{name} {installed(name)}" for name in ("torch", "onnx", "onnxscript", "onnxruntime"))
    print(f"{options.net}: {len(archs)} nets, latent {latent}; {chip()}, {operating_system()}; {versions}\n")
    print("| exporter | export, s | export, CPU s | nodes | latency, ms | latency / ours |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in wall:
        cells = [spread(wall[name], 2), spread(processor[name], 2), spread(nodes[name], 0)]
        print(f"| {name} | {' | '.join(cells)} | {spread(milliseconds[name], 3)} | {spread(ratios[name], 3)} |")
    print(f"\nTorchScript has no RMSNorm, which {sum(arch.qk_norm for arch in archs)} of the nets have.")


if __name__ == "__main__":
    main()
