"""Clips to records and back: the command end to end, what each record holds, and runs that are killed, shared or wrong."""

import json
import os
import shutil
import wave
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stage1
from configs.errors import RequestError
from data_pipelines import batches, clips, example, pairs, records
from data_pipelines.encoders import Encoders
from data_pipelines.manifest import read_manifest
from launch import command
from launch import encode as launch_encode
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.folders.atomic import sha256
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.tokenizer import byte_tokenizer
from omnitransfer_jax.weights.parts import PARTS

SMOKE = stage1.get_config("smoke")


@pytest.fixture(scope="module")
def encoders():
    """Loaded once for all tests, the weights random."""
    return Encoders(SMOKE, "")


@pytest.fixture
def run(encoders, monkeypatch):
    """A function that runs launch.encode in this process and returns its exit code."""
    monkeypatch.setattr(launch_encode, "Encoders", lambda config, folder, devices: encoders)

    def run(manifest, out, *args):
        return command.execute(
            launch_encode.main,
            launch_encode.FLAGS,
            ["--config=stage1:smoke", f"--manifest={manifest}", f"--out={out}", "--allow_outside", *args],
        )

    return run


@pytest.fixture(scope="module")
def clips_manifest(tmp_path_factory):
    """The example: one pair a task."""
    return example.write_example(tmp_path_factory.mktemp("clips"))


def open_records(folder):
    dataset = records.Records(folder, SMOKE)
    return {record["id"].decode(): record for record in (dataset[i] for i in range(len(dataset)))}


def shards(folder):
    return sorted(path.name for path in folder.glob("records-*"))


def equal(folder, other):
    """Whether two data sets hold the same records in the same shards; their bytes differ, for the order of a record's features is free."""
    ours, theirs = open_records(folder), open_records(other)
    same_shards = (folder / "dataset_info.json").read_text() == (other / "dataset_info.json").read_text()
    pairs = [(ours[name][key], theirs[name][key]) for name in ours for key in ours[name] if name in theirs]
    return same_shards and list(ours) == list(theirs) and all(np.array_equal(a, b) for a, b in pairs)


def test_what_a_record_holds(run, encoders, clips_manifest, tmp_path):
    assert run(clips_manifest, tmp_path / "r") == 0
    found = open_records(tmp_path / "r")
    grey = encoders.latents(np.zeros((1, 9, 32, 48, 3), np.float32))[0]
    for row in read_manifest(clips_manifest):
        record = {name: records.from_bits(x) if np.asarray(x).dtype == np.uint16 else x for name, x in found[row.id].items()}

        def is_close(name, expected, record=record):
            assert record[name].shape == expected.shape
            assert np.abs(record[name] - expected).max() <= 2**-8 * np.abs(expected).max(), (name, record["id"])

        pixels = {
            name: clips.to_unit(clips.read_clip(getattr(row, name).path, frames=9, fps=8, height=32, width=48))
            for name in ("reference", "target")
        }
        is_close("target", encoders.latents(pixels["target"][None])[0])
        is_close("reference", encoders.latents(pixels["reference"][None])[0])
        assert tasks.TASKS[record["task"]].name == row.task
        mask, condition = record["condition"][..., :4], record["condition"][..., 4:]
        if row.task in ("id", "style"):
            assert record["has_image"] == 0
            assert not record["image"].any()
            assert not mask.any()
            assert np.abs(condition - grey).max() <= 2**-8 * np.abs(grey).max()
        else:
            start = clips.to_unit(clips.fit(clips.read_image(row.first_frame), 32, 48)) if row.first_frame else pixels["target"][0]
            video = np.concatenate([start[None], np.zeros((8, 32, 48, 3), np.float32)])
            expected = np.concatenate([np.zeros((3, 4, 6, 4), np.float32), encoders.latents(video[None])[0]], axis=-1)
            expected[0, ..., :4] = 1
            assert record["has_image"] == 1
            is_close("condition", expected)
            is_close("image", encoders.image(start[None])[0])
        assert len(record["text"]) == min(32, len(row.prompt.encode()) + 1)  # bytes, and the end
        (text,), (rows,) = encoders.text([row.prompt])
        is_close("text", text[:rows])
    empty = records.empty_text(tmp_path / "r", 32)
    assert (empty[:1] == records.from_bits(found["motion_1"]["text"])).all()
    assert empty[0].any()
    assert not empty[1:].any()


