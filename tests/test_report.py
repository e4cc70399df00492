"""The report, read in a real headless browser: it fits, loads nothing, and shows the records' figures."""

import json
import os

import pytest

from fastllama.lab import changes, history, report
from tests.fake_records import fake_record

HOSTILE = "<script>document.title = 'run'</script> & \"quoted\""


@pytest.fixture(scope="module")
def records():
    return [
        fake_record(1, HOSTILE, commit="a" * 40, speed=40.0),
        fake_record(2, "faster", commit="b" * 40, speed=61.5),
    ]


@pytest.fixture(scope="module")
def page(browser, records, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.render(records), encoding="utf-8")
    browser.get(path.as_uri())
    return browser


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_does_not_overflow(page, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wide = page.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert wide[0] == width and wide[1] <= width
    if folder := os.environ.get("FASTLLAMA_SCREENSHOTS"):
        page.save_screenshot(f"{folder}/report-{width}.png")


def test_figures_are_the_records_and_words_are_text(page, records):
    script = "return [...document.querySelectorAll('#log tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    shown = page.execute_script(script)
    assert [row[2] for row in shown] == [record["what"] for record in records]
    assert [row[5] for row in shown] == [changes.times_vanilla(record) for record in records]
    assert [float(row[3]) for row in shown] == pytest.approx([r["tok_per_s"] for r in records], abs=0.005)
    assert page.title == "fastllama: measurements"
    drawn = page.execute_script("return [...document.images].map(i => [i.naturalWidth, i.alt.length])")
    assert drawn and all(width > 0 and alt > 0 for width, alt in drawn)


def test_nothing_is_loaded_and_the_console_is_empty(page):
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)


def test_the_timeline_follows_commits_and_is_the_same_file_twice(records, tmp_path):
    (rows,) = history.series(records).values()
    assert rows == records
    files = [history.timeline(records, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg")]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="no timeline"):
        history.timeline([fake_record(vanilla=None)], tmp_path / "c.svg")


def test_no_records_no_page():
    with pytest.raises(ValueError, match="no record"):
        report.render([])
