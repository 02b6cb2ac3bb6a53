from __future__ import annotations

import gzip
import io
import json
import logging
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snapgen import progress
from snapgen.data import dataset
from snapgen.data.dataset import ImageDataset, load_dataset
from snapgen.data.decoding import decode
from snapgen.errors import InputError
from snapgen.io import digests as digests_


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def classes(root: Path, each: int = 20, names: tuple[str, ...] = ("red_fox", "owl")) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i:03}.png").write_bytes(picture(100 * number + i))
    return root


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(count: int, first: int = 0) -> dict[str, bytes]:
    files = {}
    for i in range(first, first + count):
        files[f"{i:05}.jpg"] = picture(i, "JPEG")
        files[f"{i:05}.txt"] = f"picture {i}\n".encode()
    return files


def both(source: Path | str, resolution: int = 8) -> tuple[ImageDataset, ImageDataset]:
    return (
        load_dataset(str(source), split="train", resolution=resolution),
        load_dataset(str(source), split="val", resolution=resolution),
    )


# The embedded set.


def facts(name: str) -> list[dict[str, object]]:
    with tarfile.open(dataset.EMOJI / name) as tar:
        return [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]


def test_emoji_counts_and_captions() -> None:
    train, val = both("emoji", 32)
    assert len(train) + len(val) == 3766
    assert 0.10 < len(val) / 3766 < 0.14
    for images in (train, val):
        assert images.skipped == 0
        assert images.pixels.shape == (len(images), 3, 32, 32)
        assert all(caption.strip() == caption and caption for caption in images.captions)
        assert Counter(images.captions).most_common(1)[0][1] <= 2  # one of each vendor
    assert {"red apple", "rocket"} <= {*train.captions, *val.captions}


def test_styles_are_added_to_the_emoji() -> None:
    for plain, styled in zip(both("emoji", 32), both("emoji-styles", 32), strict=True):
        assert styled.captions[: len(plain)] == plain.captions
        assert torch.equal(styled.pixels[: len(plain)], plain.pixels)
        assert len(styled) > 2.5 * len(plain)
        styles = Counter(caption.rpartition(", ")[2] for caption in styled.captions[len(plain) :])
        assert set(styles) == {f"{style} style" for style in ("flat", "blob", "Twitter", "Firefox", "EmojiOne")}
    assert "red apple, flat style" in both("emoji-styles", 32)[0].captions


@pytest.mark.parametrize("resolution", dataset.EMOJI_RESOLUTIONS)
def test_no_concept_caption_or_picture_is_in_both_splits(resolution: int) -> None:
    train, val = (
        facts(f"{resolution}-{split}.tar.gz") + facts(f"{resolution}-{split}-styles.tar.gz")
        for split in ("train", "val")
    )
    assert not {fact["concept"] for fact in train} & {fact["concept"] for fact in val}
    assert not {fact["caption"] for fact in train} & {fact["caption"] for fact in val}
    vendors = Counter(fact["vendor"] for fact in train + val)
    assert (vendors["fluent"], vendors["noto"]) == (1855, 1911)


def test_no_picture_is_in_both_splits() -> None:
    train, val = (images.pixels.flatten(1).float() for images in both("emoji-styles", 32))
    assert torch.cdist(val, train).min() / train.shape[1] ** 0.5 > 3


def test_emoji_of_other_resolutions() -> None:
    assert load_dataset("emoji", split="val", resolution=16).pixels.shape[-1] == 16
    large = load_dataset("emoji", split="val", resolution=64)
    small = load_dataset("emoji", split="val", resolution=32)
    assert large.captions == small.captions
    assert large.digest != small.digest
    with pytest.raises(InputError, match="64 px"):
        load_dataset("emoji", split="val", resolution=65)


def test_every_beginning_of_the_emoji_is_a_fair_sample() -> None:
    first = facts("32-val.tar.gz")[:100]
    assert 30 < sum(fact["vendor"] == "noto" for fact in first) < 70
    assert len({fact["group"] for fact in first}) >= 8


# Folders.


