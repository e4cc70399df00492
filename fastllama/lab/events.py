"""An event file of TensorBoard: the same bytes for the same content, and no host's name."""

import io
import os
from pathlib import Path

# TensorBoard's own writers put the time, the host's name and the process's number there.
NAME = "events.out.tfevents.record"
_ANY = "events.out.tfevents.*"


def scalar(tag: str, value: float):
    """A point of a chart, as a Summary of TensorBoard's."""
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    return scalar_pb(tag, value)


def text(tag: str, markdown: str):
    """An entry of the text tab, as a Summary."""
    from tensorboard.plugins.text.summary_v2 import text_pb

    return text_pb(tag, markdown)


def hparams_columns(hparams: dict[str, list], metrics: dict[str, str]) -> list:
    """The columns of the hparams table, as one Summary.

    hparams: a column's name and the values that it has, all bool, all numbers or all str. metrics: the tag of a
    scalar and the column's name.
    """
    from tensorboard.plugins.hparams import summary_v2

    def domain(values: list):
        if isinstance(values[0], (bool, str)):
            return summary_v2.Discrete(sorted(set(values)))
        return summary_v2.RealInterval(float(min(values)), float(max(values)))

    columns = [summary_v2.HParam(name, domain(values)) for name, values in hparams.items()]
    return [
        summary_v2.hparams_config_pb(
            columns, [summary_v2.Metric(tag, display_name=name) for tag, name in metrics.items()]
        )
    ]


def hparams_row(name: str, values: dict, time: float) -> list:
    """A row of the hparams table, begun and ended, as two Summaries. time: seconds since 1970."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2

    begun = summary_v2.hparams_pb(values, trial_id=name, start_time_secs=time)
    plugin_data = begun.value[0].metadata.plugin_data
    # The values are a map, which has no order of its own.
    plugin_data.content = plugin_data_pb2.HParamsPluginData.FromString(plugin_data.content).SerializeToString(
        deterministic=True
    )
    status = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time)
    ended = type(begun)()
    ended.value.add(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=status)),
        tensor=metadata.NULL_TENSOR,
    )
    return [begun, ended]


def _encoded(summaries: list, step: int, time: float) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    writer = RecordWriter(file)
    writer.write(Event(wall_time=time, file_version="brain.Event:2").SerializeToString())
    for summary in summaries:
        writer.write(Event(wall_time=time, step=step, summary=summary).SerializeToString())
    return file.getvalue()


def write(folder: Path, summaries: list, step: int, time: float) -> None:
    """Put the summaries in place of all events in `folder`; events that are the same already are left alone.

    time: seconds since 1970.
    """
    path = Path(folder) / NAME
    content = _encoded(summaries, step, time)
    if not path.exists() or path.read_bytes() != content:
        # TensorBoard would read a temporary file whose name holds that of an event file.
        temporary = path.with_name(f".board.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    for other in path.parent.glob(_ANY):
        if other != path:
            other.unlink()
