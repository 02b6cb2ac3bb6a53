from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import Autoencoder, AutoencoderWithDecoder, KLAutoencoder
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.conditioning import captions as conditioning
from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.coreml.pipeline_export import describe
from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import RectifiedFlow
from snapgen.errors import InputError
from snapgen.models.unet import UNet
from snapgen.pipeline.loading import find_pipeline, load_pipeline
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
from tests.snapgen.conditioning.test_text_encoder import bert, clip
from tests.snapgen.diffusers_nets import small_kl
from tests.snapgen.nets import stirred, tiny

PROMPTS = ["a red fox on the moon", "", "the moon"]
FITTING = {"latent_channels": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))


def kl() -> KLAutoencoder:
    """A tiny AutoencoderKL, which halves the side once."""
    return KLAutoencoder(small_kl())


def with_decoder() -> AutoencoderWithDecoder:
    torch.manual_seed(0)
    decoder = TinyDecoder(latent_channels=4, widths=(8, 16), blocks=(1, 1), mid_blocks=1, norm_groups=4)
    return AutoencoderWithDecoder(kl(), decoder.eval())


def encoders(folder: Path) -> list[TextEncoderConfig]:
    """A group of two joined on channels, and one behind it: 16 + 24 channels, 8 + 5 tokens."""
    first = TextEncoderConfig(encoder=str(bert(folder / "bert")), tokens=8)
    second = TextEncoderConfig(encoder=str(clip(folder / "clip")), tokens=8, layer="penultimate", join="channels")
    return [first, second, TextEncoderConfig(encoder=first.encoder, tokens=5)]


def made(
    folder: Path, coder: Autoencoder | None = None, texts: list[TextEncoderConfig] | None = None, **changes: Any
) -> SnapGenPipeline:
    """A pipeline of random weights: two text encoders in three places, 16 pixels a side."""
    net = stirred(tiny({**FITTING, "context_dim": 40}))
    facts: dict[str, Any] = {"prediction": "preconditioned", "steps": 2, "resolution": 16, **changes}
    pipeline = SnapGenPipeline.from_components(
        net, coder or autoencoder.load_autoencoder("emoji"), texts or encoders(folder), **facts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> SnapGenPipeline:
    return made(tmp_path_factory.mktemp("encoders"))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["velocity", "preconditioned"])
def test_it_samples_as_flow_does(
    prediction: rectified_flow.FlowPredictionType, guidance: float, shift: float, pipeline: SnapGenPipeline
) -> None:
    components = {**pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift)}
    components["unet"] = copy.deepcopy(pipeline.unet)
    components["unet"].prediction_type = None
    one = SnapGenPipeline(**components, encoders=pipeline.config.encoders, prediction=prediction, guidance=guidance)
    one.set_progress_bar_config(disable=True)
    context = torch.randn(3, 13, 40, generator=torch.Generator().manual_seed(0))
    noise = rectified_flow.per_image_noise(range(3), (4, 4, 4), seed=7)
    sizes = {"height": 16, "width": 16, "num_inference_steps": 5}
    found = one(context=context, seed=7, output_type="latent", **sizes).images
    expected = RectifiedFlow(prediction, shift).sample(one.unet, noise, context, steps=5, guidance=guidance)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_prompts_are_encoded_as_in_training(pipeline: SnapGenPipeline, tmp_path: Path) -> None:
    captions = conditioning.encode(PROMPTS, encoders(tmp_path))
    expected = captions.conditioning(torch.arange(len(PROMPTS))).context
    found = pipeline.encode(PROMPTS)
    assert found is not None
    assert torch.equal(found, expected)
    assert found[0, :8].any()
    assert found[0, 8:].any()
    assert not found[1].any()


def test_guidance_leads_away_from_the_encoded_empty_prompt_where_the_net_was_trained_so(tmp_path: Path) -> None:
    texts = [config.model_copy(update={"null": "encoded"}) for config in encoders(tmp_path)]
    one = made(tmp_path, texts=texts)
    sizes: dict[str, Any] = {"output_type": "latent", "num_inference_steps": 3, "seed": 7}
    null = one.encode([""])
    context = one.encode(PROMPTS)
    assert null is not None
    assert null.any()
    assert context is not None
    assert torch.equal(context[1], null[0])
    noise = rectified_flow.per_image_noise(range(3), (4, 4, 4), seed=7)
    flow = RectifiedFlow("preconditioned")
    expected = flow.sample(one.unet, noise, context, steps=3, guidance=3, null=null)
    found = one(PROMPTS, guidance_scale=3, **sizes).images
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    torch.testing.assert_close(found[1], one(PROMPTS, guidance_scale=1, **sizes).images[1], rtol=1e-3, atol=1e-3)
    one.save_pretrained(tmp_path / "pipeline")
    again = load_pipeline(tmp_path / "pipeline")
    assert [encoder.null for encoder in again.encoders] == ["encoded"] * 3


