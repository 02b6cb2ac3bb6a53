"""Interaction with the report in headless Chromium."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from archsearch.reports import study_report
from tests.archsearch.reports import factory
from tests.archsearch.reports.test_study_report import HOSTILE

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    study = factory.create(folder, candidates=24, names=HOSTILE)
    return study_report.write_report(study, folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """An open page, and its console messages, errors and unexpected requests."""

    def __init__(self, browser: Browser, url: str, *, width: int = 1280, dark: bool = False) -> None:
        self.problems: list[str] = []
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        self.page.set_default_timeout(120_000)
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self._requested(request.url, url))
        self.page.goto(url)
        self.page.wait_for_selector("#panel h3")

    def _requested(self, requested: str, url: str) -> None:
        if requested != url and not requested.startswith(("data:", "blob:")):
            self.problems.append(f"request: {requested}")


@pytest.fixture(scope="module")
def opened(browser: Browser, url: str) -> Iterator[Visit]:
    visit = Visit(browser, url)
    yield visit
    visit.page.close()


@pytest.fixture
def visit(opened: Visit) -> Visit:
    """The page with all filters reset. It is opened only once because parsing plotly takes seconds."""
    opened.page.fill("#filter", "")
    opened.page.check("input[name=show][value=all]")
    return opened


@pytest.fixture(autouse=True)
def _no_problems(opened: Visit) -> Iterator[None]:
    yield
    problems, opened.problems = opened.problems, []
    assert problems == []


def column(page: Page, index: int) -> list[str]:
    cells: list[str] = page.locator(f"#table tbody tr:not([hidden]) > *:nth-child({index + 1})").evaluate_all(
        "cells => cells.map(cell => cell.dataset.value ?? cell.textContent)"
    )
    return cells


def test_every_chart_draws(visit: Visit) -> None:
    page = visit.page
    drawn = page.eval_on_selector_all(
        ".chart",
        """charts => charts.map(chart => [
            chart.id,
            chart.querySelectorAll(".main-svg").length,
            [...chart.querySelectorAll(".scatterlayer .point, .scatterlayer .js-line")].filter(
                mark => mark.getBoundingClientRect().width > 0).length,
        ])""",
    )
    assert {name for name, _, _ in drawn} == {
        "front-chart",
        "hypervolume",
        "seeds-validation_loss",
        "seeds-frechet_distance",
        "seeds-kernel_distance",
    }
    assert all(layers > 0 and marks > 5 for _, layers, marks in drawn), drawn
    assert page.locator(".effect .dot").count() > 10


def test_every_pair_of_axes_draws(visit: Visit) -> None:
    page = visit.page
    for y in page.locator("#axis-y option").evaluate_all("options => options.map(o => o.value)"):
        for x in page.locator("#axis-x option").evaluate_all("options => options.map(o => o.value)"):
            page.select_option("#axis-y", y)
            page.select_option("#axis-x", x)
            titles = page.locator("#front-chart .infolayer [class*=title]").all_text_contents()
            expected = [page.locator(f"#axis-{a} option:checked").text_content() for a in "xy"]
            assert set(expected) <= set(titles)
            assert page.locator("#front-chart .scatterlayer .point").count() > 10


def test_a_click_on_a_point_shows_its_samples(visit: Visit) -> None:
    page = visit.page
    before = page.locator("#panel h3").text_content()
    page.locator("#front-chart").scroll_into_view_if_needed()
    point = page.evaluate(
        """() => {
            const chart = document.getElementById("front-chart"), area = chart.getBoundingClientRect();
            const trace = chart.data.find(t => t.name === "searched" && t.customdata.length > 2);
            const {xaxis, yaxis} = chart._fullLayout;
            return [trace.customdata[1], area.left + xaxis._offset + xaxis.d2p(trace.x[1]),
                    area.top + yaxis._offset + yaxis.d2p(trace.y[1])];
        }"""
    )
    page.mouse.move(point[1], point[2])
    page.wait_for_selector(f"#panel[data-number='{point[0]}']")
    page.mouse.click(point[1], point[2])
    page.wait_for_selector(f"#table tr.selected[data-number='{point[0]}']")
    assert page.input_value("#pick") == str(point[0])
    assert page.locator("#panel h3").text_content() != before
    assert page.locator("#panel img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    assert "residual blocks" in (page.locator("#panel .words").text_content() or "")
    page.mouse.move(5, 5)
    page.wait_for_timeout(200)
    assert page.locator("#panel").get_attribute("data-number") == str(point[0])


def test_the_table_sorts_both_ways_with_missing_numbers_last(visit: Visit) -> None:
    page = visit.page
    head = page.locator("#table thead th", has_text="Validation loss")
    for direction, backwards in (("ascending", False), ("descending", True)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == direction
        values = column(page, 2)
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers, reverse=backwards)
        assert len(numbers) > 5
        assert values[len(numbers) :] == [""] * (len(values) - len(numbers)) != []
    assert page.locator("#table thead th:not([aria-sort=none])").count() == 1


def test_the_table_sorts_by_keyboard_and_by_text(visit: Visit) -> None:
    page = visit.page
    page.locator("#table thead th", has_text="State").locator("button").focus()
    page.keyboard.press("Enter")
    states = [value.strip().lower() for value in column(page, 1)]
    assert states == sorted(states)
    assert len(set(states)) > 2


def test_the_table_filters(visit: Visit) -> None:
    page = visit.page
    page.fill("#filter", "rope: true")
    few = page.locator("#table tbody tr:visible").count()
    assert 0 < few < 24
    assert page.locator("#count").text_content() == f"{few} of 24"
    page.fill("#filter", "")
    page.check("input[name=show][value=front]")
    assert set(column(page, 1)) == {"on the front"}
    page.check("#show-knobs")
    assert page.locator("#table thead th.knob-column:visible").count() == 14


def test_a_row_opens_its_candidate(visit: Visit) -> None:
    page = visit.page
    button = page.locator("#table tbody tr[data-scored=true] .open").nth(3)
    name = button.text_content()
    button.click()
    assert page.locator("#panel h3").text_content() == name
    assert page.locator("#table tr.selected .open").text_content() == name


def test_hostile_names_are_shown_and_do_nothing(visit: Visit) -> None:
    page = visit.page
    for name in HOSTILE.values():
        page.select_option(
            "#pick", label=next(t for t in page.locator("#pick option").all_text_contents() if name in t)
        )
        assert page.locator("#panel h3").text_content() == name
    assert page.evaluate("window.owned") is None


@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_are_legible_and_reach_the_charts(browser: Browser, url: str, dark: bool) -> None:
    visit = Visit(browser, url, dark=dark)
    page = visit.page
    for start in (dark, not dark):
        assert luminance(page, "--page") < 0.2 if start else luminance(page, "--page") > 0.8
        for foreground in ("--ink", "--muted", "--front", "--knee", "--better", "--worse"):
            for background in ("--page", "--surface"):
                assert contrast(page, foreground, background) >= 4.5, (foreground, background)
        ink = page.locator("#front-chart .xtitle").evaluate("title => getComputedStyle(title).fill")
        assert ink == color(page, "--muted")
        page.click("#theme")
    assert visit.problems == []
    page.close()


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_screen(browser: Browser, url: str, width: int) -> None:
    visit = Visit(browser, url, width=width)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.page.locator("#front-chart .main-svg").first.bounding_box()["width"] <= width  # type: ignore[index]
    assert visit.problems == []
    visit.page.close()


def test_a_page_of_one_candidate_has_no_errors(browser: Browser, tmp_path: Path) -> None:
    visit = Visit(
        browser, study_report.write_report(factory.create(tmp_path, candidates=1), tmp_path / "r.html").as_uri()
    )
    assert visit.page.locator("#table tbody tr").count() == 1
    assert visit.problems == []
    visit.page.close()


def test_tables_show_their_numbers_on_a_phone(browser: Browser, url: str) -> None:
    visit = Visit(browser, url, width=390)
    page = visit.page
    clipped = page.eval_on_selector_all(
        ".scroller", "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.ariaLabel)"
    )
    assert clipped == [], "nothing is cut off at the right"
    labels = page.eval_on_selector_all(
        "#table tbody tr:first-child td",
        """cells => cells.filter(cell => cell.getBoundingClientRect().width > 0).map(
            cell => getComputedStyle(cell, "::before").content.replaceAll('"', "") + ": " + cell.textContent.trim())""",
    )
    assert any(re.fullmatch(r"Validation loss .*: [\d.]+ \[[\d.]+, [\d.]+\]", label) for label in labels), labels
    overlapping = page.eval_on_selector_all(
        ".effects td",
        """cells => cells.filter(cell => { const figure = cell.querySelector(".figure"); const { top } = cell
            .getBoundingClientRect(); return figure && figure.getBoundingClientRect().top < top + 14; }).length""",
    )
    assert overlapping == 0, "a label has a line of its own"
    visit.page.close()


def color(page: Page, name: str) -> str:
    resolved: str = page.evaluate(
        """name => {
            const probe = document.body.appendChild(document.createElement("i"));
            probe.style.color = `var(${name})`;
            const color = getComputedStyle(probe).color;
            probe.remove();
            return color;
        }""",
        name,
    )
    return resolved


def luminance(page: Page, name: str) -> float:
    """Relative luminance of a CSS variable's color (WCAG 2.2)."""
    channels = [int(channel) / 255 for channel in color(page, name).removeprefix("rgb(").rstrip(")").split(",")]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(page: Page, foreground: str, background: str) -> float:
    light, dark = sorted((luminance(page, foreground), luminance(page, background)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
