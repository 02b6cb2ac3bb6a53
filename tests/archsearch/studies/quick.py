"""A scorer that takes milliseconds and always gives the same numbers, and a study to use it on.

As a program it runs that study: ``python -m tests.archsearch.studies.quick FOLDER '{"trials": 8}'``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol
from archsearch.score import Cost, LatencyRecord, Quality
from archsearch.spaces.space import Space
from archsearch.stats.estimate import Estimate
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.run import search
from archsearch.studies.search.scorer import CHECKPOINT
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write
from snapgen.progress import ProgressCallback
from snapgen.seeding import derive_seed
from tests.records import latency_record

SPACE = """
latent_size: 8
base:
  latent_channels: 12
  context_dim: 384
  norm_groups: 8
  time: {embed_dim: 64, hidden_dim: 128}
  down:
    - {channels: 16, num_res_blocks: 1, head_dim: 8}
    - {channels: 32, num_res_blocks: 1, head_dim: 8, num_transformers: 1}
  mid: {num_res_blocks: 2, head_dim: 8, num_transformers: 1}
  up:
    - {channels: 16, num_res_blocks: 2, head_dim: 8}
    - {channels: 32, num_res_blocks: 2, head_dim: 8, num_transformers: 2}
knobs:
  levels[1].self_attention: [true, false]
  convs:
    plain: {all.conv: standard}
    separable: {all.conv: separable, all.expansion: 1}
    separable ×2: {all.conv: separable, all.expansion: 2}
  all.ffn_ratio: [2, 3, 4]
  all.num_kv_heads: [1, 2, null]
  levels[0].channels: [16, 24, 32, 48]
  levels[1].channels: [32, 48, 64]
references:
  thin: {convs: separable, all.ffn_ratio: 2, all.num_kv_heads: 1, "levels[0].channels": 16, "levels[1].channels": 32}
"""

SMALL_SPACE = (
    SPACE[: SPACE.index("knobs:")]
    + """knobs:
  all.conv: [standard, separable]
  all.expansion: [1, 2]
  all.ffn_ratio: [2, 3, 4]
