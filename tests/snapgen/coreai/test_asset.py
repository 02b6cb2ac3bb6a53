"""Every primitive of the space converts to Core AI, is what the format has an operation for, and has our costs."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from archsearch.cost.counter import cost, module_cost
from snapgen.architecture.overrides import apply_overrides
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.coreai import asset
from snapgen.coreai.asset import COREAI
from snapgen.coreai.unet import CoreAIUNet
from snapgen.coreml import convert
from snapgen.coreml.layers import time_features
from snapgen.coreml.package import PackageOptions, PackageSummary
from snapgen.errors import InputError
from tests.snapgen.coreml.test_convert import NARROW, NETS, SIZE, SMALL, TOKENS, decoder
from tests.snapgen.nets import inputs, stirred


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))


@pytest.fixture
def installed() -> None:
    pytest.importorskip("coreai_torch", reason="the extra coreai is not installed")


def summary(path: Path) -> PackageSummary:
    assert path.suffix == ".aimodel"
    return COREAI.summarize(path)


@pytest.mark.parametrize("name", NETS)
def test_the_form_that_is_converted_computes_what_the_net_does(name: str) -> None:
    net = stirred(apply_overrides(SMALL, NETS[name]))
    sample, timestep, context = inputs(net.arch, batch=1, size=SIZE, tokens=TOKENS)
    with torch.no_grad():
        expected = net(sample, timestep, context)
        found = CoreAIUNet(net)(sample, time_features(timestep, net.arch.time.embed_dim), context)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NETS])
def test_every_primitive_converts_to_what_core_ai_has_an_operation_for(name: str) -> None:
    arch = apply_overrides(SMALL, NETS[name])
    found = summary(convert.convert_unet(arch, (8, 4), context_tokens=TOKENS, target=COREAI))
    net = stirred(arch)
    norms = {kind: sum(isinstance(m, kind) for m in net.modules()) for kind in (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)}
    counts = found.operation_counts
    attentions = [b for _, b, _ in arch.named_levels() for _ in range(b.num_transformers)]
    assert counts["scaled_dot_product_attention"] == sum(b.self_attention + b.cross_attention for b in attentions)
    assert counts["group_norm"] == norms[nn.GroupNorm]
    assert counts["layer_norm"] == norms[nn.LayerNorm]
    assert counts.get("rms_norm", 0) == norms[nn.RMSNorm]
    assert not {"softmax", "reduce_mean", "pow", "cos", "invoke", "cast"} & counts.keys()
    views = {"aten.flatten.using_ints", "aten.reshape.default"}
    assert found.decomposed.keys() - views == {"aten.linear.default"}
    assert found.violations == ()
    square = summary(convert.convert_unet(arch, SIZE, context_tokens=TOKENS, target=COREAI))
    assert square.macs == cost(arch, SIZE, context_tokens=TOKENS).macs


@pytest.mark.usefixtures("installed")
def test_a_decoder_and_its_facts() -> None:
    path = convert.convert_decoder(decoder(), 8, target=COREAI)
    found = summary(path)
    with torch.device("meta"):
        assert found.macs == module_cost(TinyDecoder(**NARROW), torch.empty(1, 16, 8, 8)).macs
    assert found.resident_bytes > found.size_bytes
    kept = json.loads((path / "metadata.json").read_text())["creatorDefinedMetadata"]["archsearch"]
    assert json.loads(kept)["coreai-torch"] == importlib.metadata.version("coreai-torch")
    assert convert.convert_decoder(decoder(), 8, target=COREAI) == path, "it is in the cache"


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("options", "bits"), [({}, 16), ({"palette_bits": 4}, 4), ({"int8": True}, 8)])
def test_weights_are_stored_small(options: dict[str, Any], bits: int) -> None:
    arch = apply_overrides(SMALL, {"levels[0].channels": 64, "levels[1].channels": 64})
    found = summary(convert.convert_unet(arch, 8, options=PackageOptions(**options), target=COREAI))
    assert found.size_bytes == pytest.approx(cost(arch, 8).params * bits / 8, rel=0.25)
    assert found.macs == cost(arch, 8).macs


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_a_text_encoder_keeps_its_attention_whole() -> None:
    counts = summary(convert.convert_text(tokens=8, target=COREAI)).operation_counts
    assert (counts["scaled_dot_product_attention"], counts["layer_norm"]) == (6, 13)


def test_without_the_extra_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(asset.metadata, "version", version)
    with pytest.raises(InputError, match=r"coreai-core is not installed; install the extra: .*archsearch\[coreai\]"):
        COREAI.versions()
    with pytest.raises(InputError, match=r"coreai-opt is not installed; install the extra: .*archsearch\[coreai-opt\]"):
        COREAI.save(nn.Identity(), {}, "y", PackageOptions(int8=True), "", Path())


def test_a_component_that_ends_the_app_is_told() -> None:
    small = PackageSummary("unet.aimodel", 4 * 2**30, 1, 1, {}, {}, (), 1, {})
    assert asset._checked(small).violations == ()
    large = PackageSummary("unet.aimodel", 5 * 2**30, 1, 1, {}, {}, (), 1, {})
    assert asset._checked(large).violations == (
        "is 5.00 GiB, and a component over 4.00 GiB ends the app; store fewer bits",
    )


@pytest.mark.usefixtures("installed")
def test_what_is_no_asset_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.aimodel").mkdir()
    for file in ("main.mlirb", "main.hash"):
        with pytest.raises(InputError, match="is no asset, or a damaged one"):
            COREAI.summarize(tmp_path / "x.aimodel")
        (tmp_path / "x.aimodel" / file).write_bytes(b"0" * 32)
