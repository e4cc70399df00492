"""The report, read in a real headless browser: it fits, loads nothing, and shows the records' figures."""

import json
import os

import pytest

from fastllama.lab.pages import report
from fastllama.lab.pictures import history
from fastllama.lab.points import points_file
from fastllama.lab.records import changes, words
from fastllama.lab.records.sources import ROOT
from fastllama.lab.suite import suite_file
from tests.fake_records import current, fake_record, point
from tests.test_points_file import unmeasured

HOSTILE = "<script>document.title = 'run'</script> & \"quoted\""


@pytest.fixture(scope="module")
def records():
    return [
        fake_record(1, HOSTILE, commit="a" * 40, speed=40.0),
        fake_record(2, "faster", commit="b" * 40, speed=61.5),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository's tb_logs: a sweep with a point that failed, and the suite run and the words that this one keeps."""
    root = tmp_path_factory.mktemp("report")
    logs = root / words.LOGS
    (logs / "sweeps").mkdir(parents=True)
    for size, speed in ((1, 40.0), (8, 61.5)):
        points_file.append(logs / "sweeps" / "batch.jsonl", current(point(batch_size=size, speed=speed)))
    points_file.append(logs / "sweeps" / "batch.jsonl", unmeasured(reason=HOSTILE, batch_size=16))
    newest, _ = suite_file.newest()["cpu"]
    (logs / "suite").mkdir()
    for path in (newest, ROOT / words.LOGS / "cited.json", ROOT / words.LOGS / "unmeasured.json"):
        target = root / path.relative_to(ROOT)
        target.write_bytes(path.read_bytes())
    return root


@pytest.fixture(scope="module")
def page(browser, records, root):
    path = root / "report.html"
    path.write_text(report.render(records, root), encoding="utf-8")
    browser.get(path.as_uri())
    return browser


def resize(page, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def rows(page, section: str) -> list[list[str]]:
    script = (
        f"return [...document.querySelectorAll('#{section} tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    return page.execute_script(script)


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_does_not_overflow(page, width):
    resize(page, width)
    wide = page.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert wide[0] == width and wide[1] <= width
    if folder := os.environ.get("FASTLLAMA_SCREENSHOTS"):
        height = page.execute_script("return document.documentElement.scrollHeight")
        page.set_window_size(width, height)
        resize_to = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", resize_to)
        page.save_screenshot(f"{folder}/report-{width}.png")


def test_on_a_phone_every_figure_is_in_view_under_its_name(page):
    resize(page, 375)
    cells = page.execute_script(
        "return [...document.querySelectorAll('td')].map(c => [c.getBoundingClientRect().right, "
        "getComputedStyle(c, '::before').content, c.dataset.head])"
    )
    assert cells and all(right <= 375 and content == f'"{head}"' for right, content, head in cells)
    # Labels of a plot are some 9 points of a picture of 900; half of that could not be read.
    drawn = page.execute_script("return [...document.images].map(i => i.width / i.naturalWidth)")
    assert drawn and min(drawn) > 0.6


def test_figures_are_the_records_and_words_are_text(page, records):
    resize(page, 1280)
    shown = rows(page, "log")
    assert [row[2] for row in shown] == [record["what"] for record in records]
    assert [row[6] for row in shown] == [changes.times_vanilla(record) for record in records]
    assert [float(row[4]) for row in shown] == pytest.approx([r["tok_per_s"] for r in records], abs=0.005)
    assert [row[9] for row in shown] == [record["hash"] for record in records]
    (newest,) = rows(page, "results")
    assert newest[0].startswith("demo fp32") and newest[1] == changes.times_vanilla(records[-1])
    assert page.title == "fastllama: measurements"
    drawn = page.execute_script("return [...document.images].map(i => [i.naturalWidth, i.alt.length])")
    assert len(drawn) == 3 and all(width > 0 and alt > 0 for width, alt in drawn)


def test_the_suite_and_the_sweep_are_shown_with_what_failed(page, root):
    path, kept = suite_file.newest()["cpu"]
    shown = rows(page, "suite")
    assert [row[0] for row in shown] == [one["what"] for one in kept]
    assert [row[3] for row in shown] == ["reached" if one["reached"] else "not reached" for one in kept]
    assert {row[3] for row in shown} == {"reached", "not reached"} and {row[5] for row in shown} == {path.stem}
    points = rows(page, "sweeps")
    assert [row[0] for row in points] == ["batch_size 1", "batch_size 8", "batch_size 16"]
    assert points[2][-1] == f"failed: {HOSTILE}"
    assert rows(page, "cited") and "run_llama.py" in page.find_element("id", "unmeasured").text


def test_what_a_screen_reader_needs_is_there(page):
    found = page.execute_script(
        "return [document.documentElement.lang, ['header', 'nav', 'main', 'footer'].map(n => "
        "document.querySelectorAll(n).length), [...document.querySelectorAll('th')].every(t => t.scope == 'col'), "
        "[...document.querySelectorAll('[role=region], section')].every(r => r.getAttribute('aria-label') || "
        "document.getElementById(r.getAttribute('aria-labelledby')))]"
    )
    assert found == ["en", [1, 1, 1, 1], True, True]


def test_light_and_dark_both_have_contrast(page):
    shades = []
    for scheme in ("light", "dark"):
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        colours = page.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor].map(c => c.match(/\\d+/g))"
        )
        ink, paper = (sum(map(int, colour[:3])) / 3 for colour in colours)
        assert abs(ink - paper) > 150
        shades.append(paper)
    assert shades[0] > 200 > 60 > shades[1]


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


def test_the_command_writes_the_page_or_says_why_not(records, tmp_path, capsys, monkeypatch):
    from fastllama.lab import __main__ as lab

    monkeypatch.setattr(report, "read_all", lambda root: records)
    target = tmp_path / "page.html"
    assert lab.main(["--root", str(tmp_path), "report", "-o", str(target)]) == 0
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert lab.main(["--root", str(tmp_path), "report", "-o", str(tmp_path / "none" / "page.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
