"""changes.md: the experiment log, rendered from the records and the words beside them."""

from pathlib import Path

from fastllama.lab.measuring import statistics
from fastllama.lab.points import figures
from fastllama.lab.quality import score
from fastllama.lab.records import words
from fastllama.lab.records.sources import ROOT

NAME = "changes.md"

_HEADER = """\
# What each change did

Rendered from the records in `tb_logs/` by `python -m fastllama.lab changes`; not edited by hand. A test renders
it again and compares.

**How to read it.** One table per machine, model and workload; one row per record, each on top of the row before.

- *tok/s*: batch size x new tokens / t_N, seconds of the whole call. *decode tok/s*: batch size x (new tokens - 1) /
  (t_N - t_1), from two calls of generate. Both are medians over the runs; (smallest..largest sample) follows.
- *x vanilla*: decode tok/s over that of transformers' own class, timed in turns in the same run. `~` behind it: the
  rule below finds no difference, so nothing is claimed.
- *of ceiling*: bytes that a token must read x tokens per second, as a share of the read bandwidth measured in the
  same run. 100 % is as fast as the memory allows. Up to record 040 the best of torch's reductions told the bandwidth;
  from 041 on our one-row product is among what reads, and the median over the runs counts.
- *max MB*: peak memory of a fresh process (CPU: anonymous memory, and the weights that stay mapped from the
  checkpoint's file; accelerator: allocated).
- *hash*: sha256 over the new ids, 8 digits. *parity*: `exact`, ids equal to vanilla's; `tie`, equal up to a position
  where vanilla's two best logits are closer than 1e-4; `half`, fp16 or bf16, where equality is reported and not
  promised; `lossy`, a switch that stores fewer bits: never called equal, but scored; `drawn`, drawn with assistance:
  other tokens of the same distribution; `differs`; `reference`, vanilla itself.
- *assisted x*, behind what is compiled: the seconds of the same model unassisted over those of the assisted calls,
  whole calls in turns in one process. Assisted rows have tables of their own.
- *quality*, of lossy rows: teacher-forced on the start of the demo's held-out text, against vanilla in fp32:
  perplexity and its change, KL divergence of the reference from ours (nats; mean, and the 99th percentile over the
  positions), and the share of positions with the same likeliest token.
- *gain*: of "x vanilla" on the row before; for a further row of one commit (a switch that was tried), on the first
  row of that commit. The machine drifts between rows, and vanilla drifts with it, so the runs' ratios to vanilla are
  compared and not tok/s; the figure is that of their medians. `~`: no difference by the rule below. Each row is a
  process of its own, and processes of one commit differ as well: rows "measured again" show by how much.
- *the rule*: of `python -m fastllama.lab compare`, with p < 0.05, on the logarithms of the runs' ratios: a t-test
  where there are fewer than six runs, which is where ranks say nothing, and a rank test from there on.

**How to add a row.** Commit the change, then measure it with one command:

    python run_llama.py --preallocate --compile static --record "what changed"

To say beforehand what you expect, run `python -m fastllama.lab predict "what changed" "what I expect"` and commit
it with the change. Where there is no .git (a copied tree), add `--commit SHA`: the source hash in the record is
compared with that commit when the record comes back.
"""

_FOOTER = """\
## As curves

    python -m fastllama.lab board
    tensorboard --logdir tb_logs

The first line writes TensorBoard's event files from the records (they are not in git), the second shows them: a
chart per workload and figure, a point per record. `python -m fastllama.lab plot rows -o rows.svg` draws one group.
"""


def cell(text: str) -> str:
    """`text` as the inside of a markdown table cell: one line, without column bars."""
    return " ".join(text.split()).replace("|", "\\|")


def number(value: float | None, digits: int = 1) -> str:
    """A figure with a comma at the thousands; a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _adaptive(value: float) -> int:
    """Decimals that show at least three digits of a speed."""
    return 0 if value >= 1000 else 1 if value >= 100 else 2


def speed(value: float | None, spread: tuple[float, float] | None = None) -> str:
    """A median, and behind it the smallest and largest sample."""
    if value is None:
        return "-"
    digits = _adaptive(value)
    if spread is None:
        return number(value, digits)
    return f"{number(value, digits)} ({number(spread[0], digits)}..{number(spread[1], digits)})"


def table(heads: list[str], rows: list[list[str]], right: tuple[str, ...] = ()) -> str:
    """A markdown table; the columns named in `right` are aligned to the right."""
    rule = ["---:" if head in right else "---" for head in heads]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *rows]) + "\n"


def gain(record: dict, before: dict | None) -> str:
    """Gain of "x vanilla" on another row in percent; "~" where the rule finds none, a dash where there is no row."""
    if before is None or not record["decode_speedup"] or not before["decode_speedup"]:
        return "-"
    verdict = statistics.compare_points(record, before)
    return "~" if verdict.word == statistics.NO_DIFFERENCE else f"{100 * (verdict.ratio - 1):+.1f} %"


def times_vanilla(record: dict) -> str:
    """Decode speed over that of the vanilla in the same run, with "~" where the rule finds no difference."""
    ratio = number(record["decode_speedup"], 2)
    if record["baseline"] is None or record["decode_speedup"] is None:
        return ratio
    return f"{ratio} ~" if statistics.compare_with_vanilla(record).word == statistics.NO_DIFFERENCE else ratio


def own_rows(records: list[dict]) -> list[dict]:
    """Of each commit, machine and workload the first record: what the commit is, without switches tried beside it."""
    first: dict[tuple, dict] = {}
    for record in records:
        first.setdefault((record["commit"], figures.machine_name(record), figures.workload(record)), record)
    return list(first.values())


def compared_with(rows: list[dict], index: int) -> dict | None:
    """The row that row `index` of a group is a gain on: its commit's first row, or for that one, the commit before's.

    So switches tried at one commit are compared with that commit's own row and not with each other.
    """
    own = own_rows(rows)
    position = next(place for place, row in enumerate(own) if row["commit"] == rows[index]["commit"])
    if own[position] is not rows[index]:
        return own[position]
    return own[position - 1] if position else None


def groups(records: list[dict]) -> dict[str, dict[tuple, list[dict]]]:
    """Records by machine and workload, in order of first appearance; vanilla's own records lead their group."""
    grouped: dict[str, dict[tuple, list[dict]]] = {}
    for record in records:
        workloads = grouped.setdefault(figures.machine_name(record), {})
        workloads.setdefault(figures.workload(record), []).append(record)
    for workloads in grouped.values():
        for rows in workloads.values():
            rows.sort(key=lambda record: record["parity"] != "reference")  # stable: the order stays within each
    return grouped