@pytest.mark.parametrize("coder", [None, kl, with_decoder], ids=["emoji", "kl", "tiny decoder"])
def test_what_is_saved_is_loaded(coder: Callable[[], Autoencoder] | None, tmp_path: Path) -> None:
    one = made(tmp_path, coder and coder(), shift=3, guidance=2)
    one.save_pretrained(tmp_path / "x" / "pipeline")
    again = load_pipeline(tmp_path / "x")
    assert again.unet.prediction_type == "preconditioned"
    assert again.config.encoders == one.config.encoders
    assert (again.config.prediction, again.config.guidance, again.scheduler.config.shift) == ("preconditioned", 2, 3)
    found, expected = (each(PROMPTS, output_type="np").images for each in (again, one))
    assert expected.shape == (3, 16, 16, 3)
    assert np.array_equal(found, expected)


def test_a_fresh_process_loads_it_with_nothing_of_ours_but_the_class(tmp_path: Path) -> None:
    one = made(tmp_path)
    one.save_pretrained(tmp_path / "pipeline")
    script = (
        "from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline\n"
        f"pipeline = SnapGenPipeline.from_pretrained({str(tmp_path / 'pipeline')!r})\n"
        "import sys\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'archsearch']\n"
        f"pipeline({PROMPTS[0]!r}, num_inference_steps=4, seed=3).images[0].save({str(tmp_path / 'it.png')!r})\n"
    )
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=alone)
    (expected,) = one(PROMPTS[0], num_inference_steps=4, seed=3).images
    # The last bit of a product can depend on where its factors lie in memory, so one level of 255 may differ.
    levels = [np.asarray(image, dtype=np.int16) for image in (Image.open(tmp_path / "it.png"), expected)]
    assert np.abs(levels[0] - levels[1]).max() <= 1


def test_an_image_depends_on_its_index_not_on_the_batch(pipeline: SnapGenPipeline) -> None:
    whole = pipeline(PROMPTS, num_images_per_prompt=2, output_type="pt").images
    parts = pipeline(PROMPTS, num_images_per_prompt=2, output_type="pt", batch_size=4).images
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-3)
    assert whole.shape == (6, 3, 16, 16)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(pipeline(PROMPTS[0], seed=1, output_type="pt").images[0], whole[0])


def test_a_generator_decides_the_noise(pipeline: SnapGenPipeline) -> None:
    def drawn(generator: Any) -> Any:
        return pipeline(PROMPTS[:2], generator=generator, output_type="latent").images

    assert torch.equal(*(drawn(torch.Generator().manual_seed(1)) for _ in range(2)))
    one_each = drawn([torch.Generator().manual_seed(number) for number in (1, 2)])
    turned = drawn([torch.Generator().manual_seed(number) for number in (2, 2)])
    assert torch.equal(one_each[1], turned[1])
    assert not torch.equal(one_each[0], turned[0])


def test_an_image_need_not_be_square(pipeline: SnapGenPipeline) -> None:
    (image,) = pipeline(PROMPTS[0], height=8, width=24).images
    assert image.size == (24, 8)
    assert pipeline(PROMPTS[0], return_dict=False, output_type="np")[0].shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"height": 12}, "height: 12 is not a valid size; use a multiple of 8"),
        ({"width": 0}, "width: 0 is not a valid size"),
        ({"prompt": None}, "prompt: and context are mutually exclusive"),
        ({"prompt": []}, "prompt: is an empty list"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is not positive; use 1 or more"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan is not finite"),
        ({"output_type": "jpeg"}, "output_type: 'jpeg' is unknown; use one of: pil, np, pt, latent"),
        ({"latents": torch.zeros(2, 4, 4, 4)}, "latents: are 2 for 1 images"),
        ({"generator": [torch.Generator()] * 2}, "generator: are 2 for 1 images"),
    ],
)
def test_what_cannot_be_drawn_is_told(asked: dict[str, Any], message: str, pipeline: SnapGenPipeline) -> None:
    with pytest.raises(InputError, match=message.replace("'", ".").replace(".", "[.']?")):
        pipeline(**{"prompt": PROMPTS[0], **asked})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": None}, "pipeline: has no autoencoder"),
        ({"encoders": [{}]}, "pipeline: encoders: has 1 entries"),
        ({"tokenizer_3": None}, "pipeline: encoders: has 3 entries"),
        ({"prediction": "image"}, "pipeline: prediction: is 'image'"),
        (
            {"decoder": TinyDecoder(latent_channels=4, widths=(32,), blocks=(1,))},
            "pipeline: decoder: decodes other latents",
        ),
        ({"unet": UNet(tiny(FITTING), "v")}, "is 'preconditioned', but its net predicts 'v'"),
        ({"unet": stirred(tiny())}, "pipeline: vae: has 4 latent channels, but the net has 3"),
    ],
)
def test_components_that_do_not_fit_are_told(changes: dict[str, Any], message: str, pipeline: SnapGenPipeline) -> None:
    facts = {"encoders": pipeline.config.encoders, "prediction": "preconditioned", **pipeline.components, **changes}
    with pytest.raises(InputError, match=message):
        SnapGenPipeline(**facts)


