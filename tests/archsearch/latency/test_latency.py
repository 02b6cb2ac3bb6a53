from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from archsearch import devices, machine
from archsearch.latency import base, host, onnx_export
from archsearch.latency.base import MeasurementError
from archsearch.latency.host import HostBackend, HostConfig
from archsearch.latency.steady_state import SteadyStateConfig
from snapgen.architecture.schema import Architecture, BlocksConfig, LevelConfig, TimeEmbeddingConfig
from snapgen.errors import InputError
from snapgen.models.unet import UNet

LATENT, TOKENS = 8, 5
BRIEF = SteadyStateConfig(block_seconds=1e-6, seconds=1e-6)


def arch(*, down: dict[str, Any] | None = None, mid: dict[str, Any] | None = None, **changes: Any) -> Architecture:
    """Two levels; the options hold for the lower one's stages, the middle's for the middle."""
    lower = LevelConfig(**({"channels": 32, "num_res_blocks": 1, "head_dim": 8} | (down or {})))
    first = LevelConfig(channels=16, num_res_blocks=1, head_dim=8)
    middle = BlocksConfig(**({"num_res_blocks": 1, "head_dim": 8} | (mid or {})))
    values: dict[str, Any] = {"latent_channels": 4, "context_dim": 12, "norm_groups": 4}
    values |= {"time": TimeEmbeddingConfig(embed_dim=8, hidden_dim=16)} | changes
    return Architecture(down=(first, lower), mid=middle, up=(first, lower), **values)


TINY = arch()

# Between them: every kind of conv, attention and embedding.
KINDS = {
    "plain convs": TINY,
    "separable": arch(down={"conv": "separable"}, mid={"conv": "separable"}),
    "separable ×2, time at the output": arch(
        down={"conv": "separable", "expansion": 2},
        time=TimeEmbeddingConfig(embed_dim=8, hidden_dim=16, projection="output"),
    ),
    "MHSA": arch(
        down={"num_transformers": 1, "cross_attention": False}, mid={"num_transformers": 1, "transformer_depth": 2}
    ),
    "MQA, QK norm, RoPE": arch(down={"num_transformers": 1, "num_kv_heads": 1}, qk_norm=True, rope=True),
    "GQA, RoPE": arch(down={"num_transformers": 1, "num_kv_heads": 2, "cross_attention": False}, rope=True),
    "cross-attention alone, GQA, QK norm": arch(
        down={"num_transformers": 1, "num_kv_heads": 2, "self_attention": False},
        mid={"num_res_blocks": 0},
        qk_norm=True,
    ),
    "feed-forward alone": arch(
        down={"num_transformers": 1, "self_attention": False, "cross_attention": False, "ffn_ratio": 1.5}
    ),
    "transformers alone on the way down": Architecture(
        latent_channels=4,
        context_dim=12,
        norm_groups=4,
        time=TimeEmbeddingConfig(embed_dim=8, hidden_dim=16),
        down=(
            LevelConfig(channels=16, num_res_blocks=1, conv="separable"),
            LevelConfig(channels=32, num_res_blocks=0, num_transformers=1, head_dim=8),
        ),
        mid=BlocksConfig(num_res_blocks=0),
        up=(LevelConfig(channels=16, num_res_blocks=1), LevelConfig(channels=32, num_res_blocks=2, conv="separable")),
    ),
}


