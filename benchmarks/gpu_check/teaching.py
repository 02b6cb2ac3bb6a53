"""Part 6: a distilled training step, with a teacher of SD3.5-Large's shape and random weights in bfloat16."""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu_check.nets import Fed, peak_of, setting_of
from benchmarks.gpu_check.section import Section, Table
from benchmarks.gpu_check.setup import Setup
from benchmarks.train_step_nets import SIZES, Contestant, Entry
from snapgen.architecture.presets import preset
from snapgen.models.unet import UNet

TEACHER = "teacher, of forward and backward"
RESERVE = 5.0


def run(section: Section, setup: Setup) -> None:
    """Alone and taught, with and without checkpointing, at both latents."""
    device = torch.device(setup.device)
    if setup.device == "cpu":
        torch.set_num_threads(1)
    size = SIZES["embedded" if setup.small else "full"]
    name = "snapgen-emoji" if setup.small else "snapgen-t2i"
    section.say(
        f"{name} under bfloat16's autocast, distilled by output and features from an SD3 transformer of "
        f"{size.teacher['num_layers']} layers of width "
        f"{size.teacher['num_attention_heads'] * size.teacher['attention_head_dim']} in bfloat16; random weights, "
        "fused AdamW. The device is waited for around the teacher, so that its share is known. Peak memory: student, "
        "its training and the teacher."
    )
    table = section.table(
        "A distilled step", ["latent", "", "batch", "ms a step", "of it the teacher", "images/s", "peak GiB"]
    )
    ours = partial(UNet, preset(name))
    entries = [
        Entry("distilled", ours, distilled=True),
        Entry("alone", ours),
        Entry("distilled, checkpointed", ours, distilled=True, checkpointed=True),
    ]
    for latent, batch in ((8, 2),) if setup.small else ((128, 4), (32, 64)):
        for entry in entries[:2] if setup.small else entries:
            if setup.left() < RESERVE:
                section.say(f"Not taken for want of time: latent {latent}, {entry.name}, and what follows it.")
                return
            setting = setting_of(size, device, latent=latent, batch=batch, waits=True)
            _measure(section, table, entry, setting, steps=1 if setup.small else 4)


def _measure(section: Section, table: Table, entry: Entry, setting: Fed, *, steps: int) -> None:
    """One row; a batch that does not fit is halved."""
    while True:
        gc.collect()  # hooks on a teacher make circles, which hold its memory
        batch = setting.stage.batch
        try:
            with peak_of(setting.device) as peak:
                contestant = Contestant(entry, setting)
                for _ in range(2):
                    contestant.step()
                taken = [contestant.step() for _ in range(steps)]
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                section.say(f"Latent {setting.latent}, {entry.name}: not even one image fits into the memory.")
                return
        contestant = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()
        setting = replace(setting, stage=setting.stage.model_copy(update={"batch": batch // 2}))
    seconds = statistics.median(step["train step"] for step in taken)
    share = statistics.median(step.get(TEACHER, 0.0) / step["train step"] for step in taken)
    held = peak[0] if peak else None
    table.add(
        setting.latent,
        entry.name,
        batch,
        f"{1e3 * seconds:.1f}",
        f"{share:.0%}" if entry.distilled else None,
        f"{batch / seconds:.1f}",
        None if held is None else f"{held / 2**30:.1f}",
    )
    section.record(what="distilled", latent=setting.latent, entry=entry.name, batch=batch, steps=taken, peak_bytes=held)
