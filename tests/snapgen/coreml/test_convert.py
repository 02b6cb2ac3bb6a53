"""Every primitive of the space converts, computes what torch does, and stays on the Neural Engine."""

from __future__ import annotations

import copy
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archsearch.cost.counter import cost, module_cost
from snapgen.architecture import presets
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.autoencoders.tiny_decoder import PAPER, TinyDecoder
from snapgen.coreml import compatibility, convert as coreml, mil as mil_, package
from snapgen.coreml.layers import CoreMLUNet, time_features
from snapgen.coreml.package import PackageOptions
from snapgen.errors import InputError
from snapgen.models.unet import UNet
from tests.snapgen import mil
from tests.snapgen.nets import inputs, stirred

SMALL = Architecture.model_validate(
    {
        "latent_channels": 3,
        "context_dim": 12,
        "norm_groups": 4,
        "time": {"embed_dim": 8, "hidden_dim": 16},
        "down": [
            {"channels": 8, "num_res_blocks": 0, "num_transformers": 1, "head_dim": 4, "self_attention": False},
            {"channels": 16, "num_res_blocks": 1, "head_dim": 4},
        ],
        "mid": {"num_res_blocks": 1, "head_dim": 4},
        "up": [
            {"channels": 8, "num_res_blocks": 1, "head_dim": 4},
            {"channels": 16, "num_res_blocks": 1, "head_dim": 4},
        ],
    }
)
# The first holds each conv, each form of heads, cross-attention in each stage; the second what it lacks.
NETS: dict[str, dict[str, Any]] = {
    "qk norm, rope": {
        "qk_norm": True,
        "rope": True,
        "down[0].num_kv_heads": 1,
        "down[0].conv": "separable",
        "mid.num_transformers": 1,
        "mid.num_kv_heads": 2,
        "up[0].conv": "separable",
        "up[0].expansion": 2,
        "up[0].num_transformers": 1,
        "up[0].self_attention": False,
        "up[1].num_transformers": 1,
        "up[1].num_kv_heads": 1,
        "time.projection": "output",
    },
    "neither": {"mid.num_transformers": 1, "up[1].conv": "separable"},
    "rope": {"rope": True, "mid.num_transformers": 1, "all.num_kv_heads": 2, "all.conv": "separable"},
    "qk norm": {"qk_norm": True, "down[1].num_transformers": 1, "up[1].num_transformers": 1, "all.num_kv_heads": 1},
}
MORE = {"rope", "qk norm"}
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE)) for name in NETS]
TOKENS, SIZE = 3, 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))


