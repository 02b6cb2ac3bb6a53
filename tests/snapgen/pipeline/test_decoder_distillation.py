"""A pruned decoder learns from the whole one on latents that pipelines of both kinds draw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from typer.testing import CliRunner

from archsearch.cli import app
from snapgen.autoencoders import autoencoder, stepwise
from snapgen.autoencoders.autoencoder import KLAutoencoder
from snapgen.autoencoders.pruned_decoder import PrunedAutoencoderKL, decode_image, prune_decoder
from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.errors import InputError
from snapgen.io.chunked import ChunkedTensor
from snapgen.pipeline import synthetic_latents
from snapgen.pipeline.decoder_distillation import DecoderDistillationConfig, DecoderDistiller, distill, read_prompts
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
from snapgen.pipeline.synthetic_latents import SamplingConfig
from tests.snapgen.diffusers_nets import SD, small_kl
from tests.snapgen.encoders import bert, clip
from tests.snapgen.nets import stirred, tiny

FEW = SamplingConfig(num_latents=12, num_inference_steps=2, guidance_scale=2, resolution=16)
SHORT = DecoderDistillationConfig(steps=4, batch_size=3, warmup_steps=1)
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))


def ours(folder: Path, coder: Any = None) -> Path:
    """A SnapGenPipeline of random weights."""
    net = stirred(tiny({"latent_channels": 4, "context_dim": 16}))
    texts = [TextEncoderConfig(encoder=str(bert(folder / "bert")), tokens=8)]
    facts: dict[str, Any] = {"prediction": "preconditioned", "steps": 2, "resolution": 16}
    SnapGenPipeline.from_components(net, coder or KLAutoencoder(small_kl()), texts, **facts).save_pretrained(
        folder / "pipe"
    )
    return folder / "pipe"


def theirs(folder: Path) -> Path:
    """Stable Diffusion's own pipeline, tiny."""
    from transformers import AutoTokenizer, CLIPTextModel

    torch.manual_seed(0)
    text = clip(folder / "clip")
    pipeline = StableDiffusionPipeline(
        vae=small_kl(),
        text_encoder=CLIPTextModel.from_pretrained(text),
        tokenizer=AutoTokenizer.from_pretrained(text, model_max_length=12, pad_token="</s>"),
        unet=UNet2DConditionModel(**{**SD, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 24}),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {"ours": ours(root / "a"), "theirs": theirs(root / "b")}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red fox\n\n  on the moon \na moon\n")
    return path


def drawn(folder: Path, prompts: list[str], sampling: SamplingConfig = FEW) -> torch.Tensor:
    return synthetic_latents.latents(synthetic_latents.open_pipeline(folder), folder, prompts, sampling).materialize()


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_latents_are_the_pipelines_own(folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its scale, each of its prompt and of its own noise, whatever is drawn beside it; nothing is drawn twice."""
    monkeypatch.setattr(synthetic_latents, "CHUNK_SIZE", 5)
    found = drawn(folders[kind], ["a fox", "the moon"])
    assert found.shape[:2] == (12, 4)
    assert len({tuple(row.flatten()[:8].tolist()) for row in found}) == 12
    pipeline = synthetic_latents.open_pipeline(folders[kind])
    noise = torch.Generator().manual_seed(synthetic_latents.seeding.derive_seed(0, "synthetic noise", 7))
    sizes = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 2.0}
    alone = pipeline("the moon", generator=[noise], output_type="latent", **sizes).images
    torch.testing.assert_close(found[7:8].float(), alone, rtol=2e-3, atol=2e-3)
    assert not torch.equal(drawn(folders[kind], ["a moon", "the moon"])[0], found[0])
    assert not torch.equal(drawn(folders[kind], ["a fox", "the moon"], FEW.model_copy(update={"seed": 1}))[0], found[0])
    monkeypatch.setattr(synthetic_latents, "_sample", lambda *_: pytest.fail("drawn again"))
    assert torch.equal(drawn(folders[kind], ["a fox", "the moon"]), found)


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_the_pipeline_is_written_with_the_smaller_decoder(
    folders: dict[str, Path], kind: str, prompts: Path, tmp_path: Path
) -> None:
    result = distill(folders[kind], prompts, tmp_path / "out", sampling=FEW, training=SHORT)
    assert 3 < result.whole_params / result.params < 4
    pipeline = synthetic_latents.open_pipeline(tmp_path / "out")
    assert isinstance(pipeline.vae, PrunedAutoencoderKL)
    sizes: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    assert pipeline(["a fox"], **sizes).images.shape == (1, 16, 16, 3)
    coder = autoencoder.load_autoencoder(tmp_path / "out")
    whole = autoencoder.load_autoencoder(folders[kind])
    pixels = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(coder.encode(pixels), whole.encode(pixels))
    assert not list(tmp_path.glob("*.checkpoint*"))
    if kind == "theirs":
        assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").vae.config.decoder_channels == (4, 8)


def test_training_lowers_the_error() -> None:
    whole = small_kl()
    latents = torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    small = prune_decoder(whole, 0.5)
    with torch.no_grad():
        before = (decode_image(small, latents[32:]) - decode_image(whole, latents[32:])).square().mean()
    encoder = {name: tensor.clone() for name, tensor in small.encoder.state_dict().items()}
    training = DecoderDistillationConfig(steps=120, batch_size=8, learning_rate=5e-3, warmup_steps=10)
    DecoderDistiller(small, whole, ChunkedTensor([latents]), training, 32).complete()
    after = (decode_image(small, latents[32:]) - decode_image(whole, latents[32:])).square().mean()
    assert after < 0.6 * before
    assert all(torch.equal(encoder[name], tensor) for name, tensor in small.encoder.state_dict().items())


def test_the_loss_is_between_the_two_images() -> None:
    whole, latents = small_kl(), torch.randn(1, 4, 4, 4)
    small = prune_decoder(whole, 0.5)
    expected = (small.decode(latents / 1.5 + 0.06).sample - whole.decode(latents / 1.5 + 0.06).sample).square().mean()
    run = DecoderDistiller(small, whole, ChunkedTensor([latents]), SHORT)
    torch.testing.assert_close(run.step()["mse"], expected.detach())


@pytest.mark.parametrize("last", [1, 3])
def test_killed_and_run_again_it_ends_the_same(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    def stop(fraction: float, message: str) -> None:  # noqa: ARG001 - a progress callback
        if round(fraction * SHORT.steps) == last + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(stepwise, "CHECKPOINT_INTERVAL_SECONDS", 0.0)
    facts: dict[str, Any] = {"sampling": FEW, "training": SHORT}
    with pytest.raises(KeyboardInterrupt):
        distill(folders["ours"], prompts, tmp_path / "out", progress=stop, **facts)
    assert not (tmp_path / "out").exists()
    other = SHORT.model_copy(update={"prune_ratio": 0.25})
    with pytest.raises(InputError, match="belongs to a training run with a different training"):
        distill(folders["ours"], prompts, tmp_path / "out", sampling=FEW, training=other)
    fractions: list[float] = []
    distill(folders["ours"], prompts, tmp_path / "out", progress=lambda share, _: fractions.append(share), **facts)
    steps = [round(fraction * SHORT.steps) for fraction in fractions]
    assert steps == list(range(last + 2, 5)), "it goes on from the checkpoint that was written last"
    distill(folders["ours"], prompts, tmp_path / "unbroken", **facts)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "unbroken" / WEIGHTS).read_bytes()


def without_text(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = index["tokenizer"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))


def of_another_kind(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))


def without_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_text, "text_encoder: has no text encoder; name a pipeline that takes prompts"),
        (of_another_kind, "describes FluxPipeline; name the folder of a SnapGenPipeline or StableDiffusionPipeline"),
        (without_vae, "vae/config.json: does not exist"),
        (shutil.rmtree, "is neither a folder nor the name of one under runs/"),
    ],
)
def test_a_pipeline_that_will_not_do_is_told(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, spoil: Any, words: str
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(folders["theirs"], folder)
    spoil(folder)
    answer = CliRunner().invoke(app, ["prune-decoder", str(folder), "--prompts", str(prompts), "--out", "x"])
    assert isinstance(answer.exception, InputError)
    assert words in str(answer.exception)


def test_an_autoencoder_of_ours_is_no_kl(prompts: Path, tmp_path: Path) -> None:
    folder = ours(tmp_path, autoencoder.load_autoencoder("emoji"))
    with pytest.raises(InputError, match="vae: has a ConvAutoencoder, not an AutoencoderKL"):
        distill(folder, prompts, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prune-ratio", "1"], "ratio: 1.0 is not a share of channels to prune"),
        (["--prune-ratio", "0.9"], "ratio: 0.9 leaves none of 8 channels in 4 groups"),
        (["--num-latents", "1"], "options: num_latents"),
        (["--steps", "0"], "options: steps"),
        (["--resolution", "18", "--num-latents", "2"], "18"),
    ],
)
def test_a_bad_option_is_told(
    folders: dict[str, Path], prompts: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    out = tmp_path / "out"
    answer = CliRunner().invoke(
        app, ["prune-decoder", str(folders["ours"]), "--prompts", str(prompts), "--out", str(out), *options]
    )
    assert isinstance(answer.exception, InputError), answer.output
    assert words in str(answer.exception)
    assert not out.exists()


def test_prompts_that_are_none_are_told(tmp_path: Path) -> None:
    for name, content in (("empty", b" \n"), ("bytes", b"\xff\xfe\x00"), ("none", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: "):
            read_prompts(tmp_path / name)


def test_the_command_says_what_came_of_it(folders: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    asked = [
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "out"),
        "--num-latents",
        "4",
        "--steps",
        "2",
        "--batch",
        "2",
    ]
    answer = CliRunner().invoke(app, ["prune-decoder", str(folders["ours"]), *asked, "--json"])
    assert answer.exit_code == 0, answer.exception
    told = json.loads(answer.stdout)
    assert told["params"] < told["whole_params"] / 3
    assert told["trained"]["images"] == 1
    again = CliRunner().invoke(app, ["prune-decoder", str(folders["ours"]), *asked])
    assert "already exists" in str(again.exception)
