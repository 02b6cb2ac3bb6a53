"""The evaluator on a small folder of shapes, through the real loader, text encoder and extractor."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from archsearch.protocol import EvaluationProtocol
from archsearch.quality import candidate_evaluator as quality, distances
from archsearch.quality.candidate_evaluator import WORST, CandidateEvaluator
from archsearch.quality.evaluator import fixed_prompts
from archsearch.quality.short_run import Checkpoints
from archsearch.score import Quality
from snapgen.architecture.schema import Architecture, BlocksConfig, LevelConfig, TimeEmbeddingConfig
from snapgen.data.pixels import grid
from snapgen.errors import InputError
from snapgen.models.unet import UNet
from snapgen.objectives import teacher

STAGE = LevelConfig(channels=8, num_res_blocks=1, head_dim=4)


def tiny(*, channels: int = 3, context: int = 384, attention: bool = True, stages: int = 2) -> Architecture:
    stage = STAGE.model_copy(update={"num_transformers": int(attention)})
    return Architecture(
        latent_channels=channels,
        context_dim=context,
        norm_groups=4,
        time=TimeEmbeddingConfig(embed_dim=8, hidden_dim=16),
        down=(stage,) * stages,
        mid=BlocksConfig(num_res_blocks=1, head_dim=4),
        up=(stage,) * stages,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Circles and squares in three colours, 16 px, split by the folder."""
    root = tmp_path_factory.mktemp("shapes")
    for split, count in (("train", 8), ("val", 2)):
        for colour in ("red", "green", "blue"):
            for shape in ("circle", "square"):
                home = root / split / f"{colour}_{shape}"
                home.mkdir(parents=True)
                for number in range(count):
                    image = Image.new("RGB", (16, 16), "white")
                    draw = ImageDraw.Draw(image)
                    box = (number % 4, number // 4, 10 + number % 4, 10 + number // 4)
                    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
                    image.save(home / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def protocol(folder: Path) -> EvaluationProtocol:
    return EvaluationProtocol(
        data=str(folder),
        resolution=8,
        autoencoder="none",
        steps=6,
        batch_size=8,
        num_inference_steps=2,
        num_samples=8,
        feature_resolution=32,
        validation_pairs=24,
        train_seeds=(0, 1),
    )


@pytest.fixture(scope="module")
def evaluator(protocol: EvaluationProtocol, tmp_path_factory: pytest.TempPathFactory) -> CandidateEvaluator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARCHSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return CandidateEvaluator(protocol, torch.device("cpu"))


@pytest.fixture(scope="module")
def plain(protocol: EvaluationProtocol) -> CandidateEvaluator:
    """One seed, no samples."""
    return CandidateEvaluator(protocol.model_copy(update={"num_samples": 0, "train_seeds": (0,)}), torch.device("cpu"))


@pytest.fixture(scope="module")
def scored(
    evaluator: CandidateEvaluator, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Quality, Path, list[tuple[str, float]]]:
    told: list[tuple[str, float]] = []
    home = tmp_path_factory.mktemp("artifacts")
    found = evaluator.score(
        tiny(), study_seed=7, progress=lambda fraction, message: told.append((message, fraction)), artifacts=home
    )
    return found, home, told


def test_it_scores_with_a_teacher(protocol: EvaluationProtocol, tmp_path: Path) -> None:
    shape = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    sizes = {"latent_channels": 3, "context_dim": 384, "pooled_width": 384, "sample_size": 8}
    teacher.new_teacher(shape, **sizes, seed=0).save_pretrained(tmp_path / "teacher")
    taught = {"teacher": str(tmp_path / "teacher"), "scaling": "fixed"}
    settings = protocol.model_dump() | {"distillation": taught, "gradient_accumulation_steps": 2, "train_seeds": (0,)}
    evaluator = CandidateEvaluator(EvaluationProtocol(**settings), torch.device("cpu"))
    alone = CandidateEvaluator(EvaluationProtocol(**settings | {"distillation": None}), torch.device("cpu"))
    assert evaluator.resolved.teacher_digest
    assert evaluator.resolved.hash != alone.resolved.hash
    scores = [each.score(tiny(), study_seed=0) for each in (evaluator, alone)]
    assert not scores[0].diverged
    assert scores[0].validation_loss != scores[1].validation_loss
    teacher.new_teacher(shape, **sizes | {"context_dim": 20}, seed=0).save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="takes a context of width 20, but its text encoders give 384"):
        CandidateEvaluator(EvaluationProtocol(**settings), torch.device("cpu"))


def test_says_what_an_architecture_must_fit(evaluator: CandidateEvaluator) -> None:
    assert evaluator.evaluator.latent_shape == (3, 8, 8)
    assert evaluator.context_dim == 384
    evaluator.check(tiny())
    evaluator.check(tiny(context=99, attention=False).model_copy(update={"mid": BlocksConfig(num_res_blocks=1)}))


@pytest.mark.parametrize(
    ("arch", "place"),
    [(tiny(channels=4), "latent_channels"), (tiny(context=768), "context_dim"), (tiny(stages=5), "down")],
)
def test_refuses_what_does_not_fit(plain: CandidateEvaluator, arch: Architecture, place: str) -> None:
    with pytest.raises(InputError, match=place) as caught:
        plain.score(arch, study_seed=0)
    assert caught.value.place == place


def test_scores_every_seed(
    scored: tuple[Quality, Path, list[tuple[str, float]]], evaluator: CandidateEvaluator
) -> None:
    found = scored[0]
    assert not found.diverged
    assert found.protocol_hash == evaluator.resolved.hash
    assert found.extractor == "efficientnet-lite0"
    assert found.training_seconds > 0
    for estimate in (found.validation_loss, found.frechet_distance, found.kernel_distance):
        assert estimate is not None
        assert len(estimate.by_seed) == 2
        assert estimate.by_seed[0] != estimate.by_seed[1]
        assert estimate.value == pytest.approx(sum(estimate.by_seed) / 2)
        assert estimate.low < estimate.value < estimate.high


def test_progress_never_goes_back(scored: tuple[Quality, Path, list[tuple[str, float]]]) -> None:
    told = scored[2]
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert {stage for stage, _ in told} >= {"training seed 0", "sampling seed 0", "training seed 1", "sampling seed 1"}


def test_artifacts_are_the_first_seeds(
    scored: tuple[Quality, Path, list[tuple[str, float]]], evaluator: CandidateEvaluator
) -> None:
    found, home, _ = scored
    assert sorted(path.name for path in home.iterdir()) == ["curve.csv", "samples.png", "unet"]
    with (home / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 7))
    assert float(rows[-1]["validation_loss"]) == found.validation_loss.by_seed[0]
    assert any(row["validation_loss"] for row in rows[:-1])
    unet = UNet.from_pretrained(home / "unet")
    assert unet.prediction_type == evaluator.protocol.prediction_type
    sheet = grid(evaluator.samples(unet, 8), *quality.GRID)
    with Image.open(home / "samples.png") as image:
        assert image.size == (sheet.shape[2], sheet.shape[1])
        pixels = torch.tensor(image.getdata(), dtype=torch.uint8).view(image.height, image.width, 3)
    assert (pixels.permute(2, 0, 1).int() - sheet.int()).abs().max() <= 1


