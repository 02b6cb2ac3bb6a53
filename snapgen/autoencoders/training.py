"""Training of the small autoencoder, or of a tiny decoder for a frozen encoder (SnapGen, section 3.2).

Encoder and decoder of the autoencoder are trained together at first. Then the encoder is frozen, and the decoder is
trained further against a patch discriminator. With a given encoder, only a `TinyDecoder` is trained.
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
from snapgen.autoencoders.stepwise import StepwiseConfig, StepwiseTrainer
from snapgen.autoencoders.tiny_decoder import PAPER, TinyDecoder
from snapgen.data.pixels import INFERENCE_BATCH_SIZE, to_float
from snapgen.errors import InputError
from snapgen.io.cache import JSON
from snapgen.optim import optimizers
from snapgen.optim.ema import EMA

ImagesByResolution = Mapping[int, Tensor]
"""Images by resolution: uint8 (N, 3, resolution, resolution)."""

STATISTICS_IMAGES = 800
"""Images of each resolution from which the latents' statistics are computed: 51,200 latent positions at 32 px."""


class DecoderTrainingConfig(StepwiseConfig):
    """Configuration of autoencoder or decoder training, on which the weights depend along with images and shape.

    The paper names the losses (MSE, LPIPS, adversarial) but not their weights. All values here are our choice.
    """

    batch_size: int = Field(default=32, ge=1, le=65536)
    """Images per step at the lowest resolution; fewer at higher ones, so that all steps cost about the same."""
    resolutions: tuple[int, ...] = Field(default=(32, 32, 64), min_length=1)
    """Resolutions through which the steps cycle; one that is listed twice gets twice the steps."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for the matrices inside the net and AdamW for everything else; adamw: AdamW for all."""
    latent_noise: float = Field(default=0.3, ge=0)
    """Largest standard deviation of the noise added to latents, since a diffusion model's latents are not exact."""
    coarse: float = Field(default=1, ge=0)
    """Weight of the loss between the decoded 2×2 average of the latents and the 2×2 average of the image. It ties the
    latents' scales to the image's, which leaves less high-frequency energy for a diffusion model to learn."""
    l1: float = Field(default=0.5, ge=0)
    """Weight of the mean absolute error."""
    mse: float = Field(default=1, ge=0)
    """Weight of the mean squared error."""
    perceptual: float = Field(default=0.3, ge=0)
    """Weight of the perceptual loss (`snapgen.autoencoders.perceptual`)."""
    adversarial: float = Field(default=0.03, ge=0)
    """Weight of the adversarial loss."""
    adversarial_share: float = Field(default=0.25, ge=0, le=1)
    """Final share of the steps, in which the encoder is frozen and the discriminator is used."""


class LatentSpec(Protocol):
    """Anything with known latents, such as an autoencoder or the plan of one."""

    @property
    def factor(self) -> int:
        """Downscale factor: pixels along a side of the image per position of the latent."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        ...


class PatchDiscriminator(nn.Sequential):
    """Discriminator of three convolutions on patches of 18 px: (B, 3, H, W) → (B, 1, H/4, W/4).

    All but the last have spectral norm, so that within few steps the discriminator does not overpower the decoder.
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


