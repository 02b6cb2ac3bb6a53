from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from benchmarks import train_step
from benchmarks.train_step_nets import SIZES, Contestant, Entry, Setting, Size
from snapgen.conditioning.captions import ConditioningDims
from snapgen.models.unet import UNet
from snapgen.training.batches import MicroBatch
from snapgen.training.loop import Trainer
from snapgen.training.stages import FlowMatchingStage
from tests.snapgen.nets import tiny

TINY = Size(
    (Entry("ours", partial(UNet, tiny())),),
    channels=3,
    captions=ConditioningDims(12, 4, 0),
    teacher={"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "pos_embed_max_size": 4},
    teaching=ConditioningDims(12, 4, 6),
)
STAGE = FlowMatchingStage(
    name="timed",
    resolution=32,
    num_images=12,
    batch_size=4,
    lr_schedule="constant",
    warmup_fraction=0,
    optimizer="adamw",
)
SETTING = Setting(TINY, torch.device("cpu"), 1, 8, STAGE)


@pytest.mark.parametrize("size", SIZES)
def test_the_twin_is_diffusers_net(size: str) -> None:
    twin, theirs = (
        train_step.macs(SIZES[size].entries[number], Setting(SIZES[size], torch.device("cpu"), 1, 8))
        for number in (1, 2)
    )
    assert twin == theirs


def test_the_bare_step_is_the_loops() -> None:
    bare, looped = Contestant(TINY.entries[0], SETTING), Contestant(TINY.entries[0], SETTING)
    loop = Trainer(STAGE, looped.net, {"flow": looped.objective}, looped.feed, accelerator=Accelerator(cpu=True))
    loop.run(report=lambda _: None, should_pause=lambda _: False, pause=lambda: None)
    for step in range(1, 4):
        bare.step(bare.feed.batch(MicroBatch(step)))
    for one, other in zip(bare.net.parameters(), looped.net.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, tensor in bare.ema.state().items():
        assert torch.equal(tensor, loop.ema.state()[name]), name


def test_a_teachers_share_is_within_the_step() -> None:
    entry = replace(TINY.entries[0], distilled=True)
    seconds = Contestant(entry, SETTING).step()
    assert 0 < seconds["teacher, of forward and backward"] < seconds["forward and backward"] < seconds["train step"]