def rounded(net: Any) -> Any:
    """The net with weights that half precision has."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.half())
    return net


def converted(module: nn.Module, feed: dict[str, Tensor], output: str) -> Any:
    examples = {name: tensor if tensor.dtype == torch.int32 else tensor.half() for name, tensor in feed.items()}
    with package.quiet():
        return package._convert(module, examples, output, PackageOptions())


@cache
def unet(name: str) -> tuple[UNet, dict[str, Tensor], Any]:
    """A net, an input, and its conversion."""
    net = rounded(stirred(apply_overrides(SMALL, NETS[name])))
    sample, timestep, context = inputs(net.arch, batch=1, size=SIZE, tokens=TOKENS)
    feed = {
        "sample": sample.half().float(),
        "time_features": time_features(timestep, net.arch.time.embed_dim),
        "context": context.half().float(),
    }
    return net, feed, converted(CoreMLUNet(copy.deepcopy(net).half(), SIZE), feed, "velocity")


def saved(model: Any, folder: Path) -> mil_.MILProgram:
    model.save(str(folder / "it.mlpackage"))
    return mil_.read_program(folder / "it.mlpackage")


@pytest.mark.parametrize("name", EACH)
def test_a_converted_net_computes_what_torch_does(name: str) -> None:
    """Its program, in float32: the tables of RoPE and what was multiplied into weights are all that was rounded."""
    net, feed, model = unet(name)
    with torch.no_grad():
        expected = net(feed["sample"], torch.tensor([0.2]), feed["context"])
    (found,) = mil.run(model, feed)
    assert (found - expected).abs().max() < 0.01 * expected.std()


@pytest.mark.parametrize("name", EACH)
def test_a_converted_net_stays_on_the_neural_engine(name: str, tmp_path: Path) -> None:
    net, _, model = unet(name)
    program = saved(model, tmp_path)
    assert compatibility.violations(program) == []
    assert program.macs == cost(net.arch, SIZE, context_tokens=TOKENS).macs
    assert (
        {t.dtype for t in program.inputs} == {t.dtype for op in program.operations for t in op.outputs} == {"FLOAT16"}
    )
    counts = program.counts()
    attentions = [(b, b.num_kv_heads == 1) for _, b, _ in net.arch.named_levels() for _ in range(b.num_transformers)]
    assert counts["scaled_dot_product_attention"] == sum(b.self_attention + b.cross_attention for b, _ in attentions)
    # A context's keys and values of one head are not transposed.
    assert counts["transpose"] == sum(3 * b.self_attention + (2 if mqa else 3) for b, mqa in attentions)
    assert counts["instance_norm"] == sum(isinstance(m, nn.GroupNorm) for m in net.modules())
    assert not {"softmax", "matmul", "cast", "square", "reduce_mean", "gather"} & counts.keys()


def test_what_a_program_lies_in_is_told(tmp_path: Path) -> None:
    program = saved(unet("qk norm, rope")[2], tmp_path)
    layouts = program.layouts()
    assert sum(layouts.values()) == sum(len(op.outputs) for op in program.operations)
    assert {"(1, C, H, W)", "(1, C, 1, N)", "(heads, D, 1, N)", "(1, heads, N, D)"} <= layouts.keys()


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML predicts on macOS alone")
@pytest.mark.parametrize("name", EACH)
def test_core_ml_predicts_what_torch_does(name: str, tmp_path: Path) -> None:
    import coremltools as ct

    net, feed, model = unet(name)
    saved(model, tmp_path)
    loaded = ct.models.MLModel(str(tmp_path / "it.mlpackage"), compute_units=ct.ComputeUnit.ALL)
    found = loaded.predict({key: tensor.half().numpy() for key, tensor in feed.items()})["velocity"]
    with torch.no_grad():
        expected = net(feed["sample"], torch.tensor([0.2]), feed["context"])
    assert (torch.from_numpy(found).float() - expected).abs().max() < 0.05 * expected.std()


# --- the tiny decoder ---

NARROW: dict[str, Any] = PAPER | {"widths": (8, 16), "blocks": (1, 1), "mid_blocks": 1, "norm_groups": 4}


def decoder() -> TinyDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return rounded(TinyDecoder(**NARROW).eval())  # type: ignore[no-any-return]


def test_a_tiny_decoder_converts() -> None:
    program = mil_.read_program(coreml.convert_decoder(decoder(), 8))
    assert compatibility.violations(program) == []
    with torch.device("meta"):
        assert program.macs == module_cost(TinyDecoder(**NARROW), torch.empty(1, 16, 8, 8)).macs
    assert program.operations[-1].outputs[0].shape == (1, 3, 16, 16)


class Wide(nn.Module):
    """A convolution that is worth compressing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "share"),
    [(PackageOptions(palette_bits=4), 0.25), (PackageOptions(int8=True), 0.5)],
    ids=["palette", "int8"],
)
def test_weights_are_stored_small(options: PackageOptions, share: float) -> None:
    feed = {"x": torch.empty(1, 64, 8, 8, dtype=torch.float16)}
    path = package.package("wide", {}, lambda: Wide().half(), feed, "y", options, coreml.COREML)
    (file,) = path.rglob("weight.bin")
    assert file.stat().st_size == pytest.approx(share * 2 * 64 * 64 * 9, rel=0.1)
    program = mil_.read_program(path)
    assert compatibility.violations(program) == []
    assert program.macs == 64 * 64 * 9 * 6 * 6


# --- the cache ---


class Written:
    """Stands for a converted model."""

    def __init__(self) -> None:
        self.user_defined_metadata: dict[str, str] = {}

    def save(self, path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "Manifest.json").write_text(self.user_defined_metadata["archsearch"])


def test_a_package_is_made_once_for_all_that_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Written] = []

    def convert(*_: object) -> Written:
        made.append(Written())
        return made[-1]

    monkeypatch.setattr(package, "_convert", convert)
    paths = {coreml.convert_decoder(decoder(), 4) for _ in range(2)}
    assert len(made) == 1
    paths.add(coreml.convert_decoder(decoder(), 8))
    paths.add(coreml.convert_decoder(decoder(), 4, options=PackageOptions(int8=True)))
    paths.add(coreml.convert_decoder(rounded(TinyDecoder(**NARROW)), 4))
    assert len(paths) == len(made) == 4
    (folder,) = {path.parent for path in paths}
    assert set(folder.iterdir()) == paths, "nothing half-written stays"


