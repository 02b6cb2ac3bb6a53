"""Profiles of phones: predictions of the published figures, and model files that match a new fit."""

from __future__ import annotations

import pytest

from archsearch.predictor import figures, profile_fitting, profiles
from archsearch.predictor.model import FEATURES, LatencyModel, Residual
from archsearch.predictor.reference_nets import ReferenceNet, architecture
from snapgen.architecture import presets
from snapgen.architecture.presets import TINY_DECODER
from snapgen.errors import InputError
from tests.archsearch.cost.test_counter import _row


@pytest.fixture(scope="module")
def fits() -> dict[str, LatencyModel]:
    return {name: profile_fitting.fit_profile(name) for name in profiles.NAMES}


def of(model: LatencyModel, what: str) -> Residual:
    return next(residual for residual in model.residuals if residual.what == what)


@pytest.mark.parametrize(("name", "ms"), [("snapgen-t2i", 274), (TINY_DECODER, 119)])
def test_the_16_pro_max_takes_its_published_times(name: str, ms: float) -> None:
    found = profiles.model("iphone-16-pro-max").predict(profile_fitting.operations_of(ReferenceNet(name=name)))
    assert found.ms == pytest.approx(ms, rel=0.1)
    assert found.interval_ms[0] < ms < found.interval_ms[1]


def test_the_15_pro_has_its_published_ratios() -> None:
    """Predicted ratios of the rows, each within five percentage points of the published one."""
    model = profiles.model("iphone-15-pro")
    ms = {row: model.predict(profile_fitting.operations_of(ReferenceNet(name=row))).ms for row in _ROWS}
    assert ms["snapgen/row 1"] / ms["snapgen-baseline"] - 1 == pytest.approx(-0.24, abs=0.05)
    assert ms["snapgen/row 2a"] / ms["snapgen/row 1"] - 1 == pytest.approx(-0.62, abs=0.05)
    assert ms["snapgen/row 2b"] / ms["snapgen/row 1"] == pytest.approx(1 / 2.4, abs=0.05)
    assert ms["snapgen/row 4"] / ms["snapgen/row 3"] - 1 == pytest.approx(-0.09, abs=0.05)


_ROWS = {
    "snapgen-baseline": "0",
    "snapgen/row 1": "1",
    "snapgen/row 2a": "2a",
    "snapgen/row 2b": "2b",
    "snapgen/row 3": "3",
    "snapgen/row 4": "4",
}


@pytest.mark.parametrize(("name", "row"), _ROWS.items())
def test_the_rows_are_the_ablations(name: str, row: str) -> None:
    assert architecture(name).id == _row(row).id


def test_the_files_are_what_the_figures_make(fits: dict[str, LatencyModel]) -> None:
    """Run ``python -m archsearch.predictor.profile_fitting`` after a change of the figures, the prior or the
    operations."""
    for name, model in fits.items():
        shipped = profiles.model(name)
        assert shipped.coefficients == pytest.approx(model.coefficients, rel=0.01, abs=1e-4)
        assert shipped.quantiles == pytest.approx(model.quantiles, rel=0.02)
        assert [r.what for r in shipped.residuals] == [r.what for r in model.residuals]


def test_every_figure_is_there_whether_met_or_missed(fits: dict[str, LatencyModel]) -> None:
    for name, model in fits.items():
        assert len(model.residuals) == len(profile_fitting.published())
        for residual in model.residuals:
            own = {"fitted": residual.device == name, "borrowed": residual.device in profiles.NAMES, "check": True}
            assert own[residual.used]
        assert {r.used for r in model.residuals} == {"fitted", "borrowed", "check"}


def test_a_figure_is_shown_as_published(fits: dict[str, LatencyModel]) -> None:
    model = fits["iphone-15-pro"]
    assert (of(model, "U-Net step, 1024 px").published, of(model, "U-Net step, 1024 px").unit) == (274, "ms")
    assert (of(model, "row 1 over row 2b").published, of(model, "row 1 over row 2b").unit) == (2.4, "×")
    guided = of(model, "SDXL base, 768 px, guided")
    assert guided.published == pytest.approx(1000 / 0.85)
    assert guided.error == pytest.approx(guided.predicted / guided.published - 1)