def test_a_folder_a_class(tmp_path: Path) -> None:
    train, val = both(classes(tmp_path / "set"))
    assert set(train.captions) | set(val.captions) == {"red fox", "owl"}
    assert len(train) + len(val) == 40
    assert 0 < len(val) < 12
    assert torch.equal(torch.cat(list(train.batches(7))), train.pixels)
    assert [len(batch) for batch in train.batches(16)][:-1] == [16] * (len(train) // 16)
    pixels = decode(picture(3), 8)
    assert pixels is not None
    assert any(torch.equal(pixels, image) for image in torch.cat([train.pixels, val.pixels]))
    assert train.captions[:10] != sorted(train.captions)[:10]


def test_own_splits_are_used_whole(tmp_path: Path) -> None:
    classes(tmp_path / "train", 5)
    classes(tmp_path / "val", 2)
    train, val = both(tmp_path)
    assert (len(train), len(val)) == (10, 4)
    (tmp_path / "val").rename(tmp_path / "validation")
    assert len(both(tmp_path)[1]) == 4


def test_train_alone_is_divided(tmp_path: Path) -> None:
    classes(tmp_path / "train", 30)
    train, val = both(tmp_path)
    assert len(train) + len(val) == 60
    assert len(val) > 0


def test_a_class_may_be_called_train_with_an_underscore(tmp_path: Path) -> None:
    train, _ = both(classes(tmp_path / "set", names=("bus", "train_", "tram")))
    assert set(train.captions) == {"bus", "train", "tram"}
    with pytest.raises(InputError, match=r"images in bus, tram beside its folder train; .* add an underscore: train_"):
        both(classes(tmp_path / "other", names=("bus", "train", "tram")))


def test_unsorted_validation_images_are_refused(tmp_path: Path) -> None:
    classes(tmp_path / "train", 2)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.png").write_bytes(picture(0))
    with pytest.raises(InputError, match="class folders"):
        load_dataset(str(tmp_path), split="val", resolution=8)


def test_a_plain_folder(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"blue_bird_{i}.PNG").write_bytes(picture(i))
    (tmp_path / "blue_bird_3.txt").write_text("  a bird\n on a branch ")
    (tmp_path / "blue_bird_4.txt").write_text("\n")
    (tmp_path / ".hidden.png").write_bytes(picture(0))
    train, val = both(tmp_path)
    captions = {*train.captions, *val.captions}
    assert len(captions) == 30
    assert {"a bird on a branch", "blue bird 4", "blue bird 5"} <= captions


def test_wordnet_ids_are_looked_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classes(tmp_path / "ILSVRC" / "train", 20, names=("n01440764", "n01443537"))
    root = tmp_path / "ILSVRC"
    assert set(both(root)[0].captions) == {"n01440764", "n01443537"}
    assert "LOC_synset_mapping.txt" in caplog.text
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    assert set(both(root)[0].captions) == {"tench", "goldfish"}


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    classes(tmp_path / "elsewhere", 40, names=("owl",))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "owl").symlink_to(tmp_path / "elsewhere" / "owl")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")
    train, val = both(tmp_path / "set")
    assert len(train) + len(val) == 40


def test_the_digest_follows_content_and_captions(tmp_path: Path) -> None:
    root = classes(tmp_path / "set")

    def digests() -> tuple[str, str]:
        train, val = both(root)
        return train.digest, val.digest

    first = digests()
    assert first[0] != first[1]
    for file in root.rglob("*.png"):
        os.utime(file, (1, 1))
    assert digests() == first
    (root / "owl").rename(root / "eagle_owl")
    renamed = digests()
    assert renamed[0] != first[0]
    for i in range(20):
        (root / "red_fox" / f"{i:03}.png").write_bytes(picture(1000 + i))
    assert digests()[0] not in (first[0], renamed[0])


def test_damaged_images_are_counted_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = classes(tmp_path / "train")
    (tmp_path / "val" / "owl").mkdir(parents=True)
    (tmp_path / "val" / "owl" / "a.png").write_bytes(picture(0))
    (root / "owl" / "000.png").write_bytes(b"")
    (root / "owl" / "001.png").write_bytes(picture(1)[:-60])
    (root / "owl" / "002.png").write_text("text")
    (root / "owl" / "003.png").unlink()
    (root / "owl" / "003.png").symlink_to(root / "nowhere.png")
    for _ in range(2):  # computed, then from the cache
        caplog.clear()
        images = load_dataset(str(tmp_path), split="train", resolution=8)
        assert (len(images), images.skipped) == (36, 4)
        assert len(images.captions) == len(images.pixels)
        assert len(caplog.records) == 1
        assert "skipped 4 of 40" in caplog.text


