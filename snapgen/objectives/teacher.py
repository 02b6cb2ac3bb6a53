"""The teacher of a distillation: diffusers' SD3 transformer, either SD3.5 from a folder or a small one trained here.

SnapGen's teachers are SD3.5-Large and, for step distillation, SD3.5-Large-Turbo (arXiv 2412.09619, section 4).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from diffusers import SD3Transformer2DModel
from pydantic import Field
from torch import Tensor, nn

from snapgen import config as settings, seeding
from snapgen.config import Config, rule
from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import null_like
from snapgen.errors import InputError
from snapgen.io import hub, pretrained
from snapgen.io.prediction_type import NOTES, read_prediction_type

if TYPE_CHECKING:
    from snapgen.conditioning.captions import Conditioning, TextEncoderConfig

_log = logging.getLogger(__name__)

NUM_TRAIN_TIMESTEPS = 1000
"""SD3's timestep for pure noise, t = 1."""


class TeacherConfig(Config):
    """Configuration of a new SD3 transformer, apart from what its data determine; the names are diffusers' own."""

    num_layers: int = Field(default=6, ge=1, le=256)
    """Transformer blocks."""
    num_attention_heads: int = Field(default=6, ge=1, le=1024)
    """Attention heads."""
    attention_head_dim: int = Field(default=32, ge=4, le=1024)
    """Channels of a head."""
    patch_size: int = Field(default=2, ge=1, le=64)
    """Pixels of the latent along a side of a token."""
    pos_embed_max_size: int | None = Field(default=None, ge=1, le=4096)
    """Patches along a side that there are positions for; None: as many as the latent has."""
    dual_attention_layers: tuple[int, ...] = ()
    """Blocks with a second attention over the image alone, as in SD3.5-Medium."""
    qk_norm: Literal["rms_norm"] | None = "rms_norm"
    """Normalization of queries and keys."""

    @rule
    def _check_width(self) -> None:
        # The sine-cosine position embedding splits the channels into sine and cosine for rows and columns.
        if self.num_attention_heads * self.attention_head_dim % 4:
            raise ValueError("num_attention_heads × attention_head_dim is not a multiple of 4; change one of them")