def prediction(record: dict) -> str:
    """The expectation, and whether git holds it from before the run."""
    if record["prediction"] is None:
        return ""
    note = {True: "", False: " (not committed before the run)", None: " (not checked: no .git)"}
    return cell(record["prediction"]) + note[record["prediction_committed"]]


def how(record: dict) -> str:
    """What was compiled, and for an assisted record its gain end to end over the same model unassisted."""
    words = record["switches"]["compile"]
    return (
        f"{words}, assisted x {number(record['assisted']['speedup_end_to_end'], 2)}" if "assisted" in record else words
    )


def _row(record: dict, before: dict | None) -> list[str]:
    share = record["ceiling_fraction"]
    return [
        f"[{record['id'].split('-')[0]}]({words.LOGS}/{record['id']}/record.json)",
        f"`{record['commit'][:7]}`",
        cell(record["what"]),
        how(record),
        speed(record["tok_per_s"]),
        speed(record["decode_tok_per_s"], figures.spread(record)),
        times_vanilla(record),
        "-" if share is None else f"{100 * share:.0f} %",
        number(record["max_mem_mb"]),
        f"`{record['hash']}`",
        record["parity"],
        gain(record, before),
    ]


_HEADS = ["#", "commit", "what changed", "compile", "tok/s", "decode tok/s", "x vanilla", "of ceiling", "max MB"]
_HEADS += ["hash", "parity", "gain"]
_RIGHT = ("tok/s", "decode tok/s", "x vanilla", "of ceiling", "max MB", "gain")


def _group(rows: list[dict]) -> str:
    lines = [_row(record, compared_with(rows, index)) for index, record in enumerate(rows)]
    heads = _HEADS
    if any(record["parity"] == "lossy" for record in rows):
        heads = [*heads, "quality"]
        lines = [[*line, score.of_record(record) or "-"] for line, record in zip(lines, rows, strict=True)]
    if any(record["prediction"] for record in rows):
        heads = [*heads, "predicted"]
        lines = [[*line, prediction(record)] for line, record in zip(lines, rows, strict=True)]
    text = f"### {cell(figures.workload_name(rows[0]))}\n\n"
    if rows[0]["model"].startswith("random:"):
        text += "Random weights: speed and memory only, nothing about quality.\n\n"
    return text + table(heads, lines, _RIGHT)


_CITED_HEADS = ["what changed", "compile", "tok/s", "max MB", "hash"]


def _cited(tables: list[dict]) -> str:
    parts = ["## Cited, not measured here\n"]
    for cited in tables:
        lines = [
            [
                cell(row["what"]),
                cell(row["compile"]),
                f"{row['tok_per_s']:.3f}",
                f"{row['max_mem_mb']:.2f}",
                row["hash"],
            ]
            for row in cited["rows"]
        ]
        parts.append(f"### {cell(cited['source'])}\n")
        parts.append("; ".join(cell(cited[name]) for name in ("machine", "model", "workload", "note")) + "\n")
        parts.append(table(_CITED_HEADS, lines, ("tok/s", "max MB")))
    return "\n".join(parts)


def _tried(entries: list[dict]) -> str:
    lines = [
        f"- **{cell(one['what'])}.** Expected: {cell(one['expected'])} Found: {cell(one['found'])}" for one in entries
    ]
    return "## Tried and left\n\nBy hand, without a record.\n\n" + "\n".join(lines) + "\n"


def _unmeasured(entries: list[dict]) -> str:
    lines = [f"- {cell(entry['what'])}:\n\n      {' '.join(entry['command'].split())}\n" for entry in entries]
    return "## Not yet measured\n\n" + "\n".join(lines)


def render(records: list[dict], root: Path = ROOT) -> str:
    """The whole of changes.md, from records in order of number (record.read_all) and the words under `root`."""
    parts = [_HEADER]
    for machine, workloads in groups(records).items():
        parts.append(f"## {cell(machine)}\n")
        parts.extend(_group(rows) for rows in workloads.values())
    if not records:
        parts.append("No record yet.\n")
    if cited := words.cited(root):
        parts.append(_cited(cited))
    if tried := words.tried(root):
        parts.append(_tried(tried))
    if unmeasured := words.unmeasured(root):
        parts.append(_unmeasured(unmeasured))
    parts.append(_FOOTER)
    return "\n".join(parts)


def write(records: list[dict], root: Path = ROOT) -> Path:
    """Render changes.md; returns its path."""
    path = Path(root) / NAME
    words.write_atomically(path, render(records, root))
    return path


def is_current(records: list[dict], root: Path = ROOT) -> bool:
    """True if changes.md is what the records render to."""
    path = Path(root) / NAME
    return path.exists() and path.read_text(encoding="utf-8") == render(records, root)
