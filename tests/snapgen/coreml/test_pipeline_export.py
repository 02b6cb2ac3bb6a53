from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from typer.testing import CliRunner

from archsearch.cli import app
from snapgen.coreml import convert, mil as mil_, pipeline_export
from snapgen.diffusion import process, rectified_flow
from snapgen.errors import InputError
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
from tests.snapgen import mil
from tests.snapgen.coreml.test_convert import rounded
from tests.snapgen.pipeline.test_snapgen_pipeline import PROMPTS, encoders, kl, made, with_decoder


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def one_cache(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these tests alone: the nets that two of them export are converted once."""
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(packages))


class Phone:
    """Runs an exported folder as its pipeline.json says, knowing nothing else of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told = json.loads((folder / "pipeline.json").read_text())
        self.unet, self.decoder = (mil.load(folder / self.told[part]["package"]) for part in ("unet", "decoder"))

    def draw(self, prompt: str, noise: Tensor) -> Tensor:
        context, sampler, x = self.context(prompt), self.told["sampler"], noise
        frequencies = torch.tensor(self.told["time_features"]["frequencies"])
        assert sampler["velocity"] == "s = 1 / sqrt(t^2 + (1 - t)^2); v = (2 t - 1) s^2 x + s unet(s x, t)"
        for t, then in pairwise(sampler["sigmas"]):
            angles = 1000 * t * frequencies
            features = torch.cat([angles.cos(), angles.sin()])[None]
            s = (t**2 + (1 - t) ** 2) ** -0.5

            def velocity(context: Tensor, t=t, s=s, x=x, features=features) -> Tensor:
                feed = {"sample": s * x, "time_features": features, "context": context}
                return (2 * t - 1) * s**2 * x + s * mil.run(self.unet, feed)[0]

            nothing = velocity(torch.zeros_like(context))
            x = x + (then - t) * (nothing + sampler["guidance"] * (velocity(context) - nothing))
        return mil.run(self.decoder, {"latents": x})[0]

    def context(self, prompt: str) -> Tensor:
        out = torch.zeros(self.told["context"]["shape"])
        for told in self.told["text_encoders"]:
            ids = AutoTokenizer.from_pretrained(self.folder / told["tokenizer"])(prompt)["input_ids"][: told["tokens"]]
            padding = [0] * (told["tokens"] - len(ids))
            feed = {"input_ids": torch.tensor([ids + padding]), "mask": torch.tensor([[1.0] * len(ids) + padding])}
            tokens, channels = (slice(*told["place"][key]) for key in ("tokens", "channels"))
            out[:, tokens, channels] = mil.run(mil.load(self.folder / told["package"]), feed)[0]
        return out


def test_an_exported_folder_draws_what_the_pipeline_does(tmp_path: Path) -> None:
    one = made(tmp_path, with_decoder(), encoders(tmp_path)[:2], shift=3, guidance=2)
    for net in (one.unet, one.decoder, one.text_encoder, one.text_encoder_2):
        rounded(net)
    one.save_pretrained(tmp_path / "pipeline")
    told = pipeline_export.export_pipeline(tmp_path / "pipeline", tmp_path / "out" / "coreml")
    phone = Phone(tmp_path / "out" / "coreml")
    assert phone.told == told
    context = one.encode(PROMPTS[:1])
    assert context is not None
    torch.testing.assert_close(phone.context(PROMPTS[0]), context, rtol=0, atol=0.02 * float(context.std()))
    noise = rectified_flow.per_image_noise([0], (4, 8, 8), seed=0)
    expected = one(PROMPTS[0], latents=noise, output_type="pt").images * 2 - 1
    found = phone.draw(PROMPTS[0], noise).clamp(-1, 1)
    assert found.shape == (1, 3, 16, 16)
    assert (found - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.slow
def test_a_pruned_decoder_is_exported_and_drawn_with(tmp_path: Path) -> None:
    """From one command to the next, and in a process that knows the pipeline's class alone."""
    one = made(tmp_path, kl(), encoders(tmp_path)[:2], guidance=2)
    for net in (one.unet, one.text_encoder, one.text_encoder_2):
        rounded(net)
    one.save_pretrained(tmp_path / "run" / "pipeline")
    (tmp_path / "prompts.txt").write_text("\n".join(filter(None, PROMPTS)))
    small, phones = tmp_path / "small", tmp_path / "coreml"
    asked = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--num-latents",
        "4",
        "--steps",
        "2",
        "--batch",
        "2",
        "--quiet",
    ]
    for command in (
        ["prune-decoder", str(tmp_path / "run"), "--out", str(small), *asked],
        ["export", str(small), "--to", "coreml", "--quiet"],
    ):
        answer = CliRunner().invoke(app, command)
        assert answer.exit_code == 0, answer.exception
    noise = rectified_flow.per_image_noise([0], (4, 8, 8), seed=0)
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    script = (
        "from safetensors.torch import load_file, save_file\n"
        "from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline\n"
        f"pipeline = SnapGenPipeline.from_pretrained({str(small)!r})\n"
        "assert pipeline.vae.config.decoder_channels == (4, 8), pipeline.vae.config\n"
        f"latents = load_file({str(tmp_path / 'noise.safetensors')!r})['noise']\n"
        f"image = pipeline({PROMPTS[0]!r}, latents=latents, output_type='pt').images\n"
        f"save_file({{'image': image}}, {str(tmp_path / 'image.safetensors')!r})\n"
    )
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=alone)
    expected = load_file(tmp_path / "image.safetensors")["image"] * 2 - 1
    found = Phone(phones).draw(PROMPTS[0], noise).clamp(-1, 1)
    assert (found - expected).abs().max() < 0.05 * expected.std()
    whole = one(PROMPTS[0], latents=noise, output_type="pt").images * 2 - 1
    assert (whole - expected).abs().max() > 0.2 * expected.std(), "the whole decoder's image"


