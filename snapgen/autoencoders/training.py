"""The training of the small autoencoder, or of a tiny decoder for an encoder that is given (SnapGen, section 3.2).

Both parts learn together at first; then the encoder is frozen and the decoder goes on against a discriminator of
patches. An encoder that is given is frozen from the start, and what is trained is a `TinyDecoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from snapgen import seeding
from snapgen.autoencoders.autoencoder import Autoencoder, ConvAutoencoder
from snapgen.autoencoders.perceptual import PerceptualLoss
from snapgen.autoencoders.tiny_decoder import PAPER, TinyDecoder
from snapgen.config import Config
from snapgen.data.pixels import BATCH, to_float
from snapgen.errors import InputError
from snapgen.io.cache import JSON
from snapgen.io.checkpoint import StepCallback
from snapgen.optim import optimizers
from snapgen.optim.ema import EMA
from snapgen.optim.optimizers import OptimizerGroup
from snapgen.optim.schedule import cosine_with_warmup

ImagesByResolution = Mapping[int, Tensor]
"""Images by resolution: uint8 (N, 3, resolution, resolution)."""


MEASURED = 800
"""Images of each resolution that the latents' statistics are taken from; 800 hold 51,200 latent positions at 32 px."""


class DecoderTrainingConfig(Config):
    """Everything that the trained weights depend on, beside the images and the architecture.

    The paper names the losses (MSE, LPIPS, adversarial), not their weights: all values here are our choice.
    """

    steps: int = Field(default=2500, ge=1)
    batch: int = Field(default=32, ge=1)
    """Images a step at the lowest resolution; fewer at higher ones, so that every step costs about the same."""
    resolutions: tuple[int, ...] = Field(default=(32, 32, 64), min_length=1)
    """Taken in turn; one that is named twice gets twice the steps."""
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    warmup: int = Field(default=100, ge=0)
    ema: float = Field(default=0.03, gt=0, le=0.25)
    """Width of the weights' average, relative to the steps so far of its part (`snapgen.optim.ema.EMA`)."""
    latent_noise: float = Field(default=0.3, ge=0)
    """Largest standard deviation of the noise that the decoder must bear: a diffusion model's latents are not exact."""
    coarse: float = Field(default=1, ge=0)
    """Weight of the loss of decoding latents averaged 2×2 against images averaged so. It ties the latents' scales to
    the image's, which leaves less high-frequency energy for a diffusion model to learn."""
    l1: float = Field(default=0.5, ge=0)
    mse: float = Field(default=1, ge=0)
    perceptual: float = Field(default=0.3, ge=0)
    adversarial: float = Field(default=0.03, ge=0)
    adversarial_share: float = Field(default=0.25, ge=0, le=1)
    """The last share of the steps, in which the encoder is frozen and the discriminator plays."""
    seed: int = 0


class LatentSpec(Protocol):
    """Anything that knows what its latents are like: an autoencoder, or a plan of one."""

    @property
    def factor(self) -> int:
        """Pixels along a side of the image for one of the latent."""
        ...

    @property
    def latent_channels(self) -> int:
        """Of the latents."""
        ...


class PatchDiscriminator(nn.Sequential):
    """Three convolutions that judge patches of 18 px: (B, 3, H, W) → (B, 1, H/4, W/4).

    All but the last are spectrally normalised: with few steps to play it must not run away from the decoder.
    """

    def __init__(self, width: int = 32) -> None:
        norm = nn.utils.parametrizations.spectral_norm
        super().__init__(
            norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )


