"""A pipeline's folder loads through diffusers as its card says, and goes to the hub and back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from archsearch.cli import app
from snapgen.errors import InputError
from snapgen.pipeline.card import LOADER, USE
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline
from tests.snapgen import hub_standin
from tests.snapgen.hub_standin import Hub
from tests.snapgen.pipeline.test_snapgen_pipeline import encoders, made, with_decoder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> SnapGenPipeline:
    folder = tmp_path_factory.mktemp("encoders")
    return made(folder, with_decoder(), encoders(folder)[:2])


@pytest.fixture(scope="module")
def folder(pipeline: SnapGenPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "pipeline"
    pipeline.save_pretrained(path)
    return path


def test_the_card_tells_what_is_in_the_folder(pipeline: SnapGenPipeline, folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: ")
    assert pipeline.unet.arch.id in card
    assert f"| U-Net | UNet | {sum(p.numel() for p in pipeline.unet.parameters()):,} |" in card
    assert all(part in card for part in ("tiny decoder", "text encoder 2", "FILL IN", "## Limits"))
    assert (folder / LOADER).is_file()


def test_the_weights_carry_the_facts(pipeline: SnapGenPipeline, folder: Path) -> None:
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        with safe_open(file, "pt") as weights:
            assert weights.metadata()["archsearch.architecture"] == pipeline.unet.arch.id
            assert weights.metadata()["archsearch.steps"] == "2"


def test_the_lines_of_the_card_draw_the_image(pipeline: SnapGenPipeline, folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code == USE
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    drawn = np.asarray(Image.open(folder / "apple.png"))
    assert np.array_equal(drawn, np.asarray(pipeline("a red apple").images[0]))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_standin.running() as hub:
        yield hub


def push(hub: Hub, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "archsearch", "push", *map(str, arguments)]
    own = {**os.environ, **hub.environment, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=own)


@pytest.mark.slow
def test_a_pushed_pipeline_comes_back_whole_and_draws_the_same(
    hub: Hub, pipeline: SnapGenPipeline, folder: Path, tmp_path: Path
) -> None:
    listed = push(hub, folder, "me/emoji", "--dry-run")
    assert listed.returncode == 0
    assert "README.md" in listed.stdout
    assert not hub.models, "a dry run sends nothing"
    pushed = push(hub, folder, "me/emoji")
    assert (pushed.returncode, pushed.stdout) == (0, f"{hub.environment['HF_ENDPOINT']}/me/emoji\n"), pushed.stderr
    assert "FILL IN" in pushed.stderr
    assert hub.private == {"me/emoji": True}
    assert hub.models["me/emoji"].keys() == {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    }
    script = (
        "import sys\nfrom huggingface_hub import snapshot_download\nfrom diffusers import DiffusionPipeline\n"
        "folder = snapshot_download('me/emoji', local_dir=sys.argv[1])\n"
        "drawn = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)\n"
        "drawn('a red apple').images[0].save(sys.argv[1] + '.png')\n"
    )
    own = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "new")], check=True, capture_output=True, env=own)
    drawn = np.asarray(Image.open(tmp_path / "new.png"))
    assert np.array_equal(drawn, np.asarray(pipeline("a red apple").images[0]))
    for arguments, environment, message in (
        ((folder, "me/emoji"), {}, "me/emoji: is taken; give another name, or --update it"),
        ((folder, "me/other"), {"HF_TOKEN": "hf_wrong"}, "me/other: was refused by the hub (401"),
        ((folder, "me/other"), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "me/other: could not be pushed ("),
    ):
        refused = push(hub, *arguments, **environment)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith(f"archsearch: {message}")
        assert refused.stderr.count("\n") == 1
    assert push(hub, folder, "me/emoji", "--update", "--quiet").returncode == 0


@pytest.mark.parametrize(
    ("run", "name", "message"),
    [
        ("folder", "emoji", "emoji: is no name of a model on the hub; write OWNER/NAME"),
        ("nowhere", "me/emoji", "nowhere: is neither a folder nor the name of one under runs/; name a trained run"),
        ("unfinished", "me/emoji", "finish its training"),
        ("folder", "me/emoji", "push: there is no token of the hub; run hf auth login, or set HF_TOKEN"),
    ],
)
def test_what_cannot_be_pushed_is_told_in_a_line(
    run: str, name: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished").mkdir()
    answer = CliRunner().invoke(app, ["push", str(folder) if run == "folder" else run, name])
    assert isinstance(answer.exception, InputError)
    assert message in str(answer.exception)
