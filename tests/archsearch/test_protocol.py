from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from archsearch.protocol import REVISION, EvaluationProtocol, ResolvedProtocol
from snapgen.config import as_yaml


def resolved(digests: str = "d", **fields: Any) -> ResolvedProtocol:
    return ResolvedProtocol(
        protocol=EvaluationProtocol(**fields),
        data_digest=digests,
        autoencoder_digest="a",
        text_encoder_digest="t",
        feature_extractor_digest="e",
    )


CHANGES: dict[str, Any] = {
    "steps": 17,
    "batch_size": 6,
    "optimizer": "muon",
    "learning_rate": 0.123,
    "beta2": 0.5,
    "weight_decay": 0.3,
    "grad_clip": 2.5,
    "warmup_fraction": 0.31,
    "lr_schedule": "constant",
    "ema_sigma_rel": 0.07,
    "caption_dropout": 0.6,
    "prediction_type": "data",
    "timestep_shift": 2.0,
    "precision": "bfloat16",
    "resolution": 64,
    "context_tokens": 5,
    "context_padding": "encoded",
    "null_caption": "encoded",
    "num_inference_steps": 99,
    "guidance_scale": 7.0,
    "num_samples": 1000,
    "feature_resolution": 128,
    "validation_pairs": 33,
    "train_seeds": (4, 5, 6),
    "gradient_accumulation_steps": 2,
    "compile": True,
    "varied": "weights",
    "retrieval": True,
}
NAMED = {"data", "autoencoder", "text_encoder", "feature_extractor", "init_from", "distillation"}
NOT_COUNTED = {"gradient_checkpointing", "curve_points"}
"""Fields that change the memory or what is kept, and not the numbers."""


def test_every_field_is_covered() -> None:
    assert CHANGES.keys() | NAMED | NOT_COUNTED == EvaluationProtocol.model_fields.keys()


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_hash_and_is_named(field: str) -> None:
    plain, changed = resolved(optimizer="adamw", lr_schedule="linear", prediction_type="velocity"), CHANGES[field]
    other = resolved(**{"optimizer": "adamw", "lr_schedule": "linear", "prediction_type": "velocity", field: changed})
    assert plain.hash != other.hash
    difference = plain.first_difference(other)
    assert difference is not None
    assert difference.startswith(f"{field}: ")
    for protocol in (plain, other):
        assert as_yaml(protocol.protocol.model_dump(mode="json")[field]) in difference


def test_files_count_by_content() -> None:
    plain = resolved(data="emoji")
    assert plain.hash == resolved(data="/elsewhere/emoji").hash
    assert plain.first_difference(resolved(data="/elsewhere/emoji")) is None
    other = resolved("other", data="emoji")
    assert plain.hash != other.hash
    assert plain.first_difference(other) == "data: emoji with digest d against other"
    assert plain.first_difference(resolved("other", data="faces")) == "data: emoji against faces"


def test_sampling_settings_do_not_count_without_samples() -> None:
    plain = resolved(num_samples=0)
    assert plain.hash == resolved(num_samples=0, guidance_scale=9.0, num_inference_steps=3, feature_resolution=99).hash
    assert plain.hash != resolved(num_samples=0, validation_pairs=99).hash


def test_published_hashes_stay_valid() -> None:
    plain = resolved()
    assert plain.revision == REVISION == 2
    assert plain.model_copy(update={"revision": 1}).hash == "a1d270327b16d215"


def test_inherited_weights_count_by_content() -> None:
    plain, one = resolved(), resolved(init_from="a")
    assert plain.hash != one.hash
    same, other = (one.model_copy(update={"init_from_digest": digest}) for digest in ("", "w"))
    assert one.hash == same.model_copy(update={"protocol": EvaluationProtocol(init_from="elsewhere")}).hash
    assert one.hash != other.hash
    for a, b in ((plain, other), (other, plain)):
        difference = a.first_difference(b) or ""
        assert difference.startswith("init_from: ")
        assert "null" in difference
        assert "a" in difference.removeprefix("init_from: ").replace("against", "").replace("null", "")
    assert one.first_difference(other) == "init_from: a with digest '' against w"
    seeds = plain.first_difference(resolved(train_seeds=[3]))
    assert seeds == "train_seeds: [0, 1] against [3]", "as a YAML file has it"


def test_a_teacher_counts_by_content() -> None:
    def taught(digest: str = "w", **fields: Any) -> ResolvedProtocol:
        distillation = {"teacher": "a", "teacher_text_encoders": [{"encoder": "b"}], **fields}
        return resolved(distillation=distillation).model_copy(update={"teacher_digest": digest})

    assert resolved().hash != taught().hash
    moved = taught(teacher="elsewhere", teacher_text_encoders=[{"encoder": "moved"}])
    assert taught().hash == moved.hash
    assert taught().first_difference(moved) is None
    for other in (taught("v"), taught(guidance_scale=2), taught(teacher_text_encoders=[{"encoder": "b", "tokens": 3}])):
        assert taught().hash != other.hash
        assert (taught().first_difference(other) or "").startswith("distillation: ")


@pytest.mark.parametrize("fields", [{"gradient_checkpointing": True}, {"curve_points": 8}])
def test_what_does_not_change_the_numbers_does_not_count(fields: dict[str, Any]) -> None:
    assert resolved().hash == resolved(**fields).hash
    assert resolved().first_difference(resolved(**fields)) is None


def test_revision_counts() -> None:
    plain = resolved()
    older = plain.model_copy(update={"revision": 0})
    assert plain.hash != older.hash
    assert (plain.first_difference(older) or "").startswith("revision: ")


@given(st.sampled_from(sorted(CHANGES)), st.sampled_from(sorted(CHANGES)))
def test_hashes_differ_exactly_when_a_field_does(a: str, b: str) -> None:
    one, other = resolved(**{a: CHANGES[a]}), resolved(**{b: CHANGES[b]})
    assert (one.hash == other.hash) == (one.first_difference(other) is None) == (a == b)


def test_survives_json() -> None:
    one = resolved(train_seeds=(3, 1, 2))
    again = ResolvedProtocol.model_validate_json(one.model_dump_json())
    assert again == one
    assert again.hash == one.hash


@pytest.mark.parametrize(
    "fields",
    [
        {"train_seeds": ()},
        {"train_seeds": (1, 1)},
        {"num_samples": 3},
        {"steps": 0},
        {"sampel": 1},
        {"learning_rate": float("nan")},
        {"batch_size": 6, "gradient_accumulation_steps": 4},
        {"retrieval": True, "num_samples": 0},
        {"distillation": {}},
        {"distillation": {"teacher": "a", "output": False, "features": False}},
        {"distillation": {"teacher": "a"}, "prediction_type": "noise"},
    ],
    ids=str,
)
def test_rejects_invalid_settings(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EvaluationProtocol(**fields)
