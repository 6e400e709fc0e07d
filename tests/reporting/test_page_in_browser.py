"""The report's page in a real browser: no error, no request, filters, theme, both widths, the file's numbers."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain.reporting import page as report_page
from mmtrain.reporting.contents import gather
from mmtrain.reporting.results import find_runs
from tests.reporting.runs import write_all

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("background-networking", "component-update", "sync")  # of what Chromium does on its own
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
SLOW = 120_000  # ms; a busy machine is no failure
sync_api.expect.set_options(timeout=SLOW)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: `apt-get install chromium`")


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=SLOW)
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The page of 14 runs."""
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "report.html"
    path.write_text(report_page.render(gather(find_runs([write_all(folder / "runs")]), "Fourteen runs")))
    return path


@pytest.fixture
def opened(browser, file) -> Iterator["sync_api.Page"]:
    """The page at 1280 px; whatever goes wrong in the browser fails the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.set_default_timeout(SLOW)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url[:80]}"))
    page.on("request", lambda r: wrong.append(r.url[:80]) if not r.url.startswith(("file:", "data:")) else None)
    page.goto(file.as_uri())
    yield page
    page.close()
    assert not wrong


def visible_rows(page: "sync_api.Page", kind: str) -> int:
    """Rows of a kind that no filter hides, in all tables whether folded or not."""
    selector = f"details.table:not([hidden]) tr.{kind}:not([hidden])"
    return page.locator(selector).count()


def test_filters_act_on_tables_curves_figures_and_runs(opened) -> None:
    reported, ours = visible_rows(opened, "reported"), visible_rows(opened, "ours")
    assert reported > 50 and ours > 20
    opened.locator("input[name=reported]").uncheck()
    assert (visible_rows(opened, "reported"), visible_rows(opened, "ours")) == (0, ours)
    opened.locator("input[name=reported]").check()
    opened.locator("input[name=method][value=CyCLIP]").uncheck()
    assert visible_rows(opened, "ours") == ours - 4 and 0 < visible_rows(opened, "reported") < reported
    assert opened.locator("figure[data-run]:not([hidden])").count() == 36
    assert opened.locator("#runs tbody tr:not([hidden])").count() == 11
    assert opened.locator("output").inner_text().startswith("11 of 14 runs")
    opened.locator("#curves .chart", has_text="val/unseen_concepts/zero_shot_top1").scroll_into_view_if_needed()
    lines = opened.locator("#curves .chart", has_text="val/unseen_concepts/zero_shot_top1").locator("path")
    sync_api.expect(lines).to_have_count(9 + 3)
    opened.fill("input[name=text]", "twemoji_style top1")
    charts = opened.locator(".chart:not([hidden]) figcaption")
    assert charts.all_inner_texts() == ["val/twemoji_style/zero_shot_top1"]
    opened.locator("input[name=comparable]").check()
    assert visible_rows(opened, "reported") == 0, "no reported column has these words"
    opened.get_by_role("button", name="Reset").click()
    sync_api.expect(opened.locator("output")).to_have_text(re.compile("^14 of 14 runs"))
    assert (visible_rows(opened, "reported"), visible_rows(opened, "ours")) == (reported, ours)


def test_only_comparable_columns(opened) -> None:
    table = opened.locator("details.table", has_text="retrieval").first
    heads = table.locator("thead th[data-place]:not([hidden])")
    assert heads.count() == 9
    opened.locator("input[name=comparable]").check()
    texts = " ".join(heads.all_inner_texts())
    assert heads.count() == 6 and "†" not in texts
    cells = table.locator("tbody tr").first.locator("td:not([hidden])")
    assert cells.count() == 6


def test_seed_filter_averages_again(opened) -> None:
    """10.31 and 10.62 of two seeds; with one seed there is no interval. Reported: 10.16."""
    cell = opened.locator("#paper-1 tr.ours td").first
    assert re.sub(r"\s+", " ", cell.inner_text()).startswith("10.46 ± 1.97 ▲ +0.30")
    opened.locator("input[name=seed][value='1']").uncheck()
    assert re.sub(r"\s+", " ", cell.inner_text()).startswith("10.31 ▲ +0.15 better")
    opened.locator("input[name=seed][value='0']").uncheck()
    assert opened.locator("#paper-1 tr.ours:not([hidden])").count() == 0


def test_numbers_are_those_of_the_file(opened, browser, file) -> None:
    """The script fills our cells anew: without it the page shows the same texts in the same colours."""
    read = "cells => cells.map(cell => cell.innerHTML.replace(/\\s+/g, ' '))"
    filled = opened.locator("td[data-seeds]").evaluate_all(read)
    context = browser.new_context(java_script_enabled=False)
    still = context.new_page()
    still.goto(file.as_uri(), timeout=SLOW)
    written = still.locator("td[data-seeds]").evaluate_all(read)
    context.close()
    assert len(written) > 200 and filled == written


def test_curve_is_read_by_pointer_and_keys(opened) -> None:
    chart = opened.locator("#curves .chart", has_text="val/unseen_concepts/zero_shot_top1")
    chart.locator("svg").scroll_into_view_if_needed()
    sync_api.expect(chart.locator("path")).to_have_count(12 + 4)
    chart.locator("svg").hover(position={"x": 150, "y": 60})
    sync_api.expect(chart.locator(".tip")).to_contain_text(re.compile(r"step \d+.*CyCLIP 0\.0\d+ \(0\.0\d+ to 0"))
    chart.locator("svg").focus()
    opened.keyboard.press("Escape")
    opened.keyboard.press("ArrowLeft")
    sync_api.expect(chart.locator(".tip")).to_contain_text("step 899")


def test_theme_is_toggled(opened) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = opened.evaluate(colour)
    opened.get_by_role("button", name="Dark theme").click()
    dark = opened.evaluate(colour)
    opened.get_by_role("button", name="Light theme").click()
    assert opened.evaluate(colour) == light != dark


def test_picture_opens_large_and_closes_with_escape(opened) -> None:
    opened.locator(".pictures button").first.click()
    sync_api.expect(opened.get_by_role("dialog")).to_contain_text("Modality gap on")
    opened.keyboard.press("Escape")
    sync_api.expect(opened.get_by_role("dialog")).to_have_count(0)


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_the_width(opened, width) -> None:
    """Tables scroll inside their own box, their first column stays; nothing makes the page itself wider."""
    opened.set_viewport_size({"width": width, "height": 844})
    opened.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert opened.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    box = opened.locator("#laptop .scroll").first
    before = box.locator("tbody th").first.bounding_box()["x"]
    scrolled = box.evaluate("box => { box.scrollLeft = 200; return box.scrollLeft }")
    assert scrolled > 0 and abs(box.locator("tbody th").first.bounding_box()["x"] - before) < 2
    entry = "performance.getEntriesByType('navigation')[0]"
    print(f"{width} px: load {opened.evaluate(entry + '.loadEventEnd'):.0f} ms")
