"""What TensorBoard would read of a run."""

from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary


def values(folder: Path) -> Iterator[tuple[int, Summary.Value]]:
    """(step, value) of every event; a record is its length, a checksum, the event, a checksum."""
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            yield from ((event.step, value) for value in event.summary.value)
