"""A step of training: our nets against diffusers' `UNet2DConditionModel` of the same widths and blocks.

A step is what `snapgen.loop` does with a batch: forward and backward through a turn (`snapgen.objectives`), clipping
and the optimizer (`snapgen.optimizers`), the weights' average; every net with the same settings. Nets are timed in one
process, in turns, a median of several steps each; ratios are of the same turn. ``--alone`` keeps one net at a time in
memory and makes it anew every turn. With one thread on the CPU a time is that thread's processor time.

Peak memory is of a fresh process that makes a net and takes three steps: on the CPU the growth of its largest resident
size since everything was imported (weights, gradients, averages, activations and what the allocator holds; the garbage
of importing hides up to its own size), on CUDA ``torch.cuda.max_memory_allocated``.

    python -m benchmarks.train_step --size embedded --latent 8 16 --batch 32 --optimizer adamw muon
    python -m benchmarks.train_step --size full --latent 16 --batch 1 --optimizer adamw --alone
    python -m benchmarks.train_step --size embedded --latent 8 --batch 32 --what loop
    python -m benchmarks.train_step --utilisation --size full --latent 32 128 --batch 64 8 [--peak FLOPS]

``--utilisation`` is for CUDA: the share of the device's dense bfloat16 peak that a step of the 379 M net gets (6 FLOPs
a MAC of `archsearch.cost`: 2 forward, 4 backward), latents of 32 and 128 for 256 and 1024 px, channels-last, eager and
compiled. Nothing here has been run on CUDA: it was written on a machine without.
Results: ``reports/results/train_step.md``.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import re
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from archsearch.cost import module_cost
from archsearch.machine import chip, operating_system
from benchmarks.peers import PLAIN, SHAPE, Make, Times, compare
from snapgen import teacher
from snapgen.conditioning import Captions, EncoderSettings, Widths, layout
from snapgen.feed import Batch, Feed, Part, training_times
from snapgen.loop import Loop
from snapgen.objectives import FlowTurn
from snapgen.paths import changed
from snapgen.presets import preset
from snapgen.rows import Rows
from snapgen.stages import Distillation, FlowStage
from snapgen.text import Embeddings
from snapgen.training import Average, optimizers_of
from snapgen.unet import UNet

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s of NVIDIA's SXM modules, from its data sheets."""
FLOPS_A_MAC = 6
IMAGES = 256
"""Of the feed; random latents and captions."""
LOOP_STEPS = 10

EMOJI = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 96, 128),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (4, 6, 8),  # diffusers means heads
    "cross_attention_dim": 384,
    "norm_num_groups": 16,
    "use_linear_projection": True,
    "time_embedding_dim": 128,
    **PLAIN,
}
# The baseline with the widths and depths above.
AS_EMOJI: dict[str, Any] = {
    "latent_channels": 4,
    "context_width": 384,
    "norm_groups": 16,
    "time.frequencies": 64,
    "time.width": 128,
    "mid.head_width": 16,
    "mid.transformer_depth": 2,
    **{f"{way}[{level}].channels": width for way in ("down", "up") for level, width in enumerate((64, 96, 128))},
    **{f"{way}[{level}].head_width": 16 for way in ("down", "up") for level in range(3)},
    **{f"down[{level}].residual_blocks": 1 for level in range(3)},
    **{f"up[{level}].residual_blocks": 2 for level in range(3)},
    **{f"down[{level}].transformers": 1 for level in (1, 2)},
    **{f"up[{level}].transformers": 2 for level in (1, 2)},
    **{f"{way}[{level}].transformer_depth": level for way in ("down", "up") for level in (1, 2)},
}
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64, "pos_embed_max_size": 192}
SMALL_TEACHER = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32, "pos_embed_max_size": 32}
"""Of ``studies/train_emoji.yaml``."""