def with_weights(net: UNet) -> UNet:
    """Random everywhere, also where a fresh net is zero, so that no layer's mistake is hidden."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * max(1, weight[0].numel()) ** -0.5)
    net.eval()
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_the_timed_net_computes_what_the_trained_one_does(kind: str, tmp_path: Path) -> None:
    net = with_weights(UNet(KINDS[kind]))
    inputs = base.sample_inputs(KINDS[kind], LATENT, TOKENS)
    onnx_export.export(net, inputs, tmp_path / "unet.onnx")
    session = host.open_session(tmp_path / "unet.onnx", threads=1)
    (output,) = session.run(["output"], {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        expected = net(*inputs.values()).numpy()
    assert output.shape == expected.shape
    assert np.abs(output - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_graph_is_whole_and_its_weights_are_the_nets(tmp_path: Path) -> None:
    net = UNet(KINDS["MQA, QK norm, RoPE"]).eval()
    onnx_export.export(net, base.sample_inputs(net.arch, LATENT, TOKENS), tmp_path / "unet.onnx")
    onnx.checker.check_model(tmp_path / "unet.onnx", full_check=True)
    model = onnx.load(tmp_path / "unet.onnx")
    floats = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.FLOAT]
    sizes = sum(int(np.prod(w.dims)) for w in floats)
    params = sum(p.numel() for p in net.parameters())
    assert params <= sizes <= params * 1.2, "weights once each, and a few tables"
    kinds = {node.op_type for node in model.graph.node}
    assert {"Attention", "RMSNormalization", "LayerNormalization", "Gelu"} <= kinds


def test_random_weights_are_ordinary_numbers(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = UNet(TINY).eval()
    net.to_empty(device="cpu")
    with torch.no_grad():
        for weight in net.parameters():
            weight.fill_(float("nan"))
    inputs = base.sample_inputs(TINY, LATENT, TOKENS)
    onnx_export.export(net, inputs, tmp_path / "unet.onnx", random_weights=True)
    smallest = np.finfo(np.float32).tiny
    for proto in onnx.load(tmp_path / "unet.onnx").graph.initializer:
        array = onnx.numpy_helper.to_array(proto, str(tmp_path))
        assert np.isfinite(array).all()
        if array.dtype == np.float32 and array.any():
            assert np.abs(array[array != 0]).min() > smallest
    session = host.open_session(tmp_path / "unet.onnx", threads=1)
    (output,) = session.run(["output"], {name: tensor.numpy() for name, tensor in inputs.items()})
    assert 0.01 < np.abs(output).mean() < 100


def test_an_operation_without_lines_is_refused_by_name(tmp_path: Path) -> None:
    class Sums(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(0)

    with pytest.raises(onnx_export.Unsupported, match=r"aten\.cumsum"):
        onnx_export.export(Sums(), {"x": torch.zeros(3)}, tmp_path / "sums.onnx")


def test_a_record_says_what_was_measured() -> None:
    record = devices.backend("host", rule=BRIEF.model_dump()).measure(TINY, LATENT, TOKENS)
    assert 0 < record.lower_quartile_ms <= record.median_ms <= record.upper_quartile_ms
    assert record.runs >= 2
    assert record.load_ms > 0
    assert (record.source, record.device, record.compute_units, record.threads) == ("measured", "host", "CPU", 1)
    assert record.chip == machine.chip()
    assert record.os == machine.operating_system()
    assert record.runtime.startswith("onnxruntime ")


def test_measuring_changes_nothing_for_what_comes_after() -> None:
    def arithmetic() -> list[float]:
        return [*(torch.tensor([1e-40, 1.0]) * torch.rand(1, generator=torch.Generator().manual_seed(0))).tolist()]

    before, state, threads = arithmetic(), torch.get_rng_state(), torch.get_num_threads()
    HostBackend(HostConfig(rule=BRIEF)).measure(TINY, LATENT, TOKENS)
    assert arithmetic() == before, "denormals are not flushed to zero in training"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_threads_reach_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_export.export(UNet(TINY).eval(), base.sample_inputs(TINY, LATENT, TOKENS), tmp_path / "unet.onnx")
    assert host.open_session(tmp_path / "unet.onnx", threads=3).get_session_options().intra_op_num_threads == 3
    asked: list[int] = []
    original = host.open_session

    def opened(path: Path, *, threads: int) -> onnxruntime.InferenceSession:
        asked.append(threads)
        return original(path, threads=threads)

    monkeypatch.setattr(host, "open_session", opened)
    record = HostBackend(HostConfig(threads=2, rule=BRIEF)).measure(TINY, LATENT, TOKENS)
    assert (record.threads, asked) == (2, [2])


def test_nothing_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    HostBackend(HostConfig(rule=BRIEF)).measure(TINY, LATENT, TOKENS)
    with pytest.raises(MeasurementError):
        HostBackend(HostConfig(rule=BRIEF, timeout=1e-6)).measure(TINY, LATENT, TOKENS)
    assert not list(tmp_path.iterdir())


def test_what_takes_too_long_is_a_failure_that_says_so() -> None:
    with pytest.raises(MeasurementError, match=f"{TINY.id} could not be measured on the host: timed out after 1e-06 s"):
        HostBackend(HostConfig(timeout=1e-6)).measure(TINY, LATENT, TOKENS)


def test_what_the_runtime_refuses_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "export", lambda _net, _inputs, path, **_: path.write_bytes(b"not a model"))
    with pytest.raises(MeasurementError, match="could not be measured on the host"):
        HostBackend(HostConfig()).measure(TINY, LATENT, TOKENS)


@pytest.mark.parametrize("size", [0, -2, 7])
def test_a_latent_of_the_wrong_size_is_the_users_mistake(size: int) -> None:
    with pytest.raises(InputError, match="use a multiple of 2"):
        HostBackend(HostConfig()).measure(TINY, size, TOKENS)


@pytest.mark.parametrize(
    ("device", "options", "place"),
    [
        ("toaster", {}, "toaster"),
        ("host", {"thread": 2}, "thread: unknown key"),
        ("host", {"threads": 0}, "threads"),
        ("host", {"rule": {"seconds": -1}}, "rule.seconds"),
        ("host", {"rule": {"precision": float("nan")}}, "rule.precision"),
    ],
)
def test_wrong_settings_are_placed(device: str, options: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError, match=place):
        devices.backend(device, **options)


@pytest.mark.slow
def test_the_full_size_design_is_timed() -> None:
    from snapgen.architecture.presets import preset

    record = HostBackend(HostConfig(rule=SteadyStateConfig(seconds=1))).measure(preset("snapgen-imagenet"), 32, 77)
    assert record.runs >= 2
    assert record.median_ms > 50, "38 GMACs take no core of today's less"