"""
)
"""Twelve points, of which nine are different networks: standard convolutions are not expanded."""


class QuickScorer:
    """Numbers of an architecture's own JSON. Environment: QUICK_SECONDS a stage, QUICK_LOG a file of what was scored,
    QUICK_FAULT an architecture id prefix, and how it goes wrong."""

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        self.settings, self.space = settings, space
        self.seconds = float(os.environ.get("QUICK_SECONDS", "0"))

    def describe(self) -> Mapping[str, Any]:
        resolved = ResolvedProtocol(
            protocol=self.settings.protocol,
            data_digest="d",
            autoencoder_digest="a",
            text_encoder_digest="t",
            feature_extractor_digest="e",
        )
        return {
            "protocol": resolved.model_dump(mode="json"),
            "protocol_hash": resolved.hash,
            "machine": {"system": "test"},
        }

    def check(self, arch: Architecture) -> None:
        if arch.latent_channels != 12:
            raise InputError("architecture", "has no 12 latent channels", "give it 12")

    def cost(self, arch: Architecture) -> Cost:
        time.sleep(self.seconds / 10)
        return quick_cost(arch)

    def latency(self, arch: Architecture) -> LatencyRecord:
        time.sleep(self.seconds / 10)
        return quick_record(arch)

    def final_latency(self, arch: Architecture, first: LatencyRecord) -> LatencyRecord:  # noqa: ARG002
        return first

    def quality(
        self,
        arch: Architecture,
        *,
        seeds: Sequence[int],
        progress: ProgressCallback,
        artifacts: Path,
        until: int | None = None,
    ) -> Quality:
        self._misbehave(arch)
        steps = self.settings.protocol.steps
        checkpoint = artifacts / CHECKPOINT.format(seed=seeds[0])
        done = int(checkpoint.read_text()) if checkpoint.exists() else 0
        for i, seed in enumerate(seeds):
            progress(i / len(seeds), f"training seed {seed}")
            time.sleep(self.seconds * ((until or steps) - done) / steps)
            if log := os.environ.get("QUICK_STEPS"):
                with Path(log).open("a") as file:
                    file.write(f"{arch.id} {seed} {done} {until or steps}\n")
        if until is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(checkpoint) as path:
                path.write_text(str(until))
            return self._quality(arch, seeds, 1 + 0.5 * (1 - until / steps))
        (artifacts / "samples.png").write_bytes(b"not quite a picture")
        (artifacts / "curve.csv").write_text("step,loss\n1,0.5\n")
        (artifacts / "unet").mkdir()
        (artifacts / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
        if log := os.environ.get("QUICK_LOG"):
            with Path(log).open("a") as file:
                file.write(arch.id + "\n")
        return self._quality(arch, seeds)

    def _quality(self, arch: Architecture, seeds: Sequence[int], factor: float = 1.0) -> Quality:
        loss = factor * quick_loss(arch)
        by_seed = [loss * {0: 0.99, 1: 1.01}.get(seed, 1.0) for seed in seeds]
        mean = loss if len(seeds) == 2 else sum(by_seed) / len(seeds)
        value = Estimate(value=mean, low=0.98 * loss, high=1.02 * loss, by_seed=tuple(by_seed))
        return Quality(
            validation_loss=value,
            frechet_distance=value,
            kernel_distance=value,
            extractor="efficientnet-lite0",
            protocol_hash=self.describe()["protocol_hash"],
            proxy=self.space.proxy.name if self.space.proxy else None,
            training_seconds=1,
        )

    def _misbehave(self, arch: Architecture) -> None:
        prefix, _, how = os.environ.get("QUICK_FAULT", "").partition(":")
        if not how or not arch.id.startswith(prefix):
            return
        if how == "raise":
            raise RuntimeError("out of\nmemory")
        if how == "die":
            os._exit(9)
        raise InputError("data", "is gone", "bring it back")


def quick_cost(arch: Architecture) -> Cost:
    """Something like the params of the real net."""
    params = 0.0
    for _, blocks, channels in arch.named_levels():
        conv = 9 if blocks.conv == "standard" else blocks.expansion + 1
        params += blocks.num_res_blocks * 2 * conv * channels**2
        params += blocks.num_transformers * channels**2 * (4 * blocks.self_attention + 3 * blocks.ffn_ratio)
        params += blocks.num_transformers * channels * 100 * (blocks.num_kv_heads or 4)
    return Cost(params=int(params), macs=int(40 * params), activation_bytes=int(1000 + params / 10))


def quick_latency(arch: Architecture) -> float:
    cost = quick_cost(arch)
    return 0.2 + cost.macs / 1e6 + 0.3 * sum(b.self_attention * b.num_transformers for _, b, _ in arch.named_levels())


def quick_record(arch: Architecture) -> LatencyRecord:
    ms = quick_latency(arch)
    return latency_record(ms, lower_quartile_ms=0.9 * ms, upper_quartile_ms=1.1 * ms, device="quick")


def quick_loss(arch: Architecture) -> float:
    noise = derive_seed(7, arch.id) / 2**63 - 0.5
    attention = sum(b.self_attention * b.num_transformers for _, b, _ in arch.named_levels())
    return float(2 * quick_cost(arch).params ** -0.15 - 0.004 * attention + 0.004 * noise)


def settings(folder: Path, **changes: Any) -> StudyConfig:
    """The study, with its space in ``folder``; runs go under the current directory."""
    space = folder / "space.yaml"
    with atomic_write(space) as path:  # a search in another process may be reading it
        path.write_text(SPACE)
    values: dict[str, Any] = {"name": "quick", "space": str(space), "trials": 8, "sampler": "tpe", "seed": 3}
    return StudyConfig.model_validate({**values, "protocol": EvaluationProtocol(), **changes})


if __name__ == "__main__":
    search(settings(Path(sys.argv[1]), **json.loads(sys.argv[2])), scorer=QuickScorer)
