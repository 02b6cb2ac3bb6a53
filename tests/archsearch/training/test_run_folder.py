from __future__ import annotations

from pathlib import Path

import pytest

from archsearch.training.run_folder import RunFolder, read_unet
from snapgen.errors import InputError
from snapgen.models.unet import UNet
from tests.archsearch.studies.tiny_recipe import recipe
from tests.snapgen.nets import tiny


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(*recipe(tmp_path))
    found.create()
    return found


def write(text: str) -> object:
    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "a").write_text(text)

    return write


def test_a_pipeline_takes_the_place_of_the_one_before(folder: RunFolder) -> None:
    assert folder.pipeline_stages() is None
    for text in ("one", "two"):
        folder.write_pipeline(write(text), stages=text)  # type: ignore[arg-type]
        assert (folder.pipeline_stages(), (folder.pipeline / "a").read_text()) == (text, text)
    assert [path.name for path in folder.path.iterdir()] == ["pipeline"]


def test_a_pipeline_that_cannot_be_written_leaves_the_one_before(folder: RunFolder) -> None:
    folder.write_pipeline(write("one"), stages="one")  # type: ignore[arg-type]

    def full(new: Path) -> None:
        (new / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"pipeline: cannot be written .*No space left"):
        folder.write_pipeline(full, stages="two")
    assert folder.pipeline_stages() == "one"
    assert [path.name for path in folder.path.iterdir()] == ["pipeline"]


def test_a_result_is_whole_or_not_there(folder: RunFolder) -> None:
    folder.checkpoint.write_bytes(b"state")

    def full(new: Path) -> None:
        (new / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"02-base: cannot be written"):
        folder.write_result(1, full)
    assert folder.checkpoint.exists()
    assert not (folder.path / "stages").exists()
    (folder.path / "stages" / ".02-base-killed").mkdir(parents=True)
    folder.write_result(1, write("done"))  # type: ignore[arg-type]
    assert [path.name for path in (folder.path / "stages").iterdir()] == ["02-base"]
    assert not folder.checkpoint.exists()


def test_a_run_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match="another folder"):
        RunFolder(*recipe(tmp_path)).create()


def test_a_net_of_another_architecture(folder: RunFolder, tmp_path: Path) -> None:
    assert read_unet(None, folder.arch) is None
    UNet(tiny()).save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="has architecture"):
        read_unet(tmp_path / "unet", folder.arch)
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="does not describe a U-Net of this package"):
        read_unet(tmp_path / "unet", folder.arch)
    with pytest.raises(InputError, match="does not exist"):
        read_unet(tmp_path / "none", folder.arch)