def test_the_intervals_hold_nine_of_ten_figures(fits: dict[str, LatencyModel]) -> None:
    """Those that were only compared are the hardest: they are of other nets, and of older phones."""
    for name, model in fits.items():
        held = [
            low <= figure.value <= high
            for figure in profile_fitting.published()
            if figure.against is None
            for low, high in [model.predict(profile_fitting.operations_of(figure.net)).interval_ms]
        ]
        assert sum(held) >= len(held) - 1, name


def test_the_prior_names_every_feature() -> None:
    engine = profile_fitting.config.load_yaml(profiles.FOLDER / "neural-engine.yaml", profile_fitting.AcceleratorPrior)
    assert set(engine.prior) == set(FEATURES)


def test_a_figure_is_exactly_one_number() -> None:
    net = {"name": "snapgen-t2i"}
    for changes in ({}, {"ms": 1, "per_second": 2}, {"ratio": 2}, {"ms": 1, "against": net}):
        with pytest.raises(ValueError, match=r"figure|against"):
            profile_fitting.PublishedFigure.model_validate(
                {"what": "x", "device": "y", "source": "z", "net": net, **changes}
            )


@pytest.mark.parametrize("name", ["snapgen/row 9", "nowhere/row 1", "no-net"])
def test_a_net_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        architecture(name)


def test_a_preset_is_itself() -> None:
    assert architecture("snapgen-t2i") == presets.preset("snapgen-t2i")


def test_each_fitted_figure_comes_with_what_the_others_predict(fits: dict[str, LatencyModel]) -> None:
    for name, model in fits.items():
        for residual, shipped in zip(model.residuals, profiles.model(name).residuals, strict=True):
            assert (residual.left_out is None) == (residual.used == "check")
            assert residual.left_out is None or shipped.left_out == pytest.approx(residual.left_out, rel=0.01)
            assert shipped.nets == residual.nets
    of_own = {r.what: r.left_out_ratio for r in fits["iphone-16-pro-max"].residuals if r.used == "fitted"}
    assert of_own == {
        "U-Net step, 1024 px": pytest.approx(0.85, abs=0.01),
        "tiny decoder, 1024 px": pytest.approx(1.27, abs=0.01),
    }
    met = [abs(r.error) for model in fits.values() for r in model.residuals if r.used == "fitted"]
    assert max(met) < 0.06, "what it was fitted to, it meets: that says nothing"


def test_a_profile_tells_its_degrees_of_freedom(fits: dict[str, LatencyModel]) -> None:
    expected = "Fitted to 6 published figures, 24 coefficients: no degrees of freedom are left, and prior estimates"
    assert fits["iphone-15-pro"].freedom.startswith(expected)


def test_a_profile_knows_the_changes_that_it_was_fitted_to() -> None:
    model = profiles.model("iphone-15-pro")
    ids = {row: architecture(name).id for name, row in _ROWS.items()}
    pairs = [("1", "0"), ("2a", "1"), ("2b", "1"), ("4", "3"), ("3", "2b")]
    assert [model.was_fitted_to(ids[a], ids[b]) for a, b in pairs] == [True, True, True, True, False]
    assert not profiles.model("iphone-16-pro-max").was_fitted_to(ids["3"], ids["2b"])


def test_the_card_does_not_change_what_latencies_are_compared_with(fits: dict[str, LatencyModel]) -> None:
    """Latencies of one model are comparable, whatever its file tells beside the prediction."""
    model = fits["iphone-15-pro"]
    plain = tuple(r.model_copy(update={"left_out": None, "nets": ()}) for r in model.residuals)
    assert model.model_copy(update={"residuals": plain}).runtime_name == model.runtime_name
    other = model.model_copy(update={"tolerance": 0.5})
    assert other.runtime_name != model.runtime_name


def test_apples_figures_have_a_source_and_are_held_out() -> None:
    known = figures.figures()
    assert [f.ms for f in known if f.fits_profiles] == [399.3, 412.1, 381.0]
    assert sum(f.net is not None for f in known) == 7
    assert all(f.source and f.tag for f in known)
    held = figures.held_out("iphone-16-pro-max")
    assert len(held) == 4 + 3
    assert all(0.2 < h.refitted_ms / h.published_ms < 5 for h in held)
    model = profiles.model("iphone-16-pro-max")
    step = held[-1]
    assert (
        step.predicted_ms
        == model.predict(profile_fitting.operations_of(ReferenceNet(name="sd15", latent=64, batch=2))).ms
    )
