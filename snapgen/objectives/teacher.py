"""The teacher of a distillation: diffusers' SD3 transformer, SD3.5 by path or a small one trained here.

SnapGen's teachers are SD3.5-Large and, for few steps, SD3.5-Large-Turbo (arXiv 2412.09619, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from diffusers import SD3Transformer2DModel
from pydantic import Field, model_validator
from torch import Tensor, nn

from snapgen import config as settings
from snapgen import seeding
from snapgen.config import Config
from snapgen.diffusion import rectified_flow
from snapgen.errors import InputError, first_line
from snapgen.io import hub, pretrained

if TYPE_CHECKING:
    from snapgen.conditioning.captions import Conditioning

TICKS = 1000
"""SD3 counts time from 0 to this."""

BESIDE = "teacher.json"
"""The file beside diffusers' own that says what the net predicts; without it, a velocity."""


class TeacherConfig(Config):
    """What of an SD3 transformer does not follow from its data; the names are diffusers' own."""

    num_layers: int = Field(default=6, ge=1)
    num_attention_heads: int = Field(default=6, ge=1)
    attention_head_dim: int = Field(default=32, ge=4)
    patch_size: int = Field(default=2, ge=1)
    pos_embed_max_size: int | None = Field(default=None, ge=1)
    """Patches along a side that there are positions for; None: those of ``sample_size``."""
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: Literal["rms_norm"] | None = "rms_norm"

    @model_validator(mode="after")
    def _divides(self) -> TeacherConfig:
        if self.num_attention_heads * self.attention_head_dim % 4:
            raise ValueError("num_attention_heads × attention_head_dim is no multiple of 4; its positions need one")
        return self


class _Meaning(Config):
    prediction: rectified_flow.FlowPredictionType = "velocity"


