"""Pictures: what is along the axis, what stands beside what, and what is no picture."""

import itertools
import json
import sys

import pytest

import run_llama
from fastllama.lab import __main__ as command_line
from fastllama.lab.measuring import ceiling, measure, statistics
from fastllama.lab.memory import memory
from fastllama.lab.pictures import canvas, curve, history, plot_memory, plot_rows, plot_sweep
from fastllama.lab.points import figures, points_file
from fastllama.lab.records import sources
from tests.fake_records import ENVIRONMENT, fake_record, point
from tests.test_measure import write_tiny

matplotlib = pytest.importorskip("matplotlib")

SKIPPED = {
    "schema": points_file.SCHEMA,
    "status": "skipped",
    "reason": "it cannot fit",
    "predicted_mb": 9000.0,
    "free_mb": 8000.0,
    "seed": 0,
    "sampler": {},
    "environment": ENVIRONMENT,
    "command": "python run_llama.py --batch-size 64",
    "source_sha256": "ab" * 32,
}


def batches(*sizes: int, **fields) -> list[dict]:
    return [point(batch_size=size, speed=40.0 / size, **fields) for size in sizes]


def skipped(size: int) -> dict:
    like = point(batch_size=size)
    names = ("model", "dtype", "device", "batch_size", "prompt_length", "new_tokens", "cache_length", "switches")
    return {**SKIPPED, **{name: like[name] for name in names}}


def fuses_and_bucket(fuses=("all", "no"), buckets=(16, 64, 256)) -> list[dict]:
    return [
        point(speed=10.0 + place, switches={"fuse": fuse, "bucket": bucket})
        for place, (fuse, bucket) in enumerate((fuse, bucket) for fuse in fuses for bucket in buckets)
    ]


def drawn_options(*temperatures: float) -> list[dict]:
    return [point(sampler={"do_sample": True, "temperature": one}) for one in temperatures]


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """Draw, and give the figure instead of a file."""

    def drawn(draw, *arguments, **named):
        kept = []
        monkeypatch.setattr(canvas, "save", lambda plt, made, path: kept.append(made))
        draw(*arguments, tmp_path / "x.svg", **named)
        kept[0].canvas.draw()
        return kept[0]

    yield drawn
    sys.modules["matplotlib.pyplot"].close("all")


def lines(axes) -> dict[str, tuple[list, list, list]]:
    """By label, or by place where there is none: (x, y, [(low, high) of each whisker])."""
    found = {}
    for place, container in enumerate(axes.containers):
        data, _, bars = container.lines
        ends = [(segment[0][1], segment[1][1]) for bar in bars for segment in bar.get_segments()]
        label = container.get_label()
        found[place if label.startswith("_") else label] = (list(data.get_xdata()), list(data.get_ydata()), ends)
    return found


def marks(axes) -> list[tuple]:
    """How each line looks without its colour."""
    made = [container.lines[0] for container in axes.containers]
    return [(line.get_marker(), line.get_linestyle(), line.get_markerfacecolor() == "white") for line in made]


VANILLA = canvas.VANILLA
KINDS = {
    "rows": (plot_rows.rows, [fake_record(1, vanilla=None), fake_record(2), fake_record(3, commit="b" * 40)]),
    "sizes": (plot_sweep.sweep, batches(1, 2, 4)),
    "words": (plot_sweep.sweep, fuses_and_bucket(buckets=[16])),
    "two": (plot_sweep.sweep, fuses_and_bucket()),
    "memory": (plot_memory.memory, batches(1, 2, 4)),
    "timeline": (history.timeline, [fake_record(1), fake_record(2, commit="b" * 40), fake_record(3, model="other")]),
    "curve": (curve.curve, [point(), point(dtype="bf16", read_gb_per_s=7.0)]),
}


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_is_the_same_file_whatever_the_user_s_settings(kind, suffix, tmp_path):
    draw, content = KINDS[kind]
    first = draw(content, tmp_path / f"a.{suffix}").read_bytes()
    assert first.startswith({"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml"}[suffix]) and len(first) > 5000
    matplotlib.rcParams["lines.linewidth"] = 7
    assert draw(content, tmp_path / f"b.{suffix}").read_bytes() == first
    assert matplotlib.get_backend().lower() == "agg"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{suffix}", f"b.{suffix}"]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = plot_sweep.sweep(batches(1, 2), tmp_path / "x.png")
    before = path.read_bytes()

    def full(self, file, **named):
        file.write_bytes(b"half")
        raise OSError("no space left")

    plt = canvas.pyplot()
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        plot_sweep.sweep(batches(1, 4), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path] and not plt.get_fignums()


