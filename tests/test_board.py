"""TensorBoard: the event files, and what it shows of them in a real headless browser."""

import os
import re
import socket
import subprocess
import sys
from datetime import datetime
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.lab.pages import board, events
from fastllama.lab.points import figures
from fastllama.lab.records import record
from tests.fake_records import COMMIT, fake_record, make_repository, point

MARKUP = "\n  # not a title\n\n```\n<b>bold</b> &amp; *stars*\t|x|\n    \\n [a](b) `c`\n"
SAMPLER = {"do_sample": True, "temperature": 0.7, "top_k": 20}


def _write(records, logs):
    for made in records:
        (logs / made["id"]).mkdir(parents=True)
    board.write_all(records, logs)
    return logs


@pytest.fixture(scope="module")
def records():
    return [
        fake_record(1, "vanilla", speed=20.123, vanilla=None, switches={"fuse": None}),
        fake_record(2, "native", speed=61.456, switches={"compile": "native"}, text_sample=MARKUP, hash="00c0ffee"),
        fake_record(3, "drawn", speed=33.333, vanilla=11.0, model="org/name", batch_size=4, sampler=SAMPLER),
    ]


# --- the event files


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [path] = folder.glob("*tfevents*")
    read = EventAccumulator(str(path))
    read.Reload()
    return read


def test_scalars_are_the_records_figures(records, tmp_path):
    _write(records, tmp_path)
    names = ["demo fp32 cpu b1 p1000 n200"] * 2 + ["org_name fp32 cpu b4 p1000 n200 {}"]
    names[2] = names[2].format(figures.workload(records[2])[-1])
    for number, (made, name) in enumerate(zip(records, names, strict=True), start=1):
        read = _events(tmp_path / made["id"])
        wanted = {f"{name}/{figure}": made[figure] for figure in board.FIGURES if made[figure] is not None}
        wanted |= {f"{board.EVERY}/{figure}": made[figure] for figure in board.METRICS}
        assert set(read.Tags()["scalars"]) == set(wanted)
        for tag, value in wanted.items():
            [scalar] = read.Scalars(tag)
            assert scalar.step == number and scalar.value == pytest.approx(value, rel=1e-6)


def test_events_are_replaced_hold_no_host_and_are_the_same_twice(records, tmp_path):
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    logs = _write(records, tmp_path / "a")
    first = {path.relative_to(logs): path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    assert [str(path) for path in sorted(first)] == [f"00{n}-{COMMIT[:7]}/{events.NAME}" for n in (1, 2, 3)]
    assert socket.gethostname() not in str(list(first))
    folder = logs / records[0]["id"]
    EventFileWriter(str(folder)).close()  # what earlier versions left, named with the host
    (folder / events.NAME).write_bytes(b"half a fi")
    kept = (logs / records[1]["id"] / events.NAME).stat().st_ino
    board.write_all(records, logs)
    assert {path.relative_to(logs): path.read_bytes() for path in logs.rglob("*") if path.is_file()} == first
    assert (logs / records[1]["id"] / events.NAME).stat().st_ino == kept  # left alone


def test_saving_brings_new_columns_to_every_record(tmp_path):
    make_repository(tmp_path)
    first = record.save(point(), "first", root=tmp_path).parent
    assert "compile" in _columns(first) and "temperature" not in _columns(first)
    second = record.save(point(sampler=SAMPLER), "second", root=tmp_path).parent
    assert "temperature" in _columns(first) and _columns(first) == _columns(second)


def _columns(folder):
    from tensorboard.plugins.hparams import metadata

    content = _events(folder).SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    return [info.name for info in metadata.parse_experiment_plugin_data(content).hparam_infos]


def test_a_row_is_a_session_that_ended_well(records, tmp_path):
    from tensorboard.plugins.hparams import api_pb2, metadata

    made = records[1]
    content = _events(_write(records, tmp_path) / made["id"]).SummaryMetadata(metadata.SESSION_END_INFO_TAG)
    ended = metadata.parse_session_end_info_plugin_data(content.plugin_data.content)
    assert ended.status == api_pb2.STATUS_SUCCESS
    assert ended.end_time_secs == datetime.fromisoformat(made["recorded_at"]).timestamp()


class _Shown(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.text = ""
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


PIECES = ["<b>", "</pre>", "</code>", "<!--", "&amp;", "&", "```", "~~~", "# a", "- a", "*a*", "[a](b)", "|", "    "]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*PIECES, "\n", "\t", "\\", "`"]) | st.text(max_size=3)).map("".join))
def test_text_is_shown_as_it_is(text):
    from tensorboard.plugin_util import markdown_to_safe_html, safe_html

    plain = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    for show in (markdown_to_safe_html, safe_html):
        shown = _Shown(show(board.as_text(text)))
        assert shown.text == plain and shown.tags == ["pre", "code"]


# --- in a browser


