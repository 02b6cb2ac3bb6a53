"""Autoencoders between images and latents, and their training."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.autoencoders.autoencoder import Autoencoder, load_autoencoder
    from snapgen.autoencoders.latents import encode_dataset
    from snapgen.autoencoders.pruned_decoder import prune_decoder
    from snapgen.autoencoders.tiny_decoder import TinyDecoder
    from snapgen.autoencoders.training import DecoderTrainer, DecoderTrainingConfig
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "Autoencoder",
    "DecoderTrainer",
    "DecoderTrainingConfig",
    "TinyDecoder",
    "encode_dataset",
    "load_autoencoder",
    "prune_decoder",
]