def test_a_given_first_frame_takes_the_place_of_the_targets_own(encoders, clips_manifest):
    row = next(row for row in read_manifest(clips_manifest) if row.task == "effect")
    picture = clips.read_image(row.first_frame)
    clips_read = pairs.read_pixels(row, SMOKE)
    assert (clips_read.first_frame == clips.fit(picture, 32, 48)).all()
    own = pairs.read_pixels(row._replace(first_frame=None), SMOKE)
    assert (own.first_frame == own.target[0]).all()
    assert (own.target == clips_read.target).all()
    assert (own.first_frame != clips_read.first_frame).any()


def test_the_stretch_of_a_clip_is_encoded(clips_manifest, tmp_path):
    row = read_manifest(clips_manifest)[0]
    later = row._replace(target=row.target._replace(start=0.5))
    expected = clips.read_clip(row.target.path, frames=9, fps=8, height=32, width=48, start=0.5)
    assert (pairs.read_pixels(later, SMOKE).target == expected).all()
    with pytest.raises(RequestError, match=r"4 frames at 8 fps from 0\.5 s to 1 s, 9 needed"):
        pairs.read_pixels(row._replace(target=row.target._replace(start=0.5, end=1.0)), SMOKE)


def test_each_clip_has_a_size_of_its_own(clips_manifest):
    row = read_manifest(clips_manifest)[0]
    size = replace(SMOKE.video, frames=5, height=16, width=32, fps=4)
    read = pairs.read_pixels(row, replace(SMOKE, data=replace(SMOKE.data, reference=size)))
    assert (read.reference.shape, read.target.shape) == ((5, 16, 32, 3), (9, 32, 48, 3))
    assert (read.reference == clips.read_clip(row.reference.path, frames=5, fps=4, height=16, width=32)).all()


@pytest.fixture
def mixed_manifest(clips_manifest, tmp_path):
    """The example's pairs, with as many that cannot be used between them."""
    folder = clips_manifest.parent
    clips.write_clip(tmp_path / "short.mp4", np.zeros((6, 32, 48, 3), np.uint8), fps=8)
    (tmp_path / "corrupt.mp4").write_bytes(b"not a video at all" * 100)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    good = [json.loads(line) for line in clips_manifest.read_text().splitlines()]
    for row in good:
        row |= {key: str(folder / row[key]) for key in ("reference", "target", "first_frame") if key in row}
    bad = [
        {**good[2], "id": "short", "target": "short.mp4"},
        {**good[0], "id": "corrupt", "reference": "corrupt.mp4"},
        {**good[1], "id": "sound", "target": "sound.wav"},
        {**good[3], "id": "absent", "first_frame": "absent.png"},
        {**good[4], "id": "same", "target": good[4]["reference"]},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for pair in zip(bad, good, strict=True) for row in pair))
    return path


REASONS = {
    "short": ("short.mp4", "6 frames at 8 fps"),
    "corrupt": ("corrupt.mp4", "cannot be decoded"),
    "sound": ("sound.wav", "no video stream"),
    "absent": ("absent.png", "no such file"),
    "same": ("effect_reference.mp4", "the same clip as the reference"),
}