class DecoderTrainer:
    """A training under way, a step at a time, where ``model`` lies.

    The same arguments on the same machine with as many threads give the same weights, however often the training is
    interrupted and another one is loaded with its state: the random numbers of a step depend on its number alone.

    Args:
        model: trained in place.
        encoder: frozen encoder whose latents a `TinyDecoder` learns to decode; None: the model is an autoencoder.
    """

    def __init__(
        self,
        model: ConvAutoencoder | TinyDecoder,
        images: ImagesByResolution,
        training: DecoderTrainingConfig,
        encoder: Autoencoder | None = None,
    ) -> None:
        assert (encoder is None) == isinstance(model, ConvAutoencoder)
        missing = set(training.resolutions) - set(images)
        assert not missing, f"no images of {missing}"
        self.model, self.images, self.training, self.encoder = model, images, training, encoder
        self.done = 0
        """Steps taken."""
        self.frozen_from = round(training.steps * (1 - training.adversarial_share))
        """The step, from 0, from which the encoder is frozen and the discriminator plays."""
        model.train().requires_grad_(True)
        self.device = next(model.parameters()).device
        self.decoder = model.decoder if isinstance(model, ConvAutoencoder) else model
        self.average, self.averaged_from = EMA(model, training.ema), 0
        self.perceptual = PerceptualLoss().to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive_seed(training.seed, "autoencoder", "discriminator"))
            self.discriminator = PatchDiscriminator().to(self.device)
        self.optimizer = OptimizerGroup(
            model,
            kind=training.optimizer,
            learning_rate=training.learning_rate,
            beta2=0.99,
            weight_decay=training.weight_decay,
            clip=1,
        )
        self.judge = torch.optim.AdamW(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))

    def complete(self, progress: StepCallback | None = None) -> None:
        """Takes the steps that are left, calling ``progress`` after each, and finishes."""
        while self.done < self.training.steps:
            losses = self.step()
            if progress:
                progress(self.done, self.training.steps, losses)
        self.finish()

    def finish(self) -> None:
        """Gives the model the averaged weights and, an autoencoder, its latents' statistics."""
        self.model.load_state_dict(self.average.state())
        if self.frozen_from >= self.training.steps and isinstance(self.model, ConvAutoencoder):
            self.model.measure_latents(self._sample())
        self.model.eval()

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, JSON]]:
        """All that the next steps depend on beside the arguments, as `snapgen.io.checkpoint.save_checkpoint` takes it.

        The tensors are the training's own: save or copy them before the next step.
        """
        parts = {
            "model": dict(self.model.state_dict()),
            "average": self.average.state(),
            "optimizer": self.optimizer.state(),
            "discriminator": dict(self.discriminator.state_dict()),
            "judge": optimizers.state_of(self.judge),
        }
        return parts, {"step": self.done}

    def load(self, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        """Go on from what `state` gave in a training with the same arguments; this one has not begun."""
        assert self.done == 0
        self.done = int(facts["step"])
        self.model.load_state_dict(parts["model"])
        if self.done > self.frozen_from:
            self._hold_encoder()
        self.average.load(parts["average"])
        self.optimizer.load(parts.get("optimizer", {}))
        self.discriminator.load_state_dict(parts["discriminator"])
        optimizers.load_state(self.judge, parts.get("judge", {}))

    def step(self) -> dict[str, Tensor]:
        """One update of the model, and of the discriminator once it plays; the losses, 0-dim, on the device."""
        if self.done == self.frozen_from:
            self._freeze_encoder()
        random = torch.Generator().manual_seed(
            seeding.derive_seed(self.training.seed, "autoencoder", "step", self.done)
        )
        target = self._batch(random).to(self.device)
        latents = self._encode(target)
        reach = torch.rand(len(latents), 1, 1, 1, generator=random) * self.training.latent_noise
        noise = reach * torch.randn(latents.shape, generator=random)
        decoded = self.decoder(latents + noise.to(self.device))
        losses = self._reconstruction(decoded, target)
        if self.training.coarse and target.shape[-1] > min(self.training.resolutions):
            coarse = self.decoder(functional.avg_pool2d(latents, 2))
            again = self._reconstruction(coarse, functional.avg_pool2d(target, 2))
            losses["coarse"] = self.training.coarse * sum(again.values(), torch.zeros(()))
        if self.done >= self.frozen_from and self.training.adversarial:
            losses["adversarial"] = -self.training.adversarial * self.discriminator(decoded).mean()
        torch.autograd.backward(sum(losses.values(), torch.zeros(())))
        self.optimizer.step(cosine_with_warmup(self.done, steps=self.training.steps, warmup=self.training.warmup))
        self.average.update(self.done + 1 - self.averaged_from)
        if "adversarial" in losses:
            losses["discriminator"] = self._discriminate(decoded.detach(), target)
        self.done += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def _encode(self, target: Tensor) -> Tensor:
        if self.encoder is None:
            assert isinstance(self.model, ConvAutoencoder)
            latents: Tensor = self.model.encode_normalised_by_batch(target)
            return latents
        with torch.no_grad():
            return self.encoder.encode(target)

    def _reconstruction(self, decoded: Tensor, target: Tensor) -> dict[str, Tensor]:
        training = self.training
        return {
            "l1": training.l1 * functional.l1_loss(decoded, target),
            "mse": training.mse * functional.mse_loss(decoded, target),
            "perceptual": training.perceptual * self.perceptual(decoded, target),
        }

    def _discriminate(self, decoded: Tensor, target: Tensor) -> Tensor:
        """One update of the discriminator by the hinge loss."""
        real, fake = self.discriminator(target), self.discriminator(decoded)
        loss: Tensor = functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
        self.judge.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.judge.step()
        return loss

    def _freeze_encoder(self) -> None:
        """From here on the averaged encoder is the encoder, and the decoder sees latents as `encode` will give them."""
        if isinstance(self.model, ConvAutoencoder):
            self.model.load_state_dict(self.average.state())
            self.model.measure_latents(self._sample())
            self._hold_encoder()

    def _hold_encoder(self) -> None:
        if isinstance(self.model, ConvAutoencoder):
            self.model.encoder.requires_grad_(False)
            self.average, self.averaged_from = EMA(self.model, self.training.ema), self.frozen_from
            self.encoder = self.model

    def _batch(self, random: torch.Generator) -> Tensor:
        """The images of a step, mirrored and moved by chance: uint8 → [-1, 1]."""
        training = self.training
        resolution = training.resolutions[self.done % len(training.resolutions)]
        lowest = min(training.resolutions)
        size = max(2, round(training.batch * (lowest / resolution) ** 2))
        pixels = self.images[resolution]
        batch = pixels[torch.randint(len(pixels), (size,), generator=random)]
        mirrored = torch.rand(size, 1, 1, 1, generator=random) < 0.5
        batch = torch.where(mirrored, batch.flip(-1), batch)
        reach = resolution // 16
        padded = functional.pad(to_float(batch), (reach,) * 4, mode="replicate")
        x, y = torch.randint(2 * reach + 1, (2,), generator=random).tolist()
        return padded[..., y : y + resolution, x : x + resolution]

    def _sample(self) -> Iterator[Tensor]:
        """Batches of images spread over the set, enough of each resolution for statistics of two digits and more."""
        for resolution in sorted(set(self.training.resolutions)):
            pixels = self.images[resolution]
            for batch in torch.split(pixels[:: max(1, len(pixels) // MEASURED)], BATCH):
                yield to_float(batch).to(self.device)


def new_autoencoder(seed: int, **config: Any) -> ConvAutoencoder:
    """An untrained autoencoder; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive_seed(seed, "autoencoder", "weights"))
        return cast(ConvAutoencoder, ConvAutoencoder(**config))


def build_tiny_decoder(encoder: LatentSpec, *, seed: int, **config: Any) -> TinyDecoder:
    """An untrained decoder for an encoder's latents.

    Args:
        config: of `TinyDecoder`; what is not given is the paper's (for factor 8; as thin for others).

    Raises:
        InputError: if there is none for the encoder's factor, or the configuration is for another.
    """
    levels = encoder.factor.bit_length()
    if levels > len(PAPER["widths"]) or levels < 2:
        raise InputError("--encoder", f"has a factor of {encoder.factor}", "give one of 2, 4 or 8")
    config = {**PAPER, "widths": PAPER["widths"][:levels], "blocks": PAPER["blocks"][:levels]} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive_seed(seed, "autoencoder", "weights"))
        try:
            decoder = cast(TinyDecoder, TinyDecoder(**config | {"latent_channels": encoder.latent_channels}))
        except (TypeError, ValueError) as error:
            raise InputError("decoder", str(error), "see snapgen.autoencoders.tiny_decoder.TinyDecoder") from None
    if decoder.factor != encoder.factor:
        problem = f"decodes a factor of {decoder.factor}; the encoder's is {encoder.factor}"
        raise InputError("decoder", problem, f"give {levels} widths and blocks", place="widths")
    return decoder
