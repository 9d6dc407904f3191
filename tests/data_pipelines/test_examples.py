"""Fields of a serialized example: those that TFDS reads, of whatever sizes."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipelines import examples


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000])  # lengths of one byte, of two, of three
@pytest.mark.parametrize("number", [0, 1, 300, 2**31 - 1])
def test_what_tfds_reads(size, number):
    tensor = tfds.features.Tensor(shape=(None, 1), dtype=np.uint16, encoding="bytes")
    features = tfds.features.FeaturesDict(
        {"id": tfds.features.Text(), "rows": tensor, "task": tfds.features.Scalar(np.int32), "has": tfds.features.Scalar(np.float32)}
    )
    rows = np.random.default_rng(size).integers(0, 2**16, (size, 1)).astype(np.uint16)
    example = features.serialize_example({"id": "é" * (size % 200), "rows": rows, "task": number, "has": number / 3})
    expected, found = features.deserialize_example_np(example), examples.fields(example)
    assert found.keys() == expected.keys()
    assert bytes(found["id"]) == expected["id"]
    assert np.array_equal(np.frombuffer(found["rows"], np.uint16).reshape(-1, 1), expected["rows"])
    assert (found["task"], found["has"]) == (expected["task"], expected["has"])


@pytest.mark.parametrize("content", [b"\x0a\x05abc", b"\x08\x01", b"\x0a"])
def test_no_example(content):
    with pytest.raises((ValueError, IndexError)):
        examples.fields(content)
