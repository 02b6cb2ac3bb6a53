"""A run in float16 names the layer that overflows, and an export refuses it or keeps the component in float32."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from snapgen.coreml import pipeline_export
from snapgen.coreml.mil import read_program
from snapgen.errors import InputError
from snapgen.pipeline.float16_run import LARGEST, activation_peaks
from tests.snapgen.pipeline.test_snapgen_pipeline import encoders, made, with_decoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made(tmp_path, with_decoder(), encoders(tmp_path)[:2]).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """Its decoder's first convolution yields more than half precision holds."""
    coder = with_decoder()
    with torch.no_grad():
        coder.decoder.layers[0].weight.mul_(1e7)
    made(tmp_path, coder, encoders(tmp_path)[:2]).save_pretrained(tmp_path / "large")
    return tmp_path / "large"


def test_each_component_has_a_peak(folder: Path) -> None:
    peaks = activation_peaks(folder, (8, 4), ["a red apple", ""])
    assert peaks.keys() == {"unet", "decoder", "text_encoder", "text_encoder_2"}
    assert all(0 < peak.value < LARGEST and peak.layer for peak in peaks.values())


def test_the_layer_that_overflows_is_named(overflowing: Path, tmp_path: Path) -> None:
    peaks = activation_peaks(overflowing, 4)
    assert peaks["decoder"] == ("layers.0", math.inf)
    assert math.isfinite(peaks["unet"].value)
    with pytest.raises(InputError, match=r"decoder.mlpackage: overflows float16 \(65,504\) in its layer layers.0"):
        pipeline_export.export_pipeline(overflowing, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_overflowing_component_is_kept_in_float32(
    overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    pipeline_export.export_pipeline(overflowing, tmp_path / "out", latent_size=(4, 6), overflow="float32")
    told = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    assert told["decoder"]["largest_activation"] == {"layer": "layers.0", "value": None, "overflows": True}
    assert [told[name]["precision"] for name in ("unet", "decoder")] == ["float16", "float32"]
    assert told["decoder"]["outputs"] == {"image": [1, 3, 8, 12]}
    program = read_program(tmp_path / "out" / "decoder.mlpackage")
    assert {t.dtype for op in program.operations for t in op.outputs} == {"FLOAT32"}
    assert program.operations[-1].outputs[0].shape == (1, 3, 8, 12)
