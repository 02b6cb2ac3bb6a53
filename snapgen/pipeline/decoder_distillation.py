"""Distillation of a pruned decoder from the full one, on a pipeline's own latents (SnapFusion, arXiv 2306.00980).

The loss is the mean squared error between both decoders' images of a latent that the pipeline sampled for a prompt. No
more of the training is published; all settings are our choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from snapgen import devices, files
from snapgen.autoencoders.pruned_decoder import SNAPFUSION_RATIO, PrunedAutoencoderKL, decode_image, prune_decoder
from snapgen.autoencoders.psnr import Psnr, decoder_psnr
from snapgen.autoencoders.stepwise import CheckpointSession, StepwiseConfig, StepwiseTrainer
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_folder, check_new_folder
from snapgen.io.cache import JSON
from snapgen.io.chunked import ChunkedTensor
from snapgen.pipeline import loading, synthetic_latents
from snapgen.pipeline.synthetic_latents import SamplingConfig
from snapgen.progress import ProgressCallback, ignore_progress, silence_libraries

MAX_HELDOUT = 64
"""Held-out latents on which the decoders are compared, at most; they are the last ones and at most a tenth of all."""


class DecoderDistillationConfig(StepwiseConfig):
    """Configuration of decoder distillation; together with the latents and the full decoder it fixes the weights."""

    prune_ratio: float = SNAPFUSION_RATIO
    """Share of the channels to prune (`snapgen.autoencoders.pruned_decoder.pruned_width`)."""
    steps: int = Field(default=2000, ge=1, le=1_000_000_000)
    """Optimizer steps."""
    batch_size: int = Field(default=4, ge=1, le=65536)
    """Latents per step."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""


class DecoderDistiller(StepwiseTrainer):
    """Distillation of a pruned decoder.

    Args:
        model: its decoder is trained in place; its encoder and ``post_quant_conv`` do not change.
        reference: the autoencoder from which it was pruned, on the same device.
        latents: latents sampled by the pipeline, (N, C, h, w).
        training: the configuration.
        count: number of latents to train on, from the first; None: all.
    """

    net_key, seed_key = "decoder", ("decoder distillation",)

    def __init__(
        self,
        model: PrunedAutoencoderKL,
        reference: AutoencoderKL,
        latents: ChunkedTensor,
        training: DecoderDistillationConfig,
        count: int | None = None,
    ) -> None:
        self.model, self.reference, self.latents, self.training = model, reference, latents, training
        self.count = len(latents) if count is None else count
        reference.eval().requires_grad_(False)
        model.train().requires_grad_(False)
        model.decoder.requires_grad_(True)
        super().__init__(model.decoder, training, "adamw")

    def finish(self) -> None:
        """Load the averaged weights into the model."""
        super().finish()
        self.model.eval().requires_grad_(False)

    def step(self) -> dict[str, Tensor]:
        """Update the decoder once; returns the loss, 0-dim, on the device."""
        indices = torch.randint(self.count, (self.training.batch_size,), generator=self.generator())
        latents = self.latents[indices].to(self.model.device, torch.float32)
        with torch.no_grad():
            target = decode_image(self.reference, latents)
        return self.update({"mse": functional.mse_loss(decode_image(self.model, latents), target)})


@dataclass(frozen=True)
class DecoderDistillationResult:
    """Parameters of both decoders, and the PSNR of the pruned one's images against the full one's."""

    params: int
    whole_params: int
    """Parameters of the full decoder; the name is that of the command's JSON output."""
    untrained: Psnr
    """PSNR before training, on held-out latents."""
    trained: Psnr
    """PSNR after training, on the same latents."""


def distill(
    run: str | Path,
    prompts: Path,
    out: Path,
    *,
    sampling: SamplingConfig | None = None,
    training: DecoderDistillationConfig | None = None,
    progress: ProgressCallback = ignore_progress,
) -> DecoderDistillationResult:
    """Replace a pipeline's decoder by a pruned one: sample latents, prune, train, and write the new pipeline.

    If the process is killed, the same call resumes and ends with the same weights: latents are cached, and the
    training's checkpoint is kept next to ``out`` until it is done.

    Args:
        run: a run's folder or name, or a pipeline's folder (`snapgen.pipeline.synthetic_latents.open_pipeline`).
        prompts: a text file with one prompt per line.
        out: the folder to write: the same pipeline with a `PrunedAutoencoderKL` as its ``vae``.
        sampling: how latents are sampled.
        training: how the decoder is pruned and trained.
        progress: called after every step.

    Raises:
        InputError: if anything is missing, does not fit, or cannot be written.
    """
    sampling, training = sampling or SamplingConfig(), training or DecoderDistillationConfig()
    check_new_folder(out)
    lines = read_prompts(prompts)
    folder = loading.find_pipeline(run)
    pipeline = synthetic_latents.open_pipeline(folder)
    reference: AutoencoderKL = pipeline.vae
    pruned = prune_decoder(reference, training.prune_ratio, source=str(folder / "vae"))
    identity = _identity(folder, lines, sampling, training)
    checkpoint = CheckpointSession(out.with_name(out.name + ".checkpoint.safetensors"), identity)
    pipeline.to(devices.default_device())
    latents = synthetic_latents.latents(pipeline, folder, lines, sampling)
    count = len(latents) - min(MAX_HELDOUT, max(1, len(latents) // 10))
    heldout = latents[torch.arange(count, len(latents))].float().to(devices.default_device())
    pruned.to(devices.default_device())
    untrained = _psnr_against(reference, pruned, heldout)
    distiller = DecoderDistiller(pruned, reference, latents, training, count)
    checkpoint.restore(distiller)
    checkpoint.complete(distiller, progress)
    if not all(bool(parameter.isfinite().all()) for parameter in pruned.parameters()):
        raise InputError("training", "ends with weights that are not finite", "lower the learning rate")
    result = DecoderDistillationResult(
        params=_num_params(pruned.decoder),
        whole_params=_num_params(reference.decoder),
        untrained=untrained,
        trained=_psnr_against(reference, pruned, heldout),
    )
    pipeline.register_modules(vae=pruned)
    pipeline.to("cpu")
    with silence_libraries(), atomic_folder(out) as temporary:
        pipeline.save_pretrained(temporary)
    checkpoint.path.unlink(missing_ok=True)
    return result


def _identity(
    folder: Path, prompts: Sequence[str], sampling: SamplingConfig, training: DecoderDistillationConfig
) -> dict[str, JSON]:
    """Everything that the result depends on: a checkpoint of another identity is not resumed."""
    return {
        "pipeline": synthetic_latents.digest_of(folder),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
        "sampling": sampling.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "torch": torch.__version__,
    }


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per non-empty line.

    Raises:
        InputError: if there is no such file, it is not text, or it has no prompt.
    """
    text = files.read_text(path, "name a text file with one prompt per line")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(path, "has no prompt", "write one per line")
    return lines


def _psnr_against(reference: AutoencoderKL, pruned: AutoencoderKL, latents: Tensor) -> Psnr:
    return decoder_psnr(lambda x: decode_image(pruned, x), lambda x: decode_image(reference, x), latents)


def _num_params(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
