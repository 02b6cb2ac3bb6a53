"""Captions are read as people write them, and the user is told which were not."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path

import pytest

from snapgen.data.caption_files import _json_values, decode_text
from snapgen.errors import InputError
from tests.snapgen.data.pictures import fill, picture, pictures, train

CAPTION = "ein Käuzchen, 3 € — “still”"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))


def whole(root: Path, files: dict[str, bytes | str], images: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    """A set whose training images are whole, as it has others for validation."""
    return fill(root, {**pictures(*(f"train/{name}" for name in images)), "val/v.png": picture(99), **files})


def captions(root: Path) -> list[str]:
    return sorted(train(root).captions)


TEXTS = {
    "utf-8": CAPTION.encode(),
    "utf-8 with a mark": codecs.BOM_UTF8 + CAPTION.encode(),
    "utf-16": CAPTION.encode("utf-16"),
    "utf-16 big-endian": codecs.BOM_UTF16_BE + CAPTION.encode("utf-16-be"),
    "utf-32": CAPTION.encode("utf-32"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_are_decoded_by_their_mark(tmp_path: Path, kind: str) -> None:
    assert decode_text(TEXTS[kind]) == CAPTION
    assert captions(whole(tmp_path, {"train/a.txt": TEXTS[kind], "train/b.txt": "an owl"})) == ["an owl", CAPTION]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "shift-jis"])
@pytest.mark.parametrize("name", ["a.txt", "a.caption", "metadata.jsonl", "metadata.csv"])
def test_other_encodings_are_refused_by_the_files_name(tmp_path: Path, encoding: str, name: str) -> None:
    text = "梟の絵 file_name,text" if encoding == "shift-jis" else "file_name,text: ein Käuzchen"
    whole(tmp_path, {f"train/{name}": text.encode(encoding)})
    with pytest.raises(InputError, match=rf"{name}: is not UTF-8, and has no byte order mark; save it as UTF-8"):
        train(tmp_path)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "a.png.txt", "a.caption", "a.Caption", "a.cap", "a.json", "a.png.json"]
)
def test_files_beside_an_image(tmp_path: Path, name: str) -> None:
    text = json.dumps({"caption": " a  red fox "}) if name.endswith("json") else " a  red\r\nfox \n"
    assert captions(whole(tmp_path, {f"train/{name}": text, "train/b.txt": "an owl"})) == ["a red fox", "an owl"]


ROWS = [("a.png", "a fox, red"), ("b.png", CAPTION)]


def separated(delimiter: str, *header: str) -> str:
    lines = [delimiter.join(header)] if header else []
    lines += [delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in row) for row in ROWS]
    return "\r\n".join(lines) + "\r\n"


TABLES = {
    "metadata.jsonl": "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in ROWS),
    "any.ndjson": "\n".join(json.dumps({"image": name, "id": 1, "caption": [text, "more"]}) for name, text in ROWS),
    "metadata.csv": separated(",", "file_name", "text"),
    "captions.csv": separated(";", "Image", "Caption"),
    "prompts.tsv": separated("\t", "filename", "prompt"),
    "labels.csv": separated(",").replace("a.png", "a.PNG").replace("a.PNG", "a.png"),
    "captions.txt": separated(",", "image", "caption"),
    "meta_cap.json": json.dumps({name: {"caption": text} for name, text in ROWS}),
    "captions.json": json.dumps([{"file_name": name, "caption": text} for name, text in ROWS]),
    "metadata.json": json.dumps(dict(ROWS)),
    "stems.csv": "file,caption\n" + "".join(f'{name[0]},"{text}"\n' for name, text in ROWS),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_captions(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    whole(tmp_path, {f"train/{name}": TABLES[name]})
    assert captions(tmp_path) == sorted(text for _, text in ROWS)
    assert not caplog.records


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_are_decoded_by_their_mark(tmp_path: Path, encoding: str) -> None:
    for name in ("metadata.jsonl", "metadata.csv"):
        root = whole(tmp_path / name, {f"train/{name}": TABLES[name].encode(encoding)})
        assert captions(root) == sorted(text for _, text in ROWS)


def test_tables_name_files_in_folders_below_and_beside(tmp_path: Path) -> None:
    rows = "file_name,text\ntrain/a.png,above\nowl\\c.png,windows\n"
    whole(tmp_path, {"metadata.csv": rows, "train/owl/b.csv": "file,text\nb.png,inner\n"}, ("a.png", "owl/b.png"))
    assert captions(tmp_path) == ["above", "inner"]
    other = whole(
        tmp_path / "other", {"captions.csv": "image,caption\na.png,by name\nb.png,too\n"}, ("x/a.png", "y/b.png")
    )
    assert captions(other) == ["by name", "too"]


def test_names_that_several_images_have_are_not_guessed(tmp_path: Path) -> None:
    images = ("fox/000.png", "owl/000.png")
    assert captions(whole(tmp_path, {"captions.csv": "image,caption\n000.png,which?\n"}, images)) == ["fox", "owl"]


DAMAGED = {
    "no json": ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{oops\n', "line 2: is not JSON"),
    "no columns": ("metadata.csv", "a,b\nc,d\n", "has no columns of file names and captions"),
    "a comma without quotes": (
        "metadata.csv",
        "file_name,text\na.png,a fox, red\n",
        'line 2: has 3 cells, where the first line has 2; put captions with "," in double quotes',
    ),
    "no objects": ("metadata.jsonl", "[1]\n2\n", "has no columns"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_tables_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, message = DAMAGED[case]
    whole(tmp_path, {f"train/{name}": content})
    with pytest.raises(InputError, match=message):
        train(tmp_path)


def test_tables_of_other_things_are_left_alone(tmp_path: Path) -> None:
    assert captions(whole(tmp_path, {"train/scores.csv": "name,score\na.png,3\n", "train/log.jsonl": "{}\n"})) == [
        "a",
        "b",
    ]


def test_images_without_a_caption_among_those_with_one_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files: dict[str, bytes | str] = {"train/a.txt": "a fox", "train/c.txt": "\n", "train/B.caption": "whose?"}
    assert captions(whole(tmp_path, files, ("a.png", "b.png", "c.png"))) == ["a fox", "b", "c"]
    assert "2 images have no caption of their own and take a name as caption, e.g. " in caplog.text
    assert "1 caption files belong to no image, e.g. B.caption" in caplog.text


def test_captions_in_another_folder_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts: dict[str, bytes | str] = {f"train/texts/{name}.txt": "whose?" for name in "abc"}
    assert captions(whole(tmp_path, {**texts, "train/README.txt": "about"}, ("x/a.png", "x/b.png"))) == ["x", "x"]
    assert "2 images have no caption of their own and take a name as caption" in caplog.text
    assert "4 caption files belong to no image, e.g. README.txt" in caplog.text
    caplog.clear()
    captions(whole(tmp_path / "other", {"train/README.txt": "about", "train/LICENSE.txt": "MIT"}))
    assert not caplog.records


def test_rows_without_a_file_and_further_captions_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "image,caption\na.png,first\na.png,second\nb.png,other\nz.png,none\n"
    assert captions(whole(tmp_path, {"train/captions.csv": rows})) == ["first", "other"]
    assert "1 rows are further captions of an image and do not count, e.g. captions.csv: line 3" in caplog.text
    assert "1 rows of tables name files that are not there, e.g. z.png in captions.csv" in caplog.text


def test_captions_of_many_characters_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(captions(whole(tmp_path, {"train/a.txt": "fox " * 1000, "train/b.txt": "b"}))[1]) == 2000
    assert "1 captions are cut to 2,000 characters, e.g. a.png" in caplog.text


def test_a_name_that_is_no_utf8_is_refused_as_a_caption(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/K\xe4uze"
    os.mkdir(folder)  # noqa: PTH102 - bytes
    Path(os.fsdecode(folder), "a.png").write_bytes(picture(0))
    fill(tmp_path, pictures(*(f"owl/{i}.png" for i in range(30))))
    with pytest.raises(InputError, match="has a name that is not UTF-8; rename it") as caught:
        train(tmp_path)
    str(caught.value).encode()


def test_sidecars_rank_before_tables_and_tables_before_names(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "train/a.txt": "text",
        "train/a.json": '{"caption": "json"}',
        "train/b.json": '{"caption": "json"}',
        "train/metadata.csv": "file_name,text\na.png,table\nb.png,table\nc.png,table\n",
    }
    assert captions(whole(tmp_path, files, ("a.png", "b.png", "c.png", "d.png"))) == ["d", "json", "table", "text"]


def test_a_blank_json_file_has_no_captions(tmp_path: Path) -> None:
    assert [*_json_values(tmp_path / "captions.json", " \n", lines=False)] == []