def test_what_a_killed_conversion_left_is_not_taken_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_convert", lambda *_: Written())
    path = coreml.convert_decoder(decoder(), 4)
    left = path.with_name(f"{path.stem}.1-ab.part.mlpackage")
    path.rename(left)
    assert coreml.convert_decoder(decoder(), 4) == path
    assert left.is_dir(), "it may be another worker's"
    os.utime(left, (0, 0))
    coreml.convert_decoder(decoder(), 8)
    assert not left.exists()


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> Written:
        raise RuntimeError("no")

    monkeypatch.setattr(package, "_convert", fail)
    with pytest.raises(RuntimeError):
        coreml.convert_decoder(decoder(), 4)
    assert list((tmp_path / "coreml").iterdir()) == []


def test_nets_of_one_id_share_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(coreml, "package", lambda *args: seen.append(args[1]))
    coreml.convert_unet(SMALL, 8)
    coreml.convert_unet(apply_overrides(SMALL, {"up[0].num_kv_heads": 1}), 8)
    coreml.convert_unet(apply_overrides(SMALL, {"down[0].num_kv_heads": 1}), 8)
    assert seen[0] == seen[1] != seen[2]


def test_random_weights_are_of_ordinary_size_and_no_two_layers_are_one() -> None:
    net = coreml._random_unet(apply_overrides(SMALL, {"down[1].num_res_blocks": 2}))
    first, second = (layer.residual.conv2.weight for layer in net.down[1].layers)
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    for name, parameter in net.named_parameters():
        assert parameter.dtype == torch.float16
        assert parameter.isfinite().all(), name
        if parameter.numel() > 500:
            assert parameter.float().std().item() == pytest.approx(parameter[0].numel() ** -0.5, rel=0.15)


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_net_of_two_sides_in_either_precision(precision: Any) -> None:
    path = coreml.convert_unet(SMALL, (4, 6), context_tokens=TOKENS, options=PackageOptions(precision=precision))
    program = mil_.read_program(path)
    assert {t.name: t.shape for t in program.inputs}["sample"] == (1, 3, 4, 6)
    assert {t.dtype for t in program.inputs} == {precision.upper()}
    problems = compatibility.violations(program)
    assert [line for line in problems if "float32" in line] == problems[: precision == "float32"]
    summary = coreml.COREML.summarize(path)
    largest = max(t.size_bytes for op in program.operations for t in op.outputs)
    assert summary.size_bytes + largest < summary.resident_bytes < summary.size_bytes + 20 * largest


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coreml.convert_unet(SMALL, 7), "latent: size 7 cannot be halved 1 times; use a multiple of 2"),
        (lambda: coreml.convert_unet(SMALL, 8, context_tokens=0), "tokens: 0 is not a valid context length"),
        (lambda: coreml.convert_decoder(decoder(), 0), "latent: 0 is not a valid size"),
        (lambda: coreml.convert_text("/nowhere"), "/nowhere: does not exist; name a text encoder's folder"),
    ],
)
def test_mistakes_are_told_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_cache_that_is_no_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(file))
    with pytest.raises(InputError, match="cannot hold packages"):
        coreml.convert_decoder(decoder(), 8)


def test_two_forms_of_weights_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one"):
        PackageOptions(int8=True, palette_bits=4)


# --- full size ---


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("snapgen-imagenet", 32), ("snapgen-t2i", 32), ("snapgen-t2i", 128)])
def test_a_final_design_converts_and_stays_on_the_neural_engine(name: str, size: int) -> None:
    arch = presets.preset(name)
    path = coreml.convert_unet(arch, size)
    program = mil_.read_program(path)
    assert compatibility.violations(program) == []
    counted = cost(arch, size)
    assert program.macs == counted.macs
    weights = sum(file.stat().st_size for file in path.rglob("weight.bin"))
    assert weights == pytest.approx(2 * counted.params, rel=0.01)


@pytest.mark.slow
def test_the_decoder_of_the_published_size_converts() -> None:
    program = mil_.read_program(coreml.convert_decoder(TinyDecoder(**PAPER), 128))
    assert compatibility.violations(program) == []
    assert program.operations[-1].outputs[0].shape == (1, 3, 1024, 1024)