def test_the_styles_differ_without_colour():
    styles = [canvas.style(index) for index in range(32)]
    seen = {(style["marker"], style["linestyle"], style["markerfacecolor"] == "white") for style in styles}
    assert len(seen) == 32


# sweeps


def test_ours_and_vanilla_stand_at_their_sizes_with_their_spread(figure):
    points = batches(1, 2, 8)
    (axes,) = figure(plot_sweep.sweep, points).axes
    drawn = lines(axes)
    for label, part, baseline in (
        ("fastllama: preallocated, no", points, False),
        (VANILLA, [each["baseline"] for each in points], True),
    ):
        xs, ys, whiskers = drawn[label]
        assert xs == [1, 2, 8] and ys == [each["tok_per_s"] for each in part]
        spreads = [figures.spread(each, "tok_per_s", baseline) for each in points]
        assert all(low < high for low, high in spreads)
        assert whiskers == [pytest.approx(spread) for spread in spreads]
    assert axes.get_xscale() == "log" and axes.xaxis.get_transform().base == 2
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "8"]
    assert axes.get_xlabel() == "batch size, rows" and axes.get_ylabel().startswith("tok/s, whole run: median")
    title = axes.get_title(loc="left")
    assert "demo fp32, prompt 1000, 200 new tokens" in title and "Example CPU, 2 threads" in title
    assert "batch" not in title and axes.get_ylim()[0] == 0


@pytest.mark.parametrize("name", plot_sweep.FIGURES)
def test_each_figure_has_its_values_and_its_unit(figure, name):
    points = batches(1, 2)
    (axes,) = figure(plot_sweep.sweep, points, figure=name).axes
    assert lines(axes)["fastllama: preallocated, no"][1] == [each[name] for each in points]
    assert lines(axes)[VANILLA][1] == [each["baseline"][name] for each in points]
    assert {"tok_per_s": "tok/s", "ttft_ms": "ms", "max_mem_mb": "MB"}[
        name.removeprefix("decode_")
    ] in axes.get_ylabel()


def test_an_option_that_is_no_size_has_a_linear_axis(figure):
    (axes,) = figure(plot_sweep.sweep, drawn_options(1.0, 0.5, 0.7)).axes
    assert axes.get_xscale() == "linear" and axes.get_xlabel() == "temperature"
    assert lines(axes)[VANILLA][0] == [0.5, 0.7, 1.0]
    assert "do_sample=true" in axes.get_title(loc="left")


def test_words_stand_side_by_side_with_ours_beside_vanilla(figure):
    points = [point(switches={"compile": word}) for word in ("static", "no", "native")]
    (axes,) = figure(plot_sweep.sweep, points).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["static", "no", "native"]
    ours, vanilla = (xs for xs, _, _ in lines(axes).values())
    assert all(round(x) == place and round(y) == place for place, (x, y) in enumerate(zip(ours, vanilla, strict=True)))
    assert all(x < y for x, y in zip(ours, vanilla, strict=True))
    assert {line for _, line, _ in marks(axes)} == {"None"}


def test_numbers_beside_none_are_words(figure):
    points = [point(switches={"prefill_chunk": chunk}) for chunk in (None, 16, 64)]
    (axes,) = figure(plot_sweep.sweep, points).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["none", "16", "64"]


def test_a_cache_that_was_not_chosen_is_as_long_as_it_must_be(figure):
    (axes,) = figure(plot_sweep.sweep, [point(), point(cache_length=4800)]).axes
    assert lines(axes)[VANILLA][0] == [1200, 4800]
    # One length for all of them is none that varies, also where it is just what a point needs.
    points = [point(cache_length=1200), point(prompt_length=500, cache_length=1200)]
    (axes,) = figure(plot_sweep.sweep, points).axes
    assert axes.get_xlabel() == "prompt length, tokens" and "fastllama: preallocated, no" in lines(axes)