def test_what_cannot_be_used_is_reported_and_left_out(run, mixed_manifest, tmp_path, capfd):
    assert run(mixed_manifest, tmp_path / "r", "--records_per_shard=3") == 0
    assert set(open_records(tmp_path / "r")) == {f"{name}_1" for name in tasks.NAMES}
    rejected = {entry["id"]: entry for entry in map(json.loads, (tmp_path / "r" / "rejected.jsonl").read_text().splitlines())}
    assert rejected.keys() == REASONS.keys()
    output = capfd.readouterr().out
    for name, (path, reason) in REASONS.items():
        assert rejected[name]["path"].endswith(path)
        assert rejected[name]["reason"].startswith(reason)
        assert f"refused {name}: {rejected[name]['path']}: {reason}" in output
    table = [line.split() for line in output.splitlines()]
    assert all([name, "1", "1"] in table for name in tasks.NAMES)
    assert ["all", "5", "5"] in table
    assert any(line.startswith("Next: python -m launch.train --config=stage1:smoke") for line in output.splitlines())


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(run, mixed_manifest, tmp_path, monkeypatch):
    calls = Counter()
    encode = launch_encode.encode_together

    def counted(pairs, encoders):
        ((row, _),) = pairs
        calls[row.id] += 1
        if row.id == "motion_1" and calls[row.id] == 1:
            raise KeyboardInterrupt
        return encode(pairs, encoders)

    assert run(mixed_manifest, tmp_path / "whole", "--records_per_shard=2") == 0
    monkeypatch.setattr(launch_encode, "encode_together", counted)
    assert run(mixed_manifest, tmp_path / "r", "--records_per_shard=2") == 130
    assert shards(tmp_path / "r") == shards(tmp_path / "whole")[:2]
    for _ in range(2):
        assert run(mixed_manifest, tmp_path / "r", "--records_per_shard=2") == 0
    assert {name: times for name, times in calls.items() if times > 1} == {"motion_1": 2}
    assert equal(tmp_path / "r", tmp_path / "whole")
    for name in ("rejected.jsonl", "features.json", "records.json", "empty_text.npy"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_several_processes_write_what_one_writes(run, mixed_manifest, tmp_path, capfd):
    assert run(mixed_manifest, tmp_path / "one", "--records_per_shard=2") == 0
    for index in range(3):
        capfd.readouterr()
        assert run(mixed_manifest, tmp_path / "r", "--records_per_shard=2", f"--shard_index={index}", "--shard_count=3") == 0
        assert ("of 5 shards are there; the dataset is made when" in capfd.readouterr().out) == (index < 2)
    assert equal(tmp_path / "r", tmp_path / "one")
    assert run(mixed_manifest, tmp_path / "r", "--shard_index=3", "--shard_count=3") == 2


def test_other_work_in_the_same_folder_is_refused(run, clips_manifest, mixed_manifest, tmp_path, capfd):
    assert run(clips_manifest, tmp_path / "r") == 0
    for manifest, args, words in (
        (clips_manifest, ["--video.height=16"], "video.height=32 there, 16 now"),
        (clips_manifest, ["--records_per_shard=7"], "source.records_per_shard=64 there, 7 now"),
        (mixed_manifest, [], "source.manifest="),
    ):
        assert run(manifest, tmp_path / "r", *args) == 2
        assert words in capfd.readouterr().err
    assert len(open_records(tmp_path / "r")) == 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with random numbers for encoders; the fixture `run` takes others in their place."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    for part in PARTS[1:]:
        shapes = part.shapes(getattr(SMOKE, part.name))
        model_folder.save_part(folder, part.name, [(path, rng.random(leaf.shape, np.float32)) for path, leaf in shapes.items()])
    model_folder.write_model(folder, {part.name: getattr(SMOKE, part.name) for part in PARTS[1:]})
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def test_records_know_their_weights_by_content(run, clips_manifest, model, tmp_path, capfd):
    """Moved weights are the same, others at the same path are not; so of the vocabulary."""
    folder, out = shutil.copytree(model, tmp_path / "model"), tmp_path / "r"
    assert run(clips_manifest, out, f"--train.init_from={folder}") == 0
    assert "the encoders are random" not in capfd.readouterr().out
    assert records.read_made(out)["source"]["weights"].keys() == {"vae", "text", "image", "tokenizer"}
    assert str(tmp_path) not in (out / "records.json").read_text()
    folder = folder.rename(tmp_path / "moved")
    assert run(clips_manifest, out, f"--train.init_from={folder}") == 0
    assert run(clips_manifest, out) == 2
    assert "begun as other records" in capfd.readouterr().err
    for change, words in ((other_vae, "source.weights.vae="), (other_words, "source.weights.tokenizer=")):
        change(folder)
        assert run(clips_manifest, out, f"--train.init_from={folder}") == 2
        assert words in capfd.readouterr().err
    model_folder.write_model(folder, {"text": replace(SMOKE.text, num_layers=3)})
    assert run(clips_manifest, out, f"--train.init_from={folder}") == 2
    assert "made with text.num_layers=3, the configuration has 2" in capfd.readouterr().err


def other_vae(folder):
    leaves = {path: leaf + np.float32(path.endswith("bias")) for path, leaf in model_folder.read_part(folder, "vae")}
    shutil.rmtree(folder / "vae")
    model_folder.save_part(folder, "vae", leaves.items())


def other_words(folder):
    text = (folder / "tokenizer" / "tokenizer.json").read_text()
    (folder / "tokenizer" / "tokenizer.json").write_text(text + " ")


def test_records_that_an_earlier_version_began_go_on(run, clips_manifest, model, tmp_path, capfd):
    """It wrote the path of the weights and the digest of model.json."""
    out = tmp_path / "r"
    assert run(clips_manifest, out, f"--train.init_from={model}") == 0
    made = json.loads((out / "records.json").read_text())
    made["source"]["weights"] = {"path": "/where/they/were", "model.json": "0" * 64}
    (out / "records.json").write_text(json.dumps(made))
    assert run(clips_manifest, out, f"--train.init_from={model}") == 0
    assert run(clips_manifest, out) == 2
    assert "source.weights" in capfd.readouterr().err


def test_nothing_left_is_an_error(run, tmp_path, capfd):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"id": "a", "task": "id", "reference": "absent.mp4", "target": "gone.mp4", "prompt": ""}')
    assert run(manifest, tmp_path / "r") == 2
    assert "nothing is kept, all 1 pairs are refused" in capfd.readouterr().err
    assert run(tmp_path / "none.jsonl", tmp_path / "s") == 2
    assert not (tmp_path / "s").exists()