def test_each_seed_has_a_curve_that_ends_with_its_score(scored: tuple[Quality, Path, list[tuple[str, float]]]) -> None:
    found = scored[0]
    assert len(found.curves) == 2
    for curve, last in zip(found.curves, found.validation_loss.by_seed, strict=True):
        assert list(curve.steps) == [2, 3, 5, 6]
        assert curve.validation_loss[-1] == pytest.approx(last, rel=1e-6)
        for loss, parts in zip(curve.validation_loss, curve.by_timestep, strict=True):
            assert len(parts) == quality.TIMESTEP_BINS
            assert sum(parts) / len(parts) == pytest.approx(loss, rel=1e-5)  # 24 pairs: as many in each part


def test_what_seeds_change_can_be_chosen(plain: CandidateEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(varied: str) -> list[float]:
        changed = plain.protocol.model_copy(update={"train_seeds": (0, 1), "varied": varied})
        monkeypatch.setattr(plain, "protocol", changed)
        return list(plain.score(tiny(), study_seed=0).validation_loss.by_seed)

    first = {varied: losses(varied) for varied in ("all", "weights", "order", "noise")}
    assert len({by_seed[0] for by_seed in first.values()}) == 1, "the first seed is the same"
    assert len({by_seed[1] for by_seed in first.values()} | {first["all"][0]}) == 5


def test_samples_can_be_scored_by_the_captions_that_they_retrieve(protocol: EvaluationProtocol) -> None:
    judged = CandidateEvaluator(protocol.model_copy(update={"retrieval": True}), torch.device("cpu"))
    found = judged.score(tiny(), study_seed=0)
    assert found.retrieval_mrr is not None
    assert len(found.retrieval_mrr.by_seed) == 2
    assert 0 < found.retrieval_mrr.value <= 1
    first, second = (judged.score(tiny(), study_seed=0, seeds=[seed]) for seed in (0, 1))
    assert first.with_seeds(second).retrieval_mrr == found.retrieval_mrr
    assert first.with_seeds(second).curves == found.curves


def test_a_score_repeats_to_the_bit(
    scored: tuple[Quality, Path, list[tuple[str, float]]], evaluator: CandidateEvaluator
) -> None:
    again = evaluator.score(tiny().canonical(), study_seed=7)
    assert again.model_copy(update={"training_seconds": 0.0}) == scored[0].model_copy(update={"training_seconds": 0.0})


def test_a_run_that_pauses_goes_on_to_the_bit(
    scored: tuple[Quality, Path, list[tuple[str, float]]], evaluator: CandidateEvaluator, tmp_path: Path
) -> None:
    """At a step between two reports, then at one of them; the second seed does not pause."""
    checkpoints, halves = Checkpoints(tmp_path / "checkpoints", seconds=1000), []
    for until in (2, 2, 5):
        halves.append(
            evaluator.score(
                tiny(), study_seed=7, seeds=[0], checkpoints=checkpoints, artifacts=tmp_path, until=until, samples=False
            )
        )
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
    first, again, second = halves
    assert first.validation_loss == again.validation_loss != second.validation_loss
    assert first.frechet_distance is None
    whole = evaluator.score(tiny(), study_seed=7, seeds=[0], checkpoints=checkpoints, artifacts=tmp_path)
    rest = evaluator.score(tiny(), study_seed=7, seeds=[1])
    assert whole.validation_loss.by_seed + rest.validation_loss.by_seed == scored[0].validation_loss.by_seed
    assert whole.kernel_distance is not None
    assert scored[0].kernel_distance is not None
    assert whole.kernel_distance.by_seed[0] == scored[0].kernel_distance.by_seed[0]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (scored[1] / weights).read_bytes()


def test_context_width_of_a_net_without_cross_attention_means_nothing(plain: CandidateEvaluator) -> None:
    narrow = tiny(attention=False).model_copy(update={"mid": BlocksConfig(num_res_blocks=1)})
    wide = narrow.model_copy(update={"context_dim": 99})
    assert narrow.id == wide.id
    first, second = (plain.score(arch, study_seed=0).validation_loss for arch in (narrow, wide.canonical()))
    assert first == second


def test_training_lowers_the_loss(plain: CandidateEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for steps in (1, 60):
        monkeypatch.setattr(plain, "protocol", plain.protocol.model_copy(update={"steps": steps}))
        losses.append(plain.score(tiny(), study_seed=0).validation_loss.value)
    assert losses[1] < 0.9 * losses[0]


def test_divergence_is_reported_and_finite(
    evaluator: CandidateEvaluator, protocol: EvaluationProtocol, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wild = protocol.model_copy(update={"learning_rate": 1e15, "grad_clip": 1e30, "warmup_fraction": 0.0, "steps": 20})
    monkeypatch.setattr(evaluator, "protocol", wild)
    found = evaluator.score(tiny(), study_seed=0, artifacts=tmp_path)
    assert found.diverged
    assert found.validation_loss.value == WORST
    assert Quality.model_validate_json(found.model_dump_json()) == found


def test_another_study_seed_is_another_run(plain: CandidateEvaluator) -> None:
    first, other = (plain.score(tiny(), study_seed=seed).validation_loss.value for seed in (0, 1))
    assert first != other


def test_no_samples_no_distances(plain: CandidateEvaluator) -> None:
    found = plain.score(tiny(), study_seed=0)
    assert (found.frechet_distance, found.kernel_distance) == (None, None)
    assert found.validation_loss.value > 0


def test_what_was_prepared_is_not_computed_again(
    protocol: EvaluationProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    first = CandidateEvaluator(protocol, torch.device("cpu"))

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(type(first.data.autoencoder), "encode", refuse)
    monkeypatch.setattr(distances, "reference", refuse)
    again = CandidateEvaluator(protocol, torch.device("cpu"))
    assert torch.equal(first.evaluator._validation_pairs[0], again.evaluator._validation_pairs[0])
    assert torch.equal(first.evaluator._reference.covariance, again.evaluator._reference.covariance)
    assert first.resolved.hash == again.resolved.hash


def test_prompts_are_held_out_captions_in_a_fixed_order(evaluator: CandidateEvaluator) -> None:
    captions = [f"caption {i}" for i in range(5)]
    prompts = fixed_prompts(captions * 3, 12)
    assert prompts == fixed_prompts(sorted(captions), 12)
    assert sorted(prompts[:5]) == captions
    assert prompts[:5] != captions
    assert prompts[:5] == prompts[5:10]
    assert set(evaluator.evaluator.prompts()) <= {
        "red circle",
        "green circle",
        "blue circle",
        "red square",
        "green square",
        "blue square",
    }


def test_a_resolution_that_the_autoencoder_cannot_halve_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="resolution"):
        CandidateEvaluator(
            EvaluationProtocol(data=str(folder), resolution=9, autoencoder="emoji", num_samples=0), torch.device("cpu")
        )


def test_grid_lays_images_in_rows() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    sheet = grid(images, 2, 3)
    assert sheet.shape == (3, 6, 10)
    assert sheet[0, 4, 0] == 3
    assert sheet[0, 0, 4] == 1
    assert sheet[0, 2, 0] == 255
