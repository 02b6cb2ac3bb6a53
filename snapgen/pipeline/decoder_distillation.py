"""A pruned decoder learns what the whole one makes of the pipeline's own latents (SnapFusion, arXiv 2306.00980).

The loss is the mean squared error between the two decoders' images of a latent that the pipeline drew for a prompt.
Nothing else is published of the training: all settings are our choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from snapgen import devices, seeding
from snapgen import progress as progress_
from snapgen.autoencoders.pruned_decoder import HALF, PrunedAutoencoderKL, decode_image, prune_decoder
from snapgen.autoencoders.psnr import Psnr, decoder_psnr
from snapgen.config import Config
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_folder
from snapgen.io.cache import JSON
from snapgen.io.checkpoint import CheckpointSession, StepCallback
from snapgen.io.chunked import ChunkedTensor
from snapgen.optim.ema import EMA
from snapgen.optim.optimizers import OptimizerGroup
from snapgen.optim.schedule import cosine_with_warmup
from snapgen.pipeline import loading, synthetic_latents
from snapgen.pipeline.synthetic_latents import SamplingConfig

HELD_OUT = 64
"""Latents at most, a tenth of all, that the decoders are compared on and nothing is trained on: the last ones."""


class DecoderDistillationConfig(Config):
    """Everything that the trained weights depend on, beside the latents and the whole decoder."""

    ratio: float = HALF
    """Of the channels that are cut; `snapgen.autoencoders.pruned_decoder.pruned_width` says which ratios there are."""
    steps: int = Field(default=2000, ge=1)
    batch: int = Field(default=4, ge=1)
    """Latents a step."""
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: int = Field(default=100, ge=0)
    ema: float = Field(default=0.03, gt=0, le=0.25)
    """Width of the weights' average, relative to the steps so far (`snapgen.optim.ema.EMA`)."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)


