from __future__ import annotations

import io
from pathlib import Path

import pandas
import pytest

from archsearch.reports import study_report
from archsearch.reports.rendering import tables
from archsearch.reports.study import audit
from archsearch.stats.rank_correlation import FIT, candidates_needed, interval
from archsearch.studies.experiments.proxy_audit import ITSELF, AgreementRow
from tests.archsearch.reports import factory

ROWS = [
    AgreementRow("validation_loss", "itself with another seed", "as is", 0.93, 0.8, 0.99, 12),
    AgreementRow("a | <b>", "validation_loss of the long run", "at equal MACs", -0.13, None, None, 12),
    AgreementRow("macs", "frechet_distance of the long run", "at equal MACs", None, None, None, 12),
]


def test_markdown_escapes_bars() -> None:
    assert audit.markdown(ROWS, steps=240).splitlines() == [
        "| score | against | kind | ρ | 95 % interval | n |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        "| validation loss | itself with another seed | as is | 0.93 | 0.80 to 0.99 | 12 |",
        "| a \\| <b> | validation loss of the long run | at equal MACs | −0.13 | – | 12 |",
        "| MACs | Fréchet distance of the long run | at equal MACs | – | – | 12 |",
    ]


def test_csv_reads_back() -> None:
    frame = pandas.read_csv(io.StringIO(audit.csv(ROWS)))
    assert tuple(frame.columns) == audit.HEADER
    assert frame["rho"].tolist()[:2] == [0.93, -0.13]
    assert frame["rho"].isna().tolist() == [False, False, True]
    assert frame["score"][1] == "a | <b>"


@pytest.mark.parametrize("name", ["audit.md", "audit.csv"])
def test_writes_both(tmp_path: Path, name: str) -> None:
    assert audit.write_audit(ROWS, tmp_path / name, steps=240) == tmp_path / name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audit.csv", "audit.md"]
    assert (tmp_path / "audit.md").read_text() == audit.markdown(ROWS, steps=240)


def test_section_is_escaped_and_in_the_report(tmp_path: Path) -> None:
    assert "a | &lt;b&gt;" in audit.section(ROWS, steps=240)
    study = factory.create(tmp_path, candidates=3, samples=False)
    plain = study_report.write_report(study, tmp_path / "plain.html").read_text()
    assert 'id="audit"' not in plain
    study.set_user_attr("audit", [vars(AgreementRow("x", "y", "z", 0.5, 0.1, 0.8, 9))])
    audited = study_report.write_report(study, tmp_path / "audited.html").read_text()
    assert 'id="audit"' in audited
    assert "0.10 to 0.80" in audited


def test_an_audit_of_few_candidates_says_what_it_cannot_tell() -> None:
    few = [AgreementRow("validation_loss", "the long run", "as is", 1.0, -0.75, 1.0, 4)]
    sentence = "Only 4 candidates: even a ρ of 1.00 of so few has the interval −0."
    assert sentence in audit.markdown(few, steps=240)
    assert sentence in audit.section(few, steps=240)
    assert "Only" not in audit.markdown(ROWS, steps=240) + audit.section(ROWS, steps=240)


def test_markdown_escapes_cells() -> None:
    assert tables.markdown(["a", "b"], [["x\ny", "back\\slash"]]) == (
        "| a | b |\n| --- | ---: |\n| x y | back\\\\slash |\n"
    )


LONG = "validation_loss of a run 5× as long"


@pytest.mark.parametrize(
    ("as_is", "at_equal_latency", "expected"),
    [
        ((0.9, 0.75, 0.97, 20), (0.85, 0.6, 0.95, 20), ("yes", "–")),
        ((0.9, 0.75, 0.97, 20), (0.7, 0.35, 0.88, 20), ("not shown", "61 candidates, if ρ stays as it is (now 20)")),
        (
            (0.9, 0.75, 0.97, 20),
            (0.4, -0.1, 0.7, 20),
            ("no", "longer short runs, e.g. of 480 steps instead of 240: ρ itself is not above 0.5"),
        ),
    ],
)
def test_a_score_is_fit_to_rank_only_where_its_agreement_is_known_to_be_high(
    as_is: tuple[float, float, float, int], at_equal_latency: tuple[float, float, float, int], expected: tuple[str, str]
) -> None:
    """Both as it is and at equal latency; agreement with itself, and what size alone says, are no evidence."""
    rows = [
        AgreementRow("validation_loss", ITSELF, "as is", 0.99, 0.98, 1.0, 20),
        AgreementRow("macs", LONG, "as is", 0.99, 0.98, 1.0, 20),
        AgreementRow("validation_loss", LONG, "as is", *as_is),
        AgreementRow("validation_loss", LONG, "at equal latency", *at_equal_latency),
        AgreementRow("validation_loss", LONG, "at equal MACs", 0.1, -0.3, 0.5, 20),
    ]
    (found,) = audit.fitness(rows, steps=240)
    assert found[:2] == ("validation loss", "validation loss of a run 5× as long")
    assert found[2:] == expected
    for text in (audit.markdown(rows, steps=240), audit.section(rows, steps=240)):
        assert f"{audit.FIT}" in text
        assert all(cell in text for cell in expected)


@pytest.mark.parametrize("rho", [0.51, 0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("controls", [0, 1])
def test_so_many_candidates_would_show_it(rho: float, controls: int) -> None:
    count = candidates_needed(rho, controls=controls)
    assert count is not None
    assert interval(rho, count, controls=controls)[0] > FIT
    assert interval(rho, count - 2, controls=controls)[0] <= FIT
    assert candidates_needed(FIT) is None