def test_what_is_not_finite_is_refused(encoders, clips_manifest, monkeypatch):
    row, latents = read_manifest(clips_manifest)[0], encoders.latents
    monkeypatch.setattr(encoders, "latents", lambda x: latents(x) * np.float32("inf"))
    with pytest.raises(RequestError, match=r"id_target\.mp4: the target of 'id_1' is encoded as NaN or infinity"):
        pairs.encode(row, pairs.read_pixels(row, SMOKE), encoders)


def test_absent_weights_are_an_error_before_the_first_pair(run, clips_manifest, tmp_path, capfd, monkeypatch):
    """Not a reason to refuse every pair."""
    monkeypatch.setattr(launch_encode, "Encoders", Encoders)
    model_folder.write_model(tmp_path / "model", {"vae": SMOKE.vae})
    assert run(clips_manifest, tmp_path / "r", f"--train.init_from={tmp_path / 'model'}") == 2
    assert "refused" not in capfd.readouterr().out


def test_real_clips_become_batches(run, shared, tmp_path):
    """The five demonstration sets of the paper's authors, anamorphic clips among them."""
    folder = shared / "clips" / "omnitransfer"
    sets = {"id": "ID__*1", "style": "Style__*1", "motion": "Motion__*1", "camera": "Camera__*2", "effect": "Effect__*1"}
    rows = []
    for task, pattern in sets.items():
        reference, target = (str(folder / pattern.replace("*", role)) for role in ("ref", "result"))
        row = {"id": task, "task": task, "prompt": "", "reference": f"{reference}.mp4", "target": f"{target}.mp4"}
        if task not in ("id", "style"):
            row["first_frame"] = f"{reference}.jpg"
        rows.append(json.dumps(row))
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    assert run(tmp_path / "m.jsonl", tmp_path / "r") == 0
    assert (tmp_path / "r" / "rejected.jsonl").read_text() == ""
    config = replace(SMOKE, data=replace(SMOKE.data, path=str(tmp_path / "r"), shuffle=False), train=replace(SMOKE.train, batch_size=5))
    batch = next(batches.batches(config, seed=0))
    assert batch.task.tolist() == [0, 1, 2, 3, 4]
    assert batch.has_image.tolist() == [0, 0, 1, 1, 1]
    assert all(np.isfinite(array).all() and array.std() > 0 for array in jax.tree.leaves(batch))
    distinct = [np.abs(batch.target[i] - batch.reference[i]).max() for i in range(5)]
    assert min(distinct) > 0.1
    reference = omnitransfer.make_reference(jnp.asarray(batch.reference), jnp.asarray(batch.task), (3, 2, 3))
    assert jax.tree.map(lambda x: x.shape, reference) == ((5, 3, 4, 6, 36), (5, 3), None, None)


