"""From prompts to images: a trained net with its autoencoder, text encoders and scheduler, as a diffusers pipeline.

    from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
    SnapGenPipeline.from_pretrained("runs/x/pipeline")("a red apple", num_inference_steps=4).images[0]

diffusers' own ``DiffusionPipeline.from_pretrained`` looks for the classes of pipelines in diffusers alone, so it is
this class that loads such a folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from snapgen.autoencoders.autoencoder import Autoencoder, AutoencoderWithDecoder, ConvAutoencoder, KLAutoencoder
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.conditioning import captions as conditioning
from snapgen.conditioning import text_encoder as text
from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import PREDICTION_TYPES, NoiseProcess, PredictionType, Scheduler
from snapgen.diffusion.process import make_process as process_of
from snapgen.errors import InputError
from snapgen.models.unet import UNet

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
ENCODING = {"tokens", "layer", "join"}
"""What of a text encoder's settings its context depends on, beside its weights."""
OUTPUTS = ("pil", "np", "pt", "latent")
BATCH = 16
"""Images drawn at once, if nothing else is asked for."""


class SnapGenPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws images for prompts, as the training's process samples (`snapgen.diffusion.process`), with the training's
    contexts.

    Everything beside the components is configuration, in ``model_index.json``. Whoever trains makes one by `assembled`.

    Args:
        unet: the net.
        vae: the autoencoder of its latents.
        scheduler: takes the steps: of rectified flow Euler's method, whose ``shift`` is the timesteps' resolution
            shift, of diffusion DDIM's.
        decoder: decodes in the autoencoder's place.
        text_encoder, text_encoder_2, …: of transformers, in the order in which they are merged.
        tokenizer, tokenizer_2, …: theirs.
        encoders: how each of them encodes, as mappings of `TextEncoderConfig`' fields.
        prediction: what the net's output stands for, and so the process.
        steps: of a call that names none; a few-step net's own number.
        guidance: likewise; 1 for a few-step net.
        resolution: pixels of a side, likewise; None: a call names them.

    Raises:
        InputError: if these do not fit together.
    """

    model_cpu_offload_seq = "->".join([*TEXT_ENCODERS, "unet", "decoder", "vae"])
    _optional_components = ["decoder", *TEXT_ENCODERS, *TOKENIZERS]  # noqa: RUF012 - diffusers adds it to lists

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
            raise InputError("pipeline", "has no autoencoder; its latents are pixels", "train on an autoencoder's")
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
            encoders=[dict(each) for each in encoders],
            prediction=prediction,
            steps=steps,
            guidance=guidance,
            resolution=resolution,
        )
        self._check()
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.autoencoder.factor)

    @classmethod
    def assembled(
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
        """A pipeline of what a training holds; the text encoders are loaded by their names, if the net takes a context.

        Raises:
            InputError: as the class, or if a text encoder cannot be loaded.
        """
        decoder = autoencoder.decoder if isinstance(autoencoder, AutoencoderWithDecoder) else None
        base = autoencoder.encoder if isinstance(autoencoder, AutoencoderWithDecoder) else autoencoder
        vae = base.net if isinstance(base, KLAutoencoder) else base if isinstance(base, ConvAutoencoder) else None
        encoders = encoders if unet.needs_context else ()
        if len(encoders) > len(TEXT_ENCODERS):
            raise InputError("pipeline", f"has {len(encoders)} text encoders", f"use at most {len(TEXT_ENCODERS)}")
        components: dict[str, Any] = {}
        for name, tokenizer, settings in zip(TEXT_ENCODERS, TOKENIZERS, encoders, strict=False):
            components[name], components[tokenizer] = text.load_text_encoder(settings.encoder)
        return cls(
            unet,
            vae,
            process_of(prediction, shift=shift).scheduler(),
            decoder,
            **components,
            encoders=[settings.model_dump(include=ENCODING) for settings in encoders],
            prediction=prediction,
            steps=steps,
            guidance=guidance,
            resolution=resolution,
        )

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, with the decoder that is used."""
        return self._base if self.decoder is None else AutoencoderWithDecoder(self._base, self.decoder)

    @property
    def _base(self) -> Autoencoder:
        return cast(Autoencoder, KLAutoencoder(self.vae) if isinstance(self.vae, AutoencoderKL) else self.vae)

    @property
    def text_encoders(self) -> list[tuple[Any, Any]]:
        """The text encoders, each with its tokenizer."""
        names = zip(TEXT_ENCODERS, TOKENIZERS, self.config.encoders, strict=False)
        return [(getattr(self, name), getattr(self, tokenizer)) for name, tokenizer, _ in names]

    @property
    def encoders(self) -> list[TextEncoderConfig]:
        """How each text encoder encodes; each is named as its component."""
        return [
            TextEncoderConfig(encoder=name, **settings)
            for name, settings in zip(TEXT_ENCODERS, self.config.encoders, strict=False)
        ]

    @property
    def stride(self) -> int:
        """What the sides of an image are multiples of, in pixels."""
        return cast(int, self.autoencoder.factor * self.unet.arch.stride)

    def _check(self) -> None:
        arch, vae = self.unet.arch, self._base
        if arch.latent_channels != vae.latent_channels:
            problem = f"has {vae.latent_channels} latent channels; its net has {arch.latent_channels}"
            raise InputError("pipeline", problem, "use the autoencoder of the training", place="vae")
        latents, decoder = (vae.factor, vae.latent_channels), self.decoder
        if decoder is not None and (decoder.factor, decoder.config.latent_channels) != latents:
            problem = "is of other latents than vae's"
            raise InputError("pipeline", problem, "use the one trained on them", place="decoder")
        count = len(self.config.encoders)
        for names in (TEXT_ENCODERS, TOKENIZERS):
            if [getattr(self, name) is not None for name in names] != [i < count for i in range(len(names))]:
                problem = f"describes {count}, but does not hold {', '.join(names[:count]) or 'none'}"
                raise InputError("pipeline", problem, "give these, and no others", place="encoders")
        if arch.has_cross_attention and not count:
            raise InputError("pipeline", "has no text encoder; its net has cross-attention", "give the training's")
        if self.config.prediction not in PREDICTION_TYPES:
            choices = ", ".join(PREDICTION_TYPES)
            raise InputError("pipeline", f"is {self.config.prediction!r}", f"use one of: {choices}", place="prediction")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor | None:
        """Contexts of prompts as in training: (len(prompts), N, context width); None where there is no text encoder."""
        if not self.encoders:
            return None
        captions = conditioning.encode(prompts, self.encoders, loaded=self.text_encoders)
        return captions.condition(torch.arange(len(prompts))).context

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
        batch_size: int = BATCH,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images of prompts, in their order.

        Args:
            prompt: one or several; an empty one is the null caption.
            context: contexts (B, N, context width) in place of prompts.
            num_images_per_prompt: images that follow each other.
            num_inference_steps: of the sampler; without it the configuration's.
            guidance_scale: of classifier-free guidance, likewise; 1 costs one evaluation of the net a step, others two.
            height, width: in pixels, likewise; multiples of `stride`.
            seed: of the noise where there is neither ``generator`` nor ``latents``: an image's depends on its index.
            generator: of the noise; or one for each image.
            latents: the noise itself, (images, C, H, W); it decides the size.
            output_type: ``pil``; ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W) in [0, 1]; ``latent``.
            return_dict: False: a tuple.
            batch_size: images drawn at once.

        Raises:
            InputError: if these do not fit each other or the components.
        """
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        guidance = self.config.guidance if guidance_scale is None else guidance_scale
        _check_call(steps, guidance, num_images_per_prompt, batch_size, output_type)
        context, count = self._contexts(prompt, context, num_images_per_prompt)
        if latents is None:
            latents = self._noise(count, self._latent_shape(height, width), seed, generator)
        elif len(latents) != count:
            raise InputError("latents", f"are {len(latents)} for {count} images", "give one an image")
        parts = []
        starts = range(0, count, batch_size)
        with self.progress_bar(total=len(starts) * steps) as bar:
            for start in starts:
                rows = slice(start, start + batch_size)
                found = self._sample(latents[rows], None if context is None else context[rows], steps, guidance, bar)
                parts.append(found if output_type == "latent" else self._decode(found))
        images = torch.cat(parts)
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _contexts(
        self, prompt: str | Sequence[str] | None, context: Tensor | None, times: int
    ) -> tuple[Tensor | None, int]:
        """A context for each image, if the net takes any, and the number of images."""
        if (prompt is None) == (context is None):
            raise InputError("prompt", "is to be given, or a context", "give one of the two")
        if context is None:
            assert prompt is not None
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not prompts:
                raise InputError("prompt", "is an empty list", "give at least one")
            if not self.unet.needs_context:
                return None, len(prompts) * times
            context = self.encode(prompts)
            assert context is not None
        return context.to(self._execution_device).repeat_interleave(times, 0), len(context) * times

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        sides = []
        for name, side in (("height", height), ("width", width)):
            side = self.config.resolution if side is None else side
            if side is None:
                raise InputError(name, "is not given, and the pipeline names no resolution", "give it")
            if side < 1 or side % self.stride:
                raise InputError(name, f"{side} is no size of this pipeline's", f"use a multiple of {self.stride}")
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
            raise InputError("generator", f"are {len(generator)} for {count} images", "give one, or one an image")
        return cast(Tensor, randn_tensor((count, *shape), generator=generator, device=self._execution_device))

    @property
    def process(self) -> NoiseProcess:
        """What the net was trained on."""
        return process_of(self.config.prediction)

    def _sample(self, noise: Tensor, context: Tensor | None, steps: int, guidance: float, bar: Any) -> Tensor:
        """As the process samples, by the scheduler, whose timesteps are 1000·t."""
        scheduler, dtype = self.scheduler, self.unet.dtype
        x = noise.to(self._execution_device, torch.float32)
        self.process.set_steps(scheduler, steps, x.device)

        def net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            some = None if context is None else context.to(dtype)
            return cast(Tensor, self.unet(x.to(dtype), t, some).float())

        for timestep in scheduler.timesteps:
            t = (timestep / scheduler.config.num_train_timesteps).expand(len(x))
            said = self.process.guided(net, x, t, context, guidance)
            x = scheduler.step(said, timestep, x, return_dict=False)[0]
            bar.update()
        return x

    def _decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) → images (B, 3, H · factor, W · factor) in [-1, 1], float32."""
        dtype = (self.vae if self.decoder is None else self.decoder).dtype
        return self.autoencoder.decode(latents.to(dtype)).float()


def _check_call(steps: int, guidance: float, times: int, batch: int, output: str) -> None:
    for name, count in (("num_inference_steps", steps), ("num_images_per_prompt", times), ("batch_size", batch)):
        if count < 1:
            raise InputError(name, f"{count} is no count", "use 1 or more")
    if not math.isfinite(guidance):
        raise InputError("guidance_scale", f"{guidance} is no number", "use 1 for none")
    if output not in OUTPUTS:
        raise InputError("output_type", f"{output!r} is unknown", f"use one of: {', '.join(OUTPUTS)}")