class Theirs(nn.Module):
    """diffusers' net, called as ours."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, sample: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """The output, for ``t`` in [0, 1]."""
        return self.net(sample, 1000 * t, context, return_dict=False)[0]  # type: ignore[no-any-return]

    def enable_gradient_checkpointing(self) -> None:
        """diffusers' own."""
        self.net.enable_gradient_checkpointing()


def theirs(**shape: Any) -> nn.Module:
    """diffusers' net of a shape."""
    return Theirs(UNet2DConditionModel(**shape))


@dataclass(frozen=True)
class Entry:
    """A net and how it is trained."""

    name: str
    make: Make
    layout: torch.memory_format = torch.channels_last
    checkpointed: bool = False
    distilled: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Size:
    """Nets that are comparable, and what they are trained on."""

    entries: tuple[Entry, ...]
    """Ours first."""
    channels: int
    """Of the latents."""
    captions: Widths
    teacher: dict[str, int]
    teaching: Widths
    """The teacher's captions."""


def _entries(name: str, ours: Make, twin: Make, shape: dict[str, Any]) -> tuple[Entry, ...]:
    peer = partial(theirs, **shape)
    return (
        Entry(f"ours, {name}", ours),
        Entry("ours, in UNet2D's shape", twin),
        Entry("UNet2DConditionModel", peer),
        Entry("UNet2DConditionModel, contiguous", peer, torch.contiguous_format),
        Entry(f"ours, {name}, checkpointed", ours, checkpointed=True),
        Entry("UNet2DConditionModel, checkpointed", peer, checkpointed=True),
        Entry(f"ours, {name}, distilled", ours, distilled=True),
    )


SIZES = {
    "embedded": Size(
        _entries(
            "snapgen-emoji",
            partial(UNet, preset("snapgen-emoji")),
            partial(UNet, changed(preset("snapgen-baseline"), AS_EMOJI)),
            EMOJI,
        ),
        channels=4,
        captions=Widths(384, 16, 384),
        teacher=SMALL_TEACHER,
        teaching=Widths(384, 16, 384),
    ),
    "full": Size(
        _entries(
            "snapgen-t2i",
            partial(UNet, preset("snapgen-t2i")),
            partial(UNet, changed(preset("snapgen-baseline"), {"context_width": 2304})),
            {**SHAPE, **PLAIN, "cross_attention_dim": 2304},
        ),
        channels=16,
        captions=Widths(2304, 154, 0),
        teacher=SD35_LARGE,
        teaching=Widths(4096, 154, 2048),
    ),
}


@dataclass(frozen=True)
class Setting:
    """Where and how all nets of a table are trained."""

    size: Size
    device: torch.device
    threads: int
    latent: int
    stage: FlowStage = field(default_factory=lambda: FlowStage(name="timed", resolution=32, images=1))

    def now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.thread_time() if self.device.type == "cpu" and self.threads == 1 else time.perf_counter()

    def feed(self, *, taught: bool) -> Feed:
        """Random latents and captions."""
        noise = torch.Generator().manual_seed(0)
        shape = (IMAGES, self.size.channels, self.latent, self.latent)
        return Feed(
            Rows([torch.randn(shape, generator=noise).half()]),
            captions_of(self.size.captions, noise),
            teacher=captions_of(self.size.teaching, noise) if taught else None,
            dropout=[0.1],
            batch=self.stage.batch,
            times=training_times(1),
            seed=0,
            device=self.device,
        )


def captions_of(shape: Widths, noise: torch.Generator) -> Captions:
    """Random embeddings of such a shape, one a latent."""
    tokens, pooled = (IMAGES, shape.tokens, shape.context), (IMAGES, max(1, shape.pooled))
    table = Embeddings(*(Rows([torch.randn(size, generator=noise).half()]) for size in (tokens, pooled)))
    encoder = EncoderSettings(tokens=shape.tokens, pooled=shape.pooled > 0)
    return Captions([table], torch.arange(IMAGES), layout([encoder], [(shape.context, pooled[1])]))


