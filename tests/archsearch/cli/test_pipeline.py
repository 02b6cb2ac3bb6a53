"""The commands on trained runs: what they write is what the pipeline draws."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from archsearch import cli
from archsearch.spaces.loading import load_space
from snapgen.autoencoders import autoencoder
from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.coreml import convert, package as packaging
from snapgen.coreml.package import PackageOptions
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
from tests.snapgen.coreml.test_convert import Wide
from tests.snapgen.nets import stirred, tiny

Capture = pytest.CaptureFixture[str]
SIDE, GAP = 16, 2


@pytest.fixture(scope="module")
def pipeline() -> SnapGenPipeline:
    """A net of random weights under the shipped text encoder and autoencoder."""
    net = stirred(tiny({"latent_channels": 4, "context_dim": 384}))
    made = SnapGenPipeline.from_components(
        net,
        autoencoder.load_autoencoder(),
        [TextEncoderConfig(tokens=8)],
        prediction="preconditioned",
        steps=2,
        resolution=SIDE,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def trained(pipeline: SnapGenPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    pipeline.save_pretrained(folder / "runs" / "demo" / "pipeline")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: Capture, trained: Path) -> Any:
    """The command's output, run beside runs/; the exit status must be 0."""

    def run(*arguments: object) -> str:
        monkeypatch.chdir(trained)
        monkeypatch.setattr(sys, "argv", ["archsearch", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert (ended.value.code, err) == (0, "")
        return out

    return run


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def test_a_prompt_is_drawn_as_the_pipeline_draws_it(run: Any, pipeline: SnapGenPipeline, tmp_path: Path) -> None:
    out = tmp_path / "new" / "apple.png"
    assert run("generate", "demo", "a red apple", "--out", out) == f"{out}: 1 of 16×16 pixels\n"
    assert np.array_equal(pixels(out), np.asarray(pipeline("a red apple").images[0]))
    run("generate", "runs/demo", "a red apple", "--out", out, "--steps", 3, "--guidance", 4, "--seed", 5, "--quiet")
    asked = {"num_inference_steps": 3, "guidance_scale": 4, "seed": 5}
    assert np.array_equal(pixels(out), np.asarray(pipeline("a red apple", **asked).images[0]))


def test_prompts_stand_in_rows_and_their_images_beside_each_other(
    run: Any, pipeline: SnapGenPipeline, tmp_path: Path
) -> None:
    out = tmp_path / "both.png"
    run("generate", "demo", "a red apple", "a blue car", "--images", 3, "--out", out)
    sheet, step = pixels(out), SIDE + GAP
    assert sheet.shape == (SIDE + step, SIDE + 2 * step, 3)
    images = pipeline(["a red apple", "a blue car"], num_images_per_prompt=3).images
    for number, image in enumerate(images):
        top, left = number // 3 * step, number % 3 * step
        assert np.array_equal(sheet[top : top + SIDE, left : left + SIDE], np.asarray(image))


def test_an_image_of_another_size_and_form(run: Any, tmp_path: Path) -> None:
    run("generate", "runs/demo/pipeline", "a red apple", "--size", "24x8", "--out", tmp_path / "it.webp")
    with Image.open(tmp_path / "it.webp") as image:
        assert (image.format, image.size) == ("WEBP", (24, 8))


def test_an_exported_run_holds_its_packages(
    run: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small package stands for each; `tests/snapgen/test_coreml_export.py` converts the real ones."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    feed = {"x": torch.empty(1, 64, 8, 8, dtype=torch.float16)}
    package = packaging.package("wide", {}, lambda: Wide().half(), feed, "y", PackageOptions(), convert.COREML)
    for kind in ("unet", "decoder", "text"):

        def stand_in(_: Any, size: int, kind: str = kind, **__: Any) -> Path:
            asked.append((kind, size))
            return package

        monkeypatch.setattr(convert, f"convert_{kind}", stand_in)
    out = run("export", "demo", "--to", "coreml")
    written = trained / "runs" / "demo" / "coreml"
    assert asked == [("unet", 4), ("decoder", 4), ("text", 8)]
    assert {path.name for path in written.iterdir()} == {
        *("unet.mlpackage", "decoder.mlpackage", "text_encoder.mlpackage", "tokenizer", "pipeline.json")
    }
    assert str(written / "pipeline.json") in out.replace("\n", "")
    shutil.rmtree(written)
    assert "Known to fall off the Neural Engine: nothing." in out
    told = json.loads(run("export", "demo", "--to", "coreml", "--latent-size", 6, "--json"))
    assert {"folder": str(Path("runs/demo/coreml"))}.items() <= told.items()
    assert told["unet"]["inputs"]["sample"] == [1, 4, 6, 6]
    assert told["sampler"]["sigmas"] == [1.0, 0.5, 0.0]


@pytest.mark.slow
def test_one_net_is_one_package(run: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    tiny_net = tmp_path / "net.json"
    tiny_net.write_text(tiny().to_json())
    sizes = ("--latent-size", 4, "--context-tokens", 3)
    out = run("export", tiny_net, "--to", "coreml", *sizes, "--palette-bits", 4)
    assert (trained / "net.mlpackage" / "Manifest.json").is_file(), "named after the net"
    assert "Known to fall off the Neural Engine:\nnet.mlpackage: " in out, "on so small a grid"
    found = json.loads(run("export", tiny_net, "--to", "coreml", *sizes, "--json", "--out", "other.mlpackage"))
    assert found["package"] == "other.mlpackage"
    assert [line for line in found["violations"] if line not in out.replace("\n", " ")] == []
    assert sum(found["operation_counts"].values()) == found["operations"]


def test_a_spaces_reference_is_exported(
    run: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def stand_in(net: Any, *_: Any, **__: Any) -> Path:
        asked.append(net)
        return package

    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    feed = {"x": torch.empty(1, 64, 8, 8, dtype=torch.float16)}
    package = packaging.package("wide", {}, lambda: Wide().half(), feed, "y", PackageOptions(), convert.COREML)
    monkeypatch.setattr(convert, "convert_unet", stand_in)
    run("export", "emoji:base", "--to", "coreml")
    assert asked == [load_space("emoji").base]
    assert (trained / "emoji-base.mlpackage" / "Manifest.json").is_file()


def test_terminated_an_export_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "convert_unet", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "argv", ["archsearch", "export", "demo", "--to", "coreml", "--out", str(tmp_path / "a/b")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert not list(tmp_path.iterdir())


def test_a_run_has_its_own_context(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "argv", ["archsearch", "export", "demo", "--to", "coreml", "--context-tokens", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--context-tokens: demo is a run, which has its own; leave it out" in capsys.readouterr().err
