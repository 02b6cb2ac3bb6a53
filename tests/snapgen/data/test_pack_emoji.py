from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snapgen.data.dataset import load_dataset
from snapgen.data.emoji import pack, styles
from snapgen.data.emoji.concepts import (
    VALIDATION_FRACTION,
    EmojiImage,
    concept,
    concepts,
    normalize,
    split,
    without_leaks,
)
from snapgen.data.emoji.npm import NpmPackage, fetch
from snapgen.data.emoji.pack import on_white
from snapgen.errors import InputError


def drawing(seed: int, kind: str) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64)).save(file, kind, lossless=True)
    return file.getvalue()


def tarball(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def icon(seed: int) -> str:
    """The body of an SVG icon of 32 units, of sixteen squares in random colors."""
    colors = np.random.default_rng(seed).integers(0, 1 << 24, 16).tolist()
    squares = ((8 * (i % 4), 8 * (i // 4), color) for i, color in enumerate(colors))
    return "".join(f'<path fill="#{color:06x}" d="M{x} {y}h8v8h-8z"/>' for x, y, color in squares)


def icon_package(folder: Path, vendor: str, icons: dict[str, object], chars: dict[str, str]) -> styles.IconSet:
    """The icon set of a vendor, with a package of these contents."""
    (icon_set,) = (icon_set for icon_set in styles.ICON_SETS if icon_set.vendor == vendor)
    contents = {
        "package/icons.json": json.dumps({"width": 32, "height": 32, **icons}).encode(),
        "package/chars.json": json.dumps(chars).encode(),
    }
    digest = tarball(folder / icon_set.file, contents)
    return replace(icon_set, sha512=digest)


CODES = [f"1F6{i:02X}" for i in range(60)]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages in the form of the real ones: 60 emoji and a waving hand with a skin tone, from both vendors, and the
    60 as icons of two sets, of which one has code points."""
    folder = tmp_path / "npm"
    folder.mkdir()
    fluent = {f"package/assets/{code.lower()}.webp": drawing(i, "WEBP") for i, code in enumerate(CODES)}
    noto = {f"package/img/google/64/{c.lower()}-fe0f.png": drawing(100 + i, "PNG") for i, c in enumerate(CODES)}
    for home, kind, files in (("assets", "WEBP", fluent), ("img/google/64", "PNG", noto)):
        files[f"package/{home}/1f44b-1f3fb.{kind.lower()}"] = drawing(7, kind)
        files[f"package/{home}/1f44b.{kind.lower()}"] = drawing(8, kind)
        files[f"package/{home}/ffff.{kind.lower()}"] = drawing(9, kind)
    files = {"hexcode": "1F44B", "label": "waving hand", "skins": [{"hexcode": "1F44B-1F3FB", "label": "x"}]}
    entries = [{"hexcode": f"{c}-FE0F", "label": f"thing {c}", "tags": ["t"], "group": 0} for c in CODES] + [files]
    groups = {"groups": [{"order": 0, "message": "things"}]}
    base = {
        "package/en/data.json": json.dumps(entries).encode(),
        "package/en/messages.json": json.dumps(groups).encode(),
        "package/LICENSE": b"MIT",
    }
    for name, contents in (("FLUENT", fluent), ("NOTO", noto), ("CAPTIONS", base)):
        package: NpmPackage = getattr(pack, name)
        named = replace(package, sha512=tarball(folder / package.file, contents))
        monkeypatch.setattr(pack, name, named)
    patterns = {vendor: pattern for vendor, (_, pattern) in pack.DRAWINGS.items()}
    drawings = {"fluent": (pack.FLUENT, patterns["fluent"]), "noto": (pack.NOTO, patterns["noto"])}
    monkeypatch.setattr(pack, "DRAWINGS", drawings)
    flat = {f"thing-{i}": {"body": icon(i)} for i in range(60)}
    chars = {code.lower(): f"thing-{i}" for i, code in enumerate(CODES)}
    named = {f"thing{code}": {"body": icon(100 + i)} for i, code in enumerate(CODES)}
    icon_sets = (
        icon_package(folder, "fluentflat", {"icons": flat}, chars),
        icon_package(folder, "fxemoji", {"icons": named}, {}),
    )
    monkeypatch.setattr(styles, "ICON_SETS", icon_sets)
    return folder


def test_packing_gives_the_same_bytes_and_what_was_packed(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        assert pack.main(["--packages", str(packages), "--out", str(out)]) == 0
    names = sorted(path.name for path in outs[0].iterdir())
    shards = [
        f"{size}-{part}{suffix}.tar.gz" for size in (32, 64) for part in ("train", "val") for suffix in ("-styles", "")
    ]
    assert names == [*shards, "LICENSE-emojibase"]
    assert all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in names)
    monkeypatch.setattr("snapgen.data.dataset.EMOJI", outs[0])
    images = [load_dataset("emoji", split=part, resolution=32) for part in ("train", "val")]
    captions = images[0].captions + images[1].captions
    assert len(captions) == 122
    assert set(captions) == {f"thing {code}" for code in CODES} | {"waving hand"}
    assert f"32-train.tar.gz: {len(images[0])} images" in capsys.readouterr().out
    for part, plain in zip(("train", "val"), images, strict=True):
        styled = load_dataset("emoji-styles", split=part, resolution=32)
        assert styled.captions[: len(plain)] == plain.captions, "the same images, and then the icons"
        expected = {f"{caption}, {style} style" for caption in plain.captions for style in ("flat", "Firefox")}
        assert set(styled.captions[len(plain) :]) == expected - {f"waving hand, {s} style" for s in ("flat", "Firefox")}


def test_small_pictures_are_kept_exactly(packages: Path, tmp_path: Path) -> None:
    pack.pack(packages, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "32-train.tar.gz") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.mode) == (0, 0, 0o644)
        vendor, code = next(name for name in tar.getnames() if name.endswith("webp")).removesuffix(".webp").split("-")
        file = tar.extractfile(f"{vendor}-{code}.webp")
        assert file is not None
        packed = np.asarray(Image.open(file).convert("RGB"))
    seed = CODES.index(code.upper()) + (100 if vendor == "noto" else 0)
    original = on_white(Image.open(io.BytesIO(drawing(seed, "PNG"))))
    assert np.array_equal(packed, np.asarray(original.resize((32, 32), Image.Resampling.LANCZOS)))


def test_a_package_of_other_content_is_refused(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packages / pack.NOTO.file
    path.write_bytes(gzip.compress(b"something else"))
    assert pack.main(["--packages", str(packages), "--out", str(packages / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "is not emoji-datasource-google 16.0.0; delete it" in message
    assert not (packages / "out").exists()


def test_without_npm_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"npm pack @lobehub/fluent-emoji-3d@1\.1\.0"):
        fetch(pack.FLUENT, tmp_path / "new")


@pytest.mark.parametrize(
    ("hexcode", "expected"),
    [
        ("1F44B", "1f44b"),
        ("0023-FE0F-20E3", "0023-20e3"),
        ("23-20e3", "0023-20e3"),
        ("1f3f4-e0067_e0062_e0065_e006e_e0067-e007f", "1f3f4-e0067-e0062-e0065-e006e-e0067"),
    ],
)
def test_normal_hexcodes(hexcode: str, expected: str) -> None:
    assert normalize(hexcode) == expected


def test_one_concept_whatever_tone_gender_and_direction() -> None:
    running = ["1f3c3", "1f3c3-1f3fb", "1f3c3-200d-2640", "1f3c3-1f3ff-200d-2642-200d-27a1", "1f3c3-200d-27a1"]
    assert {concept(code) for code in running} == {"1f3c3"}
    assert concept("1f468-200d-1f680") == concept("1f469-1f3fe-200d-1f680") == "1f9d1-200d-1f680"
    assert concept("1f3fb") == "1f3fb"  # the skin tone itself
    assert concept("1f1f3-1f1f4") != concept("1f1f8-1f1ef")


def test_emoji_that_share_a_picture_share_a_concept() -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    near = Image.fromarray(np.asarray(pictures[0]) ^ 1)
    codes = {"0a": pictures[0], "0b": pictures[1], "0c": near, "0d": pictures[2], "0b-200d-2640": pictures[2]}
    concept_of = concepts([EmojiImage("noto", code, image) for code, image in codes.items()])
    assert concept_of["0a"] == concept_of["0c"]
    assert concept_of["0b"] == concept_of["0d"] == concept_of["0b-200d-2640"]
    assert concept_of["0a"] != concept_of["0b"]


def test_about_an_eighth_of_the_concepts_is_held_back() -> None:
    held = sum(split(f"concept {i}") == "val" for i in range(5000)) / 5000
    assert abs(held - VALIDATION_FRACTION) < 0.02


def test_a_picture_of_the_other_split_is_left_out() -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(7)]
    split_of = {"t1": "train", "t2": "train", "v1": "val", "v2": "val", "v3": "val"}
    present = [EmojiImage("noto", "t1", pictures[0]), EmojiImage("noto", "v1", pictures[1])]
    new = [
        EmojiImage("flat", "t1", pictures[0]),  # as the same emoji is drawn in its own split
        EmojiImage("blob", "t1", pictures[1]),  # a picture that is held out
        EmojiImage("flat", "t2", pictures[2]),  # a picture that is held out among the new ones, which stays there
        EmojiImage("flat", "v2", pictures[2]),
        EmojiImage("flat", "v3", pictures[0]),  # a picture that is trained on
        EmojiImage("blob", "t2", pictures[3]),
        EmojiImage("blob", "v2", pictures[4]),
    ]
    left = {(drawing.vendor, drawing.code) for drawing in without_leaks(new, present, split_of)}
    assert left == {("flat", "t1"), ("flat", "v2"), ("blob", "t2"), ("blob", "v2")}


def test_icons_are_matched_by_code_points_and_by_both_of_unicodes_names() -> None:
    labels = {
        "1f408": "cat",
        "1f431": "cat face",
        "1f36f": "honey pot",
        "1f9e8": "firecracker",
        "1f1ef-1f1f5": "flag: Japan",
        "0023-20e3": "keycap: #",
    }
    names = ["cat", "catside", "honeypot", "hidden", "flag-for-japan", "bang"]
    icons = {
        "icons": {name: {"body": name} for name in names} | {"firecracker": {"body": "", "hidden": True}},
        "aliases": {"firecracker-turned": {"parent": "bang", "hFlip": True}, "firecracker-2": {"parent": "bang"}},
    }
    matched = styles.match(icons, {"1F9E8": "firecracker-2", "23-20E3": "gone", "1f595": "bang"}, labels)
    assert matched == {
        "1f408": "catside",  # the set has a "catside", so its "cat" is a face
        "1f431": "cat",
        "1f36f": "honeypot",
        "1f9e8": "firecracker-2",
        "1f1ef-1f1f5": "flag-for-japan",
    }
    old_name = styles.match({"icons": {"black-rightwards-arrow": {"body": ""}}}, {}, {"27a1": "right arrow"})
    assert old_name == {"27a1": "black-rightwards-arrow"}
    assert styles.match({"icons": {"right-arrow": {"body": ""}}}, {}, {"27a1": "right arrow"}) == {
        "27a1": "right-arrow"
    }


def test_without_the_renderer_its_package_is_named(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"resvg_py: is not installed; pip install 'archsearch\[pack\]'"):
        pack.pack(packages, packages / "out")


def test_a_picture_is_squared_on_white() -> None:
    image = Image.new("RGBA", (4, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    square = on_white(image)
    assert square.size == (8, 8)
    assert square.getpixel((2, 0)) == (0, 0, 255)
    assert square.getpixel((0, 0)) == square.getpixel((3, 3)) == (255, 255, 255)