class Contestant:
    """A net with random weights and what trains it."""

    def __init__(self, entry: Entry, setting: Setting) -> None:
        self.setting = setting
        with torch.device("meta"):
            net = entry.make()
        self.net = filled(net, setting.device).to(memory_format=entry.layout).train()  # type: ignore[call-overload]
        if entry.checkpointed:
            self.net.enable_gradient_checkpointing()
        self.teacher = self._teacher() if entry.distilled else None
        self.teacher_seconds = 0.0
        distillation = Distillation() if entry.distilled else None
        self.turn = FlowTurn(self.net, prediction="velocity", distillation=distillation, teacher=self.teacher)
        self.turn.to(setting.device)
        self.feed = setting.feed(taught=entry.distilled)
        self.batch = self.feed.batch(Part(1))
        self.optimizers = optimizers_of(self.turn, setting.stage)
        self.average = Average(self.net, setting.stage.ema)
        self.steps = 0
        if entry.compiled:
            self.turn.compile()

    def _teacher(self) -> teacher.Teacher:
        size = self.setting.size
        with torch.device("meta"):
            made = teacher.built(
                size.teacher,
                latent_channels=size.channels,
                context_width=size.teaching.context,
                pooled_width=size.teaching.pooled,
                sample_size=self.setting.latent,
                seed=0,
            )
        made = made.bfloat16() if self.setting.device.type == "cuda" else made
        made = filled(made, self.setting.device).eval().requires_grad_(False)
        began: list[float] = []
        made.register_forward_pre_hook(lambda *_: began.append(self.setting.now()))
        made.register_forward_hook(lambda *_: self._taught(self.setting.now() - began.pop()))
        return made

    def _taught(self, seconds: float) -> None:
        self.teacher_seconds += seconds

    def step(self, batch: Batch | None = None) -> dict[str, float]:
        """Seconds of one step and of its parts."""
        stage, now = self.setting.stage, self.setting.now
        self.steps += 1
        self.teacher_seconds = 0.0
        times = [now()]
        with torch.autocast(self.setting.device.type, torch.bfloat16, enabled=stage.precision == "bfloat16"):
            loss = self.turn(self.batch if batch is None else batch)["loss"]
        torch.autograd.backward(loss)
        times.append(now())
        self.optimizers.step(1.0, skip_bad=True)
        times.append(now())
        self.average.update(self.steps)
        times.append(now())
        parts = ("forward and backward", "clip and optimizer", "average")
        found = {name: after - before for name, before, after in zip(parts, times, times[1:], strict=False)}
        taught = {"teacher, of forward and backward": self.teacher_seconds} if self.teacher else {}
        return {"train step": times[-1] - times[0], **found, **taught}


@torch.no_grad()
def filled(net: nn.Module, device: torch.device) -> nn.Module:
    """A net of the meta device on a real one: matrices small and random, scales one, biases zero."""
    net.to_empty(device=device)
    noise = torch.Generator(device).manual_seed(0)
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.ndim > 1:
            tensor.normal_(0, 0.02, generator=noise)
        else:
            tensor.fill_(float(name.endswith("weight")))
    return net


def timed(entries: Sequence[Entry], setting: Setting, *, turns: int, steps: int, alone: bool) -> Times:
    """Every net's median step in every turn; two steps warm up."""
    times: Times = {}
    kept: dict[str, Contestant] = {}
    for _ in range(turns):
        for entry in entries:
            contestant = kept.pop(entry.name, None)
            if contestant is None:
                contestant = Contestant(entry, setting)
                for _ in range(2):
                    contestant.step()
            for part, seconds in _medians(contestant, steps).items():
                times.setdefault(part, {}).setdefault(entry.name, []).append(seconds)
            if not alone:
                kept[entry.name] = contestant
            del contestant
            gc.collect()
    return times


def _medians(contestant: Contestant, steps: int) -> dict[str, float]:
    taken = [contestant.step() for _ in range(steps)]
    return {part: statistics.median(seconds[part] for seconds in taken) for part in taken[0]}


