from __future__ import annotations

from pathlib import Path

import pytest
import torch

from snapgen.errors import InputError
from snapgen.io import checkpoint


def parts() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "net": {
            "weight": torch.randn(2, 3),
            "channels.last": torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last),
        },
        "random": checkpoint.rng_state(),
        "optimizer": {"0.0.step": torch.tensor(3.0)},
    }


def test_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path, given = tmp_path / "run" / "checkpoint.safetensors", parts()
    checkpoint.save_checkpoint(path, given, {"stage": "base", "step": 7})
    found, facts = checkpoint.load_checkpoint(path)
    assert facts == checkpoint.read_metadata(path) == {"stage": "base", "step": 7}
    assert {name: set(named) for name, named in found.items()} == {name: set(named) for name, named in given.items()}
    assert all(
        torch.equal(found[part][name], tensor) for part, named in given.items() for name, tensor in named.items()
    )


def test_random_states_go_on(tmp_path: Path) -> None:
    checkpoint.save_checkpoint(tmp_path / "c", {"random": checkpoint.rng_state()}, {})
    expected = torch.randn(3)
    torch.manual_seed(99)
    checkpoint.set_random_state(checkpoint.load_checkpoint(tmp_path / "c")[0]["random"])
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_one_line(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save_checkpoint(path, parts(), {"step": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: is damaged"):
        checkpoint.load_checkpoint(path)


def test_a_full_disk_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save_checkpoint(path, parts(), {"step": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"No space left on device.*the same command goes on"):
        checkpoint.save_checkpoint(path, parts(), {"step": 2})
    assert checkpoint.read_metadata(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