def test_a_net_without_cross_attention_takes_prompts_and_reads_none(tmp_path: Path) -> None:
    net = stirred(tiny({**FITTING, "all.cross_attention": False}))
    one = SnapGenPipeline.from_components(
        net, autoencoder.load_autoencoder(), encoders(tmp_path), prediction="velocity", resolution=16
    )
    assert one.text_encoder is None
    one.set_progress_bar_config(disable=True)
    one.save_pretrained(tmp_path / "pipeline")
    again = load_pipeline(tmp_path / "pipeline")
    found, expected = (each(PROMPTS[:2], output_type="pt", num_inference_steps=2).images for each in (again, one))
    assert torch.equal(found, expected)
    told = describe(one, 4)
    assert (told["context"], told["text_encoders"], list(told["unet"]["inputs"])) == (
        None,
        [],
        ["sample", "time_features"],
    )


def test_pixels_are_no_latents(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no autoencoder, its net works on pixels"):
        made(tmp_path, autoencoder.load_autoencoder("none"))


@pytest.fixture(scope="module")
def saved(pipeline: SnapGenPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    pipeline.save_pretrained(folder / "pipeline")
    return folder


def without_a_weight(file: Path) -> None:
    weights = load_file(file)
    del weights["conv_in.bias"]
    save_file(weights, file, metadata={"format": "pt"})


def without_a_word(file: Path) -> None:
    weights = load_file(file)
    del weights["embeddings.word_embeddings.weight"]
    save_file(weights, file, metadata={"format": "pt"})


def not_a_number(file: Path) -> None:
    weights = load_file(file)
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (cut, "unet/diffusion_pytorch_model.safetensors", "model.safetensors: cannot be read"),
        (cut, "text_encoder_2/model.safetensors", "text_encoder_2: cannot be read"),
        (without_a_word, "text_encoder/model.safetensors", "text_encoder: embeddings.word_embeddings.weight: is"),
        (Path.unlink, "text_encoder/config.json", "text_encoder: is not a folder with a text encoder"),
        (Path.unlink, "tokenizer_3/tokenizer.json", "text_encoder_3: has no tokenizer"),
        (cut, "tokenizer_2/tokenizer.json", "tokenizer_2: cannot be loaded"),
        (cut, "model_index.json", "model_index.json: line [0-9]+, column [0-9]+: not valid"),
        (Path.unlink, "vae/diffusion_pytorch_model.safetensors", "vae: has no diffusion_pytorch"),
        (Path.unlink, "unet/config.json", "unet/config.json: does not exist"),
        (without_a_weight, "unet/diffusion_pytorch_model.safetensors", "conv_in.bias: is missing"),
        (not_a_number, "unet/diffusion_pytorch_model.safetensors", "conv_in.bias: holds values"),
        (Path.unlink, "model_index.json", "has no pipeline/model_index.json; finish its training"),
    ],
)
def test_a_damaged_folder_is_told(
    damage: Callable[[Path], None], file: str, message: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "run")
    damage(tmp_path / "run" / "pipeline" / file)
    with pytest.raises(InputError, match=message) as caught:
        load_pipeline(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_run_is_found_by_its_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "runs" / "x")
    expected = tmp_path / "runs" / "x" / "pipeline"
    assert [find_pipeline(name).resolve() for name in ("x", "runs/x", "runs/x/pipeline")] == [expected] * 3
    (tmp_path / "x").mkdir()  # e.g. the data that the run is trained on
    assert find_pipeline("x").resolve() == expected
    with pytest.raises(InputError, match="y: is neither a folder nor the name of one under runs/"):
        find_pipeline("y")
