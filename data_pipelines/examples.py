"""The fields of a serialized `tf.train.Example`, where they lie: nothing is copied, which protobuf would do twice.

    Example {1: Features {1: repeated entry {1: name, 2: Feature {1: bytes | 2: floats | 3: integers {1: values}}}}}

Only what records.py writes is read: one text of bytes, one float or one integer a field. The bytes have been compared with the shard's hash
before; others are a `ValueError`.
"""

import struct
from collections.abc import Iterator

BYTES, FLOAT, INTEGER = 1, 2, 3  # the kinds of a `tf.train.Feature`


def fields(example: bytes) -> dict[str, memoryview | float | int]:
    """The value of each field by its name."""
    found = {}
    for _, features in _parts(memoryview(example)):
        for _, entry in _parts(features):
            parts = dict(_parts(entry))
            found[str(parts[1], "utf-8")] = _value(parts[2])
    return found


def _value(feature: memoryview) -> memoryview | float | int:
    ((kind, values),) = _parts(feature)
    ((_, value),) = _parts(values)
    if kind == FLOAT:
        return struct.unpack("<f", value)[0]
    return _varint(value, 0)[0] if kind == INTEGER else value


def _parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The number and the content of each part of a message; all that an Example has are of one wire type, with their length before them."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        size, at = _varint(message, at)
        if key & 7 != 2 or at + size > len(message):
            raise ValueError("no example of a record")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, seven bits a byte, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
