from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from archsearch.quality import feature_extractors, inception
from archsearch.score import metric_label
from snapgen.errors import InputError


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file laid out as the FID weights are, with random numbers."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-random.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(inception.Inception().state_dict(), path)
    yield path
    path.unlink()


def images(count: int = 2, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_efficientnet_features() -> None:
    extractor = feature_extractors.load_extractor("efficientnet-lite0")
    found = extractor(images(5), resolution=64, batch=2)
    assert found.shape == (5, extractor.width) == (5, 1280)
    assert metric_label("frechet_distance", extractor.name) == "Fréchet distance (efficientnet-lite0)"
    torch.testing.assert_close(found, extractor(images(5).float(), resolution=64, batch=5), rtol=1e-4, atol=1e-4)
    # Trained weights tell a picture from its negative; random ones barely do.
    assert float((found - extractor(255 - images(5), resolution=64)).norm() / found.norm()) > 0.1


def test_efficientnet_is_given_what_it_was_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = feature_extractors.load_extractor("efficientnet-lite0")
    seen: list[Tensor] = []
    assert isinstance(extractor.net, feature_extractors.EfficientNetFeatures)

    def spy(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros(len(x), 1280, 2, 2)

    monkeypatch.setattr(extractor.net.net, "extract_features", spy)
    extractor(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), resolution=64)
    assert seen[0].shape == (1, 3, 64, 64)
    assert float(seen[0].max()) == float(seen[0].min()) == 1.0


def test_images_come_to_the_net_wherever_they_lie() -> None:
    """A judge draws its samples to the CPU and keeps its net on CUDA; here the net is on the meta device."""
    extractor = feature_extractors.load_extractor("efficientnet-lite0").to(torch.device("meta"))
    found = extractor(torch.zeros(3, 3, 64, 64, dtype=torch.uint8), resolution=64, batch=2)
    assert found.device.type == "meta"
    assert found.shape == (3, extractor.width)


def test_inception_has_the_published_size_and_names() -> None:
    with torch.device("meta"):
        net = inception.Inception()
    named = net.state_dict()
    # Inception-v3 without its auxiliary head has 21,785,568 weights in its trunk.
    assert sum(p.numel() for name, p in net.named_parameters() if not name.startswith("fc.")) == 21_785_568
    for name in (
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_5b.branch5x5_2.bn.running_var",
        "Mixed_7c.branch3x3dbl_3b.bn.bias",
    ):
        assert name in named
    assert named["fc.weight"].shape == (1008, 2048)


def test_inception_loads_by_path_and_is_called_fid(weights: Path) -> None:
    extractor = feature_extractors.load_extractor(str(weights))
    found = extractor(images(), resolution=64)
    assert found.shape == (2, 2048)
    assert found.isfinite().all()
    assert metric_label("frechet_distance", extractor.name) == "FID"
    assert metric_label("kernel_distance", extractor.name) == "KID"
    torch.testing.assert_close(found, extractor(images(), resolution=128))  # it has a size of its own


def test_inception_pools_as_fid_does() -> None:
    """The padding is left out of the averages; the very last block takes the maximum."""
    ones = torch.ones(1, 3, 5, 5)
    assert torch.equal(inception._average(ones), ones)
    assert inception.BlockE(8, "max").pool == "max"
    net = inception.Inception.__new__(inception.Inception)
    with torch.device("meta"):
        inception.Inception.__init__(net)
    assert (net.Mixed_7b.pool, net.Mixed_7c.pool) == ("average", "max")


def test_digest_follows_the_content(weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pth"
    copy.write_bytes(weights.read_bytes())
    assert feature_extractors.digest(str(copy)) == feature_extractors.digest(str(weights))
    copy.write_bytes(b"x" + weights.read_bytes()[1:])
    assert feature_extractors.digest(str(copy)) != feature_extractors.digest(str(weights))
    assert len(feature_extractors.digest("efficientnet-lite0")) == 16


def test_wrong_files_are_refused_in_one_line(weights: Path, tmp_path: Path) -> None:
    whole = weights.read_bytes()
    contents = {
        "empty": b"",
        "text_encoder": b"weights, please\n",
        "binary": bytes(range(256)) * 40,
        "truncated": whole[: len(whole) // 2],
        "beheaded": whole[1000:],
    }
    paths = {name: tmp_path / f"{name}.pth" for name in contents}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    for name, value in {
        "list": [1, 2],
        "numbers": {"fc.weight": 3},
        "other net": {"conv.weight": torch.ones(3)},
    }.items():
        paths[name] = tmp_path / f"{name.replace(' ', '-')}.pth"
        torch.save(value, paths[name])
    table = torch.load(weights, weights_only=True)
    for name, change in {"shape": torch.ones(3), "nan": torch.full((1008,), torch.nan)}.items():
        paths[name] = tmp_path / f"{name}.pth"
        torch.save(table | {"fc.bias": change}, paths[name])
    for path in paths.values():
        with pytest.raises(InputError) as caught:
            feature_extractors.load_extractor(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    for missing in (str(tmp_path / "none.pth"), str(tmp_path), "resnet"):
        for act in (feature_extractors.load_extractor, feature_extractors.digest):
            with pytest.raises(InputError):
                act(missing)