class Teacher(nn.Module):
    """An SD3 transformer with this package's conventions for timesteps and conditioning.

    Its weights may have another dtype than its inputs, such as bfloat16: inputs are cast to it, outputs back.

    Args:
        net: the transformer; not copied.
        prediction: what its output stands for.
        source: where it comes from, for error messages.
        trained_here: whether its configuration says what it predicts, as that of a teacher of this package does.
    """

    def __init__(
        self,
        net: SD3Transformer2DModel,
        prediction: rectified_flow.FlowPredictionType = "velocity",
        *,
        source: str | Path = "teacher",
        trained_here: bool = True,
    ) -> None:
        super().__init__()
        self.net, self.prediction, self.source, self.trained_here = net, prediction, source, trained_here
        config = net.config
        self.latent_channels: int = config.in_channels
        self.context_dim: int = config.joint_attention_dim
        self.pooled_width: int = config.pooled_projection_dim
        self.hidden_dim: int = config.num_attention_heads * config.attention_head_dim
        """Channels of an image token."""
        self.patch_size: int = config.patch_size
        self.num_layers: int = config.num_layers

    def forward(self, sample: Tensor, t: Tensor, context: Tensor | None, pooled: Tensor | None = None) -> Tensor:
        """The net's output, which `prediction` interprets.

        Args:
            sample: (B, latent_channels, H, W), H and W multiples of ``patch_size``.
            t: (B,) in [0, 1].
            context: (B, N, context_dim).
            pooled: (B, pooled_width); None: zeros.

        Returns:
            (B, latent_channels, H, W) in the sample's dtype.
        """
        assert context is not None, "an SD3 transformer needs a context"
        dtype = self.net.proj_out.weight.dtype
        if pooled is None:
            pooled = sample.new_zeros(len(sample), self.pooled_width)
        output: Tensor = self.net(
            hidden_states=sample.to(dtype),
            timestep=NUM_TRAIN_TIMESTEPS * t.float(),
            encoder_hidden_states=context.to(dtype),
            pooled_projections=pooled.to(dtype),
            return_dict=False,
        )[0]
        return output.to(sample.dtype)

    def velocity(self, sample: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        """The velocity at a sample; shapes as in `forward`."""

        def net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            return cast(Tensor, self(x, t, context, condition.pooled))

        return rectified_flow.predict_velocity(net, sample, t, condition.context, self.prediction)

    def forward_features(
        self,
        sample: Tensor,
        t: Tensor,
        condition: Conditioning,
        blocks: Sequence[int] = (),
        *,
        guidance: float = 1,
        null: Conditioning | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The velocity and the image tokens after the given blocks, from one forward pass.

        Args:
            sample: (B, latent_channels, H, W).
            t: (B,) in [0, 1].
            condition: context and pooled embedding.
            blocks: indices of transformer blocks, from 0.
            guidance: scale of v = v_∅ + guidance·(v_c − v_∅). Values other than 1 double the batch. The tokens are
                always the conditional ones.
            null: conditioning of the null caption ∅, one row; None: zeros.

        Returns:
            The velocity (B, latent_channels, H, W) and for each block (B, hidden_dim, H/patch_size, W/patch_size), all
            in the sample's dtype.
        """
        if guidance != 1:
            # (B, …) → (2·B, …): conditional, then unconditional
            pairs = zip(condition, null or (None, None), strict=True)
            context, pooled = (None if x is None else torch.cat([x, null_like(x, row)]) for x, row in pairs)
            assert context is not None
            both = condition._replace(context=context, pooled=pooled)
            velocities, tokens = self.forward_features(torch.cat([sample, sample]), torch.cat([t, t]), both, blocks)
            conditional, unconditional = velocities.chunk(2)
            return torch.lerp(unconditional, conditional, guidance), [x[: len(sample)] for x in tokens]
        outputs: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for index in blocks:
                handle = self.net.transformer_blocks[index].register_forward_hook(_store_output(outputs, index))
                hooks.callback(handle.remove)
            velocity = self.velocity(sample, t, condition)
        height, width = (side // self.patch_size for side in sample.shape[-2:])
        grid = (len(sample), height, width, self.hidden_dim)
        # (B, h·w, hidden_dim) -> (B, h, w, hidden_dim) -> (B, hidden_dim, h, w)
        return velocity, [outputs[index].reshape(grid).permute(0, 3, 1, 2).to(sample.dtype) for index in blocks]

    def check(self, *, latent_channels: int, latent_size: int, context_dim: int, pooled_width: int) -> None:
        """Check that the net fits a stage's latents and caption embeddings.

        Args:
            latent_channels: channels of the latents.
            latent_size: height and width of the latents.
            context_dim: channels of the context.
            pooled_width: channels of the pooled embedding, 0 without one.

        Raises:
            InputError: if it does not fit.
        """
        largest = self.patch_size * self.net.config.pos_embed_max_size
        if latent_channels != self.latent_channels:
            problem = f"takes latents of {self.latent_channels} channels, but the stage's have {latent_channels}"
            raise InputError(self.source, problem, "name a teacher for the same autoencoder")
        if latent_size % self.patch_size:
            problem = f"takes latents with sides divisible by {self.patch_size}, but the stage's have {latent_size}"
            raise InputError(self.source, problem, "change the resolution")
        if latent_size > largest:
            problem = f"has positions for latents up to {largest}×{largest}, but the stage's have {latent_size}"
            raise InputError(self.source, problem, "lower the resolution or name another teacher")
        for name, expected, actual in (
            ("context", self.context_dim, context_dim),
            ("pooled embedding", self.pooled_width, pooled_width),
        ):
            if expected != actual:
                problem = f"takes a {name} of width {expected}, but its text encoders give {actual or 'none'}"
                raise InputError(self.source, problem, "use the text encoders that the teacher was trained with")

    def check_padding(self, encoders: Sequence[TextEncoderConfig]) -> None:
        """Warn if a published teacher would see zeros where it was trained on encoded padding."""
        if not self.trained_here and any("zeros" in (encoder.padding, encoder.null) for encoder in encoders):
            _log.warning(
                "%s: was trained on encoded padding and null captions, where its text encoders give zeros; "
                'set padding: encoded and "null": encoded on each',
                self.source,
            )

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass, also where only the sample needs a gradient."""
        self.net.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations for the backward pass, as by default."""
        self.net.disable_gradient_checkpointing()

    def save_pretrained(self, folder: Path) -> None:
        """Write the net as diffusers does, with the prediction type in its configuration."""
        self.net.register_to_config(prediction_type=self.prediction)
        self.net.save_pretrained(folder)


def load_teacher(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Teacher:
    """Load a frozen teacher in evaluation mode, on the CPU.

    Args:
        folder: folder of an SD3 transformer as diffusers writes it, folder of a pipeline with such a ``transformer``,
            or OWNER/NAME on the hub.
        dtype: dtype of the weights.

    Raises:
        InputError: if files are missing or damaged, or do not fit each other.
    """
    teacher, weights = _open(folder)
    pretrained.fill(teacher.net, weights, dtype)
    return teacher.eval().requires_grad_(False)


def load_on_meta(folder: str | Path) -> Teacher:
    """Load a teacher without its weights, on the meta device, for its widths and for `Teacher.check`.

    Raises:
        InputError: if files are missing or damaged.
    """
    return _open(folder)[0]


def new_teacher(
    config: Mapping[str, Any],
    *,
    latent_channels: int,
    context_dim: int,
    pooled_width: int,
    sample_size: int,
    seed: int,
    prediction: rectified_flow.FlowPredictionType = "velocity",
    source: str | Path = "teacher",
) -> Teacher:
    """A new teacher with initial weights; its first output is zero.

    Args:
        config: fields of `TeacherConfig`.
        latent_channels: channels of the latents.
        context_dim: channels of the context.
        pooled_width: channels of the pooled embedding.
        sample_size: height and width of the largest latents.
        seed: seed of the weights.
        prediction: what its output stands for.
        source: where the configuration comes from, for error messages.

    Raises:
        InputError: if the configuration is invalid.
    """
    shape = settings.parse_config(dict(config), TeacherConfig, source=source)
    if pooled_width < 1:
        problem = "an SD3 transformer takes a pooled embedding, but no text encoder gives one"
        raise InputError(source, problem, "set pooled: true on one of its encoders")
    values = shape.model_dump() | {
        "sample_size": sample_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "joint_attention_dim": context_dim,
        "pooled_projection_dim": pooled_width,
        "caption_projection_dim": shape.num_attention_heads * shape.attention_head_dim,
        "pos_embed_max_size": shape.pos_embed_max_size or sample_size // shape.patch_size,
    }
    with torch.random.fork_rng(devices=[]):  # torch's default weights use the global generator; they are replaced below
        net = SD3Transformer2DModel(**values)
    _initialize(net, seed)
    return Teacher(net, prediction, source=source)


def _open(folder: str | Path) -> tuple[Teacher, pretrained.Weights]:
    """A teacher on the meta device, and its weights, which are read on demand.

    Its prediction type is a velocity where its configuration does not state one, as that of SD3.5 does not.
    """
    files = [*pretrained.MODEL_FILES, *NOTES, *(f"transformer/{file}" for file in pretrained.MODEL_FILES)]
    remedy = "name the folder of an SD3 transformer, or OWNER/NAME on the hub"
    found = hub.resolve_model_folder(folder, files, remedy=remedy, single_file="SD3Transformer2DModel")
    saved = pretrained.open_net(found, "transformer")
    path = saved.folder / pretrained.CONFIG_NAME
    net = pretrained.meta_net(saved, SD3Transformer2DModel)
    full = net.config
    expected = {
        "out_channels": full.in_channels,
        "caption_projection_dim": full.num_attention_heads * full.attention_head_dim,
        "pos_embed_max_size": full.pos_embed_max_size or "missing",
    }
    for name, value in expected.items():
        if full[name] != value:
            raise InputError(path, f"cannot be {full[name]}", pretrained.RESTORE, place=name)
    stated = read_prediction_type(saved.folder)
    prediction = stated or "velocity"
    if prediction not in rectified_flow.FLOW_PREDICTION_TYPES:
        choices = ", ".join(rectified_flow.FLOW_PREDICTION_TYPES)
        raise InputError(path, f"cannot be {prediction!r}", f"use one of: {choices}", place="prediction_type")
    prediction = cast(rectified_flow.FlowPredictionType, prediction)
    return Teacher(net, prediction, source=saved.folder, trained_here=stated is not None), saved.weights


def _store_output(outputs: dict[int, Tensor], index: int) -> Callable[..., None]:
    def hook(_block: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
        outputs[index] = output[1]  # (text tokens, image tokens)

    return hook


@torch.no_grad()
def _initialize(net: SD3Transformer2DModel, seed: int) -> None:
    """DiT's initial weights (arXiv 2212.09748, section 3.2): every block is the identity and the output is zero.

    Matrices are Xavier-uniform, each drawn from the seed and its name. Biases and the layers that modulate norms are
    zero.
    """
    for name, module in net.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or module.weight.is_meta:
            continue
        if module.bias is not None:
            module.bias.zero_()
        matrix = module.weight.flatten(1)
        if name == "proj_out" or (name.endswith(".linear") and "norm" in name):
            matrix.zero_()
        else:
            generator = torch.Generator(matrix.device).manual_seed(seeding.derive_seed(seed, "teacher", name))
            nn.init.xavier_uniform_(matrix, generator=generator)
