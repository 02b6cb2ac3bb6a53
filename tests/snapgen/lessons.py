"""A small student, its teacher and batches for the tests of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from snapgen.conditioning.captions import Conditioning, EmbeddingSlice, EncodedCaptions
from snapgen.conditioning.embeddings import Embeddings
from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import RectifiedFlow
from snapgen.io.chunked import ChunkedTensor
from snapgen.models.unet import UNet
from snapgen.objectives import teacher
from snapgen.objectives.teacher import Teacher
from snapgen.seeding import derive_seed
from snapgen.training.batches import Batch, BatchStream, StepRandom, TimestepSampler, training_timesteps
from tests.snapgen.nets import stirred, tiny

SHAPE = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}


def new_teacher(*, prediction: rectified_flow.FlowPredictionType = "velocity") -> Teacher:
    """Teacher for the latents of `nets.tiny` up to 8×8; contexts are 10 wide, pooled embeddings 5."""
    return teacher.new_teacher(
        SHAPE,
        latent_channels=3,
        context_dim=10,
        pooled_width=5,
        sample_size=8,
        seed=0,
        prediction=prediction,
    )


@torch.no_grad()
def frozen_teacher(*, prediction: rectified_flow.FlowPredictionType = "velocity") -> Teacher:
    """Teacher whose weights are all random, seeded by their names, so that every branch has an effect."""
    found = new_teacher(prediction=prediction)
    for name, weight in found.named_parameters():
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(derive_seed(0, name)))
        weight.copy_(0.2 * noise + (1 if "norm_" in name and weight.ndim == 1 else 0))
    return found.eval().requires_grad_(False)


def student() -> UNet:
    return stirred(tiny()).train()


def batch(*, count: int = 2, size: int = 4, step: int = 1, t: list[float] | None = None) -> Batch:
    """A fixed batch that fits student and teacher."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    generator = torch.Generator().manual_seed(derive_seed(3, step))
    return Batch(
        latents=normal(3, size, size),
        noise=normal(3, size, size),
        t=torch.tensor(t) if t else torch.linspace(0.2, 0.8, count),
        context=normal(3, 12),
        pooled=None,
        teacher=Conditioning(normal(4, 10), normal(5)),
        random=StepRandom(seed=7, step=step, rows=range(count)),
    )


IMAGES = 24
"""Number of images in `feed`."""


def feed(
    *,
    batch: int = 8,
    times: TimestepSampler | None = None,
    bad_image: int | None = None,
    bad_caption: int | None = None,
    device: torch.device | None = None,
) -> BatchStream:
    """Batches that fit student and teacher.

    Args:
        bad_image, bad_caption: the one of `IMAGES` that is not finite.
    """
    generator = torch.Generator().manual_seed(11)
    latents, caption = (
        torch.randn(IMAGES, 3, 4, 4, generator=generator),
        torch.randn(IMAGES, 3, 12, generator=generator),
    )
    if bad_image is not None:
        latents[bad_image, 0, 0, 0] = float("nan")
    if bad_caption is not None:
        caption[bad_caption, 0, 0] = float("inf")
    own, pooled = torch.randn(IMAGES, 4, 10, generator=generator), torch.randn(IMAGES, 5, generator=generator)
    return BatchStream(
        ChunkedTensor([latents]),
        _captions(caption, torch.zeros(IMAGES, 0)),
        teacher=_captions(own, pooled),
        dropout=[0.1],
        batch_size=batch,
        timesteps=times or training_timesteps(RectifiedFlow()),
        seed=1,
        device=device or torch.device("cpu"),
    )


def _captions(tokens: Tensor, pooled: Tensor) -> EncodedCaptions:
    place = EmbeddingSlice(slice(0, tokens.shape[1]), slice(0, tokens.shape[2]), slice(0, pooled.shape[1]))
    return EncodedCaptions(
        [Embeddings(ChunkedTensor([tokens]), ChunkedTensor([pooled]))], torch.arange(IMAGES), [place]
    )


class NoReading(TorchDispatchMode):
    """Within it, reading a number off a tensor, for which a GPU would be waited for, is an error."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a number was read"
        return function(*args, **(kwargs or {}))
