from __future__ import annotations

from pathlib import Path

import pytest
import torch

from snapgen.errors import InputError
from snapgen.io import checkpoint


def components() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "net": {
            "weight": torch.randn(2, 3),
            "channels.last": torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last),
        },
        "random": checkpoint.rng_state(),
        "optimizer": {"0.0.step": torch.tensor(3.0)},
    }


def test_loading_returns_what_was_saved(tmp_path: Path) -> None:
    path, saved = tmp_path / "run" / "checkpoint.safetensors", components()
    checkpoint.save_checkpoint(path, saved, {"stage": "base", "step": 7})
    loaded, metadata = checkpoint.load_checkpoint(path)
    assert metadata == checkpoint.read_metadata(path) == {"stage": "base", "step": 7}
    assert {name: set(state) for name, state in loaded.items()} == {name: set(state) for name, state in saved.items()}
    assert all(torch.equal(loaded[name][key], tensor) for name, state in saved.items() for key, tensor in state.items())


def test_random_states_are_restored(tmp_path: Path) -> None:
    checkpoint.save_checkpoint(tmp_path / "c", {"random": checkpoint.rng_state()}, {})
    expected = torch.randn(3)
    torch.manual_seed(99)
    checkpoint.set_rng_state(checkpoint.load_checkpoint(tmp_path / "c")[0]["random"])
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_one_line(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save_checkpoint(path, components(), {"step": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: is damaged"):
        checkpoint.load_checkpoint(path)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save_checkpoint(path, components(), {"step": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"No space left on device.*the same command resumes"):
        checkpoint.save_checkpoint(path, components(), {"step": 2})
    assert checkpoint.read_metadata(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
