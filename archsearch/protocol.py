"""The evaluation protocol: everything that a quality number depends on. Its hash is stored with every number."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.conditioning.text_encoder import ZerosOrEncoded
from snapgen.config import Config, as_yaml, rule
from snapgen.diffusion.process import PredictionType
from snapgen.diffusion.variance_preserving import DIFFUSION_PREDICTION_TYPES
from snapgen.training.settings import DistillationConfig, TrainingConfig

REVISION = 2
"""Version of the evaluation code; raised whenever the same protocol would give different numbers."""


def _enough(samples: int) -> int:
    if 0 < samples < 8:
        raise ValueError("a distance needs at least 8 samples; write 0 for no distances")
    return samples


NumSamples = Annotated[int, Field(ge=0, le=1_000_000), AfterValidator(_enough)]
"""Number of images generated for the distances; 0 means none."""


MAX_SEEDS = 64
"""Largest number of training runs behind a score."""

MAX_CURVE_POINTS = 24
"""Largest number of points of a run's curve."""

TrainSeed = Annotated[int, Field(ge=0, lt=2**32)]
"""Seed of one training run."""


class EvaluationConfig(Config):
    """How a net is evaluated."""

    validation_pairs: int = Field(default=512, ge=2, le=1_000_000)
    """Number of fixed (image, timestep, noise) triples behind the validation loss."""
    num_inference_steps: int = Field(default=28, ge=1, le=1000)
    """Sampling steps when samples are drawn."""
    guidance_scale: float = Field(default=3, ge=0, le=100)
    """Classifier-free guidance scale when samples are drawn; 1: no guidance."""
    num_samples: NumSamples = 256
    """Images drawn for the Fréchet and kernel distances; 0: no distances, otherwise at least 8."""
    feature_extractor: str = "efficientnet-lite0"
    """Features for the distances: efficientnet-lite0, or the path of the FID Inception weights. Only the latter give an
    FID."""
    feature_resolution: int = Field(default=64, ge=32, le=1024)
    """Images are resized to this before the extractor, which may resize them again (Inception: 299)."""


class TeacherDistillationConfig(DistillationConfig):
    """Knowledge distillation into every candidate, with its teacher."""

    teacher: str
    """Folder of a diffusers SD3Transformer2DModel, of a pipeline that has one, or of a recipe's finished stage that
    trained one; or OWNER/NAME on the hub."""
    teacher_text_encoders: tuple[TextEncoderConfig, ...] | None = None
    """The teacher's own text encoders; None: the candidates', with its pooled embedding."""
    teacher_bfloat16: bool = False
    """Whether the teacher's weights are held in bfloat16."""


class EvaluationProtocol(TrainingConfig, EvaluationConfig):
    """Training and evaluation settings of a candidate. The defaults are the quick start's (benchmarks/short_run.py)."""

    steps: int = Field(default=240, ge=1, le=1_000_000_000)
    """Optimizer steps of the short run."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability with which a caption is replaced by the empty one, for classifier-free guidance."""
    prediction_type: PredictionType = "preconditioned"
    """Meaning of the net's output. With rectified flow: velocity, data or preconditioned (scaled as in EDM). With the
    diffusion process of Stable Diffusion 1.5: v or noise."""
    timestep_shift: float = Field(default=1, gt=0)
    """Shift of the timesteps towards noise, as in SD3; 1: none."""
    data: str = "emoji"
    """emoji, a folder of images, or webdataset shards."""
    resolution: int = Field(default=32, ge=8, le=4096)
    """Height and width of the images, in pixels."""
    autoencoder: str = "emoji"
    """Autoencoder of the latents: emoji, none (pixels), or a folder."""
    text_encoder: str = "minilm"
    """Text encoder of the captions: minilm or a folder."""
    context_tokens: int = Field(default=16, ge=1, le=512)
    """Captions are cut to this many tokens."""
    context_padding: ZerosOrEncoded = "zeros"
    """Embeddings after a caption's last token: zeros, or the encoded padding tokens, as nets of Stable Diffusion take
    them."""
    null_caption: ZerosOrEncoded = "zeros"
    """Embeddings of the null caption: zeros, or the encoded empty string, as nets of SD-1.5 take it."""
    num_inference_steps: int = Field(default=10, ge=1, le=1000)
    """Sampling steps when samples are drawn."""
    guidance_scale: float = Field(default=2, ge=0, le=100)
    """Classifier-free guidance scale when samples are drawn; 1: no guidance."""
    train_seeds: Annotated[tuple[TrainSeed, ...], Field(min_length=1, max_length=MAX_SEEDS)] = (0, 1)
    """Seeds of the training runs. Each run gives a whole score; the candidate's score is their mean."""
    varied: Literal["all", "weights", "order", "noise"] = "all"
    """Randomness that the training seeds change: all of it, or only that of the initial weights, of the order of the
    images, or of the noise with the timesteps and the dropped captions. The rest is that of the first seed."""
    curve_points: int = Field(default=4, ge=1, le=MAX_CURVE_POINTS)
    """Evenly spaced steps, the last one included, at which a run's validation loss is kept. Each takes a hundredth of
    the quick start's run, and changes no other number."""
    retrieval: bool = False
    """Whether samples are also scored by how well they retrieve their own captions (mean reciprocal rank)."""
    init_from: str | None = None
    """Folder of a trained U-Net whose weights the candidates inherit; None: new weights."""
    distillation: TeacherDistillationConfig | None = None
    """Knowledge distillation from a teacher; None: none."""

    @rule
    def _distinct_seeds(self) -> None:
        if len(set(self.train_seeds)) < len(self.train_seeds):
            raise ValueError("a seed is listed twice; list each once")

    @rule
    def _retrieval_has_samples(self) -> None:
        if self.retrieval and not self.num_samples:
            raise ValueError("retrieval needs samples, but num_samples is 0; raise it or remove retrieval")

    @rule
    def _settings_fit_the_prediction_type(self) -> None:
        if self.prediction_type in DIFFUSION_PREDICTION_TYPES:
            if self.timestep_shift != 1:
                raise ValueError("timestep_shift applies to rectified flow only; leave it out")
            if self.distillation is not None:
                raise ValueError("distillation needs rectified flow; remove it, or choose another prediction_type")

    @property
    def text_encoders(self) -> tuple[TextEncoderConfig, ...]:
        """The text encoder, as a list of one."""
        encoder = TextEncoderConfig(
            encoder=self.text_encoder,
            tokens=self.context_tokens,
            dropout=self.caption_dropout,
            padding=self.context_padding,
            null=self.null_caption,
        )
        return (encoder,)

    @property
    def teacher_text_encoders(self) -> tuple[TextEncoderConfig, ...] | None:
        """The teacher's text encoders; None without a teacher."""
        if self.distillation is None:
            return None
        pooled = tuple(encoder.model_copy(update={"pooled": True}) for encoder in self.text_encoders)
        return self.distillation.teacher_text_encoders or pooled