def test_large_sets_stream_and_stay_in_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "7.png").write_bytes(b"damaged")
    monkeypatch.setattr(dataset, "MAX_IN_MEMORY_BYTES", 1000)
    train, _ = both(tmp_path)
    assert train._in_memory is None
    for _ in range(2):
        batches = list(train.batches(8))
        assert sum(map(len, batches)) == len(train) == len(train.captions)
        for caption, pixels in zip(train.captions, torch.cat(batches), strict=True):
            assert torch.equal(pixels, decode(picture(int(caption)), 8))  # type: ignore[arg-type]
    later = torch.cat(list(train.batches(8, start=5)))
    assert torch.equal(later, train.pixels[5:])
    (tmp_path / f"{train.captions[20]}.png").write_bytes(b"gone bad")
    assert torch.equal(torch.cat(list(train.batches(8, start=21))), later[16:])
    with pytest.raises(InputError, match="changed while"):
        list(train.batches(8))


def test_large_sets_are_hashed_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = classes(tmp_path / "set")
    monkeypatch.setattr(digests_, "HASHED_BYTES", 100)
    first = both(root)[0].digest
    assert both(root)[0].digest == first
    for file in root.rglob("*.png"):
        os.utime(file, (1, 1))
    assert both(root)[0].digest != first


# Shards.


def test_shards_by_folder_glob_braces_and_name(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"part-{number}.tar", samples(30, 30 * number))
    train, val = both(tmp_path)
    assert len(train) + len(val) == 90
    assert 2 <= len(val) <= 20
    assert train.captions == [f"picture {i}" for i in range(90) if f"picture {i}" not in val.captions]
    for name in ("part-*.tar", "part-{0..2}.tar", "part-{0,1,2}.tar"):
        assert both(tmp_path / name)[0].digest == train.digest
    assert len(both(tmp_path / "part-1.tar")[0]) < 31
    expected = decode(picture(int(train.captions[5].split()[1]), "JPEG"), 8)
    assert expected is not None
    assert torch.equal(train.pixels[5], expected)