def peak_memory(entry: Entry, setting: Setting) -> int:
    """Bytes that a net's training takes at most, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(_peak_here, entry, setting).result()


def _peak_here(entry: Entry, setting: Setting) -> int:
    torch.set_num_threads(setting.threads)
    before = _largest(setting.device)
    contestant = Contestant(entry, setting)
    for _ in range(3):
        contestant.step()
    return _largest(setting.device) - before


def _largest(device: torch.device) -> int:
    """Bytes held at most by this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # here ru_maxrss begins with the parent's
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def looped(setting: Setting, turns: int) -> Times:
    """A step of the loop, with its feed and a report every ten steps, against the bare step on one batch of it."""
    contestant = Contestant(setting.size.entries[0], setting)
    stage = setting.stage.model_copy(update={"images": setting.stage.batch * LOOP_STEPS * (turns + 1)})
    cpu = setting.device.type == "cpu"
    accelerator = Accelerator(cpu=cpu)
    loop = Loop(stage, contestant.net, {"flow": contestant.turn}, contestant.feed, accelerator=accelerator)
    loop.report_every = LOOP_STEPS
    began, found = [setting.now()], Times(step={"the loop": [], "bare": [], "its feed alone": []})

    def pause() -> None:
        seconds = setting.now() - began[0]
        bare = statistics.mean(contestant.step()["train step"] for _ in range(LOOP_STEPS))
        fed = setting.now()
        for number in range(LOOP_STEPS):
            contestant.feed.batch(Part(number + 1))
        if loop.step > LOOP_STEPS:  # a first turn warms up
            feeding = (setting.now() - fed) / LOOP_STEPS
            for name, one in zip(found["step"], (seconds / LOOP_STEPS, bare, feeding), strict=True):
                found["step"][name].append(one)
        began[0] = setting.now()

    loop.run(report=lambda _: None, due=lambda step: step % LOOP_STEPS == 0, pause=pause)
    return found


def macs(entry: Entry, setting: Setting) -> tuple[int, int]:
    """Of a forward pass over one image, and parameters."""
    with torch.device("meta"):
        sample = torch.empty(1, setting.size.channels, setting.latent, setting.latent)
        context = torch.empty(1, setting.size.captions.tokens, setting.size.captions.context)
        cost = module_cost(entry.make().eval(), sample, torch.empty(1), context)
    return cost.macs, cost.params


def utilisation(macs: int, images: int, seconds: float, peak: float) -> float:
    """The share of a device's peak FLOP/s that a step gets: ``macs`` of one image's forward pass."""
    return FLOPS_A_MAC * macs * images / (seconds * peak)


def show_utilisation(setting: Setting, latents: Sequence[int], batches: Sequence[int], peak: float, steps: int) -> None:
    """The first net's, eager and compiled; a batch that does not fit is halved."""
    ours = setting.size.entries[0]
    print("| latent | batch | | params, M | GMACs an image | ms a step | images/s | of the peak | peak memory, GiB |")
    print("|" + "---|" * 9)
    for latent, batch in zip(latents, batches, strict=True):
        for compiled in (False, True) if setting.device.type == "cuda" else (False,):
            entry = replace(ours, compiled=compiled)
            seconds, tried, held = _fitting(entry, replace(setting, latent=latent), batch, steps)
            count, params = macs(entry, replace(setting, latent=latent))
            share = utilisation(count, tried, seconds, peak)
            print(
                f"| {latent} | {tried} | {'compiled' if compiled else 'eager'} "
                f"| {params / 1e6:.1f} | {count / 1e9:.1f} "
                f"| {1e3 * seconds:.1f} | {tried / seconds:.1f} | {share:.1%} | {held / 2**30:.2f} |",
                flush=True,
            )