class DecoderTrainer(StepwiseTrainer):
    """Training of an autoencoder or of a tiny decoder.

    Args:
        model: trained in place.
        images: training images of every resolution.
        training: the configuration.
        encoder: frozen encoder whose latents a `TinyDecoder` learns to decode; None: the model is an autoencoder.
    """

    net_key, seed_key = "model", ("autoencoder", "step")

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
        self.frozen_from = round(training.steps * (1 - training.adversarial_share))
        """First step, from 0, with a frozen encoder and the discriminator."""
        model.train().requires_grad_(True)
        super().__init__(model, training, training.optimizer)
        self.device = next(model.parameters()).device
        self.decoder = model.decoder if isinstance(model, ConvAutoencoder) else model
        self.perceptual = PerceptualLoss().to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive_seed(training.seed, "autoencoder", "discriminator"))
            self.discriminator = PatchDiscriminator().to(self.device)
        self.discriminator_optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))

    def finish(self) -> None:
        """Load the averaged weights into the model and set an autoencoder's latent statistics."""
        super().finish()
        if self.frozen_from >= self.training.steps and isinstance(self.model, ConvAutoencoder):
            self.model.measure_latents(self._sample())
        self.model.eval()

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, JSON]]:
        groups, metadata = super().state()
        judge = optimizers.state_of(self.discriminator_optimizer)
        return groups | {"discriminator": dict(self.discriminator.state_dict()), "judge": judge}, metadata

    def load(self, groups: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any]) -> None:
        if int(metadata["step"]) > self.frozen_from:
            self._use_frozen_encoder()
        super().load(groups, metadata)
        self.discriminator.load_state_dict(groups["discriminator"])
        optimizers.load_state(self.discriminator_optimizer, groups.get("judge", {}))

    def step(self) -> dict[str, Tensor]:
        """Update the model, and the discriminator once it is used; returns the losses, 0-dim, on the device."""
        if self.done == self.frozen_from:
            self._freeze_encoder()
        random = self.generator()
        target = self._batch(random).to(self.device)
        latents = self._encode(target)
        std = torch.rand(len(latents), 1, 1, 1, generator=random) * self.training.latent_noise
        noise = std * torch.randn(latents.shape, generator=random)
        decoded = self.decoder(latents + noise.to(self.device))
        losses = self._reconstruction(decoded, target)
        if self.training.coarse and target.shape[-1] > min(self.training.resolutions):
            # (B, C, h, w) → (B, C, h/2, w/2), decoded and compared at half the resolution
            coarse = self.decoder(functional.avg_pool2d(latents, 2))
            coarse_losses = self._reconstruction(coarse, functional.avg_pool2d(target, 2))
            losses["coarse"] = self.training.coarse * sum(coarse_losses.values(), torch.zeros(()))
        if self.done >= self.frozen_from and self.training.adversarial:
            losses["adversarial"] = -self.training.adversarial * self.discriminator(decoded).mean()
        losses = self.update(losses)
        if "adversarial" in losses:
            losses["discriminator"] = self._discriminate(decoded.detach(), target).detach()
        return losses

    def _encode(self, target: Tensor) -> Tensor:
        if self.encoder is None:
            assert isinstance(self.model, ConvAutoencoder)
            latents: Tensor = self.model.encode_with_batch_stats(target)
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
        """Update the discriminator once by the hinge loss."""
        real, fake = self.discriminator(target), self.discriminator(decoded)
        loss: Tensor = functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.discriminator_optimizer.step()
        return loss

    def _freeze_encoder(self) -> None:
        """Load the averaged weights and freeze the encoder; the decoder now trains on the latents of `encode`."""
        if isinstance(self.model, ConvAutoencoder):
            self.model.load_state_dict(self.ema.state())
            self.model.measure_latents(self._sample())
            self._use_frozen_encoder()

    def _use_frozen_encoder(self) -> None:
        if isinstance(self.model, ConvAutoencoder):
            self.model.encoder.requires_grad_(False)
            self.ema, self.ema_from = EMA(self.model, self.training.ema_sigma_rel), self.frozen_from
            self.encoder = self.model

    def _batch(self, random: torch.Generator) -> Tensor:
        """The images of a step, randomly mirrored and shifted: uint8 → [-1, 1]."""
        training = self.training
        resolution = training.resolutions[self.done % len(training.resolutions)]
        lowest = min(training.resolutions)
        size = max(2, round(training.batch_size * (lowest / resolution) ** 2))
        pixels = self.images[resolution]
        batch = pixels[torch.randint(len(pixels), (size,), generator=random)]
        mirrored = torch.rand(size, 1, 1, 1, generator=random) < 0.5
        batch = torch.where(mirrored, batch.flip(-1), batch)
        max_shift = resolution // 16
        padded = functional.pad(to_float(batch), (max_shift,) * 4, mode="replicate")
        x, y = torch.randint(2 * max_shift + 1, (2,), generator=random).tolist()
        return padded[..., y : y + resolution, x : x + resolution]

    def _sample(self) -> Iterator[Tensor]:
        """Batches of images spread over the data set, enough per resolution for statistics to at least two digits."""
        for resolution in sorted(set(self.training.resolutions)):
            pixels = self.images[resolution]
            for batch in torch.split(pixels[:: max(1, len(pixels) // STATISTICS_IMAGES)], INFERENCE_BATCH_SIZE):
                yield to_float(batch).to(self.device)


def new_autoencoder(seed: int, **config: Any) -> ConvAutoencoder:
    """An untrained autoencoder whose weights depend only on the seed and the configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive_seed(seed, "autoencoder", "weights"))
        return cast(ConvAutoencoder, ConvAutoencoder(**config))


def build_tiny_decoder(encoder: LatentSpec, *, seed: int, **config: Any) -> TinyDecoder:
    """An untrained decoder for an encoder's latents.

    Args:
        encoder: whose latents are decoded.
        seed: seed of the weights.
        config: arguments of `TinyDecoder`. The defaults are those of `PAPER` for a factor of 8, and its first levels
            for smaller factors.

    Raises:
        InputError: if the encoder's factor is not supported, or the configuration is for another factor.
    """
    levels = encoder.factor.bit_length()
    if levels > len(PAPER["widths"]) or levels < 2:
        raise InputError(
            "--encoder", f"has a downscale factor of {encoder.factor}", "use an encoder with one of 2, 4 or 8"
        )
    config = {**PAPER, "widths": PAPER["widths"][:levels], "blocks": PAPER["blocks"][:levels]} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive_seed(seed, "autoencoder", "weights"))
        try:
            decoder = cast(TinyDecoder, TinyDecoder(**config | {"latent_channels": encoder.latent_channels}))
        except (TypeError, ValueError) as error:
            raise InputError("decoder", str(error), "see snapgen.autoencoders.tiny_decoder.TinyDecoder") from None
    if decoder.factor != encoder.factor:
        problem = f"has a downscale factor of {decoder.factor}, but the encoder's is {encoder.factor}"
        raise InputError("decoder", problem, f"give {levels} widths and blocks", place="widths")
    return decoder
