"""Folders of saved nets that are damaged, lie, or hold something else: one line each, and nothing allocated for it."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from archsearch import cli
from snapgen.autoencoders.autoencoder import load_vae
from snapgen.conditioning.text_encoder import load_text_encoder
from snapgen.conversion.from_diffusers import from_diffusers
from snapgen.errors import InputError
from snapgen.io import pretrained
from snapgen.models.unet import UNet, load_unet
from snapgen.objectives.teacher import load_teacher
from tests.snapgen import encoders, lessons
from tests.snapgen.diffusers_nets import SMALL, reference, small_kl
from tests.snapgen.nets import tiny

WEIGHTS = f"{pretrained.WEIGHTS_NAME}.safetensors"
TERABYTES = 1 << 43
SPARE = 1 << 28
"""Address space for Python itself while a folder is opened."""


class Allocations(TorchDispatchMode):
    """Bytes of all storages on the CPU that torch's operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == "cpu":
            storage = result.untyped_storage()
            self.storages[storage.data_ptr()] = max(storage.nbytes(), self.storages.get(storage.data_ptr(), 0))
        return result


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Hardly any address space beside what the process has, so that terabytes would fail with another error."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same net in one file and in shards, and nets of other classes."""
    folder = tmp_path_factory.mktemp("saved")
    net = UNet(tiny(), "velocity")
    net.init_weights(1)
    net.save_pretrained(folder / "whole")
    net.save_pretrained(folder / "shards", max_shard_size="30KB")
    assert len(list((folder / "shards").glob("*-of-*"))) > 2
    reference(SMALL).save_pretrained(folder / "diffusers")
    small_kl().save_pretrained(folder / "vae")
    lessons.frozen_teacher().save_pretrained(folder / "teacher")
    encoders.bert(folder / "bert")
    return folder


# --- what is whole in another form ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "shards"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_every_form_is_loaded_in_float32(
    saved: Path, tmp_path: Path, dtype: torch.dtype, options: dict[str, str], variant: str | None
) -> None:
    whole = load_unet(saved / "whole")
    net = load_unet(saved / "whole").to(dtype)
    net.save_pretrained(tmp_path, variant=variant, **options)
    found = load_unet(tmp_path)
    assert found.prediction_type == "velocity"
    assert not found.training
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, net.state_dict()[name].float())
        assert torch.allclose(tensor, whole.state_dict()[name], atol=0.05)
    assert found.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_file_without_a_variant_comes_first(saved: Path, tmp_path: Path) -> None:
    net = load_unet(saved / "whole")
    net.save_pretrained(tmp_path)
    UNet(tiny()).half().save_pretrained(tmp_path, variant="fp16")
    assert torch.equal(load_unet(tmp_path).conv_in.weight, net.conv_in.weight)
    assert [file.name for file in pretrained.weight_files(tmp_path)] == [WEIGHTS]


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "2KB"}], ids=["whole", "shards"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_every_form_of_a_text_encoder(
    saved: Path, tmp_path: Path, options: dict[str, str], variant: str | None
) -> None:
    folder = copied(saved, "bert", tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    whole = load_text_encoder(str(saved / "bert"))[0].half()
    whole.save_pretrained(folder, variant=variant, **options)
    assert len(list(folder.glob("*.safetensors"))) > len(options)
    found = load_text_encoder(str(folder))[0]
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole.state_dict()[name].float())


def test_the_weight_files_are_all_shards(saved: Path) -> None:
    files = pretrained.weight_files(saved / "shards")
    assert set(files) == set((saved / "shards").glob("*.safetensors"))


def test_an_autoencoder_under_the_names_of_old_diffusers(saved: Path, tmp_path: Path) -> None:
    """Stable Diffusion 1.5's own file has these names."""
    folder = copied(saved, "vae", tmp_path / "old")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / WEIGHTS)
    for new, old in names.items():
        for key in [key for key in weights if f".{new}." in key]:
            weights[key.replace(f".{new}.", f".{old}.")] = weights.pop(key)
    save_file(weights, folder / WEIGHTS)
    expected = load_vae(saved / "vae").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_vae(folder).state_dict().items())


# --- what is damaged ---


def copied(saved: Path, kind: str, to: Path) -> Path:
    shutil.copytree(saved / kind, to)
    return to


def rewrite(**weights: Tensor | None) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        changed = {**load_file(folder / WEIGHTS), **{name.replace("__", "."): value for name, value in weights.items()}}
        save_file({name: value for name, value in changed.items() if value is not None}, folder / WEIGHTS)

    return harm