class Teacher(nn.Module):
    """An SD3 transformer in this package's terms.

    It may be of another type than what it is given (bfloat16): inputs are cast to it, outputs back.

    Args:
        net: the transformer; not copied.
        prediction: what its output stands for.
        source: where it is from, for messages.
    """

    def __init__(
        self,
        net: SD3Transformer2DModel,
        prediction: rectified_flow.FlowPredictionType = "velocity",
        *,
        source: str | Path = "teacher",
    ) -> None:
        super().__init__()
        self.net, self.prediction, self.source = net, prediction, source
        config = net.config
        self.latent_channels: int = config.in_channels
        self.context_width: int = config.joint_attention_dim
        self.pooled_width: int = config.pooled_projection_dim
        self.width: int = config.num_attention_heads * config.attention_head_dim
        """Channels of a token."""
        self.patch: int = config.patch_size
        self.depth: int = config.num_layers

    def forward(self, sample: Tensor, t: Tensor, context: Tensor | None, pooled: Tensor | None = None) -> Tensor:
        """The net's output, whatever it stands for.

        Args:
            sample: (B, latent_channels, H, W); H and W multiples of ``patch``.
            t: (B,) in [0, 1].
            context: (B, N, context_width).
            pooled: (B, pooled_width); None: zeros, as for an empty caption.

        Returns:
            (B, latent_channels, H, W), of the sample's type.
        """
        assert context is not None, "an SD3 transformer needs a context"
        like = self.net.proj_out.weight
        if pooled is None:
            pooled = sample.new_zeros(len(sample), self.pooled_width)
        output: Tensor = self.net(
            hidden_states=sample.to(like.dtype),
            timestep=TICKS * t.float(),
            encoder_hidden_states=context.to(like.dtype),
            pooled_projections=pooled.to(like.dtype),
            return_dict=False,
        )[0]
        return output.to(sample.dtype)

    def velocity(self, sample: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        """The velocity at a sample: shapes as `forward`."""

        def net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            return cast(Tensor, self(x, t, context, condition.pooled))

        return rectified_flow.predict_velocity(net, sample, t, condition.context, self.prediction)

    def observe(
        self, sample: Tensor, t: Tensor, condition: Conditioning, blocks: Sequence[int] = (), *, guidance: float = 1
    ) -> tuple[Tensor, list[Tensor]]:
        """The velocity, and the image's tokens after some blocks, in one pass.

        Args:
            blocks: of the transformer, from 0.
            guidance: v = v_∅ + guidance·(v_c − v_∅), ∅ being zeros; any but 1 costs a batch twice as large. The tokens
                are those under the condition.

        Returns:
            (B, latent_channels, H, W), and for each block (B, width, H/patch, W/patch), all of the sample's type.
        """
        if guidance != 1:
            context, pooled = (None if x is None else torch.cat([x, torch.zeros_like(x)]) for x in condition)
            assert context is not None
            both = condition._replace(context=context, pooled=pooled)
            velocities, tokens = self.observe(torch.cat([sample, sample]), torch.cat([t, t]), both, blocks)
            conditional, unconditional = velocities.chunk(2)
            return torch.lerp(unconditional, conditional, guidance), [some[: len(sample)] for some in tokens]
        kept: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for index in blocks:
                handle = self.net.transformer_blocks[index].register_forward_hook(_keeping(kept, index))
                hooks.callback(handle.remove)
            velocity = self.velocity(sample, t, condition)
        height, width = (side // self.patch for side in sample.shape[-2:])
        grid = (len(sample), height, width, self.width)
        return velocity, [kept[index].reshape(grid).permute(0, 3, 1, 2).to(sample.dtype) for index in blocks]

    def check(self, *, latent_channels: int, latent_size: int, context_width: int, pooled_width: int) -> None:
        """Whether it can teach on such latents (of ``latent_size`` a side), with its captions of such widths.

        Raises:
            InputError: if not.
        """
        largest = self.patch * self.net.config.pos_embed_max_size
        if latent_channels != self.latent_channels:
            problem = f"takes latents of {self.latent_channels} channels, the stage's have {latent_channels}"
            raise InputError(self.source, problem, "name a teacher for the same autoencoder")
        if latent_size % self.patch:
            problem = f"takes latents whose sides {self.patch} divides, the stage's have {latent_size}"
            raise InputError(self.source, problem, "change the resolution")
        if latent_size > largest:
            problem = f"has positions for latents up to {largest} a side, the stage's have {latent_size}"
            raise InputError(self.source, problem, "lower the resolution or name another teacher")
        for name, own, given in (
            ("context", self.context_width, context_width),
            ("pooled embedding", self.pooled_width, pooled_width),
        ):
            if own != given:
                problem = f"takes a {name} {own} wide, its text encoders give {given or 'none'}"
                raise InputError(self.source, problem, "give the teacher the text encoders it was trained with")

    def enable_gradient_checkpointing(self) -> None:
        """Computes each block's activations again on the way back, to its weights or only to a sample."""
        self.net.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keeps them again."""
        self.net.disable_gradient_checkpointing()

    def save_pretrained(self, folder: Path) -> None:
        """Writes the net as diffusers does, and what it predicts beside it."""
        self.net.save_pretrained(folder)
        meaning = _Meaning(prediction=self.prediction)
        (folder / BESIDE).write_text(meaning.model_dump_json() + "\n")


def load_teacher(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Teacher:
    """A frozen teacher in evaluation mode, on the CPU.

    Args:
        folder: of an SD3 transformer as diffusers writes it, or of a pipeline, whose ``transformer`` is taken; or
            OWNER/NAME on the hub.
        dtype: of its weights.

    Raises:
        InputError: if files are missing or damaged, or do not fit each other.
    """
    found, weights = _opened(folder)
    _fill(found.net, weights, Path(found.source), dtype)
    return found.eval().requires_grad_(False)


def load_on_meta(folder: str | Path) -> Teacher:
    """A folder's teacher without its weights, on the meta device: for its widths and for `Teacher.check`.

    Raises:
        InputError: if files are missing or damaged.
    """
    return _opened(folder)[0]


def new_teacher(
    config: Mapping[str, Any],
    *,
    latent_channels: int,
    context_width: int,
    pooled_width: int,
    sample_size: int,
    seed: int,
    prediction: rectified_flow.FlowPredictionType = "velocity",
    source: str | Path = "teacher",
) -> Teacher:
    """A new teacher to be trained; its first output is zero.

    Args:
        config: a `TeacherConfig`.
        sample_size: side of the largest latents.
        seed: of its weights.
        source: where the configuration is from, for messages.

    Raises:
        InputError: if there can be no such net.
    """
    shape = settings.parse_config(dict(config), TeacherConfig, source=source)
    if pooled_width < 1:
        problem = "an SD3 transformer takes a pooled embedding, and no text encoder gives one"
        raise InputError(source, problem, "set pooled: true on one of its encoders")
    values = shape.model_dump() | {
        "sample_size": sample_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "joint_attention_dim": context_width,
        "pooled_projection_dim": pooled_width,
        "caption_projection_dim": shape.num_attention_heads * shape.attention_head_dim,
        "pos_embed_max_size": shape.pos_embed_max_size or sample_size // shape.patch_size,
    }
    with torch.random.fork_rng(devices=[]):  # torch's own initial weights, drawn over
        net = SD3Transformer2DModel(**values)
    _initialise(net, seed)
    return Teacher(net, prediction, source=source)


def _opened(folder: str | Path) -> tuple[Teacher, Mapping[str, Tensor]]:
    """An empty teacher, and its weights still to be read."""
    files = [*pretrained.WEIGHTS, BESIDE, *(f"transformer/{file}" for file in pretrained.WEIGHTS)]
    remedy = "name the folder of an SD3 transformer, or OWNER/NAME on the hub"
    found = hub.resolve_model_folder(folder, files, remedy=remedy)
    folder, config, weights = pretrained.read_part(found, "transformer")
    net = _empty(folder / "config.json", config)
    said = folder / BESIDE
    meaning = settings.load_yaml(said, _Meaning) if said.exists() else _Meaning()
    return Teacher(net, meaning.prediction, source=folder), weights


def _keeping(kept: dict[int, Tensor], index: int) -> Callable[..., None]:
    def keep(_block: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
        kept[index] = output[1]  # the text's tokens, the image's

    return keep


def _empty(path: Path, config: dict[str, Any]) -> SD3Transformer2DModel:
    """The net of a configuration, without memory."""
    if config.get("_class_name") != "SD3Transformer2DModel":
        problem = f"describes {config.get('_class_name') or 'no model'}"
        raise InputError(path, problem, "name the folder of an SD3Transformer2DModel", place="_class_name")
    try:
        with torch.device("meta"):
            net = SD3Transformer2DModel.from_config(config)
        own = net.config
        width = own.num_attention_heads * own.attention_head_dim
        wanted = {"out_channels": own.in_channels, "caption_projection_dim": width}
        wrong = [name for name, value in wanted.items() if own[name] != value]
        wrong += [] if own.pos_embed_max_size else ["pos_embed_max_size"]
    except Exception as error:  # whatever a value of a wrong kind provokes in diffusers or torch
        problem = f"builds no net ({first_line(error)})"
        raise InputError(path, problem, pretrained.RESTORE) from None
    if wrong:
        raise InputError(path, f"{own[wrong[0]]} builds no working net", pretrained.RESTORE, place=wrong[0])
    return net


def _fill(net: SD3Transformer2DModel, weights: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Gives an empty net its weights, each checked."""
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    read = {}
    for name in sorted(shapes.keys() | weights.keys()):
        tensor = weights.get(name)
        if tensor is None or tensor.shape != shapes.get(name):
            raise InputError(folder, "weights and config.json do not fit", "use both of one training", place=name)
        if not tensor.isfinite().all():
            raise InputError(folder, "holds values that are not finite", pretrained.RESTORE, place=name)
        read[name] = tensor.to(dtype)
    net.load_state_dict(read, assign=True)


@torch.no_grad()
def _initialise(net: SD3Transformer2DModel, seed: int) -> None:
    """DiT's first weights (arXiv 2212.09748, section 3.2): each block the identity, the output zero.

    Xavier-uniform matrices, each from the seed and its name; zero biases; zero where a norm is modulated.
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
