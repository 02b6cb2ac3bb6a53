"""The report of an evolving study in headless Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from archsearch.reports import study_report
from tests.archsearch.reports import factory
from tests.archsearch.reports.study.test_in_browser import Visit, browser, pytestmark  # noqa: F401 - browser is a fixture

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_its_charts_draw_and_fit(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    study = factory.evolved(tmp_path, rounds=5)
    url = study_report.write_report(study, tmp_path / "r.html", compare_with=factory.sampled(candidates=6)).as_uri()
    visit = Visit(browser, url, width=900, dark=True)
    page = visit.page
    page.wait_for_selector("#importance-map .heatmaplayer image, #importance-map .heatmaplayer path", state="attached")
    assert (
        page.locator("#importance-map .heatmap-label").count() > 0 or page.locator("#importance-map text").count() > 20
    )
    assert page.locator("#path-validation_loss .scatterlayer .point").count() >= 5 + 6
    titles = page.locator("#path-validation_loss .infolayer [class*=title]").all_text_contents()
    assert {"Latency (ms)", "Validation loss"} <= set(titles)
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    assert visit.problems == []
    page.close()
