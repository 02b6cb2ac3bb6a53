"""Held-out pictures are never trained on, however folders and shards are named; the user is told which they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapgen.data.splits import kind_of
from snapgen.errors import InputError
from tests.snapgen.data.pictures import both, fill, picture, pictures, shard, train

TRAIN = pictures("a.png", "b.png", "c.png")
HELD_OUT = {"x.png": picture(90), "y.png": picture(91)}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))


def in_folders(root: Path, train_name: str, val_name: str) -> Path:
    fill(root / train_name, TRAIN)
    fill(root / val_name, HELD_OUT)
    return root


@pytest.mark.parametrize("train_name", ["train", "Train", "TRAINING", "train2017", "train_set"])
@pytest.mark.parametrize("val_name", ["val", "Val", "valid", "VALIDATION", "dev", "eval", "val2017", "held-out"])
def test_folders_of_known_names_are_the_splits(tmp_path: Path, train_name: str, val_name: str) -> None:
    first, second = both(in_folders(tmp_path, train_name, val_name))
    assert sorted(first.captions) == ["a", "b", "c"]
    assert sorted(second.captions) == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("train", "train"), ("images_train", "train"), ("valid", "val"), ("test", "test"), ("Testing", "test")]
    + [(name, None) for name in ("train_", "trainer", "steam train", "value", "valley", "devil", "owl", "contest")],
)
def test_names_of_splits(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_what_programs_leave_beside_the_splits_changes_nothing(tmp_path: Path) -> None:
    in_folders(tmp_path, "train", "valid")
    fill(tmp_path / "__MACOSX" / "train", {"._a.png": b"ghost"})
    fill(tmp_path / "@eaDir" / "a.png", {"SYNOPHOTO_THUMB_M.png": picture(3)})
    fill(tmp_path / ".ipynb_checkpoints", pictures("z.png"))
    first, second = both(tmp_path)
    assert sorted(first.captions) == ["a", "b", "c"]
    assert sorted(second.captions) == ["x", "y"]


def test_further_folders_beside_two_splits_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_folders(tmp_path, "train", "val")
    fill(tmp_path, {"test/t.png": picture(5), "extra/e.png": picture(6), "loose.png": picture(7), "notes/n.txt": "x"})
    first, second = both(tmp_path)
    assert len(first) == 3
    assert len(second) == 2
    assert "left out extra, test, images beside the folders; train is the training split" in caplog.text
    assert "notes" not in caplog.text


def test_a_folder_that_may_be_a_class_or_the_held_out_images_is_refused(tmp_path: Path) -> None:
    in_folders(tmp_path, "train", "kept_back")
    with pytest.raises(
        InputError, match="images in kept_back beside its folder train; name the held-out images' folder"
    ):
        train(tmp_path)
    (tmp_path / "train").rename(tmp_path / "train_")
    assert {*train(tmp_path).captions} == {"train", "kept back"}


@pytest.mark.parametrize("val_name", ["val", "test", "Valid"])
def test_held_out_images_alone_are_not_trained_on(tmp_path: Path, val_name: str) -> None:
    fill(tmp_path, {**TRAIN, f"{val_name}/x.png": picture(9)})
    with pytest.raises(InputError, match=f"has a folder {val_name} but none for training"):
        train(tmp_path)


def test_the_splits_may_lie_in_the_only_folder_with_images(tmp_path: Path) -> None:
    in_folders(tmp_path / "unpacked" / "images", "train", "val")
    fill(tmp_path, {"unpacked/labels/train/a.txt": "0 1 2 3", "README.md": "about"})
    first, second = both(tmp_path)
    assert sorted(first.captions) == ["a", "b", "c"]
    assert sorted(second.captions) == ["x", "y"]


def test_splits_below_classes_are_refused(tmp_path: Path) -> None:
    for name in ("owl", "fox"):
        in_folders(tmp_path / name, "train", "val")
    with pytest.raises(InputError, match=r"train: is a folder for training below others"):
        train(tmp_path)


def test_several_folders_for_training_are_refused(tmp_path: Path) -> None:
    in_folders(tmp_path, "train2014", "val")
    fill(tmp_path / "train2017", TRAIN)
    with pytest.raises(InputError, match="several folders for training: train2014, train2017"):
        train(tmp_path)


def samples(*numbers: int) -> dict[str, bytes]:
    return {name: content for i in numbers for name, content in ((f"{i}.png", picture(i)), (f"{i}.txt", b"%d" % i))}


@pytest.mark.parametrize("glob", ["", "*.tar"])
def test_shards_named_by_their_split(tmp_path: Path, glob: str, caplog: pytest.LogCaptureFixture) -> None:
    shard(tmp_path / "birds-train-000.tar", samples(1, 2))
    shard(tmp_path / "birds-train-001.tar", samples(3))
    shard(tmp_path / "birds-Val-000.tar", samples(4, 5))
    shard(tmp_path / "birds-test-000.tar", samples(6))
    first, second = both(tmp_path / glob if glob else tmp_path)
    assert first.captions == ["1", "2", "3"]
    assert second.captions == ["4", "5"]
    assert "left out birds-test-000.tar" in caplog.text


def test_shards_in_folders_of_splits_named_by_a_glob(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "0.tar", samples(1, 2))
    shard(tmp_path / "dev" / "0.tar", samples(3))
    first, second = both(tmp_path / "*" / "*.tar")
    assert first.captions == ["1", "2"]
    assert second.captions == ["3"]


def test_it_is_told_what_is_held_out_without_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "folder", pictures(*(f"{i}.png" for i in range(30))))
    first, second = both(tmp_path / "folder")
    assert f"held out {len(second)} of 30 images, by the hash of their names" in caplog.text
    caplog.clear()
    assert not {*first.captions} & {*second.captions}
    shard(tmp_path / "shards" / "0.tar", samples(*range(30)))
    both(tmp_path / "shards")
    assert "held out one image in ten" in caplog.text
    caplog.clear()
    both(in_folders(tmp_path / "own", "train", "val"))
    assert "held out" not in caplog.text