def test_the_second_option_is_a_series_per_value(figure):
    points = fuses_and_bucket()
    (axes,) = figure(plot_sweep.sweep, points).axes
    drawn = lines(axes)
    for fuse in ("all", "no"):
        mine = [each for each in points if each["switches"]["fuse"] == fuse]
        assert drawn[f"fuse={fuse}"][:2] == ([16, 64, 256], [each["tok_per_s"] for each in mine])
    assert VANILLA in drawn and len(drawn) == 4
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["fuse=all", "fuse=no", VANILLA]
    assert len(set(marks(axes))) == 4 and [hollow for _, _, hollow in marks(axes)] == [False, True] * 2
    (axes,) = figure(plot_sweep.sweep, points, axis="fuse").axes
    assert axes.get_xlabel() == "fuse" and {"bucket=16", "bucket=64", "bucket=256"} < lines(axes).keys()


def test_vanilla_lacks_our_switches_and_differs_in_preallocate_alone(figure):
    points = [point(switches={"products": "stock"}, batch_size=size) for size in (1, 2)]
    points += [point(vanilla=None, batch_size=size, switches={"bucket": 256}) for size in (1, 2)]
    (axes,) = figure(plot_sweep.sweep, points).axes
    assert {"preallocate=true", "preallocate=false"} < lines(axes).keys() and axes.get_xlabel() == "batch size, rows"


def test_the_last_of_two_counts_and_what_is_not_there_is_named(figure):
    old, new = point(batch_size=2, speed=5.0), point(batch_size=2, speed=6.0)
    entries = [point(), old, skipped(2), skipped(64), new, skipped(1)]
    (axes,) = figure(plot_sweep.sweep, entries).axes
    assert lines(axes)[VANILLA][0] == [1, 2]
    assert lines(axes)["fastllama: preallocated, no"][1][1] == new["tok_per_s"]
    title = " ".join(axes.get_title(loc="left").split())
    assert title.endswith("not shown: batch_size=64: skipped")
    one_token = [point(new_tokens=size, cache_length=1000 + size) for size in (1, 50, 200)]
    (axes,) = figure(plot_sweep.sweep, one_token, figure="decode_tok_per_s").axes
    assert "not shown: new_tokens=1: no decode_tok_per_s" in axes.get_title(loc="left")


def test_points_of_several_sources_say_so(figure):
    points = [point(batch_size=size, source_sha256=digit * 64) for size, digit in ((1, "a"), (2, "b"))]
    assert "2 states of the sources" in figure(plot_sweep.sweep, points).axes[0].get_title(loc="left")
    points[1]["source_sha256"] = "a" * 64
    assert "sources" not in figure(plot_sweep.sweep, points).axes[0].get_title(loc="left")


