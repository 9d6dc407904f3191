"""Records: what is written is read, a shard is there whole or not at all, and what does not fit is reported with both values."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import RequestError
from data_pipelines import records
from tests.data_pipelines.conftest import SMOKE, random_record


def open_records(config):
    return records.Records(Path(config.data.path), config)


def test_what_is_written_is_read(write_records):
    dataset = open_records(write_records(2, 0, 3))
    assert len(dataset) == 5
    for number in range(5):
        written, read = random_record(number), dataset[number]
        assert read.keys() == written.keys()
        assert (read["id"].decode(), read["task"], read["has_image"]) == (f"n{number}", written["task"], written["has_image"])
        for name in records.record_spec(SMOKE):
            assert np.array_equal(read[name], written[name]), name


def test_the_names_of_format_1():
    """Those of every record on disk, whatever the fields of a batch are called."""
    names = {"id", "task", "target", "condition", "reference", "text", "image", "has_image"}
    assert set(records.schema(SMOKE)) == names
    aligned = replace(SMOKE, alignment=replace(SMOKE.alignment, enabled=True))
    inputs = {f"shown_{name}" for name in ("tokens", "mask", "positions", "source", "features")}
    assert set(records.schema(aligned)) == names | inputs


def test_bfloat16_goes_through_uint16_exactly():
    x = np.concatenate([np.random.default_rng(0).normal(size=1000).astype(np.float32) * 100, np.float32([0, -0.0, 1, 1 + 2**-8, 3e38])])
    rounded = np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))
    back = records.from_bits(records.to_bits(x))
    assert back.dtype == np.float32
    assert (back.view(np.uint32) == rounded.view(np.uint32)).all()
    assert (records.to_bits(back) == records.to_bits(x)).all()


def test_a_shard_is_there_whole_or_not_at_all(tmp_path):
    path, features = records.shard_path(tmp_path, 0, 1), records.schema(SMOKE)

    def write(die):
        with records.shard_writer(path, features) as append:
            append(random_record(0))
            assert not path.exists()
            if die:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(die=True)
    assert not path.exists()
    write(die=False)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_going_on_needs_the_same_configuration_and_source(tmp_path):
    folder = tmp_path / "new" / "records"
    records.begin(folder, SMOKE, {"key": 1})
    records.begin(folder, SMOKE, {"key": 1})
    records.begin(folder, replace(SMOKE, vae=replace(SMOKE.vae, encode_frames=8), seed=3), {"key": 1})
    with pytest.raises(RequestError, match=r"begun as other records \(source\.key=1 there, 2 now\)"):
        records.begin(folder, SMOKE, {"key": 2})
    smaller = replace(SMOKE, data=replace(SMOKE.data, reference=replace(SMOKE.data.reference, height=16)))
    with pytest.raises(RequestError, match=r"data\.reference\.height=32 there, 16 now"):
        records.begin(folder, smaller, {"key": 1})
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(RequestError, match=r"no records, but .*letters"):
        records.begin(tmp_path, SMOKE, {})


def test_records_that_do_not_fit_are_refused_with_both_values(write_records):
    config = write_records(2)
    for wrong, words in {
        replace(config, video=replace(config.video, frames=5)): "target is 3 x 4 x 6 x 16, not 2 x 4 x 6 x 16",
        replace(config, data=replace(config.data, reference=replace(SMOKE.video, height=16))): (
            "reference is 3 x 4 x 6 x 16, not 3 x 2 x 6 x 16"
        ),
        replace(config, text=replace(config.text, dim=64)): "text is any x 32, not any x 64",
        replace(config, image=replace(config.image, image_size=42)): "image is 5 x 32, not 10 x 32",
        replace(config, dit=replace(config.dit, text_len=16)): "prompts have up to 32 rows, dit.text_len is 16",
        replace(config, dit=replace(config.dit, image_dim=None, in_channels=16)): "records are for an image-to-video network",
    }.items():
        with pytest.raises(RequestError, match=words):
            open_records(wrong)
    assert len(open_records(replace(config, dit=replace(config.dit, text_len=64)))) == 2


def test_a_folder_that_is_no_dataset(write_records, tmp_path):
    with pytest.raises(RequestError, match=r"absent: no records, records\.json is absent; make some: python -m launch\.encode"):
        records.Records(tmp_path / "absent", SMOKE)
    for missing in ("dataset_info.json", "features.json", "empty_text.npy"):
        config = write_records(1, name=missing)
        (tmp_path / missing / missing).unlink()
        with pytest.raises(RequestError, match="unfinished records"):
            open_records(config)


@pytest.mark.parametrize("content", ["", '{"format": 1, "config": {"di', "[1]", '{"format": 1, "config": 3, "source": {}}', "{}"])
def test_a_cut_description_is_one_short_line(write_records, content):
    config = write_records(1)
    file = Path(config.data.path) / "records.json"
    file.write_text(content)
    for use in (open_records, lambda config: records.begin(file.parent, config, {"world": "random"})):
        with pytest.raises(RequestError, match=rf"^{file}: .* JSON.*; restore it from a copy, or make the records again") as error:
            use(config)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("vae", {"latents_mean": (0.0,) * 16}, r"vae\.latents_mean="),
        ("text", {"relative_max_distance": 64}, r"text\.relative_max_distance=128 there, 64 now"),
        ("image", {"num_heads": 4}, r"image\.num_heads=2 there, 4 now"),
        ("video", {"fps": 16}, r"video\.fps=8 there, 16 now"),
    ],
)
def test_records_of_another_encoding_of_equal_shape_are_refused(write_records, part, change, words):
    config = write_records(1)
    with pytest.raises(RequestError, match=f"records of another encoding .*{words}"):
        open_records(replace(config, **{part: replace(getattr(config, part), **change)}))
    assert len(open_records(replace(config, vae=replace(config.vae, encode_frames=8), text=replace(config.text, dtype="bfloat16")))) == 1


def test_the_digest_is_of_the_contents(write_records, tmp_path):
    """Moved records keep it; one array, one record more or other weights change it."""

    def digest(config):
        return records.digest(Path(config.data.path), config)

    config = write_records(2, 1)
    before = digest(config)
    moved = Path(config.data.path).rename(tmp_path / "moved")
    assert digest(replace(config, data=replace(config.data, path=str(moved)))) == before
    assert digest(write_records(2, 2)) != before
    config = write_records(2, 1, name="other")
    assert digest(config) == before
    made = json.loads((tmp_path / "other" / "records.json").read_text())
    (tmp_path / "other" / "records.json").write_text(json.dumps(made | {"source": {"world": "another"}}))
    assert digest(config) != before
    config = write_records(2, 1, name="changed")
    with records.shard_writer(records.shard_path(tmp_path / "changed", 1, 2), records.schema(SMOKE)) as append:
        append(random_record(7))
    assert digest(config) != before


def test_a_damaged_record_is_reported_with_its_shard(write_records):
    config = write_records(2, 0, 2)
    shard = records.shard_path(Path(config.data.path), 2, 3)
    content = bytearray(shard.read_bytes())
    content[content.index(random_record(2)["target"].tobytes()[:32])] ^= 1
    shard.write_bytes(bytes(content))
    dataset = open_records(config)
    assert [dataset[i]["id"] for i in (0, 1, 3)] == [b"n0", b"n1", b"n3"]
    with pytest.raises(RequestError, match=rf"^{shard}: record 2 of the dataset cannot be read"):
        dataset[2]


def test_the_empty_prompt_is_padded(write_records):
    text = records.empty_text(Path(write_records(1).data.path), 4)
    assert (text == np.array([1, 0, 0, 0], np.float32)[:, None]).all()
    assert text.shape == (4, SMOKE.text.dim)
