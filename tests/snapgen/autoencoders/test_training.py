"""A training of a decoder that is interrupted ends as the unbroken one does, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import Autoencoder
from snapgen.autoencoders.training import DecoderTrainer, DecoderTrainingConfig, build_tiny_decoder, new_autoencoder
from snapgen.errors import InputError
from snapgen.io import checkpoint

SMALL: dict[str, Any] = {
    "encoder_widths": (8, 32),
    "encoder_blocks": (0, 1),
    "decoder_widths": (8, 32),
    "decoder_blocks": (0, 1),
    "mid_blocks": 0,
    "norm_groups": 4,
}
SIX = DecoderTrainingConfig(steps=6, batch_size=4, resolutions=(16, 16, 32), warmup_steps=2, adversarial_share=0.5)


@pytest.fixture(scope="module")
def images() -> dict[int, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {side: torch.randint(256, (9, 3, side, side), generator=random, dtype=torch.uint8) for side in (16, 32)}


@pytest.fixture(scope="module")
def encoder() -> Autoencoder:
    return autoencoder.load_autoencoder("emoji")


def begun(
    images: dict[int, Tensor], training: DecoderTrainingConfig, encoder: Autoencoder | None = None
) -> DecoderTrainer:
    if encoder is None:
        return DecoderTrainer(new_autoencoder(0, **SMALL), images, training)
    shape = {"widths": (8, 16, 32), "blocks": (0, 1, 1), "norm_groups": 4}
    return DecoderTrainer(build_tiny_decoder(encoder, seed=0, **shape), images, training, encoder)


def assert_equal(run: DecoderTrainer, other: DecoderTrainer) -> None:
    """Not only the weights: all that further steps would depend on."""
    (parts, facts), (others, other_facts) = run.state(), other.state()
    assert facts == other_facts
    assert parts.keys() == others.keys()
    for part in parts:
        assert parts[part].keys() == others[part].keys(), part
        for name in parts[part]:
            assert torch.equal(parts[part][name], others[part][name]), (part, name)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_equals_unbroken(
    images: dict[int, Tensor], encoder: Autoencoder, tmp_path: Path, given: bool, optimizer: str
) -> None:
    training = SIX.model_copy(update={"optimizer": optimizer})
    frozen = encoder if given else None
    unbroken = begun(images, training, frozen)
    for _ in range(training.steps):
        unbroken.step()
        checkpoint.save_checkpoint(tmp_path / str(unbroken.done), *unbroken.state())
    # The encoder is frozen as step 3 begins: before it, at it, just behind it, at the end.
    for step in (1, 3, 4, 6):
        resumed = begun(images, training, frozen)
        resumed.load(*checkpoint.load_checkpoint(tmp_path / str(step)))
        while resumed.done < training.steps:
            resumed.step()
        assert_equal(resumed, unbroken)
    unbroken.finish()
    resumed.finish()
    assert_equal(resumed, unbroken)


def test_state_holds_what_the_discriminator_learnt(images: dict[int, Tensor]) -> None:
    run = begun(images, SIX)
    before = {name: tensor.clone() for name, tensor in run.discriminator.state_dict().items()}
    while run.done < SIX.steps:
        run.step()
    parts, facts = run.state()
    assert facts == {"step": 6}
    assert not any(torch.equal(before[name], tensor) for name, tensor in parts["discriminator"].items())
    assert parts["judge"]
    assert not any(p.requires_grad for p in run.model.get_submodule("encoder").parameters())


def test_losses_stay_tensors(images: dict[int, Tensor]) -> None:
    run = begun(images, SIX.model_copy(update={"adversarial_share": 1.0}))
    losses = run.step()
    assert losses.keys() == {"l1", "mse", "perceptual", "adversarial", "discriminator"}
    assert all(loss.ndim == 0 and loss.isfinite() and not loss.requires_grad for loss in losses.values())


def test_frozen_weights_are_trained_again(images: dict[int, Tensor]) -> None:
    model = new_autoencoder(0, **SMALL).eval().requires_grad_(False)
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    DecoderTrainer(model, images, SIX.model_copy(update={"steps": 1, "adversarial_share": 0.0})).complete()
    assert not all(torch.equal(weights[name], tensor) for name, tensor in model.named_parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"widths": (32, 64), "blocks": (0, 1)}, "has a downscale factor of 2, but the encoder's is 4"),
        ({"norm_groups": 7}, "multiples of 7"),
        ({"depth": 3}, "depth"),
    ],
)
def test_decoder_that_does_not_fit_is_refused(encoder: Autoencoder, config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_tiny_decoder(encoder, seed=0, **config)