_DIGESTS = {
    "data": "data_digest",
    "autoencoder": "autoencoder_digest",
    "text_encoder": "text_encoder_digest",
    "feature_extractor": "feature_extractor_digest",
}
"""Fields that name something outside the protocol, and the digests that replace them in the hash."""

_SAMPLING_FIELDS = ("num_inference_steps", "guidance_scale", "feature_extractor", "feature_resolution")
"""Fields that have no effect if no samples are generated."""

_LATER_FIELDS = (
    "init_from",
    "distillation",
    "gradient_accumulation_steps",
    "compile",
    "context_padding",
    "null_caption",
    "varied",
    "retrieval",
)
"""Fields added after hashes were first published. Their defaults do not count, so that hashes stay valid."""

_HASHED_NAMES = {
    "batch_size": "batch",
    "grad_clip": "clip",
    "warmup_fraction": "warmup",
    "lr_schedule": "schedule",
    "ema_sigma_rel": "ema",
    "prediction_type": "prediction",
    "timestep_shift": "shift",
    "text_encoder": "text",
    "num_inference_steps": "sampler_steps",
    "guidance_scale": "guidance",
    "num_samples": "samples",
    "feature_extractor": "extractor",
    "train_seeds": "seeds",
    "init_from": "inherit",
}
"""Field names as they were when hashes were first published. Hashes use them, so that renames keep hashes valid."""


class ResolvedProtocol(Config):
    """A protocol with the digests of the files it refers to: two numbers are comparable if these are equal."""

    protocol: EvaluationProtocol
    data_digest: str
    """Digest of the images and captions of both splits."""
    autoencoder_digest: str
    text_encoder_digest: str
    feature_extractor_digest: str
    """Digest of the feature extractor's weights; empty if no samples are generated."""
    init_from_digest: str = ""
    """Digest of the U-Net whose weights candidates start from; empty for random initialization."""
    teacher_digest: str = ""
    """Digest of the teacher and of its text encoders; empty without distillation."""
    revision: int = REVISION

    @property
    def hash(self) -> str:
        """Protocol hash of 16 hex digits; two hashes are equal if and only if `first_difference` returns None.

        Files count by their content, not by their path. Sampling settings do not count if no samples are generated.
        """
        values = {_HASHED_NAMES.get(name, name): value for name, value in self._identity().items()}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def first_difference(self, other: ResolvedProtocol) -> str | None:
        """The first field in which two protocols differ, with both values as in YAML; None if they are equal."""
        own_identity, other_identity = self._identity(), other._identity()
        own, others = (resolved.protocol.model_dump(mode="json") for resolved in (self, other))
        for name in own_identity | other_identity:
            own_digest, other_digest = own_identity.get(name), other_identity.get(name)
            if own_digest == other_digest:
                continue
            a, b = as_yaml(own.get(name, own_digest)), as_yaml(others.get(name, other_digest))
            if a == b:  # the same name, but other content
                a, b = f"{a} with digest {as_yaml(own_digest)}", as_yaml(other_digest)
            return f"{name}: {a} against {b}"
        return None

    def _identity(self) -> dict[str, Any]:
        values = self.protocol.model_dump(mode="json")
        values |= {name: getattr(self, digest) for name, digest in _DIGESTS.items()}
        if not self.protocol.num_samples:
            values |= dict.fromkeys(_SAMPLING_FIELDS)
        del values["gradient_checkpointing"], values["curve_points"]  # they do not change the numbers
        for name in _LATER_FIELDS:
            if getattr(self.protocol, name) == EvaluationProtocol.model_fields[name].default:
                del values[name]
        if "init_from" in values:
            values["init_from"] = self.init_from_digest
        if "distillation" in values:
            encoders = values["distillation"]["teacher_text_encoders"]
            later = ("padding", "null")
            sizes = encoders and [
                {k: None if k == "encoder" else v for k, v in encoder.items() if k not in later or v != "zeros"}
                for encoder in encoders
            ]
            values["distillation"] |= {"teacher": self.teacher_digest, "teacher_text_encoders": sizes}
        return values | {"revision": self.revision}
