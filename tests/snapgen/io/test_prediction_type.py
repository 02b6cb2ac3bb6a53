"""Tests of the prediction type of a saved net: in its configuration, or in the notes of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snapgen.errors import InputError
from snapgen.io.prediction_type import NOTES, check_prediction_type, read_prediction_type


def saved(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_it_stands_in_the_configuration(tmp_path: Path) -> None:
    assert read_prediction_type(saved(tmp_path)) is None
    assert read_prediction_type(saved(tmp_path, prediction_type=None)) is None
    assert read_prediction_type(saved(tmp_path, prediction_type="preconditioned")) == "preconditioned"


@pytest.mark.parametrize("note", NOTES)
def test_a_note_of_earlier_versions_is_read(note: str, tmp_path: Path) -> None:
    (tmp_path / note).write_text('{"prediction": "v"}\n')
    assert read_prediction_type(saved(tmp_path)) == "v"
    assert read_prediction_type(saved(tmp_path, prediction_type=None)) == "v"
    assert read_prediction_type(saved(tmp_path, prediction_type="noise")) == "noise"


@pytest.mark.parametrize("text", ["", "[", "{}", "3", '{"prediction": "epsilon"}', '{"prediction": []}'])
def test_a_damaged_note_is_one_line(text: str, tmp_path: Path) -> None:
    (saved(tmp_path) / NOTES[0]).write_text(text)
    with pytest.raises(InputError, match=NOTES[0]) as error:
        read_prediction_type(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_not_expected_is_one_line(tmp_path: Path) -> None:
    saved(tmp_path, prediction_type="v")
    check_prediction_type(tmp_path, "v", required=True)
    with pytest.raises(InputError, match="predicts 'v', not 'noise'; name a net of the same prediction type"):
        check_prediction_type(tmp_path, "noise")
    saved(tmp_path)
    check_prediction_type(tmp_path, "v")
    with pytest.raises(InputError, match=r'config\.json: prediction_type: .* write "prediction_type": "v" there'):
        check_prediction_type(tmp_path, "v", required=True)
    saved(tmp_path, prediction_type="epsilon")
    with pytest.raises(InputError, match=r"config\.json: prediction_type: 'epsilon' is not a prediction type"):
        check_prediction_type(tmp_path, "v")
