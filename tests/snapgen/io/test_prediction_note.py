"""Tests of the note that records a U-Net's prediction type."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapgen.errors import InputError
from snapgen.io import prediction_note


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert prediction_note.read_prediction_type(tmp_path) is None
    prediction_note.write_prediction_type(tmp_path, "preconditioned")
    assert prediction_note.read_prediction_type(tmp_path) == "preconditioned"


@pytest.mark.parametrize("text", ["", "[", "{}", "3", '{"prediction": "epsilon"}', '{"prediction": "v", "more": 1}'])
def test_a_damaged_note_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / prediction_note.NOTE).write_text(text)
    with pytest.raises(InputError, match=prediction_note.NOTE) as error:
        prediction_note.read_prediction_type(tmp_path)
    assert "\n" not in str(error.value)