class DecoderDistiller:
    """A training under way, a step at a time, where ``model`` lies.

    The same arguments on the same machine with as many threads give the same weights, however often the training is
    interrupted: the random numbers of a step depend on its number alone.

    Args:
        model: whose decoder is trained in place; its encoder and ``post_quant_conv`` stay.
        whole: the autoencoder that it was pruned from, on the same device.
        latents: as the pipeline draws them, (N, C, h, w).
        count: of the latents, the first ones, that it learns from; None: all.
    """

    def __init__(
        self,
        model: PrunedAutoencoderKL,
        whole: AutoencoderKL,
        latents: ChunkedTensor,
        training: DecoderDistillationConfig,
        count: int | None = None,
    ) -> None:
        self.model, self.whole, self.latents, self.training = model, whole, latents, training
        self.count = len(latents) if count is None else count
        self.done = 0
        """Steps taken."""
        whole.eval().requires_grad_(False)
        model.train().requires_grad_(False)
        model.decoder.requires_grad_(True)
        self.average = EMA(model.decoder, training.ema)
        self.optimizer = OptimizerGroup(
            model.decoder,
            kind="adamw",
            learning_rate=training.learning_rate,
            beta2=0.99,
            weight_decay=training.weight_decay,
            clip=1,
        )

    def complete(self, progress: StepCallback | None = None) -> None:
        """Takes the steps that are left, calling ``progress`` after each, and gives the model the averaged weights."""
        while self.done < self.training.steps:
            losses = self.step()
            if progress:
                progress(self.done, self.training.steps, losses)
        self.model.decoder.load_state_dict(self.average.state())
        self.model.eval().requires_grad_(False)

    def step(self) -> dict[str, Tensor]:
        """One update of the decoder; the loss, 0-dim, on the device."""
        random = torch.Generator().manual_seed(
            seeding.derive_seed(self.training.seed, "decoder distillation", self.done)
        )
        drawn = torch.randint(self.count, (self.training.batch,), generator=random)
        latents = self.latents[drawn].to(self.model.device, torch.float32)
        with torch.no_grad():
            target = decode_image(self.whole, latents)
        loss = functional.mse_loss(decode_image(self.model, latents), target)
        torch.autograd.backward(loss)
        self.optimizer.step(cosine_with_warmup(self.done, steps=self.training.steps, warmup=self.training.warmup))
        self.done += 1
        self.average.update(self.done)
        return {"mse": loss.detach()}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, JSON]]:
        """All that the next steps depend on beside the arguments; the tensors are the training's own."""
        parts = {
            "decoder": dict(self.model.decoder.state_dict()),
            "average": self.average.state(),
            "optimizer": self.optimizer.state(),
        }
        return parts, {"step": self.done}

    def load(self, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        """Go on from what `state` gave in a training with the same arguments; this one has not begun."""
        assert self.done == 0
        self.done = int(facts["step"])
        self.model.decoder.load_state_dict(parts["decoder"])
        self.average.load(parts["average"])
        self.optimizer.load(parts.get("optimizer", {}))


@dataclass(frozen=True)
class DecoderDistillationResult:
    """What came of it: params of the decoders, and how well the pruned one's images agree with the whole one's."""

    params: int
    whole_params: int
    untrained: Psnr
    """As it was cut."""
    trained: Psnr
    """Both on latents that were held out."""


def distil(
    run: str | Path,
    prompts: Path,
    out: Path,
    *,
    sampling: SamplingConfig | None = None,
    training: DecoderDistillationConfig | None = None,
    progress: StepCallback | None = None,
) -> DecoderDistillationResult:
    """Give a pipeline a pruned decoder: draw latents, cut, train, and write the pipeline with it.

    Killed at any moment, the same call goes on to the same weights: latents are kept in the cache, the training's
    checkpoint beside ``out`` until it is done.

    Args:
        run: as `snapgen.pipeline.synthetic_latents.open_pipeline` takes it.
        prompts: a text file, a prompt a line.
        out: the folder to write: the same pipeline, whose ``vae`` is a `PrunedAutoencoderKL`.

    Raises:
        InputError: if anything is missing, does not fit, or cannot be written.
    """
    sampling, training = sampling or SamplingConfig(), training or DecoderDistillationConfig()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(out, "is there already", "name a new folder")
    lines = read_prompts(prompts)
    folder = loading.find_pipeline(run)
    pipeline = synthetic_latents.open_pipeline(folder)
    whole: AutoencoderKL = pipeline.vae
    small = prune_decoder(whole, training.ratio, source=str(folder / "vae"))
    asked: dict[str, JSON] = {
        "pipeline": synthetic_latents.digest_of(folder),
        "prompts": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
        "sampling": sampling.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "torch": torch.__version__,
    }
    kept = CheckpointSession(out.with_name(out.name + ".checkpoint.safetensors"), asked)
    pipeline.to(devices.default_device())
    latents = synthetic_latents.latents(pipeline, folder, lines, sampling)
    count = len(latents) - min(HELD_OUT, max(1, len(latents) // 10))
    held = latents[torch.arange(count, len(latents))].float().to(devices.default_device())
    small.to(devices.default_device())
    untrained = _agreement(small, whole, held)
    training_run = DecoderDistiller(small, whole, latents, training, count)
    kept.restore(training_run)
    training_run.complete(kept.keeping(training_run, progress))
    if not all(bool(parameter.isfinite().all()) for parameter in small.parameters()):
        raise InputError("training", "ends with weights that are not finite", "lower the learning rate")
    result = DecoderDistillationResult(
        params=_params(small.decoder),
        whole_params=_params(whole.decoder),
        untrained=untrained,
        trained=_agreement(small, whole, held),
    )
    pipeline.register_modules(vae=small)
    pipeline.to("cpu")
    with progress_.silence_libraries(), atomic_folder(out) as written:
        pipeline.save_pretrained(written)
    kept.path.unlink(missing_ok=True)
    return result


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, a line each; empty lines are none.

    Raises:
        InputError: if there is no such file, it is no text or holds none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        problem = "is not text (not UTF-8)" if isinstance(error, UnicodeDecodeError) else str(error.strerror).lower()
        raise InputError(path, problem, "name a text file of prompts, one a line") from None
    if not lines:
        raise InputError(path, "holds no prompt", "write one a line")
    return lines


def _agreement(small: AutoencoderKL, whole: AutoencoderKL, latents: Tensor) -> Psnr:
    return decoder_psnr(lambda some: decode_image(small, some), lambda some: decode_image(whole, some), latents)


def _params(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
