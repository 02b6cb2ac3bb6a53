"""Benchmark of full-size nets: ours compared with diffusers' of equal widths and depths, and the ablation's rows.

All nets of a run are timed round-robin in one process, so that changes of the machine's speed affect all alike; ratios
are taken within a round. The nets share one storage for their random weights and one for the optimizer's averages. A
train step is forward, backward and a step of fused AdamW, on the mean square of the output.

Nets run in float32 on the CPU: diffusers' in both memory layouts, ours in channels-last, with and without
`snapgen.models.onednn`. With one thread, times are the CPU time of that thread, which excludes other processes;
otherwise they are wall-clock times. `benchmarks.gpu_check` runs such nets on CUDA.

    python benchmarks/peers.py --peers dreamlite unet2d [--latent 32] [--batch 1] [--passes 7] [--what forward train]
    python benchmarks/peers.py --rows 0 1 2a 2b 3 4 5 --latent 128 --passes 3 --what forward [--backend onnxruntime]

Memory: weights, their gradients and two averages of the largest net, 6 GB for ``dreamlite``, 10 GB for ``unet2d``;
with ``--what forward`` a quarter of that. Results: ``reports/results/peers.md``.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DreamLiteUNetModel, UNet2DConditionModel
from torch import Tensor, nn

from archsearch.cost.counter import module_cost
from archsearch.latency.host import HostBackend, HostConfig
from archsearch.machine import chip, operating_system
from archsearch.spaces.loading import load_space
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.presets import preset
from snapgen.architecture.schema import Architecture
from snapgen.models import onednn as linear
from snapgen.models.unet import UNet

TOKENS = 77
ALIGNED = 16  # numbers: 64 bytes of float32
LEARNING_RATE = 1e-6
ONEDNN = linear.AVAILABLE

# The baseline's widths and depths in diffusers' words, and the time embedding's width as ours has it.
SHAPE = {
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": (256, 512, 896),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 4),
    "attention_head_dim": (4, 8, 14),  # diffusers means heads
    "cross_attention_dim": 768,
    "use_linear_projection": True,
    "time_embedding_dim": 896,
}
PLAIN = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
# DreamLite's first stage has residual blocks before its cross-attention; ours has cross-attention alone.
AS_DREAMLITE = {"down[0].num_res_blocks": 2, "time.projection": "expanded", "rope": False}

Make = Callable[[], nn.Module]
Times = dict[str, dict[str, list[float]]]
"""Seconds in every round, by kind of pass and name of the net."""


def ours(arch: Architecture) -> Make:
    """Build our net."""
    return lambda: UNet(arch)


def dreamlite() -> nn.Module:
    """DreamLite's net with SnapGen's choices that it supports: MQA, QK norm, feed-forward ratio 3."""
    net: nn.Module = DreamLiteUNetModel(**SHAPE, ff_mult=3, num_kv_heads=1)
    return net


def unet2d() -> nn.Module:
    """The thin, short SDXL that is the baseline of SnapGen's ablation."""
    net: nn.Module = UNet2DConditionModel(**SHAPE, **PLAIN)
    return net


# Ours first.
PEERS: dict[str, dict[str, Make]] = {
    "dreamlite": {
        "ours, as DreamLite": ours(apply_overrides(preset("snapgen-imagenet"), AS_DREAMLITE)),
        "ours, snapgen-imagenet": ours(preset("snapgen-imagenet")),
        "DreamLiteUNetModel": dreamlite,
    },
    "unet2d": {"ours, snapgen-baseline": ours(preset("snapgen-baseline")), "UNet2DConditionModel": unet2d},
}


def rows() -> dict[str, Architecture]:
    """The ablation's rows by their names in the table."""
    space = load_space("snapgen")
    found = {"0": space.base}
    for name, point in space.reference_points().items():
        if name.startswith("row "):
            found[name.removeprefix("row ")] = space.architecture(point)
    return found


@dataclass(frozen=True)
class Entry:
    """A net and how it runs."""

    name: str
    make: Make
    layout: torch.memory_format = torch.channels_last
    onednn: bool = True
    """Whether our linear layers may go through oneDNN (`snapgen.models.onednn`)."""