OTHER = {**ENVIRONMENT, "cpu": "Other CPU"}
REFUSED = {
    "no point": ([], {}, "no measured point has tok_per_s"),
    "skipped alone": ([skipped(1), skipped(2)], {}, r"batch_size=1: skipped; batch_size=2: skipped"),
    "nothing varies": ([point(), point()], {}, "nothing varies"),
    "one left": ([point(), skipped(2)], {}, r"nothing varies .*batch_size=2: skipped"),
    "three": (
        [point(), point(batch_size=2, prompt_length=10, cache_length=210, dtype="bf16")],
        {},
        "at most two options, and here 3 vary: dtype, batch_size, prompt_length",
    ),
    "machines": ([point(), point(batch_size=2, environment=OTHER)], {}, "2 machines.*Example CPU.*Other CPU"),
    "a machine behind a newer point": ([point(environment=OTHER), point(), point(batch_size=2)], {}, "2 machines"),
    "series": (
        [point(model=f"m{n}", dtype=d) for n in range(9) for d in ("fp32", "bf16")],
        {"axis": "dtype"},
        "8 series",
    ),
    "axis": (batches(1, 2), {"axis": "bucket"}, "bucket does not vary"),
    "no option": (batches(1, 2), {"axis": "colour"}, "'colour' is no option"),
    "no memory": ([{**each, "max_mem_mb": None} for each in batches(1, 2)], {"figure": "max_mem_mb"}, "max_mem_mb"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sweep_is_refused_in_a_sentence(case, tmp_path):
    entries, named, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as refusal:
        plot_sweep.sweep(entries, tmp_path / "x.png", **named)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


# memory


def test_memory_of_ours_and_vanilla_and_the_cache_s_part(figure):
    points = batches(1, 2, 4)
    for place, each in enumerate(points):
        each["max_mem_mb"], each["baseline"]["max_mem_mb"] = 300.0 + place, 350.0 + place
    (axes,) = figure(plot_memory.memory, points).axes
    drawn = lines(axes)
    assert drawn["fastllama: preallocated, no"] == ([1, 2, 4], [300.0, 301.0, 302.0], [])
    assert drawn[VANILLA] == ([1, 2, 4], [350.0, 351.0, 352.0], [])
    (cache,) = [line for line in axes.lines if "cache" in line.get_label()]
    config = json.loads((sources.ROOT / "fastllama/demo/weights/target/config.json").read_text())
    position = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    # A few positions of slack, and the mask.
    expected = [size * 1200 * position / 1e6 for size in (1, 2, 4)]
    assert list(cache.get_ydata()) == pytest.approx(expected, rel=0.02) and min(cache.get_ydata()) > expected[0]
    assert cache.get_marker() == "x"


def test_the_cache_is_of_models_whose_shape_is_known(figure):
    assert plot_memory.cache_mb(point(model="a-folder")) is None
    assert plot_memory.cache_mb(point(vanilla=None)) is None
    assert plot_memory.cache_mb(point(model="random:llama-2-7b", dtype="fp16")) == pytest.approx(629.1, rel=0.01)
    (axes,) = figure(plot_memory.memory, batches(1, 2, model="a-folder")).axes
    assert not [line for line in axes.lines if "cache" in str(line.get_label())]


# the log


def test_the_timeline_is_narrow_and_its_groups_can_be_told_apart(figure):
    commits = [digit * 40 for digit in "abc"]
    records = [
        fake_record(number, commit=commit, model=f"model-{group}", speed=20.0 * (group + 1), spread=0.05)
        for number, (group, commit) in enumerate(((g, c) for c in commits for g in range(5)), 1)
    ]
    made = figure(history.timeline, records)
    (axes,), (panel,) = made.axes, made.subfigs
    assert made.get_figwidth() <= 6
    (legend,) = panel.legends
    renderer = made.canvas.get_renderer()
    assert legend.get_window_extent(renderer).y1 <= axes.get_tightbbox(renderer).y0
    assert [text.get_text()[:7] for text in legend.get_texts()] == [f"model-{group}" for group in range(5)]
    assert len(set(marks(axes))) == 5
    drawn = list(lines(axes).values())
    for place in range(3):
        xs = sorted(group[0][place] for group in drawn)
        assert round(xs[0]) == round(xs[-1]) == place and all(b - a > 0.1 for a, b in itertools.pairwise(xs))
    own = [each for each in records if each["model"] == "model-2"]
    ratios = [statistics.ratios_to_vanilla(each) for each in own]
    assert drawn[2][1] == [each["decode_speedup"] for each in own]
    assert drawn[2][2] == [pytest.approx((min(each), max(each))) for each in ratios]


def test_the_timeline_has_panels_by_machine_and_of_at_most_eight_groups(figure):
    records = [fake_record(number, model=f"model-{number}") for number in range(1, 11)]
    records.append(fake_record(11, environment=OTHER))
    made = figure(history.timeline, records)
    assert [len(panel.legends[0].get_texts()) for panel in made.subfigs] == [8, 2, 1]
    titles = [panel.axes[0].get_title(loc="left") for panel in made.subfigs]
    assert titles[0] == titles[1] != titles[2] and titles[2].startswith("Other CPU")


def test_the_curve_shows_spread_and_a_marker_per_machine(figure):
    drawn = [point(spread=0.1), point(spread=0.1, environment=OTHER)]
    (axes,) = figure(curve.curve, drawn).axes
    ours, vanilla = (container.lines[2][0].get_segments() for container in axes.containers)
    for segments, is_baseline in ((ours, False), (vanilla, True)):
        ends = [(segment[0][1], segment[1][1]) for segment in segments]
        assert ends == [pytest.approx(figures.spread(each, "row_tok_per_s", is_baseline)) for each in drawn]
    made = [line for line in axes.lines if str(line.get_label()).startswith("fastllama")]
    assert [line.get_label() for line in made] == [f"fastllama, {figures.machine_name(each)}" for each in drawn]
    assert len({line.get_marker() for line in made}) == 2


def test_rows_of_one_token_or_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        plot_rows.rows([fake_record()], tmp_path / "none" / "x.png")
    with pytest.raises(ValueError, match="decode"):
        plot_rows.rows([fake_record(1, new_tokens=1)], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_group_is_chosen_by_its_name():
    records = [fake_record(1), fake_record(2, model="other"), fake_record(3, dtype="bf16")]
    assert plot_rows.choose(records) == records[2:]
    assert plot_rows.choose(records, "other fp32") == records[1:2]
    for group in ("demo", "nothing"):
        with pytest.raises(ValueError, match="groups"):
            plot_rows.choose(records, group)
    with pytest.raises(ValueError, match="no record"):
        plot_rows.choose([])


# the command line


@pytest.fixture
def plot(tmp_path, capsys):
    """Run `plot` on tmp_path; gives (exit code, standard output, standard error)."""

    def run(*arguments):
        code = command_line.main(["--root", str(tmp_path), "plot", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def kept(path, entries):
    for entry in entries:
        points_file.append(path, entry)
    return path


def test_sweeps_and_memory_from_the_command_line(tmp_path, plot):
    path = kept(tmp_path / "s.jsonl", [*fuses_and_bucket(), skipped(64)])
    for number, arguments in enumerate((["memory"], ["sweep"], ["sweep", "--figure", "ttft_ms", "--axis", "fuse"])):
        picture = tmp_path / f"{number}.svg"
        assert plot(*arguments, path, "-o", picture) == (0, f"{picture}\n", "")
    texts = [(tmp_path / f"{number}.svg").read_text() for number in range(3)]
    assert "peak memory" in texts[0] and "tok/s, whole run" in texts[1] and "first token, ms" in texts[2]
    assert all("batch_size=64: skipped" in text for text in texts)


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, plot, monkeypatch):
    good = kept(tmp_path / "good.jsonl", batches(1, 2))
    alike = kept(tmp_path / "alike.jsonl", [point(), point()])
    mixed = kept(tmp_path / "mixed.jsonl", [point(), point(batch_size=2, environment=OTHER)])
    three = kept(tmp_path / "three.jsonl", [point(), point(batch_size=2, new_tokens=10, dtype="bf16")])
    picture = tmp_path / "x.png"
    cases = [
        (["rows", "-o", picture], "no record"),
        (["timeline", "-o", picture], "no timeline"),
        (["curve", "-o", picture], "no curve"),
        (["rows", "-o", tmp_path / "x.jpg"], "no record"),
    ]
    for kind in ("sweep", "memory"):
        cases += [
            ([kind, tmp_path / "none.jsonl", "-o", picture], "there is no file"),
            ([kind, alike, "-o", picture], "nothing varies"),
            ([kind, mixed, "-o", picture], "2 machines"),
            ([kind, three, "-o", picture], "at most two options"),
            ([kind, good, "-o", tmp_path / "x.pdf"], ".png or .svg"),
            ([kind, good, "-o", tmp_path / "none" / "x.png"], "no folder"),
            ([kind, good, "--axis", "dtype", "-o", picture], "dtype does not vary"),
        ]
    for arguments, words in cases:
        code, out, error = plot(*arguments)
        assert (code, out) == (2, "") and error.startswith("error: ") and error.count("\n") == 1 and words in error
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for kind in ("sweep", "memory"):
        assert plot(kind, good, "-o", picture)[::2] == (
            2,
            'error: drawing needs matplotlib: pip install -e ".[plot]"\n',
        )
    assert not picture.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_without_matplotlib_the_extra_is_named(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw, content = KINDS[kind]
    with pytest.raises(ValueError, match=r"pip install -e \"\.\[plot\]\""):
        draw(content, tmp_path / "x.png")


def test_a_sweep_that_was_just_measured(tmp_path, plot, monkeypatch):
    model = write_tiny(tmp_path / "tiny")
    monkeypatch.setattr(memory, "peaks", lambda point, name: memory.Peaks(10.0, 20.0, 0.5))
    monkeypatch.setattr(measure, "Ceiling", lambda device: ceiling.Ceiling(device, 2**20))
    file, picture = tmp_path / "s.jsonl", tmp_path / "x.svg"
    argv = ["--model", model, "--dtype", "fp32", "--device", "cpu", "--prompt-length", "12", "--new-tokens", "4"]
    argv += ["--runs", "2", "--warmup", "0", "--preallocate", "--do-sample", "--json", file]
    assert run_llama.main([*map(str, argv), "--sweep", "temperature=0.5,1.5", "--sweep", "batch_size=1,2"]) == 0
    for kind in ("sweep", "memory"):
        assert plot(kind, file, "--axis", "temperature", "-o", picture)[0] == 0
        text = picture.read_text()
        assert ">batch_size=1<" in text and ">batch_size=2<" in text and ">temperature<" in text and ">1.5<" in text
        assert "do_sample=true" in text and f">{canvas.VANILLA}<" in text
