"""Autoencoders between images and latents, and their training."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.autoencoders.autoencoder import Autoencoder as Autoencoder, load_autoencoder as load_autoencoder
    from snapgen.autoencoders.latents import encode_dataset as encode_dataset
    from snapgen.autoencoders.pruned_decoder import prune_decoder as prune_decoder
    from snapgen.autoencoders.tiny_decoder import TinyDecoder as TinyDecoder
    from snapgen.autoencoders.training import (
        DecoderTrainer as DecoderTrainer,
        DecoderTrainingConfig as DecoderTrainingConfig,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