@dataclass(frozen=True)
class Setting:
    """Device and inputs of all nets."""

    device: torch.device
    threads: int
    latent: int
    batch: int

    @property
    def dtype(self) -> torch.dtype:
        """Data type of weights and inputs."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def inputs(self, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A sample, timesteps in [0, 1] and a context."""
        noise = torch.Generator().manual_seed(0)
        sample = torch.randn(self.batch, 16, self.latent, self.latent, generator=noise)
        context = torch.randn(self.batch, TOKENS, 768, generator=noise)
        place = device or self.device
        return sample.to(place, self.dtype), torch.full((self.batch,), 0.5, device=place), context.to(place, self.dtype)

    def now(self) -> float:
        """Current time in seconds, after synchronizing the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.thread_time() if self.device.type == "cpu" and self.threads == 1 else time.perf_counter()


class Storage:
    """One memory that every net's tensors are views of, one after the other."""

    def __init__(self, size: int, setting: Setting, *, deviation: float) -> None:
        self._numbers = torch.empty(size, dtype=setting.dtype, device=setting.device)
        self._numbers.normal_(0, deviation, generator=torch.Generator(setting.device).manual_seed(0))

    @staticmethod
    def size(net: nn.Module) -> int:
        """Number of elements of the storage that a net uses."""
        return sum(_aligned(p) for p in net.parameters())

    def views(self, net: nn.Module, layout: torch.memory_format) -> Iterator[Tensor]:
        """Views with the shapes of the parameters; convolution weights in that memory layout."""
        begin = 0
        for parameter in net.parameters():
            flat = self._numbers[begin : begin + parameter.numel()]
            begin += _aligned(parameter)
            if parameter.dim() == 4 and layout is torch.channels_last:
                outside, inside, height, width = parameter.shape
                yield flat.view(outside, height, width, inside).permute(0, 3, 1, 2)
            else:
                yield flat.view(parameter.shape)


def _aligned(parameter: Tensor) -> int:
    return -(-parameter.numel() // ALIGNED) * ALIGNED


class Contestant:
    """A net whose weights are views of the common storage."""

    def __init__(self, entry: Entry, setting: Setting, weights: Storage, averages: Sequence[Storage]) -> None:
        self.setting, self.onednn = setting, entry.onednn
        with torch.device("meta"):
            net = entry.make()
        assert not list(net.buffers()), "only parameters are lent"
        self._lend(net, list(weights.views(net, entry.layout)))
        sample, self.timestep, self.context = setting.inputs()
        self.sample = sample.contiguous(memory_format=entry.layout)
        self.theirs = not isinstance(net, UNet)
        self.net = net.train()
        if averages:
            self.optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, fused=True)
            means, squares = (storage.views(net, entry.layout) for storage in averages)
            for parameter, mean, square in zip(net.parameters(), means, squares, strict=True):
                steps = torch.zeros((), device=setting.device)
                self.optimizer.state[parameter] = {"step": steps, "exp_avg": mean, "exp_avg_sq": square.abs_()}

    @staticmethod
    def _lend(net: nn.Module, views: Sequence[Tensor]) -> None:
        names = [name for name, _ in net.named_parameters()]
        for name, view in zip(names, views, strict=True):
            place, _, last = name.rpartition(".")
            setattr(net.get_submodule(place), last, nn.Parameter(view))

    def forward(self) -> Tensor:
        """The net's output."""
        if self.theirs:
            return self.net(self.sample, 1000 * self.timestep, self.context, return_dict=False)[0]  # type: ignore[no-any-return]
        return self.net(self.sample, self.timestep, self.context)  # type: ignore[no-any-return]

    def forward_seconds(self) -> dict[str, float]:
        """Seconds of one forward pass without gradients."""
        began = self.setting.now()
        with torch.inference_mode():
            out = self.forward()
        seconds = self.setting.now() - began
        assert out.isfinite().all()
        return {"forward": seconds}

    def train_seconds(self) -> dict[str, float]:
        """Seconds of one train step, and of its forward and backward pass."""
        began = self.setting.now()
        torch.autograd.backward(self.forward().float().square().mean())
        middle = self.setting.now()
        self.optimizer.step()
        ended = self.setting.now()
        self.optimizer.zero_grad()
        return {"forward and backward": middle - began, "train step": ended - began}


def timed(entries: Sequence[Entry], setting: Setting, what: Sequence[str], passes: int) -> Times:
    """Seconds of every net in every round, after a warm-up round."""
    with torch.device("meta"):
        size = max(Storage.size(entry.make()) for entry in entries)
    weights = Storage(size, setting, deviation=0.02)
    averages = [Storage(size, setting, deviation=1e-3) for _ in range(2 if "train" in what else 0)]
    contestants = {entry.name: Contestant(entry, setting, weights, averages) for entry in entries}
    times: Times = {}
    for turn in range(passes + 1):
        for name, contestant in contestants.items():
            linear.AVAILABLE = contestant.onednn and ONEDNN
            found = contestant.forward_seconds() if "forward" in what else {}
            found |= contestant.train_seconds() if "train" in what else {}
            if turn:
                for part, seconds in found.items():
                    times.setdefault(part, {}).setdefault(name, []).append(seconds)
    return times