def test_shards_in_own_splits_and_compressed(tmp_path: Path) -> None:
    for split, count in (("train", 9), ("val", 4)):
        (tmp_path / split).mkdir()
        plain = shard(tmp_path / "plain.tar", samples(count))
        (tmp_path / split / "a.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    assert [len(images) for images in both(tmp_path)] == [9, 4]


def test_captions_from_json_and_samples_without(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    files = {
        "a.webp": picture(0, "WEBP"),
        "a.json": json.dumps({"caption": "an owl", "tags": []}).encode(),
        "b.png": picture(1),
        "b.json": b"{broken",
        "c.png": picture(2),
        "c.json": b'["no caption"]',
        "d.png": picture(3),
        "e.json": b'{"caption": "no image"}',
        "f.jpg": b"",
        "f.txt": b"damaged",
        "g.png": picture(4),
        "g.txt": b"caf\xe9",
        "h.mp4": b"0" * 1000,
    }
    (tmp_path / "val").mkdir()
    shard(tmp_path / "train" / "a.tar", files)
    images = load_dataset(str(tmp_path), split="train", resolution=8)
    assert images.captions == ["an owl"]
    assert images.skipped == 5


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_a_cut_shard_gives_what_stands_before_the_cut(
    tmp_path: Path, keep: float, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train").mkdir()
    path = shard(tmp_path / "train" / "a.tar", samples(40))
    shard(tmp_path / "train" / "b.tar", samples(5, 40))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    (tmp_path / "val").mkdir()
    images = load_dataset(str(tmp_path), split="train", resolution=8)
    assert 5 < len(images) < 45
    assert images.captions[-5:] == [f"picture {i}" for i in range(40, 45)]
    assert "a.tar is truncated" in caplog.text


def test_a_shard_named_like_a_command_is_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "odd #1?; name%20"
    folder.mkdir()
    shard(folder / "pipe:touch hacked.tar", samples(30))
    assert len(both(folder)[0]) > 20
    assert not Path("hacked.tar").exists()


# Sources that are none.


def text_named_tar(root: Path) -> str:
    (root / "a.tar").write_text("this is text\n" * 100)
    return "a.tar"


def empty_tar(root: Path) -> str:
    shard(root / "a.tar", {})
    return "a.tar"


def zero_byte_tar(root: Path) -> str:
    (root / "a.tar").touch()
    return "a.tar"


def headless_tar(root: Path) -> str:
    path = shard(root / "a.tar", samples(1))
    path.write_bytes(path.read_bytes()[:700])
    return "a.tar"


def tar_of_other_things(root: Path) -> str:
    shard(root / "a.tar", {"a.mp4": b"0" * 600, "README": b"hello"})
    return "a.tar"


def folder_of_broken_tars(root: Path) -> str:
    text_named_tar(root)
    return ""


def unreadable_pictures(root: Path) -> str:
    for i in range(40):
        (root / f"{i}.png").write_bytes(b"no picture")
    return ""


def one_picture(root: Path) -> str:
    (root / "a.png").write_bytes(picture(0))
    return ""


def a_text(root: Path) -> str:
    (root / "notes.txt").write_text("hello")
    return "notes.txt"


def only_texts(root: Path) -> str:
    a_text(root)
    return ""


BAD = {
    "text named .tar": (text_named_tar, "not a tar archive"),
    "empty tar": (empty_tar, "no sample|not a tar"),
    "zero-byte tar": (zero_byte_tar, "not a tar archive"),
    "tar cut in its first file": (headless_tar, "not a tar archive|none of its"),
    "tar without images": (tar_of_other_things, "no sample"),
    "folder of text named .tar": (folder_of_broken_tars, "not a tar archive"),
    "folder of damaged images": (unreadable_pictures, "none of its"),
    "one image for two splits": (one_picture, "split"),
    "a text file": (a_text, "neither a folder"),
    "folder without images": (only_texts, "holds no images"),
    "empty folder": (lambda _: "", "holds no images"),
    "missing": (lambda _: "missing", "does not exist"),
    "glob of nothing": (lambda _: "*.tar", "matches no file"),
    "missing in a brace list": (lambda _: "{000..999}.tar", "000.tar: does not exist"),
    "endless brace list": (lambda _: "{000..999999999}.tar", "lists more than"),
    "half a brace": (lambda _: "{000..2.tar", "brace"),
    "null byte": (lambda _: "a\0b", "not a path"),
    "long name": (lambda _: "a" * 5000, "too long"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_source_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    source = f"{tmp_path}/{make(tmp_path)}"
    with pytest.raises(InputError, match=message) as caught:
        both(source)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize("source", ["", "pipe:cat x.tar", "https://example.org/a.tar", "s3://b/{0..9}.tar", "Emoji"])
def test_names_that_are_no_paths_are_refused(source: str) -> None:
    with pytest.raises(InputError):
        load_dataset(source, split="train", resolution=8)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    classes(tmp_path / "set")
    (tmp_path / "set" / "owl").chmod(0)
    with pytest.raises(InputError, match="permission denied"):
        both(tmp_path / "set")
    (tmp_path / "set" / "owl").chmod(0o755)


def test_long_checks_tell_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level(logging.INFO):
        both(classes(tmp_path / "set", 5, names=("a", "b", "c", "d", "e", "f")))
    assert "checked 9 of" in caplog.text
    assert "s left" in caplog.text


# Kinds of files.


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".jfif", "JPEG"), (".jpe", "JPEG"), (".TIF", "TIFF"), (".tiff", "TIFF"), (".avif", "AVIF")]
)
def test_images_of_every_known_suffix_are_read(tmp_path: Path, suffix: str, kind: str) -> None:
    for i in range(30):
        (tmp_path / f"{i}{suffix}").write_bytes(picture(i, kind))
    assert sum(map(len, both(tmp_path))) == 30
    shard(
        tmp_path / "shards.tar",
        {f"{i}{end}": b for i in range(30) for end, b in ((suffix, picture(i, kind)), (".txt", b"x"))},
    )
    assert sum(map(len, both(tmp_path / "shards.tar"))) == 30


def test_images_of_kinds_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = classes(tmp_path / "set")
    for name in ("a.heic", "b.HEIC", "c.cr2"):
        (root / name).write_bytes(b"\0" * 20)
    assert sum(map(len, both(root))) == 40
    assert "2 are .heic, which is not read, e.g." in caplog.text
    assert "1 are .cr2, which is not read, e.g. c.cr2" in caplog.text
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.heic").write_bytes(b"\0" * 20)
    with pytest.raises(InputError, match=r"holds no images of a kind that is read \(1 are \.heic"):
        both(tmp_path / "phone")


def test_what_programs_leave_is_no_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = classes(tmp_path / "set")
    for name in (
        "._owl.png",
        "__MACOSX/owl.png",
        "owl/@eaDir/000.png/SYNOPHOTO_THUMB_M.jpg",
        "owl/.thumbnails/1.png",
        "owl/Thumbs/000.png",
        "$RECYCLE.BIN/x.png",
        "lost+found/x.png",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(5))
    train, val = both(root)
    assert len(train) + len(val) == 40
    assert {*train.captions, *val.captions} == {"red fox", "owl"}
    assert "skipped" not in caplog.text