def test_each_text_encoder_is_told_its_place(tmp_path: Path) -> None:
    told = pipeline_export.describe(made(tmp_path), 4)
    assert told["context"]["shape"] == [1, 13, 40]
    assert [each["place"] for each in told["text_encoders"]] == [
        {"tokens": [0, 8], "channels": [0, 16]},
        {"tokens": [0, 8], "channels": [16, 40]},
        {"tokens": [8, 13], "channels": [0, 16]},
    ]
    assert [(each["package"], each["tokenizer"]) for each in told["text_encoders"]][::2] == [
        ("text_encoder.mlpackage", "tokenizer"),
        ("text_encoder_3.mlpackage", "tokenizer_3"),
    ]


def test_every_prediction_is_told() -> None:
    assert tuple(process.VELOCITY) == rectified_flow.FLOW_PREDICTION_TYPES


def test_an_autoencoders_own_decoder_converts() -> None:
    coder = rounded(kl())
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half().float()
    with torch.no_grad():
        expected = coder._decode(latents)
    package = convert.convert_decoder(coder.net, 4)
    (found,) = mil.run(mil.load(package), {"latents": latents})
    assert (found - expected).abs().max() < 0.01 * expected.std()
    counts = mil_.read_program(package).counts()
    assert counts["scaled_dot_product_attention"] == 1
    assert not {"softmax", "matmul", "cast", "real_div"} & counts.keys()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    made(folder).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_size": 3}, "multiple of 2"),
        ({"out": Path("/proc/here")}, "/proc/here"),
        ({"folder": Path("/nowhere")}, "/nowhere: is neither a folder"),
    ],
)
def test_what_cannot_be_exported_is_told(
    changes: dict[str, Any], message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "convert_decoder", lambda *_, **__: pytest.fail("went on"))
    with pytest.raises(InputError, match=message):
        pipeline_export.export_pipeline(**{"folder": saved, "out": tmp_path / "out", **changes})
    assert not list(tmp_path.iterdir())


def test_a_package_that_fails_leaves_none_of_the_others(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object, **__: object) -> Path:
        assert list(tmp_path.rglob("unet.mlpackage")), "the one before is written"
        raise InputError("decoder", "is damaged", "restore it")

    monkeypatch.setattr(convert, "convert_unet", lambda *_, **__: saved)
    monkeypatch.setattr(convert, "convert_decoder", damaged)
    with pytest.raises(InputError, match="decoder: is damaged"):
        pipeline_export.export_pipeline(saved, tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_of_no_size_is_to_be_given_one(tmp_path: Path) -> None:
    one: SnapGenPipeline = made(tmp_path, resolution=None)
    one.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(InputError, match="--latent: is missing"):
        pipeline_export.export_pipeline(tmp_path / "pipeline", tmp_path / "out")
