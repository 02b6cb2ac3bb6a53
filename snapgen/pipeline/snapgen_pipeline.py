"""A diffusers pipeline from prompts to images: a trained net with its autoencoder, text encoders and scheduler.

    from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
    SnapGenPipeline.from_pretrained("runs/x/pipeline")("a red apple", num_inference_steps=4).images[0]

diffusers' ``DiffusionPipeline.from_pretrained`` looks for pipeline classes only in diffusers, so it needs
``custom_pipeline``, for which the folder has a file (`snapgen.pipeline.card`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from snapgen.autoencoders.autoencoder import Autoencoder, AutoencoderWithDecoder, ConvAutoencoder, KLAutoencoder
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.conditioning import captions as conditioning, text_encoder as text
from snapgen.conditioning.captions import ENCODING_FIELDS, EncodedCaptions, TextEncoderConfig
from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import PREDICTION_TYPES, NoiseProcess, PredictionType, make_process as process_of
from snapgen.errors import InputError
from snapgen.models.unet import UNet
from snapgen.pipeline.card import write_card

if TYPE_CHECKING:
    from snapgen.diffusion.process import Scheduler

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_BATCH_SIZE = 16
"""Images that a call samples at once by default."""


class SnapGenPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Samples images for prompts with the noise process and the contexts of training (`snapgen.diffusion.process`).

    Everything that is not a component is configuration in ``model_index.json``. Trainings create one by
    `from_components`.

    Args:
        unet: the net.
        vae: the autoencoder of its latents.
        scheduler: Euler's method for rectified flow, with the resolution shift of the timesteps in ``shift``; DDIM for
            variance-preserving diffusion.
        decoder: tiny decoder used in place of the autoencoder's.
        text_encoder, text_encoder_2, …: text encoders of transformers, in the order in which they are merged.
        tokenizer, tokenizer_2, …: their tokenizers.
        encoders: configuration of each text encoder, as mappings of `TextEncoderConfig`'s fields.
        prediction: what the net's output stands for, which selects the noise process.
        steps: default number of sampling steps; for a few-step net the number that it was trained for.
        guidance: default guidance scale; 1 for a few-step net.
        resolution: default height and width in pixels; None: every call must name them.

    Raises:
        InputError: if the components do not fit together.
    """

    model_cpu_offload_seq = "->".join([*TEXT_ENCODERS, "unet", "decoder", "vae"])
    _optional_components = ["decoder", *TEXT_ENCODERS, *TOKENIZERS]  # noqa: RUF012 - diffusers concatenates it with lists

    def __init__(
        self,
        unet: UNet,
        vae: ConvAutoencoder | AutoencoderKL,
        scheduler: Scheduler,
        decoder: TinyDecoder | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        text_encoder_4: Any = None,
        tokenizer_4: Any = None,
        encoders: Sequence[Mapping[str, Any]] = (),
        prediction: PredictionType = "velocity",
        steps: int = 28,
        guidance: float = 1,
        resolution: int | None = None,
    ) -> None:
        super().__init__()
        if vae is None:
            raise InputError("pipeline", "has no autoencoder, its net works on pixels", "train it with an autoencoder")
        self.register_modules(
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            decoder=decoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            text_encoder_4=text_encoder_4,
            tokenizer_4=tokenizer_4,
        )
        self.register_to_config(
            encoders=[dict(encoder) for encoder in encoders],
            prediction=prediction,
            steps=steps,
            guidance=guidance,
            resolution=resolution,
        )
        self._check()
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.autoencoder.factor)

    @classmethod
    def from_components(
        cls,
        unet: UNet,
        autoencoder: Autoencoder,
        encoders: Sequence[TextEncoderConfig] = (),
        *,
        prediction: PredictionType,
        shift: float = 1,
        steps: int = 28,
        guidance: float = 1,
        resolution: int | None = None,
    ) -> SnapGenPipeline:
        """A pipeline from a training's components. Text encoders are loaded by name if the net takes a context.

        Raises:
            InputError: if the components do not fit together, or a text encoder cannot be loaded.
        """
        decoder = autoencoder.decoder if isinstance(autoencoder, AutoencoderWithDecoder) else None
        base = autoencoder.encoder if isinstance(autoencoder, AutoencoderWithDecoder) else autoencoder
        vae = base.net if isinstance(base, KLAutoencoder) else base if isinstance(base, ConvAutoencoder) else None
        encoders = encoders if unet.needs_context else ()
        if len(encoders) > len(TEXT_ENCODERS):
            raise InputError("pipeline", f"has {len(encoders)} text encoders", f"use at most {len(TEXT_ENCODERS)}")
        components: dict[str, Any] = {}
        for name, tokenizer, encoder in zip(TEXT_ENCODERS, TOKENIZERS, encoders, strict=False):
            components[name], components[tokenizer] = text.load_text_encoder(encoder.encoder)
        return cls(
            unet,
            vae,
            process_of(prediction, shift=shift).scheduler(),
            decoder,
            **components,
            encoders=[encoder.model_dump(include=ENCODING_FIELDS) for encoder in encoders],
            prediction=prediction,
            steps=steps,
            guidance=guidance,
            resolution=resolution,
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Diffusers' ``save_pretrained``, with the prediction type in the net's own configuration too, and a card."""
        self.unet.prediction_type = self.config.prediction
        super().save_pretrained(save_directory, *args, **kwargs)
        write_card(Path(save_directory), self)

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder with the decoder in use."""
        return self._base if self.decoder is None else AutoencoderWithDecoder(self._base, self.decoder)

    @property
    def _base(self) -> Autoencoder:
        return cast(Autoencoder, KLAutoencoder(self.vae) if isinstance(self.vae, AutoencoderKL) else self.vae)

    @property
    def text_encoders(self) -> list[tuple[Any, Any]]:
        """Text encoders with their tokenizers."""
        names = zip(TEXT_ENCODERS, TOKENIZERS, self.config.encoders, strict=False)
        return [(getattr(self, name), getattr(self, tokenizer)) for name, tokenizer, _ in names]

    @property
    def encoders(self) -> list[TextEncoderConfig]:
        """Configuration of each text encoder, named after its component."""
        return [
            TextEncoderConfig(encoder=name, **fields)
            for name, fields in zip(TEXT_ENCODERS, self.config.encoders, strict=False)
        ]

    @property
    def stride(self) -> int:
        """Pixels of which the sides of an image must be multiples."""
        return cast(int, self.autoencoder.factor * self.unet.arch.stride)

    def _check(self) -> None:
        arch, vae = self.unet.arch, self._base
        if arch.latent_channels != vae.latent_channels:
            problem = f"has {vae.latent_channels} latent channels, but the net has {arch.latent_channels}"
            raise InputError("pipeline", problem, "use the autoencoder of the training", place="vae")
        latents, decoder = (vae.factor, vae.latent_channels), self.decoder
        if decoder is not None and (decoder.factor, decoder.config.latent_channels) != latents:
            problem = "decodes other latents than those of vae"
            raise InputError("pipeline", problem, "use the decoder trained on them", place="decoder")
        count = len(self.config.encoders)
        for names in (TEXT_ENCODERS, TOKENIZERS):
            if [getattr(self, name) is not None for name in names] != [i < count for i in range(len(names))]:
                problem = f"has {count} entries, so the components must be {', '.join(names[:count]) or 'none'}"
                raise InputError("pipeline", problem, "give these components and no others", place="encoders")
        if arch.has_cross_attention and not count:
            problem = "has no text encoder, but its net has cross-attention"
            raise InputError("pipeline", problem, "give the text encoders of the training")
        if self.config.prediction not in PREDICTION_TYPES:
            choices = ", ".join(PREDICTION_TYPES)
            raise InputError("pipeline", f"is {self.config.prediction!r}", f"use one of: {choices}", place="prediction")
        if self.unet.prediction_type not in (None, self.config.prediction):
            problem = f"is {self.config.prediction!r}, but its net predicts {self.unet.prediction_type!r}"
            raise InputError("pipeline", problem, "give the prediction type of the training", place="prediction")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor | None:
        """Contexts of prompts as in training: (len(prompts), N, context_dim); None without text encoders."""
        if not self.encoders:
            return None
        return self._encoded(prompts).conditioning(torch.arange(len(prompts))).context

    def _encoded(self, prompts: Sequence[str]) -> EncodedCaptions:
        return conditioning.encode(prompts, self.encoders, loaded=self.text_encoders)

    def _null(self, guidance: float) -> Tensor | None:
        """Context of the null caption (1, N, context_dim), where guidance needs it; None: zeros."""
        if guidance == 1 or all(encoder.null == "zeros" for encoder in self.encoders):
            return None
        return self._encoded([""]).null().context.to(self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        context: Tensor | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images for prompts, in the order of the prompts.

        Args:
            prompt: one or several prompts; an empty string is the null caption.
            context: contexts (B, N, context_dim) in place of prompts.
            num_images_per_prompt: images per prompt, which follow each other.
            num_inference_steps: sampling steps; default from the configuration.
            guidance_scale: classifier-free guidance scale; default from the configuration. A scale of 1 needs one
                evaluation of the net per step, other scales two.
            height, width: size in pixels, multiples of `stride`; default from the configuration.
            seed: seed of the noise if neither ``generator`` nor ``latents`` is given; an image's noise depends on its
                index, not on the batch.
            generator: generator of the noise, or one per image.
            latents: the initial noise (images, C, H, W), which determines the size.
            output_type: ``pil``; ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W) in [0, 1]; ``latent``.
            return_dict: whether to return an `ImagePipelineOutput` rather than a tuple.
            batch_size: images sampled at once.

        Raises:
            InputError: if the arguments do not fit each other or the components.
        """
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        guidance = self.config.guidance if guidance_scale is None else guidance_scale
        _check_call(steps, guidance, num_images_per_prompt, batch_size, output_type)
        context, count = self._contexts(prompt, context, num_images_per_prompt)
        if latents is None:
            latents = self._noise(count, self._latent_shape(height, width), seed, generator)
        elif len(latents) != count:
            raise InputError("latents", f"are {len(latents)} for {count} images", "give one per image")
        null = None if context is None else self._null(guidance)
        batches = []
        starts = range(0, count, batch_size)
        with self.progress_bar(total=len(starts) * steps) as bar:
            for start in starts:
                rows = slice(start, start + batch_size)
                own = None if context is None else context[rows]
                sampled = self._sample(latents[rows], own, steps, guidance, null, bar)
                batches.append(sampled if output_type == "latent" else self._decode(sampled))
        images = torch.cat(batches)
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _contexts(
        self, prompt: str | Sequence[str] | None, context: Tensor | None, images_per_prompt: int
    ) -> tuple[Tensor | None, int]:
        """One context per image if the net takes a context, and the number of images."""
        if (prompt is None) == (context is None):
            raise InputError("prompt", "and context are mutually exclusive, and one is required", "give one of the two")
        if context is None:
            assert prompt is not None
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not prompts:
                raise InputError("prompt", "is an empty list", "give at least one")
            if not self.unet.needs_context:
                return None, len(prompts) * images_per_prompt
            context = self.encode(prompts)
            assert context is not None
        # (prompts, N, C) → (images, N, C), each prompt's images adjacent
        repeated = context.to(self._execution_device).repeat_interleave(images_per_prompt, 0)
        return repeated, len(context) * images_per_prompt

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        sides = []
        for name, side in (("height", height), ("width", width)):
            side = self.config.resolution if side is None else side
            if side is None:
                raise InputError(name, "is missing, and the pipeline has no default resolution", "give it")
            if side < 1 or side % self.stride:
                raise InputError(name, f"{side} is not a valid size", f"use a multiple of {self.stride}")
            sides.append(side // self.autoencoder.factor)
        return (self.unet.arch.latent_channels, sides[0], sides[1])

    def _noise(
        self,
        count: int,
        shape: tuple[int, int, int],
        seed: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        if generator is None:
            return rectified_flow.per_image_noise(range(count), shape, seed=seed)
        if isinstance(generator, list) and len(generator) != count:
            raise InputError("generator", f"are {len(generator)} for {count} images", "give one, or one per image")
        return cast(Tensor, randn_tensor((count, *shape), generator=generator, device=self._execution_device))

    @property
    def process(self) -> NoiseProcess:
        """Noise process on which the net was trained."""
        return process_of(self.config.prediction)

    def _sample(
        self, noise: Tensor, context: Tensor | None, steps: int, guidance: float, null: Tensor | None, bar: Any
    ) -> Tensor:
        """Sample latents (B, C, H, W) from noise with the scheduler, whose timesteps are 1000·t."""
        scheduler, dtype = self.scheduler, self.unet.dtype
        x = noise.to(self._execution_device, torch.float32)
        self.process.set_steps(scheduler, steps, x.device)

        def net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            context = None if context is None else context.to(dtype)
            return cast(Tensor, self.unet(x.to(dtype), t, context).float())

        for timestep in scheduler.timesteps:
            t = (timestep / scheduler.config.num_train_timesteps).expand(len(x))
            output = self.process.predict_guided(net, x, t, context, guidance, null)
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
            bar.update()
        return x

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, h·factor, w·factor) in [-1, 1], float32."""
        dtype = (self.vae if self.decoder is None else self.decoder).dtype
        return self.autoencoder.decode(latents.to(dtype)).float()


def _check_call(steps: int, guidance: float, images_per_prompt: int, batch_size: int, output_type: str) -> None:
    counts = {
        "num_inference_steps": steps,
        "num_images_per_prompt": images_per_prompt,
        "batch_size": batch_size,
    }
    for name, count in counts.items():
        if count < 1:
            raise InputError(name, f"{count} is not positive", "use 1 or more")
    if not math.isfinite(guidance):
        raise InputError("guidance_scale", f"{guidance} is not finite", "use 1 for no guidance")
    if output_type not in OUTPUT_TYPES:
        raise InputError("output_type", f"{output_type!r} is unknown", f"use one of: {', '.join(OUTPUT_TYPES)}")
