"""TensorBoard: an event file for each model, in trackers/tensorboard/<role>; samples are texts.

Written in this thread, not in one of the library's own, so that a full disk is told and cannot stop training. The first
event of a sitting says where it begins: TensorBoard forgets what an earlier one wrote from there on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from constellation.trackers.tracker import Told

FLUSH_S = 2.0


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self._folder, self._settings = folder, settings
        self._writers: dict[str, Any] = {}
        self._flushed = time.monotonic()

    def tell(self, step: Told) -> None:
        from tensorboardX import summary

        if step.role not in self._writers:
            self._begin(step)
        for name, value in step.numbers().items():
            self._write(step, summary.scalar(name, value))
        if step.sample:
            self._write(step, summary.text("sample", step.sample))
        if time.monotonic() - self._flushed > FLUSH_S:
            for writer in self._writers.values():
                writer.flush()
            self._flushed = time.monotonic()

    def close(self, status: str) -> None:
        for writer in self._writers.values():
            writer.close()

    def _begin(self, step: Told) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        place = self._folder / step.role
        place.mkdir(parents=True, exist_ok=True)
        sitting = f".{len(list(place.iterdir()))}"  # two that begin within a second are two files
        writer = self._writers[step.role] = EventsWriter(str(place / "events"), sitting)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        writer.write_event(event_pb2.Event(wall_time=time.time(), step=step.step, session_log=start))
        page = "\n".join(f"    {name} = {json.dumps(value, default=str)}" for name, value in self._settings.items())
        self._write(step, summary.text("settings", page))

    def _write(self, step: Told, what: Any) -> None:
        from tensorboardX.proto import event_pb2

        event = event_pb2.Event(wall_time=time.time(), step=step.step, summary=what)
        self._writers[step.role].write_event(event)


def begin(folder: Path, title: str, settings: Mapping[str, Any]) -> TensorBoard:
    return TensorBoard(folder, settings)
