"""Benchmark of decoders: SnapGen's tiny decoder and SD3's decoder pruned by half (SnapFusion), compared with SD3's.

Compares size, compute, memory and time per image. SD3's decoder is built by diffusers and pruned by
`snapgen.autoencoders.pruned_decoder`.

Params, MACs and activations are counted on the meta device. Memory is the growth of the peak resident size during a
pass, measured in a separate process for each decoder. Time is measured round-robin in one process, after a warm-up pass
of each. Weights are random and float32, in channels-last memory, which is faster for both. With one thread
(OMP_NUM_THREADS=1) times are the CPU time of that thread, which excludes other processes; otherwise they are wall-clock
times. Prints a Markdown table.

    OMP_NUM_THREADS=1 python benchmarks/decoders.py [--pixels 1024] [--passes 3]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from archsearch.cost.counter import CostItem, count_network
from archsearch.machine import chip, operating_system
from snapgen.autoencoders.pruned_decoder import SNAPFUSION_RATIO, prune_decoder
from snapgen.autoencoders.tiny_decoder import PAPER, TinyDecoder

# stable-diffusion-3-medium-diffusers, vae/config.json
SD3 = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FACTOR = 8


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "SD3": lambda: AutoencoderKL(**SD3).decoder,
    "half": lambda: prune_decoder(AutoencoderKL(**SD3), SNAPFUSION_RATIO).decoder,
    "tiny": lambda: TinyDecoder(**PAPER),
}
"""Each (B, 16, h, w) → (B, 3, 8h, 8w)."""


class Memory(NamedTuple):
    """Bytes resident in a process."""

    before: int
    peak: int


def counted(name: str, pixels: int) -> CostItem:
    """Cost of a forward pass."""
    with torch.device("meta"):
        net, latent = DECODERS[name]().eval(), torch.empty(1, 16, pixels // FACTOR, pixels // FACTOR)
    return count_network(net, latent, groups={net: name}).by_group[name]


def ready(name: str, pixels: int) -> tuple[nn.Module, Tensor]:
    """A decoder and a latent, both in channels-last memory."""
    torch.manual_seed(0)
    net = DECODERS[name]().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net, torch.randn(1, 16, pixels // FACTOR, pixels // FACTOR).to(memory_format=torch.channels_last)


def memory(name: str, pixels: int) -> Memory:
    """Resident bytes of this process, which is to be a fresh one, before a pass, and their peak during it."""
    net, latent = ready(name, pixels)
    before = psutil.Process().memory_info().rss
    with torch.inference_mode():
        net(latent)
    unit = 1 if sys.platform == "darwin" else 1024
    return Memory(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@torch.inference_mode()
def timed(pixels: int, passes: int) -> dict[str, list[float]]:
    """Seconds of each decoder's passes, measured round-robin."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    decoders = {name: ready(name, pixels) for name in DECODERS}
    taken: dict[str, list[float]] = {name: [] for name in DECODERS}
    for i in range(passes + 1):
        for name, (net, latent) in decoders.items():
            began = clock()
            net(latent)
            seconds = clock() - began
            print(f"{name}: pass {i}, {seconds:.2f} s", file=sys.stderr, flush=True)
            if i:
                taken[name].append(seconds)
    return taken


def table(counts: dict[str, CostItem], held: dict[str, Memory], taken: dict[str, list[float]], clock: str) -> str:
    """The results as a Markdown table, with the ratio of SD3's number to each of the others."""
    memories, passes = held.items(), len(taken["tiny"])
    spread = ", ".join(f"{name} {min(seconds):.2f} to {max(seconds):.2f}" for name, seconds in taken.items())
    rows = [
        ("params, M", {name: part.params / 1e6 for name, part in counts.items()}, ".3f", "counted"),
        ("MACs, G", {name: part.macs / 1e9 for name, part in counts.items()}, ".1f", "counted"),
        ("written, fp16 MB", {name: part.written_bytes / 1e6 for name, part in counts.items()}, ".0f", "counted"),
        (
            "activations, fp16 MB",
            {name: part.activation_bytes / 1e6 for name, part in counts.items()},
            ".0f",
            "counted, peak",
        ),
        (
            "memory above before, fp32 MB",
            {name: (m.peak - m.before) / 1e6 for name, m in memories},
            ".0f",
            "measured, peak",
        ),
        ("memory of the process, fp32 MB", {name: m.peak / 1e6 for name, m in memories}, ".0f", "measured, peak"),
        (
            "time, fp32 s",
            {name: float(np.median(seconds)) for name, seconds in taken.items()},
            ".2f",
            f"measured, {clock}, median of {passes}: {spread}",
        ),
    ]
    others = [name for name in DECODERS if name != "SD3"]
    header = ["", *DECODERS, *(f"SD3 over {name}" for name in others), ""]
    lines = [_line(header), "|---" * len(header) + "|"]
    for title, of, form, how in rows:
        ratios = [f"{of['SD3'] / of[name]:.1f}×" for name in others]
        lines.append(_line([title, *(f"{of[name]:{form}}" for name in DECODERS), *ratios, how]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=1024, help="of the image, a multiple of 8")
    parser.add_argument("--passes", type=int, default=3, help="that count, of each")
    options = parser.parse_args()
    if options.pixels < FACTOR or options.pixels % FACTOR or options.passes < 1:
        parser.error(f"--pixels must be a multiple of {FACTOR}, and --passes at least 1")
    counts = {name: counted(name, options.pixels) for name in DECODERS}
    held = {}
    for name in DECODERS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            held[name] = process.submit(memory, name, options.pixels).result()
    taken = timed(options.pixels, options.passes)
    threads = torch.get_num_threads()
    print(f"{chip()}, {operating_system()}, torch {torch.__version__}, {threads} thread(s), {options.pixels} px\n")
    print(table(counts, held, taken, "processor time" if threads == 1 else "wall clock"))


if __name__ == "__main__":
    main()
