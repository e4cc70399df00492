"""An event file of TensorBoard: the same bytes for the same content, and no host's name."""

import io
from pathlib import Path

from fastllama.kernels.whole_file import whole

# TensorBoard's own writers put the time, the host's name and the process's number there.
NAME = "events.out.tfevents.record"
_ANY = "events.out.tfevents.*"


def scalar(tag: str, value: float):
    """A point of a chart, as a Summary of TensorBoard's."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    # The form that every reader knows; a tensor is a scalar to TensorBoard only.
    return Summary(value=[Summary.Value(tag=tag, simple_value=value)])


def text(tag: str, markdown: str):
    """An entry of the text tab, as a Summary."""
    from tensorboard.plugins.text.summary_v2 import text_pb

    return text_pb(tag, markdown)


def hparams_columns(hparams: dict[str, list], metrics: dict[str, str], later: tuple[str, ...] = ()):
    """The columns of the hparams table, as a Summary.

    hparams: a column's name and the values that it has, all bool, all numbers or all str. metrics: the tag of a
    scalar and the column's name. TensorBoard shows five of each until it is asked for more: the first metrics, and of
    the hparams, by name, those that are said to differ. That is not said of those named in `later`.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata

    experiment = api_pb2.Experiment()
    for name, values in hparams.items():
        column = experiment.hparam_infos.add(name=name, differs=name not in later and len(set(values)) > 1)
        known = [value for value in values if value is not None]
        if isinstance(known[0], (bool, str)):
            column.type = api_pb2.DATA_TYPE_BOOL if isinstance(known[0], bool) else api_pb2.DATA_TYPE_STRING
            column.domain_discrete.extend(sorted(set(known)))
        else:
            column.type = api_pb2.DATA_TYPE_FLOAT64
            column.domain_interval.min_value, column.domain_interval.max_value = min(known), max(known)
    for tag, name in metrics.items():
        experiment.metric_infos.add(name=api_pb2.MetricName(tag=tag), display_name=name)
    return _hparams(metadata.EXPERIMENT_TAG, experiment=experiment)


def hparams_row(values: dict, time: float) -> list:
    """A row of the hparams table, named as its run: begun and ended, two Summaries. time: seconds since 1970."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    begun = plugin_data_pb2.SessionStartInfo(start_time_secs=time)
    for column, value in values.items():
        kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(begun.hparams[column], kind, value)
    ended = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time)
    return [
        _hparams(metadata.SESSION_START_INFO_TAG, session_start_info=begun),
        _hparams(metadata.SESSION_END_INFO_TAG, session_end_info=ended),
    ]


def _hparams(tag: str, **content):
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    about = metadata.create_summary_metadata(HParamsPluginData(**content))
    # The values of a row are a map, which has no order of its own.
    data = HParamsPluginData.FromString(about.plugin_data.content)
    about.plugin_data.content = data.SerializeToString(deterministic=True)
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])


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
        # Its unfinished name does not hold that of an event file, which TensorBoard would read.
        with whole(path) as unfinished:
            unfinished.write_bytes(content)
    for other in path.parent.glob(_ANY):
        if other != path:
            other.unlink(missing_ok=True)
