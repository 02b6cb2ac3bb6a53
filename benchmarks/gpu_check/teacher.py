"""Part 6: a distillation step with a teacher of SD3.5-Large's shape and random weights in bfloat16."""

from __future__ import annotations

import gc
import statistics
from functools import partial

import torch

from benchmarks.gpu_check.nets import halving, peak_of, setting_of
from benchmarks.gpu_check.section import Section, Table
from benchmarks.gpu_check.setup import Setup
from benchmarks.train_step_nets import SIZES, Contestant, Entry, Setting
from snapgen.architecture.presets import preset
from snapgen.models.unet import UNet

TEACHER = "teacher, of forward and backward"
MIN_ENTRY_SECONDS = 5.0
"""Remaining time below which no further measurement is started."""


def run(section: Section, setup: Setup) -> None:
    """Time a step with and without a teacher and with checkpointing, at both latent sizes."""
    device = torch.device(setup.device)
    if setup.device == "cpu":
        torch.set_num_threads(1)
    size = SIZES["embedded" if setup.small else "full"]
    name = "snapgen-emoji" if setup.small else "snapgen-t2i"
    section.say(
        f"{name} under bfloat16 autocast, with output and feature distillation from an SD3 transformer with "
        f"{size.teacher['num_layers']} layers and width "
        f"{size.teacher['num_attention_heads'] * size.teacher['attention_head_dim']} in bfloat16; random weights, "
        "fused AdamW. The device is synchronized before and after the teacher to measure its share. Peak memory "
        "includes the student, its training state and the teacher."
    )
    table = section.table(
        "A distillation step", ["latent", "", "batch", "ms per step", "share of the teacher", "images/s", "peak GiB"]
    )
    student = partial(UNet, preset(name))
    entries = [
        Entry("distilled", student, distilled=True),
        Entry("alone", student),
        Entry("distilled, checkpointed", student, distilled=True, checkpointed=True),
    ]
    for latent, batch in ((8, 2),) if setup.small else ((128, 4), (32, 64)):
        for entry in entries[:2] if setup.small else entries:
            if setup.left() < MIN_ENTRY_SECONDS:
                section.say(f"Skipped for lack of time: latent {latent}, {entry.name} and all measurements after it.")
                return
            setting = setting_of(size, device, latent=latent, batch=batch, waits=True)
            _measure(section, table, entry, setting, steps=1 if setup.small else 4)


def _measure(section: Section, table: Table, entry: Entry, setting: Setting, *, steps: int) -> None:
    """Measure one row; a batch that does not fit into memory is halved."""
    for fitting in halving(setting):
        gc.collect()  # the hooks on a teacher form reference cycles that keep its memory
        batch = fitting.stage.batch_size
        try:
            with peak_of(setting.device) as peak:
                contestant = Contestant(entry, fitting)
                for _ in range(2):
                    contestant.step()
                timings = [contestant.step() for _ in range(steps)]
            break
        except torch.OutOfMemoryError:
            contestant = None  # type: ignore[assignment]
    else:
        section.say(f"Latent {setting.latent}, {entry.name}: not even a batch of one image fits into memory.")
        return
    seconds = statistics.median(step["train step"] for step in timings)
    share = statistics.median(step.get(TEACHER, 0.0) / step["train step"] for step in timings)
    peak_bytes = peak[0] if peak else None
    table.add(
        setting.latent,
        entry.name,
        batch,
        f"{1e3 * seconds:.1f}",
        f"{share:.0%}" if entry.distilled else None,
        f"{batch / seconds:.1f}",
        None if peak_bytes is None else f"{peak_bytes / 2**30:.1f}",
    )
    section.record(
        what="distilled", latent=setting.latent, entry=entry.name, batch=batch, steps=timings, peak_bytes=peak_bytes
    )
