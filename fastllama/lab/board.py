"""TensorBoard scalars of a record: a chart per figure and workload, a point per record, the number as its step."""

import json
from datetime import datetime
from pathlib import Path

FIGURES = (
    "tok_per_s",
    "decode_tok_per_s",
    "speedup",
    "decode_speedup",
    "ttft_ms",
    "max_mem_mb",
    "max_reserved_mb",
    "ceiling_fraction",
)
_EVENTS = "events.out.tfevents.*"


def tag(record: dict, name: str) -> str:
    """The chart a figure belongs to: "<workload>/<figure>", where TensorBoard groups by what precedes the slash."""
    keys = ("model", "dtype", "device", "batch_size", "prompt_length", "new_tokens")
    workload = "{} {} {} b{} p{} n{}".format(*(record[key] for key in keys))
    return f"{workload.replace('/', '_')}/{name}"


def step(record: dict) -> int:
    """The record's number."""
    return int(record["id"].split("-")[0])


def write(record: dict, folder: Path) -> None:
    """Write the record's scalars into `folder`, in place of the events that are there."""
    # tensorboard takes a second to import, and only a recorded run needs it.
    from torch.utils.tensorboard import SummaryWriter

    for stale in Path(folder).glob(_EVENTS):
        stale.unlink()
    time = datetime.fromisoformat(record["recorded_at"]).timestamp()
    with SummaryWriter(log_dir=str(folder)) as writer:
        for name in FIGURES:
            if record[name] is not None:
                writer.add_scalar(tag(record, name), record[name], step(record), walltime=time)
        row = {key: record[key] for key in ("what", "commit", "hash", "parity", "command")}
        writer.add_text(tag(record, "row"), f"```\n{json.dumps(row, indent=2)}\n```", step(record), walltime=time)


def write_all(records: list[dict], logs: Path) -> int:
    """Write the scalars of every record under `logs`; returns how many records that was."""
    for record in records:
        write(record, Path(logs) / record["id"])
    return len(records)
