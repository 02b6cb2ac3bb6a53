"""The text–image score: its mathematics on made-up features, and that it sees what real images show."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from archsearch.quality.retrieval import STRENGTHS, Retriever, RidgeMap, best_strength, ranks, sentences, tally
from snapgen.data.dataset import ImageDataset, load_dataset
from snapgen.errors import InputError
from snapgen.io import cache


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def few(images: ImageDataset, count: int) -> ImageDataset:
    """The first images of a set."""
    pixels = images.pixels[:count]
    return dataclasses.replace(images, captions=images.captions[:count], digest=f"first {count}", _in_memory=pixels)


def test_ridge_is_the_textbooks() -> None:
    features, targets = normal(20, 3), normal(20, 2, seed=1)
    rows, wanted = features - features.mean(0), targets - targets.mean(0)
    penalty = 0.5 * rows.square().sum() / 3
    # The penalty as three more observations of nothing.
    longer = torch.cat([rows, penalty.sqrt() * torch.eye(3, dtype=torch.float64)])
    solved = torch.linalg.lstsq(longer, torch.cat([wanted, torch.zeros(3, 2, dtype=torch.float64)])).solution
    loose, tight = RidgeMap.fitted(features, targets, [0.5, 1e9])
    torch.testing.assert_close(loose.weight, solved)
    torch.testing.assert_close(loose(features), rows @ solved)
    assert float(tight.weight.abs().max()) < 1e-6


def test_strength_follows_the_noise() -> None:
    truth = normal(60, 8)
    concept = torch.arange(120) % 60
    clean = truth[concept] @ normal(8, 40, seed=1)
    noisy = clean + 30 * normal(120, 40, seed=2)
    assert best_strength(clean, truth[concept], concept) == STRENGTHS[0]
    assert best_strength(noisy, truth[concept], concept) > STRENGTHS[0]


def test_ranks_count_what_is_nearer_and_ties() -> None:
    captions = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 3.0]])
    found = torch.tensor([[5.0, 0.1], [5.0, 0.1], [1.0, 1.1]])
    assert ranks(found, captions, torch.tensor([0, 1, 3])).tolist() == [1, 4, 2]


def test_rates_are_means_over_concepts() -> None:
    # Concept 0 has two images, concept 1 one; two seeds.
    found = torch.tensor([[1, 2, 20], [1, 1, 10]])
    score = tally(found, torch.tensor([0, 0, 1]), protocol_hash="p")
    assert score.r1.by_seed == (0.25, 0.5)
    assert score.r10.by_seed == (0.5, 1.0)
    assert score.mrr.value == pytest.approx((0.75 + 0.05 + 1 + 0.1) / 4)
    assert (score.concepts, score.images) == (2, 3)
    assert score.chance == pytest.approx((0.5, 1.0, 0.75))
    assert 0 <= score.r1.low <= score.r1.value <= score.r1.high <= 1


def test_interval_of_one_seed_is_about_that_of_a_bootstrap() -> None:
    found = torch.randint(1, 40, (1, 300), generator=torch.Generator().manual_seed(0))
    score = tally(found, torch.arange(300), protocol_hash="p")
    drawn = torch.randint(300, (4000, 300), generator=torch.Generator().manual_seed(1))
    for measure, values in ((score.r10, (found[0] <= 10).double()), (score.mrr, 1 / found[0].double())):
        low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        assert measure.high - measure.low == pytest.approx(high - low, rel=0.2)
        assert (measure.low, measure.high) == pytest.approx((low, high), abs=0.015)


def test_no_hit_is_not_taken_for_never() -> None:
    score = tally(torch.full((1, 200), 200), torch.arange(200), protocol_hash="p")
    assert score.r1.value == score.r1.low == 0
    assert 1 / 200 < score.r1.high < 4 / 200


def test_seeds_that_differ_widen_the_interval() -> None:
    same = torch.randint(1, 30, (1, 300), generator=torch.Generator().manual_seed(0)).expand(3, -1)
    apart = torch.stack([same[0], same[0] // 2 + 1, same[0] * 2])
    near, far = (tally(found, torch.arange(300), protocol_hash="p").mrr for found in (same, apart))
    assert far.high - far.low > 2 * (near.high - near.low)


def test_sentences_are_nearer_where_the_meaning_is() -> None:
    apple, pear, bus = sentences(["red apple", "green apple", "double-decker bus"])
    torch.testing.assert_close(float(apple.norm()), 1.0)
    assert float(apple @ pear) > float(apple @ bus) + 0.2


def test_real_images_are_found_by_their_captions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    train = few(load_dataset("emoji", split="train", resolution=32), 700)
    held_out = few(load_dataset("emoji", split="val", resolution=32), 150)
    monkeypatch.setattr("archsearch.quality.retrieval.STRENGTHS", (0.1,))  # one of the usual, for the time
    retriever = Retriever.fitted(train, resolution=64)
    shown = retriever.score(held_out.pixels, held_out.captions)
    assert shown.r10.low > 2 * shown.chance.r10
    assert shown.mrr.low > shown.chance.mrr
    mixed = held_out.pixels[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    both = retriever.score([held_out.pixels, mixed], held_out.captions)
    assert both.mrr.by_seed[0] == shown.mrr.value
    assert both.mrr.by_seed[1] < shown.mrr.value / 2
    assert both.protocol_hash == shown.protocol_hash
    assert retriever.score(held_out.pixels[:50], held_out.captions[:50]).protocol_hash != shown.protocol_hash

    def refuse(*_: object) -> None:
        raise AssertionError("what is kept is computed again")

    monkeypatch.setattr("archsearch.quality.retrieval._features", refuse)
    again = Retriever.fitted(train, resolution=64)
    assert again.score(held_out.pixels, held_out.captions) == shown
    assert len(list((cache.cache_dir() / "retrieval").iterdir())) == 1


def test_too_few_captions_are_refused() -> None:
    with pytest.raises(InputError, match="emoji: has 3 different captions; a retriever needs 5 or more"):
        Retriever.fitted(few(load_dataset("emoji", split="train", resolution=32), 3))


@pytest.mark.slow
def test_emoji_as_measured() -> None:
    """Score of the real images of 219 held-out concepts at 64 px: the upper bound for generated images."""
    train, held_out = (load_dataset("emoji", split=split, resolution=64) for split in ("train", "val"))
    score = Retriever.fitted(train).score(held_out.pixels, held_out.captions)
    assert (score.concepts, score.images) == (219, 433)
    assert score.r1.value == pytest.approx(0.22, abs=0.02)
    assert score.r10.value == pytest.approx(0.57, abs=0.02)
    assert score.mrr.value == pytest.approx(0.33, abs=0.02)
