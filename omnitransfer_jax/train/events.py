"""TensorBoard events of a run, written at once: tensorboardX's own thread ends at a full disk, and its queue then blocks the run."""

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.summary import scalar

Proto: Any = event_pb2  # its classes are made when it is imported
Summaries: Any = summary_pb2


class Events:
    """The event file of a process. What the system refuses ends it, in one line: a training does not depend on it."""

    def __init__(self, folder: Path, step: int):
        """Events of steps after `step`, of a process before, count no more."""
        try:
            self._writer: EventsWriter | None = EventsWriter(str(folder / "events"))
        except OSError as error:
            self._end(error)
            return
        self._write(Proto.Event(step=step + 1, session_log=Proto.SessionLog(status=Proto.SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(Proto.Event(step=step, summary=scalar(name, value)))
        self._call("flush")

    def picture(self, step: int, name: str, content: bytes) -> None:
        """A JPEG or PNG under IMAGES."""
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
        image = Summaries.Summary.Image(encoded_image_string=content, width=width, height=height, colorspace=3)
        self._write(Proto.Event(step=step, summary=Summaries.Summary(value=[Summaries.Summary.Value(tag=name, image=image)])))
        self._call("flush")

    def close(self) -> None:
        self._call("close")

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._call("write_event", event)

    def _call(self, name: str, *args: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, name)(*args)
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        self._writer = None
        print(f"no TensorBoard events from here on: {error.strerror or error}; metrics.jsonl has all lines", flush=True)
