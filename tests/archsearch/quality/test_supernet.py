"""Candidates that begin with a trained net's weights: which they are, and each way in which they can not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from archsearch.protocol import EvaluationProtocol
from archsearch.quality import supernet as inheritance
from archsearch.quality.candidate_evaluator import CandidateEvaluator
from archsearch.quality.supernet import Supernet
from snapgen.architecture import block_index
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.io.prediction_type import NOTES
from snapgen.models.unet import UNet
from tests.archsearch.quality.test_candidate_evaluator import folder, protocol, tiny  # noqa: F401


def base() -> Architecture:
    return block_index.with_explicit_layers(tiny())


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    net = UNet(base())
    net.init_weights(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.01 * torch.ones_like(weight))
    net.prediction_type = "preconditioned"
    net.save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def supernet(path: Path) -> Supernet:
    return Supernet(str(path), prediction="preconditioned")


def refusal(path: Path, arch: Architecture | None = None) -> str:
    with pytest.raises(InputError) as raised:
        supernet(path).check(arch or base())
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_sub_network_has_the_weights(trained: Path) -> None:
    found = supernet(trained)
    arch = apply_overrides(base(), {"mid.layers[0].num_res_blocks": 0, "up[0].layers[0].num_transformers": 2})
    found.check(arch)
    net = found.net(arch, seed=1)
    assert net.arch == arch
    assert torch.equal(net.conv_in.weight, found.unet.conv_in.weight)
    again = found.net(arch, seed=1).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in net.state_dict().items())
    assert all(weight.requires_grad for weight in net.parameters())


def test_the_digest_is_of_the_weights(trained: Path, tmp_path: Path) -> None:
    first = inheritance.digest(str(trained))
    trained.rename(tmp_path / "elsewhere")
    assert inheritance.digest(str(tmp_path / "elsewhere")) == first
    net = UNet(base())
    net.init_weights(4)
    net.save_pretrained(tmp_path / "elsewhere")
    assert inheritance.digest(str(tmp_path / "elsewhere")) != first


def test_a_folder_that_holds_no_net(trained: Path, tmp_path: Path) -> None:
    assert "is not a folder; give init_from the folder of a trained U-Net" in refusal(tmp_path / "nowhere")
    assert "config.json: does not exist" in refusal(tmp_path)
    weights = trained / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights}: cannot be read (" in refusal(trained)
    weights.unlink()
    assert f"has no {weights.name}" in refusal(trained)


def test_a_configuration_that_is_none_of_ours(trained: Path) -> None:
    for text, problem in (
        ("{}", "config.json: _class_name: describes no model; name the folder of one of: UNet"),
        ("[", "config.json: is not valid JSON"),
        ('{"_class_name": "UNet", "arch": 3}', "config.json: arch: "),
    ):
        (trained / "config.json").write_text(text)
        assert problem in refusal(trained)


def test_weights_that_are_missing_or_not_finite(trained: Path) -> None:
    config = trained / "config.json"
    values = json.loads(config.read_text())
    more = apply_overrides(base(), {"mid.layers[0].num_res_blocks": 2}).model_dump(mode="json")
    config.write_text(json.dumps({**values, "arch": more}))
    assert "mid.layers.0.copies.0.conv1.bias: is missing (weights that do not fit config.json: " in refusal(trained)
    net = UNet(base())
    with torch.no_grad():
        net.conv_in.weight[0] = float("nan")
    net.save_pretrained(trained)
    assert "not finite" in refusal(trained)


def test_a_net_that_predicts_something_else(trained: Path) -> None:
    stated = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**stated, "prediction_type": "velocity"}))
    assert "predicts 'velocity', not 'preconditioned'" in refusal(trained)
    (trained / "config.json").write_text(json.dumps({**stated, "prediction_type": None}))
    supernet(trained)
    (trained / NOTES[0]).write_text('{"prediction": "velocity"}')
    assert "predicts 'velocity', not 'preconditioned'" in refusal(trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down[0].channels": 16}, "down[0].channels: is 16; the supernetwork in "),
        ({"down[1].head_dim": 8}, "down[1].head_dim: is 8"),
        ({"latent_channels": 4}, "latent_channels: is 4"),
        ({"context_dim": 100}, "context_dim: is 100"),
        ({"up[1].layers": [[1, 1], [1, 0]]}, "up[1].layers: is 2"),
        ({"mid.layers[0].num_transformers": 1}, "CA mid.0: the supernetwork in "),
    ],
)
def test_an_architecture_that_is_not_a_sub_network(trained: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refusal(trained, apply_overrides(base(), changes))


def test_another_number_of_levels(trained: Path) -> None:
    assert "has none" in refusal(trained, block_index.with_explicit_layers(tiny(stages=3)))


def test_a_candidate_is_trained_on(trained: Path, protocol: EvaluationProtocol) -> None:  # noqa: F811
    given = protocol.model_copy(update={"num_samples": 0, "train_seeds": (0,), "steps": 2, "learning_rate": 1e-6})
    plain = CandidateEvaluator(given, torch.device("cpu"))
    elastic = CandidateEvaluator(given.model_copy(update={"init_from": str(trained)}), torch.device("cpu"))
    assert plain.resolved.hash != elastic.resolved.hash
    arch = apply_overrides(base(), {"mid.layers[0].num_res_blocks": 0})
    score = elastic.score(arch, study_seed=1)
    assert score == elastic.score(arch, study_seed=1).model_copy(update={"training_seconds": score.training_seconds})
    with torch.no_grad():
        losses = elastic.pair_losses(elastic.initial_network(arch, 0))
    assert score.validation_loss.value == pytest.approx(float(losses.mean()), rel=1e-2), "hardly trained"
    assert score.validation_loss.value != pytest.approx(plain.score(arch, study_seed=1).validation_loss.value, rel=1e-3)
    with pytest.raises(InputError, match="has no block at this site"):
        elastic.check(apply_overrides(base(), {"mid.layers[0].num_transformers": 1}))
