from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from archsearch.library import shipped
from archsearch.spaces.loading import load_space
from archsearch.studies.config.study import load_config as find_study
from archsearch.studies.lookup import find_architecture
from archsearch.training.recipe import learns_from_teacher, load_recipe, stage_teacher
from snapgen.architecture import presets
from snapgen.errors import InputError
from snapgen.training.stages import FlowMatchingStage
from tests.archsearch.studies.tiny_recipe import FEW, STAGES, recipe, written

SHAPE = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}


def refused(folder: Path, **changes: Any) -> str:
    with pytest.raises(InputError) as error:
        load_recipe(written(folder, **changes))
    return str(error.value)


@pytest.mark.parametrize("name", sorted(shipped("training")))
def test_shipped_recipes_can_be_read(name: str) -> None:
    found = load_recipe(name)
    assert found.name == f"training-{name}"
    space, _, base = found.architecture.partition(":")
    assert (
        find_architecture(found.architecture).id
        == (load_space(space).base if base else presets.preset(found.architecture)).id
    )


def test_the_supernetwork_is_what_the_elastic_study_begins_with() -> None:
    recipe, study = load_recipe("emoji_supernet"), find_study("emoji_elastic")
    (stage,) = recipe.stages
    assert study.protocol.init_from == str(recipe.folder / "stages" / f"01-{stage.name}")
    assert find_architecture(recipe.architecture).id == study.load_space().base.id
    assert isinstance(stage, FlowMatchingStage)
    assert study.supernet_audit is not None
    assert study.supernet_audit.supernet_images == stage.num_images
    assert (recipe.prediction_type, recipe.data, recipe.autoencoder) == (
        study.protocol.prediction_type,
        study.protocol.data,
        study.protocol.autoencoder,
    )
    (text,) = recipe.text_encoders
    assert (text.encoder, text.tokens) == (study.protocol.text_encoder, study.protocol.context_tokens)
    assert stage.resolution == study.protocol.resolution


def kept_by(metric: str, *, stage: int = 1, **changes: Any) -> dict[str, Any]:
    """The tiny recipe's stages, of which one keeps its best weights by a metric."""
    return {"stages": [*STAGES[:stage], {**STAGES[stage], "keep_best_by": metric, **changes}]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stagse": []}, "stagse: unknown key; remove it"),
        ({"stages": []}, "stages: "),
        ({"stages": None}, "stages: "),
        ({"stages": [STAGES[0], STAGES[0]]}, "two stages are named teacher; rename one"),
        ({"stages": [{"kind": "flow_matching", "name": "a", "steps": 3, **FEW}]}, "steps: unknown key"),
        ({"stages": [{"kind": "flow_matching", "name": "a/b", **FEW}]}, "name: "),
        ({"stages": [{"kind": "flaw", "name": "a", **FEW}]}, "flaw"),
        (
            {"stages": [{"kind": "flow_matching", "name": "a", **FEW, "gradient_accumulation_steps": 3}]},
            "gradient_accumulation_steps 3 does not divide batch_size 4",
        ),
        ({"stages": [{"kind": "flow_matching", "name": "a", **FEW, "timestep_shift": 0}]}, "shift cannot be 0"),
        ({"teacher": None}, "stage teacher trains a teacher without a shape"),
        ({"stages": [STAGES[2]]}, "stage distil needs a teacher"),
        ({"stages": STAGES[2:3], "teacher": None}, "stage distil needs a teacher"),
        ({"stages": [STAGES[3]], "teacher": None}, "stage steps needs a teacher"),
        ({"stages": [{**STAGES[3], "teacher": "x"}], "teacher": None}, "stage steps needs a teacher"),
        ({"teacher": {"path": "x", "shape": SHAPE}}, "a teacher has either a path or a shape"),
        ({"teacher": {}}, "a teacher has either a path or a shape"),
        ({"stages": [{**STAGES[0], "distillation": {}}]}, "a teacher cannot be distilled into"),
        ({"seed": -1}, "seed: "),
        ({"name": "../up"}, "cannot be a folder's name"),
        ({"evaluation": {"num_samples": 3}}, "a distance needs at least 8 samples"),
        (kept_by("validation_loss", stage=2), "is evaluated at its end only; give evaluate_every"),
        (kept_by("beauty"), "keep_best_by"),
        (kept_by("kernel_distance"), "needs samples; raise evaluation.num_samples"),
        (kept_by("kernel_distance", stage=0, evaluate_every=4), "is not measured of a teacher; use validation_loss"),
        (
            kept_by("retrieval_r10") | {"evaluation": {"num_samples": 8, "retrieval": False}},
            "stage base keeps the best by retrieval_r10, which is not measured; set evaluation.retrieval to true",
        ),
    ],
)
def test_bad_recipes_are_refused_by_place(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    message = refused(tmp_path, **changes)
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: ")
    assert says in message
    assert len(message.splitlines()) == 1


def test_what_learns_from_a_teacher(tmp_path: Path) -> None:
    found, _ = recipe(tmp_path)
    assert [learns_from_teacher(stage) for stage in found.stages] == [False, False, True, True, False]


def test_a_stage_may_have_a_teacher_of_its_own(tmp_path: Path) -> None:
    found, _ = recipe(
        tmp_path, stages=[{**STAGES[2], "teacher": "/models/turbo"}, {**STAGES[1], "teacher": "/models/x"}]
    )
    assert [stage_teacher(stage) for stage in found.stages] == ["/models/turbo", None]


def test_changes_are_checked(tmp_path: Path) -> None:
    found, _ = recipe(tmp_path)
    assert found.with_changes({"seed": 5}).seed == 5
    assert found.with_changes({"seed": 5}).source == found.source
    with pytest.raises(InputError, match="cannot be a folder's name"):
        found.with_changes({"name": "a b"})


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"emojy: is neither a shipped recipe nor a file; use emoji"):
        load_recipe("emojy")
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_no_such_architecture() -> None:
    with pytest.raises(InputError, match="nothing"):
        find_architecture("nothing")
    with pytest.raises(InputError):
        find_architecture("nosuchstudy:best")


@pytest.mark.parametrize("name", ["snapfusion", "snapfusion_teacher", "snapgen_t2i"])
def test_shipped_recipes_of_published_nets_encode_padding_and_null_caption(name: str) -> None:
    encoders = load_recipe(name).teacher_text_encoders
    assert {(encoder.padding, encoder.null) for encoder in encoders} == {("encoded", "encoded")}
