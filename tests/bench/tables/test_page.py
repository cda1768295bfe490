"""The page of a suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, Browser
from markupsafe import escape

from loracurve.bench.config import SuiteConfig
from loracurve.bench.tables.table import shown
from loracurve.bench.tables.write import write_tables


def test_the_page_has_the_tables_and_figures(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, _ = scanned
    tables = write_tables(suite, out, page=True)
    page = (out / "report.html").read_text()
    drawn = {p.stem for p in (out / "figures").glob("*.png")}
    names = (
        "barriers_made",
        "points_made",
        "reliability_made",
        "auroc_detection_of_errors",
        "auroc_detection_of_other_sets",
    )
    assert drawn == {*names, "ensembles_and_one_mode_made", "ensembles_and_curves_made"}
    assert page.count('<img src="data:image/png;base64,') == len(drawn)
    for table in tables:
        if table.name in ("goals", "summary", "barriers", "along_curves", "against_discrete", "weighted_points"):
            assert str(escape(table.title)) in page and str(escape(shown(table.rows[0][-1]))) in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_opens_without_complaints(scanned: tuple[SuiteConfig, Path, list[str]], tmp_path: Path) -> None:
    suite, out, _ = scanned
    write_tables(suite, out, page=True)
    browser = Browser(str(CHROMIUM), tmp_path)
    try:
        browser.call("Page.navigate", url=(out / "report.html").as_uri())
        browser.until("document.readyState == 'complete' && document.images.length > 0")
        assert browser.run("[...document.images].every(i => i.naturalWidth > 300)")
        assert browser.run(
            "document.documentElement.scrollWidth <= window.innerWidth"
        )  # wide tables scroll on their own
        assert browser.complaints == []
    finally:
        browser.close()