def through_onnxruntime(archs: Mapping[str, Architecture], setting: Setting, passes: int) -> Times:
    """Seconds measured by `archsearch.latency.host.HostBackend`: per round, its median over several runs."""
    host = HostBackend(HostConfig(threads=setting.threads, timeout=3600))
    times: dict[str, list[float]] = {}
    for _ in range(passes):
        for name, arch in archs.items():
            times.setdefault(name, []).append(host.measure(arch, setting.latent, TOKENS).median_ms / 1e3)
    return {"forward": times}


def entries_of(makes: Mapping[str, Make]) -> list[Entry]:
    """Variants of each net; the others are compared with the first."""
    entries = [Entry(name, make) for name, make in makes.items()]
    if len(peers := [entry for entry in entries if entry.name.endswith("Model")]):
        entries += [Entry(f"{e.name}, contiguous", e.make, torch.contiguous_format) for e in peers]
        entries += [Entry(f"{entries[0].name}, without oneDNN", entries[0].make, onednn=False)] if ONEDNN else []
    return entries


def show(times: Times, makes: Mapping[str, Make], setting: Setting) -> None:
    """Markdown tables of the nets, their times, and the ratios to the first."""
    print("| | params, M | GMACs |\n|---|---|---|")
    for name, make in makes.items():
        with torch.device("meta"):
            cost = module_cost(make().eval(), *setting.inputs(torch.device("meta")))
        print(f"| {name} | {cost.params / 1e6:.1f} | {cost.macs / 1e9:.1f} |")
    compare(times)


def compare(times: Times) -> None:
    """Markdown tables of times, and of the ratios to the first net within each round."""
    for what, of in times.items():
        first = next(iter(of))
        print(f"\n| {what} | ms | quartiles | {first} over it | quartiles |\n|---|---|---|---|---|")
        for name, seconds in of.items():
            milliseconds, ratios = np.array(seconds) * 1e3, np.array(of[first]) / seconds
            print(f"| {name} | {_spread(milliseconds, '.1f')} | {_spread(ratios, '.3f')} |")


def _spread(values: np.ndarray, form: str) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:{form}} | {low:{form}}–{high:{form}}" if len(values) > 1 else f"{middle:{form}} | one turn"


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    archs = rows()
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--peers", nargs="+", choices=PEERS, help="whose nets ours are timed against")
    group.add_argument("--rows", nargs="+", choices=archs, help="of the ablation; the first is what others compare to")
    parser.add_argument("--latent", type=int, default=32, help="height and width, a multiple of 4")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--passes", type=int, default=7, help="turns that count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--what", nargs="+", choices=["forward", "train"], default=["forward", "train"])
    parser.add_argument(
        "--backend", choices=["torch", "onnxruntime"], default="torch", help="onnxruntime: rows, forward"
    )
    options = parser.parse_args()
    if options.latent < 4 or options.latent % 4:
        parser.error("--latent must be a multiple of 4")
    if min(options.batch, options.passes, options.threads) < 1:
        parser.error("--batch, --passes and --threads must be at least 1")
    onnxruntime = options.backend == "onnxruntime"
    if onnxruntime and (options.peers or options.batch > 1 or options.what != ["forward"]):
        parser.error("--backend onnxruntime times --rows at batch 1, --what forward")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    groups = [PEERS[name] for name in options.peers or ()]
    chosen = {f"row {name}": archs[name] for name in options.rows or ()}
    groups += [{name: ours(arch) for name, arch in chosen.items()}] if chosen else []
    setting = Setting(torch.device("cpu"), options.threads, options.latent, options.batch)
    where = f"{chip()}, {options.threads} thread(s), {operating_system()}, torch {torch.__version__}"
    about = f"latent {options.latent}, batch {options.batch}, {options.passes} passes, {options.backend}"
    for makes in groups:
        print(f"\n{where}; {about}\n", flush=True)
        if onnxruntime:
            times = through_onnxruntime(chosen, setting, options.passes)
        else:
            times = timed(entries_of(makes), setting, options.what, options.passes)
        show(times, makes, setting)


if __name__ == "__main__":
    main()