def test_a_clip_that_was_rewritten_is_encoded_again(run, clips_manifest, tmp_path, capfd):
    """Of the same size and with the time of before, as rsync leaves it; a copy, whose times are new, is the same clip."""
    folder = shutil.copytree(clips_manifest.parent, tmp_path / "clips")
    manifest, out, clip = folder / clips_manifest.name, tmp_path / "r", folder / "id_target.mp4"
    assert run(manifest, out, "--records_per_shard=2") == 0
    before, shard = open_records(out), out / "records-train.array_record-00000-of-00003"
    times = {path: path.stat().st_mtime_ns for path in out.glob("records-*")}
    shutil.copyfile(clip, tmp_path / "kept.mp4")
    shutil.copyfile(tmp_path / "kept.mp4", clip)
    assert run(manifest, out, "--records_per_shard=2") == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("records-*")} == times
    stat, content = clip.stat(), bytearray(clip.read_bytes())
    other = (folder / "motion_target.mp4").read_bytes()
    content[:] = other[: len(content)] + bytes(max(0, len(content) - len(other)))
    clip.write_bytes(content)
    os.utime(clip, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert clip.stat().st_size == stat.st_size
    capfd.readouterr()
    assert run(manifest, out, "--records_per_shard=2") == 0
    assert f"{shard.name}: made again, for the clips of id_1 have changed" in capfd.readouterr().out
    assert {path.name for path, time in times.items() if path.stat().st_mtime_ns != time} == {shard.name}
    after = open_records(out)
    assert "id_1" not in after or not np.array_equal(after["id_1"]["target"], before["id_1"]["target"])
    shutil.copyfile(tmp_path / "kept.mp4", clip)  # and back
    assert run(manifest, out, "--records_per_shard=2") == 0
    assert all(np.array_equal(x, before[name][key]) for name, record in open_records(out).items() for key, x in record.items())


def test_clips_stay_in_the_folder_of_the_manifest(clips_manifest, tmp_path, capfd):
    row = json.loads(clips_manifest.read_text().splitlines()[0])
    (tmp_path / "link.mp4").symlink_to(clips_manifest.parent / row["target"])
    for path in (str(clips_manifest.parent / row["target"]), "../x.mp4", "link.mp4"):
        (tmp_path / "m.jsonl").write_text(json.dumps(row | {"target": path}))
        args = ["--config=stage1:smoke", f"--manifest={tmp_path / 'm.jsonl'}", f"--out={tmp_path / 'r'}"]
        assert command.execute(launch_encode.main, launch_encode.FLAGS, args) == 2
        assert "lies outside" in capfd.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_stated_digest_is_compared(run, clips_manifest, tmp_path):
    rows = [json.loads(line) for line in clips_manifest.read_text().splitlines()[:2]]
    for row, right in zip(rows, (True, False), strict=True):
        row |= {key: str(clips_manifest.parent / row[key]) for key in ("reference", "target")}
        row["sha256"] = {"target": sha256(row["target"]) if right else "0" * 64}
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(tmp_path / "m.jsonl", tmp_path / "r") == 0
    assert set(open_records(tmp_path / "r")) == {"id_1"}
    assert "not the target that the manifest means" in (tmp_path / "r" / "rejected.jsonl").read_text()


def test_a_check_says_what_an_encoding_would_do(mixed_manifest, tmp_path, capfd):
    rows = [json.loads(line) for line in mixed_manifest.read_text().splitlines()]
    rows.append(rows[-1] | {"id": "again", "prompt": "it melts"})
    mixed_manifest.write_text("\n".join(map(json.dumps, rows)))
    args = ["--config=stage1:smoke", f"--manifest={mixed_manifest}", "--check", "--allow_outside"]
    assert command.execute(launch_encode.main, launch_encode.FLAGS, args) == 0
    out = capfd.readouterr().out
    assert ["all", "11", "6", "5"] in [line.split() for line in out.splitlines()]
    for name, (path, reason) in REASONS.items():
        assert any(line.startswith(f"left out: {name}: ") and f"{path}: {reason}" in line for line in out.splitlines())
    assert 'look at: again: its prompt names what the reference is to show ("melts")' in out
    assert "look at: effect_1: the same pair as again" in out
    mixed_manifest.write_text(json.dumps(rows[0]))
    assert command.execute(launch_encode.main, launch_encode.FLAGS, args) == 2