@pytest.fixture(scope="module")
def address(records, tmp_path_factory):
    """A TensorBoard over the records, on a port that was free."""
    logs = _write(records, tmp_path_factory.mktemp("board"))
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                    break
            else:
                pytest.fail(f"TensorBoard did not start: {''.join(said)}")
            yield found[0]
        finally:
            process.terminate()


# The elements that match a selector, in shadow roots too.
DEEP = """
const found = (selector, root = document) => [...root.querySelectorAll('*')].flatMap(
    e => [...(e.matches(selector) ? [e] : []), ...(e.shadowRoot ? found(selector, e.shadowRoot) : [])]);
const text = (e) => e.textContent.trim();
"""
# A cell of the grid is a slot; what it shows is assigned to it.
ROWS = """
const shown = (cell) => cell.querySelector('slot').assignedNodes().map(text).join('');
return found('vaadin-grid').flatMap(grid => [...grid.shadowRoot.querySelectorAll('tr:not([hidden])')].map(
    row => [...row.children].filter(cell => !cell.matches('[part~=details-cell]')).map(shown)));
"""
# The third group of charts and those after it are shut at first.
CHARTS = """
found('tf-category-paginated-view').filter(group => !group.opened).forEach(
    group => found('.heading', group.shadowRoot).forEach(heading => heading.click()));
return found('tf-scalar-card').map(card => found('[itemprop=tag]', card.shadowRoot).map(text).join());
"""
CARDS = """
return found('tf-text-loader').flatMap(card => found('.text > tf-markdown-view', card.shadowRoot).map(view =>
    [card.run, card.tag, found('p, pre', view.shadowRoot).map(e => e.textContent),
     found('#markdown *', view.shadowRoot).map(e => e.localName)]));
"""


@pytest.fixture
def read(browser, address):
    """A function that returns what a script reads in a tab, once `done` holds of it."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    def read(tab, script, done):
        if browser.current_url != f"{address}#{tab}":
            browser.get("about:blank")
            browser.get(f"{address}#{tab}")
        shown = None

        def ready(driver):
            nonlocal shown
            shown = driver.execute_script(DEEP + script)
            return done(shown)

        try:
            WebDriverWait(browser, 15, 0.1).until(ready)
        except TimeoutException:
            pytest.fail(f"the {tab} tab shows {shown}")
        if folder := os.environ.get("FASTLLAMA_SCREENSHOTS"):
            browser.save_screenshot(f"{folder}/board-{tab}.png")
        return shown

    return read


def test_the_scalars_tab_has_every_run_and_chart(read, records):
    tags = [f"{board.EVERY}/{name}" for name in board.METRICS]
    for made in records[1:]:
        tags += [board.tag(made, name) for name in board.FIGURES if made[name] is not None]
    charts = read("scalars", CHARTS, lambda shown: len(shown) >= len(tags) and all(shown))
    assert sorted(charts) == sorted(tags)
    runs = read("scalars", "return found('.item-label-container').map(text)", bool)
    assert runs == [made["id"] for made in records]


def _as_shown(value):
    if value is None:
        return ""
    # TensorBoard shows five digits of a number.
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value:#.5g}"


def test_the_hparams_table_has_a_row_per_record_with_its_values(read, records, browser):
    first, *_ = read("hparams", ROWS, lambda rows: len(rows) == 1 + len(records))
    varied = ["compile", "do_sample", "fuse", "model", "preallocate"]
    assert first[-10:] == [*varied, *board.METRICS[:5]]
    boxes = "found('.hparam-checkbox, .metric-checkbox').filter(box => !box.checked)"
    browser.execute_script(f"{DEEP}{boxes}.forEach(box => box.click())")
    table = board.hparams(records)
    width = len(table) + len(board.METRICS)
    names, *rows = read("hparams", ROWS, lambda rows: len(rows[0]) >= width and len(rows) == 1 + len(records))
    assert sorted(names[-width:]) == sorted([*table, *board.METRICS])
    for row, made in zip(rows, records, strict=True):
        shown = dict(zip(names, row, strict=True))
        assert shown["Trial ID"] == made["id"]
        # From the record, not from what was written.
        wanted = {**made, **made["switches"], **made.get("sampler", {}), "machine": figures.machine_name(made)}
        for name in names[-width:]:
            assert shown[name] == _as_shown(wanted.get(name)), (made["id"], name)


def test_a_sample_is_shown_as_text_with_its_hash_and_parity(read, records):
    cards = read("text", CARDS, lambda cards: len(cards) == len(records))
    by_run = {run: content for run, *content in cards}
    assert sorted(by_run) == [made["id"] for made in records]
    for made in records:
        tag, (head, sample, what, command), elements = by_run[made["id"]]
        assert tag == board.tag(made, "text_sample")
        assert head == f"hash {made['hash']}, parity {made['parity']}, commit {made['commit'][:7]}"
        assert (sample, what, command) == (made["text_sample"], made["what"], made["command"])
        assert set(elements) == {"p", "pre", "code"}