def _fitting(entry: Entry, setting: Setting, batch: int, steps: int) -> tuple[float, int, int]:
    """Seconds of a step, images in it, bytes."""
    while True:
        stage = setting.stage.model_copy(update={"batch": batch})
        try:
            if setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            contestant = Contestant(entry, replace(setting, stage=stage))
            for _ in range(3):
                contestant.step()
            return _medians(contestant, steps)["train step"], batch, _largest(setting.device)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        contestant = None  # its memory, before the next is made
        gc.collect()
        torch.cuda.empty_cache()
        batch //= 2


def show(entries: Sequence[Entry], setting: Setting) -> None:
    """What each net is, and what its training holds."""
    print("| | params, M | GMACs an image | peak memory, MiB | first over it |\n|---|---|---|---|---|")
    first = 0
    for entry in entries:
        count, params = macs(entry, setting)
        held = peak_memory(entry, setting)
        first = first or held
        row = f"| {entry.name} | {params / 1e6:.2f} | {count / 1e9:.2f} | {held / 2**20:.0f} | {first / held:.2f} |"
        print(row, flush=True)


def settings_of(options: argparse.Namespace) -> Iterator[tuple[str, Setting]]:
    """A table each."""
    for latent in options.latent:
        for optimizer in options.optimizer:
            stage = FlowStage(
                name="timed",
                resolution=8 * latent,
                images=options.batch[0],
                batch=options.batch[0],
                optimizer=optimizer,
                precision="bfloat16" if options.device.type == "cuda" else "float32",
            )
            yield optimizer, Setting(SIZES[options.size], options.device, options.threads, latent, stage)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="embedded")
    parser.add_argument("--latent", type=int, nargs="+", default=[8], help="height and width, a multiple of 4")
    parser.add_argument("--batch", type=int, nargs="+", default=[32], help="--utilisation: one a latent")
    parser.add_argument("--optimizer", nargs="+", choices=["adamw", "muon"], default=["adamw"])
    parser.add_argument("--only", nargs="+", type=int, help="nets by number, from 0; others compare to the first")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="one net at a time in memory")
    parser.add_argument("--what", nargs="+", choices=["memory", "time", "loop"], default=["memory", "time"])
    parser.add_argument("--utilisation", action="store_true", help="of the device's peak")
    parser.add_argument("--peak", type=float, help="the device's dense bfloat16 FLOP/s, where it is not known here")
    options = parser.parse_args()
    if any(latent < 4 or latent % 4 for latent in options.latent):
        parser.error("--latent must be a multiple of 4")
    if min(*options.batch, options.turns, options.steps, options.threads) < 1:
        parser.error("--batch, --turns, --steps and --threads must be at least 1")
    if len(options.batch) != (len(options.latent) if options.utilisation else 1):
        parser.error("--batch takes one number, with --utilisation one a latent")
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = options.device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{chip()}, {options.threads} thread(s)"
    peak = options.peak or next((peak for name, peak in PEAKS.items() if cuda and name in where), None)
    if options.utilisation and peak is None:
        parser.error(f"the peak of {where} is not known here; give --peak")
    entries = SIZES[options.size].entries
    if not all(0 <= number < len(entries) for number in options.only or ()):
        parser.error(f"--only takes numbers from 0 to {len(entries) - 1}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    chosen = [entries[number] for number in options.only] if options.only else list(entries)
    for optimizer, setting in settings_of(options):
        about = f"{options.size}, batch {' '.join(map(str, options.batch))}, {optimizer}, {setting.stage.precision}"
        print(f"\n{where}, {operating_system()}, torch {torch.__version__}; {about}", flush=True)
        if options.utilisation:
            show_utilisation(setting, options.latent, options.batch, peak, options.steps)
            break
        print(f"latent {setting.latent}, {options.turns} turns of {options.steps} steps\n", flush=True)
        if "loop" in options.what:
            compare(looped(setting, options.turns))
        if "memory" in options.what:
            show(chosen, setting)
        if "time" in options.what:
            compare(timed(chosen, setting, turns=options.turns, steps=options.steps, alone=options.alone))


if __name__ == "__main__":
    main()