def reconfigure(**values: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return harm


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def header(change: Callable[[dict[str, Any]], object], length: int | None = None) -> Callable[[Path], None]:
    """Change the header of the weights, whose data stay the same."""

    def harm(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        values = json.loads(content[8 : 8 + size])
        change(values)
        text = json.dumps(values).encode()
        prefix = struct.pack("<Q", len(text) if length is None else length)
        (folder / WEIGHTS).write_bytes(prefix + text + content[8 + size :])

    return harm


def _behind(header: dict[str, Any], size: int) -> dict[str, Any]:
    """A weight of so many bytes behind the others."""
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return {"dtype": "F32", "shape": [size // 4], "data_offsets": [end, end + size]}


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*-of-*.safetensors"))[-1]


def as_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def replaced_by(kind: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(folder.parent / kind / WEIGHTS, folder / WEIGHTS)


def wide(levels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**level, "channels": 16384} for level in levels]


HUGE = tiny().model_dump(mode="json")
HUGE = {**HUGE, "down": wide(HUGE["down"]), "up": wide(HUGE["up"])}
INDEX = f"{WEIGHTS}.index.json"

DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no weights": ("whole", lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "a missing key": ("whole", rewrite(conv_in__bias=None), "conv_in.bias: is missing (weights that do not fit"),
    "a key too many": ("whole", rewrite(lora=torch.ones(1)), "lora: is unexpected"),
    "a misshapen weight": ("whole", rewrite(conv_in__bias=torch.ones(9)), "conv_in.bias: is of shape [9], not [8]"),
    "NaN": ("whole", rewrite(conv_in__bias=torch.full((8,), torch.nan)), "conv_in.bias: holds values that are not fin"),
    "infinity": ("whole", rewrite(conv_in__bias=torch.full((8,), torch.inf)), "conv_in.bias: holds values"),
    "integers": ("whole", rewrite(conv_in__bias=torch.ones(8, dtype=torch.int64)), "is torch.int64, not floats"),
    "truncated": ("whole", cut(WEIGHTS, 20_000), f"{WEIGHTS}: cannot be read"),
    "truncated header": ("whole", cut(WEIGHTS, 100), f"{WEIGHTS}: cannot be read"),
    "truncated length": ("whole", cut(WEIGHTS, 5), f"{WEIGHTS}: cannot be read"),
    "empty": ("whole", write(WEIGHTS, b""), f"{WEIGHTS}: cannot be read"),
    "a header of terabytes": ("whole", header(lambda _: None, length=TERABYTES), f"{WEIGHTS}: cannot be read"),
    "a header that is no JSON": ("whole", write(WEIGHTS, struct.pack("<Q", 8) + b"nothing!"), "cannot be read"),
    "a weight of terabytes": (
        "whole",
        header(lambda h: h.update(lora=_behind(h, TERABYTES))),
        f"{WEIGHTS}: cannot be read",
    ),
    "a shape of terabytes": (
        "whole",
        header(lambda h: h["conv_in.bias"].update(shape=[TERABYTES])),
        f"{WEIGHTS}: cannot be read",
    ),
    "a shape that overflows": (
        "whole",
        header(lambda h: h["conv_in.bias"].update(shape=[1 << 33, 1 << 33])),
        f"{WEIGHTS}: cannot be read",
    ),
    "overlapping weights": (
        "whole",
        header(lambda h: h["conv_in.bias"].update(data_offsets=h["time_embedding.linear_1.bias"]["data_offsets"])),
        f"{WEIGHTS}: cannot be read",
    ),
    "a header of megabytes": (
        "whole",
        write(WEIGHTS, (1 << 23).to_bytes(8, "little") + b"{}" + b" " * ((1 << 23) - 2)),
        f"{WEIGHTS}: cannot be read",
    ),
    "a pickle": ("whole", write(WEIGHTS, pickle.dumps({"conv_in.bias": [1.0] * 99})), f"{WEIGHTS}: cannot be read"),
    "a folder in place of the file": ("whole", as_folder, f"{WEIGHTS}: is not a file"),
    "weights of another class": ("whole", replaced_by("vae"), "weights that do not fit config.json"),
    "weights of a teacher": ("whole", replaced_by("teacher"), "weights that do not fit config.json"),
    "no configuration": ("whole", lambda f: (f / "config.json").unlink(), "config.json: does not exist"),
    "a configuration that is no JSON": ("whole", write("config.json", b"{"), "config.json: is not valid JSON"),
    "a configuration that is a list": ("whole", write("config.json", b"[]"), "config.json: is not a JSON object"),
    "a configuration of terabytes": ("whole", reconfigure(arch=HUGE), "is of shape [8], not [16384]"),
    "another class": ("whole", reconfigure(_class_name="AutoencoderKL"), "describes AutoencoderKL; name the folder of"),
    "no class": ("whole", reconfigure(_class_name=["UNet"]), "_class_name: describes ['UNet']"),
    "no architecture": ("whole", reconfigure(arch=3), "config.json: arch: "),
    "an architecture that cannot be": ("whole", reconfigure(arch={**HUGE, "up": []}), "config.json: arch.up: "),
    "another prediction type": ("whole", reconfigure(prediction_type="x"), "'x' is not a prediction type; use one of"),
    "a shard missing": ("shards", lambda f: last_shard(f).unlink(), "safetensors: does not exist"),
    "a shard truncated": ("shards", lambda f: cut(last_shard(f).name, 2000)(f), "safetensors: cannot be read"),
    "an index of another shard": ("shards", write(INDEX, b'{"weight_map": {"a": "b"}}'), "b: does not exist"),
    "an index of other folders": ("shards", write(INDEX, b'{"weight_map": {"a": "../b"}}'), "does not map weights"),
    "an index that maps nothing": ("shards", write(INDEX, b'{"weight_map": {}}'), "weight_map: does not map weights"),
    "an index that is no JSON": ("shards", write(INDEX, b"{"), "index.json: is not valid JSON"),
    "a teacher of a billion layers": ("teacher", reconfigure(num_layers=10**9), "it asks for more than"),
    "a teacher of terabytes": ("teacher", reconfigure(joint_attention_dim=1 << 40), "weights that do not fit"),
    "an autoencoder of a billion layers": ("vae", reconfigure(layers_per_block=10**9), "it asks for more than"),
    "a diffusers net of terabytes": ("diffusers", reconfigure(cross_attention_dim=1 << 40), "context_dim: 10995"),
    "an encoder of a billion layers": ("bert", reconfigure(num_hidden_layers=10**9), "it asks for more than"),
    "an encoder of terabytes": ("bert", reconfigure(vocab_size=1 << 40), "describes a model of"),
    "an encoder truncated": ("bert", cut("model.safetensors", 2000), "model.safetensors: cannot be read"),
    "an encoder of another width": ("bert", reconfigure(intermediate_size=8), "is of another shape"),
}  # fmt: skip
LOADERS: dict[str, Callable[[Path], object]] = {
    "whole": load_unet,
    "shards": load_unet,
    "teacher": load_teacher,
    "vae": load_vae,
    "diffusers": from_diffusers,
    "bert": lambda folder: load_text_encoder(str(folder)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_one_line_and_allocates_nothing(name: str, saved: Path, tmp_path: Path) -> None:
    kind, harm, words = DAMAGE[name]
    for other in ("vae", "teacher"):
        copied(saved, other, tmp_path / other)
    folder = copied(saved, kind, tmp_path / "net")
    harm(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    with little_memory(), Allocations() as allocated, pytest.raises(InputError) as error:
        LOADERS[kind](folder)
    line = str(error.value)
    assert words in line
    assert line.startswith(str(folder))
    assert "\n" not in line
    assert len(line) < 500
    assert "; " in line, "a remedy follows the problem"
    assert allocated.bytes <= 3 * size + 100_000  # the file, its weights in float32, and which of them are finite


@pytest.mark.parametrize("kind", ["whole", "shards", "teacher", "vae"])
def test_a_whole_folder_allocates_what_its_files_hold(kind: str, saved: Path) -> None:
    size = sum(file.stat().st_size for file in (saved / kind).glob("*.safetensors"))
    with little_memory(), Allocations() as allocated:
        LOADERS[kind](saved / kind)
    assert size // 2 < allocated.bytes <= 3 * size + 100_000, "the measure itself works"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(b"x")
    for load in LOADERS.values():
        with pytest.raises(InputError):
            load(tmp_path / "net")


COMMANDS: dict[str, tuple[str, list[str]]] = {
    "convert": ("diffusers", ["convert", "NET", "--out", "out"]),
    "export": ("whole", ["export", "NET", "--to", "coreml", "--out", "out.mlpackage"]),
    "train-autoencoder": ("vae", ["train-autoencoder", "--encoder", "NET", "--out", "out"]),
}


@pytest.mark.parametrize("harm", ["truncated", "a weight of terabytes", "NaN", "another class"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_ends_with_one_line_and_status_2(
    command: str,
    harm: str,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    kind, arguments = COMMANDS[command]
    folder = copied(saved, kind, tmp_path / "net")
    if harm == "NaN":
        weights = load_file(folder / WEIGHTS)
        save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}, folder / WEIGHTS)
    elif harm == "another class":
        reconfigure(_class_name="UNet2DModel")(folder)
    else:
        DAMAGE[harm][1](folder)
    monkeypatch.chdir(tmp_path)
    arguments = [str(folder) if argument == "NET" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["archsearch", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert ended.value.code == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"archsearch: {folder}")
    assert out == ""
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_classes_that_the_loader_does_not_know_are_named(saved: Path) -> None:
    with pytest.raises(InputError, match="describes UNet; name the folder of one of: AutoencoderKL, SD3Transformer2DM"):
        pretrained.load_net(saved / "whole", AutoencoderKL, SD3Transformer2DModel)
