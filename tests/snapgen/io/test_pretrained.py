"""Loading diffusers' U-Nets from folders, shards and the hub, damaged files, and the command that converts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DreamLiteUNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from archsearch.cli import app
from snapgen.conversion.from_diffusers import from_diffusers
from snapgen.errors import InputError
from snapgen.io.pretrained import SCHEDULER
from snapgen.models.unet import UNet
from tests.snapgen.diffusers_nets import OWN_DREAMLITE, SD, SMALL, THIN, assert_equal_outputs, reference


def test_folders_whole_sharded_half_and_of_pipelines(tmp_path: Path) -> None:
    source = reference(THIN)
    source.save_pretrained(tmp_path / "whole")
    source.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    source.save_pretrained(tmp_path / "pipeline" / "unet")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("whole", "shards", "pipeline"):
        assert_equal_outputs(source, from_diffusers(tmp_path / folder).net)
    source.half().save_pretrained(tmp_path / "half", variant="fp16")
    net = from_diffusers(str(tmp_path / "half")).net
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert_equal_outputs(source.float(), net)


def test_a_hub_name_is_fetched_the_unet_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = reference(SD)
    source.save_pretrained(tmp_path / "unet")
    requests: list[Any] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        requests.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_equal_outputs(source, from_diffusers("someone/a-pipeline").net)
    [(name, patterns)] = requests
    assert name == "someone/a-pipeline"
    assert SCHEDULER in patterns
    assert not [pattern for pattern in patterns if not pattern.endswith((".json", ".safetensors"))]

    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"could not be downloaded from the hub \(no network\);"):
        from_diffusers("someone/another-pipeline")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    reference(SMALL).save_pretrained(folder / "one")
    reference(SMALL).save_pretrained(folder / "shards", max_shard_size="100KB")
    return folder


def _copied(saved: Path, kind: str, to: Path) -> Path:
    to.mkdir()
    for file in (saved / kind).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def _truncate(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _change_weights(folder: Path, name: str, value: Tensor | None) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = {**load_file(file), name: value}
    save_file({key: tensor for key, tensor in weights.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    ("kind", "harm", "words"),
    [
        ("one", _truncate, "cannot be read"),
        ("one", lambda f: (f / "config.json").unlink(), "config.json: does not exist"),
        ("one", lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        ("one", lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "has no diffusion_pytorch_model"),
        ("one", lambda f: _change_config(f, _class_name="AutoencoderKL"), "describes AutoencoderKL"),
        ("one", lambda f: _change_config(f, block_out_channels=[8, 16]), "is not a valid configuration of UNet2D"),
        ("one", lambda f: _change_config(f, block_out_channels="wide"), "is not a valid configuration of UNet2D"),
        ("one", lambda f: _change_config(f, block_out_channels=[8, 16, 48]), r"bias: is of shape \[24\], not \[48\]"),
        ("one", lambda f: _change_config(f, norm_num_groups=3), "is not a valid configuration of UNet2D"),
        ("one", lambda f: _change_weights(f, "conv_in.bias", None), r"conv_in.bias: is missing \(.*: 1\)"),
        ("one", lambda f: _change_weights(f, "lora", torch.ones(1)), r"lora: is unexpected \(.*: 1\)"),
        ("one", lambda f: _change_weights(f, "conv_in.bias", torch.full((8,), torch.nan)), "not finite"),
        ("one", lambda f: _change_weights(f, "conv_in.bias", torch.ones(8, dtype=torch.int8)), "not floats"),
        ("shards", lambda f: next(f.glob("*-00002-of-*")).unlink(), "00002-of.*does not exist"),
        ("shards", lambda f: next(f.glob("*.index.json")).write_text('{"a": 1}'), "weight_map: does not map weights"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_line_and_nothing_written(
    saved: Path, tmp_path: Path, kind: str, harm: Any, words: str
) -> None:
    folder = _copied(saved, kind, tmp_path / "in")
    harm(folder)
    with pytest.raises(InputError, match=words) as error:
        from_diffusers(folder)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
    outcome = CliRunner().invoke(app, ["convert", str(folder), "--out", str(tmp_path / "out")])
    assert isinstance(outcome.exception, InputError)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_sources_that_are_not_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"x")
    for source, words in (
        (tmp_path / "nowhere", "does not exist"),
        ("nowhere", "does not exist"),
        ("no/such/name", "does not exist"),
        (tmp_path / "file.safetensors", "is a file"),
        (nn.Linear(1, 1), "describes Linear"),
        (AutoencoderKL(block_out_channels=(32,)), "describes AutoencoderKL"),
    ):
        with pytest.raises(InputError, match=words):
            from_diffusers(source)


# --- the command ---


def test_the_command_writes_a_converted_net(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "net"
    outcome = CliRunner().invoke(app, ["convert", str(saved / "shards"), "--out", str(out), "--json"])
    assert outcome.exit_code == 0, outcome.output
    net = UNet.from_pretrained(out)
    answer = json.loads(outcome.stdout)
    assert answer["architecture_id"] == net.arch.id
    assert answer["params"] == sum(p.numel() for p in net.parameters())
    assert_equal_outputs(reference(SMALL), net)
    assert [path.name for path in out.parent.iterdir()] == ["net"]


def test_the_command_prints_what_was_left_out(tmp_path: Path) -> None:
    reference(OWN_DREAMLITE, DreamLiteUNetModel).save_pretrained(tmp_path / "in")
    args = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert isinstance(CliRunner().invoke(app, args).exception, InputError)
    assert not (tmp_path / "out").exists()
    outcome = CliRunner().invoke(app, [*args, "--partial"], env={"COLUMNS": "200"})
    for words in ("use_sep_conv: expands to twice", "begins anew", "no place for", "params"):
        assert words in outcome.stdout


def test_the_command_overwrites_nothing(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    args = ["convert", str(saved / "one"), "--out"]
    for out in (tmp_path, tmp_path / "file"):
        outcome = CliRunner().invoke(app, [*args, str(out)])
        assert isinstance(outcome.exception, InputError)
        assert "already exists" in str(outcome.exception)
    assert (tmp_path / "file").read_text() == "x"
    outcome = CliRunner().invoke(app, [*args, str(tmp_path / "out"), "--time-ids", "1,x"])
    assert "is no list of numbers" in str(outcome.exception)
