from __future__ import annotations

import io
from pathlib import Path

import pandas
import pytest

from archsearch.reports import study_report
from archsearch.reports.rendering import tables
from archsearch.reports.study import audit
from archsearch.studies.experiments.proxy_audit import AgreementRow
from tests.archsearch.reports import factory

ROWS = [
    AgreementRow("validation_loss", "itself with another seed", "as is", 0.93, 0.8, 0.99, 12),
    AgreementRow("a | <b>", "validation_loss of the long run", "at equal MACs", -0.13, None, None, 12),
    AgreementRow("macs", "frechet_distance of the long run", "at equal MACs", None, None, None, 12),
]


def test_markdown_escapes_bars() -> None:
    assert audit.markdown(ROWS).splitlines() == [
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
    assert audit.write_audit(ROWS, tmp_path / name) == tmp_path / name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audit.csv", "audit.md"]
    assert (tmp_path / "audit.md").read_text() == audit.markdown(ROWS)


def test_section_is_escaped_and_in_the_report(tmp_path: Path) -> None:
    assert "a | &lt;b&gt;" in audit.section(ROWS)
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
    assert sentence in audit.markdown(few)
    assert sentence in audit.section(few)
    assert "Only" not in audit.markdown(ROWS) + audit.section(ROWS)


def test_markdown_escapes_cells() -> None:
    assert tables.markdown(["a", "b"], [["x\ny", "back\\slash"]]) == (
        "| a | b |\n| --- | ---: |\n| x y | back\\\\slash |\n"
    )
