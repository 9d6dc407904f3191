"""launch.evaluate: ready clips measured without a model, controls, bad clips; and sampling that is stopped and goes on.

The tiny sampler compiles for two families of tasks, about a minute:

    python -m pytest -n 0 -m slow tests/launch/test_evaluate.py
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import stage1
from evaluation import given_files, results, sampling, suites, videos
from evaluation.metrics import faces
from evaluation.transfer import Transfer, held_out
from launch import evaluate
from launch.command import execute
from omnitransfer_jax.folders import atomic
from tests.evaluation.metrics.test_lpips import random_weights

CONFIG = stage1.get_config("smoke")
SIZE = CONFIG.video
READY = ["--config=stage1:smoke", "--suite=world:2"]


def run(*args):
    return execute(evaluate.main, evaluate.FLAGS, [*READY, *map(str, args)])


def scores(out, row, metric):
    return {line.case: line.value for line in results.read(out / "scores.csv") if (line.row, line.metric) == (row, metric)}


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """The true clips, as another system would make them."""
    folder = tmp_path_factory.mktemp("videos")
    for case in suites.load("world:2", CONFIG).cases:
        videos.write(folder / f"{case.id}.mp4", case.truth(SIZE), SIZE.fps)
    return folder


def test_a_clip_is_kept_without_loss(tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (SIZE.frames, SIZE.height, SIZE.width, 3), dtype=np.uint8)
    videos.write(tmp_path / "a.mp4", clip, 8)
    assert (videos.read(tmp_path / "a.mp4", SIZE) == clip).all()


def test_true_clips_win_and_controls_do_not(ready, tmp_path):
    pytest.importorskip("cv2")
    assert run(f"--videos={ready}", f"--out={tmp_path}") == 0
    assert set(scores(tmp_path, "transfer", "retrieval").values()) == {1}
    assert set(scores(tmp_path, "copied", "copies").values()) == {1}  # so a copy never wins together with this gate
    own, still = (scores(tmp_path, row, "MF-LK") for row in ("transfer", "still"))
    motion = [case for case in own if case.startswith("motion")]
    assert all(still[case] < own[case] for case in motion)
    assert all(still[case] == 0 for case in motion)
    page = (tmp_path / "report.html").read_text()
    assert "row none" in page
    assert "incomplete: 2 of 50 clips" in (tmp_path / "tables.md").read_text()
    before = (tmp_path / "scores.csv").read_bytes()
    assert run(f"--videos={ready}", f"--out={tmp_path}") == 0
    assert (tmp_path / "scores.csv").read_bytes() == before


def test_clips_that_cannot_be_measured_cost_themselves_alone(ready, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    cases = suites.load("world:2", CONFIG).cases
    for case in cases[2:]:
        (folder / f"{case.id}.mp4").write_bytes((ready / f"{case.id}.mp4").read_bytes())
    (folder / f"{cases[0].id}.mp4").write_bytes(b"no video")
    videos.write(folder / f"{cases[1].id}.mp4", cases[1].truth(SIZE)[:5], SIZE.fps)
    (folder / f"{cases[2].id}.mp4").unlink()
    assert run(f"--videos={folder}", f"--out={tmp_path / 'out'}", "--controls=copied") == 0
    failed = {line.case: line.failure for line in results.read(tmp_path / "out" / "scores.csv") if line.metric == results.CLIP}
    assert list(failed) == [case.id for case in cases[:3]]
    for text, part in zip(failed.values(), ("cannot be decoded", "5 frames, 9 needed", "no clip named"), strict=True):
        assert part in text
        assert "\n" not in text
        assert text in capsys.readouterr().out or text in (tmp_path / "out" / "tables.md").read_text()


def test_other_settings_need_another_folder(ready, tmp_path, capsys):
    assert run(f"--videos={ready}", f"--out={tmp_path}", "--controls=copied") == 0
    assert run(f"--videos={ready}", f"--out={tmp_path}", "--controls=copied", "--video.frames=5") == 2
    assert "begun with other values of: video" in capsys.readouterr().err


def test_another_clip_under_the_same_name_needs_another_folder(tmp_path, capsys):
    """What was made from a reference is not kept when the file changes, though the suite is the same."""
    rows, reference = tmp_path / "suite.jsonl", tmp_path / "a.mp4"
    rows.write_text(json.dumps({"id": "a", "task": "id", "reference": "a.mp4"}))
    videos.write(reference, np.zeros((SIZE.frames, SIZE.height, SIZE.width, 3), np.uint8), SIZE.fps)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a.mp4").write_bytes(reference.read_bytes())
    asked = [f"--suite={rows}", f"--videos={tmp_path / 'made'}", "--controls=copied", f"--out={tmp_path / 'out'}"]
    assert run(*asked) == 0
    assert run(*asked) == 0
    videos.write(reference, np.full((SIZE.frames, SIZE.height, SIZE.width, 3), 90, np.uint8), SIZE.fps)
    assert run(*asked) == 2
    assert "begun with other values of: clips of the suite" in capsys.readouterr().err


@pytest.fixture(scope="module")
def one(ready, tmp_path_factory):
    """A suite of one motion, given as a file, with its truth made by another system."""
    folder = tmp_path_factory.mktemp("one")
    case = next(case for case in suites.load("world:2", CONFIG).cases if case.task == "motion")
    videos.write(folder / "reference.mp4", case.reference(SIZE), SIZE.fps)
    (folder / "target.mp4").write_bytes((ready / f"{case.id}.mp4").read_bytes())
    (folder / "made").mkdir()
    (folder / "made" / "a.mp4").write_bytes((folder / "target.mp4").read_bytes())
    (folder / "suite.jsonl").write_text(json.dumps({"id": "a", "task": "motion", "reference": "reference.mp4", "target": "target.mp4"}))
    return folder


def test_weights_of_another_digest_cost_their_metric_alone(one, tmp_path):
    save_file(random_weights(), tmp_path / "lpips.safetensors")
    flags = [f"--suite={one / 'suite.jsonl'}", f"--videos={one / 'made'}", "--controls=copied", f"--out={tmp_path / 'a'}"]
    others = [f"--{name}={tmp_path / 'absent'}" for name in given_files.FLAGS if name != "lpips"]
    assert run(*flags, f"--lpips={tmp_path}/lpips.safetensors@{'0' * 64}", *others) == 0
    absent = json.loads((tmp_path / "a" / "environment.json").read_text())["absent"]
    assert f"{'0' * 64} expected" in absent["LPIPS"]
    assert set(absent) >= {given.title for given in given_files.FLAGS.values()}
    assert all("\n" not in reason for reason in absent.values())
    assert scores(tmp_path / "a", "transfer", "LPIPS to the truth") == {}
    assert scores(tmp_path / "a", "transfer", "consistency (pixels)")
    assert run(*flags, f"--lpips={tmp_path}/lpips.safetensors") == 0  # only what is absent is measured
    assert set(scores(tmp_path / "a", "transfer", "LPIPS to the truth").values()) == {0}
    assert min(scores(tmp_path / "a", "copied", "LPIPS to the truth").values()) > 0
    digest = atomic.sha256(tmp_path / "lpips.safetensors")
    assert json.loads((tmp_path / "a" / "environment.json").read_text())["weights"]["LPIPS to the truth"] == digest


def test_a_copied_reference_does_not_win_identity_and_copy_distance_together(tmp_path, monkeypatch):
    """Identity alone prefers the copy, and so it is marked; copy distance does not. The face network is a stand-in: mean colours."""
    pytest.importorskip("cv2")
    (tmp_path / "made").mkdir()
    rows = []
    for case in suites.load("world:2", CONFIG).cases:
        if case.task == "id":
            videos.write(tmp_path / f"{case.id}.mp4", case.reference(SIZE), SIZE.fps)
            videos.write(tmp_path / "made" / f"{case.id}.mp4", case.truth(SIZE), SIZE.fps)
            rows.append(json.dumps({"id": case.id, "task": "id", "reference": f"{case.id}.mp4", "prompt": case.prompt}))
    (tmp_path / "suite.jsonl").write_text("\n".join(rows))
    template = faces.TEMPLATE * SIZE.height / 112
    network = faces.FaceNetwork(lambda found: found.mean((1, 2)), SIZE.height, template)
    monkeypatch.setattr(given_files, "checked", lambda given: (given, "digest"))
    monkeypatch.setattr(faces, "load", lambda path: network)
    monkeypatch.setattr(faces, "detector", lambda: lambda frame: template)
    out = tmp_path / "out"
    assert run(f"--suite={tmp_path / 'suite.jsonl'}", f"--videos={tmp_path / 'made'}", f"--out={out}", "--face=colours.onnx") == 0
    lines = results.read(out / "scores.csv")
    identity, copies = (set(results.rewarded(lines, "id", name, "higher")) for name in ("identity mean (colours)", "copy distance"))
    assert "copied" in identity
    assert "copied" not in copies
    assert not identity & copies
    assert set(scores(out, "copied", "copies").values()) == {1}
    assert "identity mean (colours) ↑ !" in (out / "tables.md").read_text()


def test_tracks_and_camera_paths_in_files(one, tmp_path):
    """A clip whose files are the reference's has no error, a held frame has all of it, a row without a folder is not measured."""
    frames, random = SIZE.frames, np.random.default_rng(0)
    places = random.uniform(0, 30, (1, 20, 2)) + np.arange(frames)[:, None, None] * [1.5, 0.5]
    path = [" ".join(map(str, [1, 0, 0, t, 0, 1, 0, 0, 0, 0, 1, 0])) for t in range(frames)]
    for name in ("reference", "transfer"):
        for kind in ("cotracker", "poses"):
            (tmp_path / kind / name).mkdir(parents=True)
        np.savez(tmp_path / "cotracker" / name / "a.npz", tracks=places)
        (tmp_path / "poses" / name / "a.txt").write_text("\n".join(path))
    flags = [f"--suite={one / 'suite.jsonl'}", f"--videos={one / 'made'}", f"--out={tmp_path / 'out'}"]
    flags += [f"--tracks={tmp_path / 'cotracker'}", f"--cameras={tmp_path / 'poses'}"]
    assert run(*flags) == 0
    for row, fidelity, translation in (("transfer", 1, 0), ("copied", 1, 0), ("still", 0, 1)):
        assert scores(tmp_path / "out", row, "MF (cotracker)") == {"a": pytest.approx(fidelity)}
        assert scores(tmp_path / "out", row, "camera translation error (poses)") == {"a": pytest.approx(translation)}
    (tmp_path / "poses" / "transfer" / "a.txt").write_text("1 2 3")
    assert run(*flags) == 0
    (line,) = [line for line in results.read(tmp_path / "out" / "scores.csv")
               if (line.row, line.metric) == ("transfer", "camera rotation error (poses)")]  # fmt: skip
    assert "no camera path" in line.failure


@pytest.mark.slow
def test_a_run_that_was_stopped_gives_the_same_scores(tmp_path, monkeypatch):
    flags = ["--sampler.steps=1", "--controls=swapped,still,copied"]
    assert run(f"--out={tmp_path / 'whole'}", *flags) == 0
    write, left = videos.write, [3]

    def stop(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sampling.videos, "write", stop)
        assert run(f"--out={tmp_path / 'stopped'}", *flags) == 130
    assert not (tmp_path / "stopped" / "scores.csv").exists()
    assert run(f"--out={tmp_path / 'stopped'}", *flags, "--shard_index=1", "--shard_count=2") == 0
    assert not (tmp_path / "stopped" / "scores.csv").exists()
    assert run(f"--out={tmp_path / 'stopped'}", *flags) == 0
    assert (tmp_path / "stopped" / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()


@pytest.mark.slow
def test_clips_of_the_world_are_those_of_transfer(tmp_path, monkeypatch):
    from dataclasses import replace

    from data_pipelines.encoders import Encoders
    from evaluation import transfer

    monkeypatch.setattr(transfer, "BATCH", 2)
    config = replace(stage1.get_config("tiny"), sampler=replace(stage1.get_config("tiny").sampler, steps=1))
    cases = [case for case in suites.load("world:2", config).cases if case.task == "motion"]
    made = sampling.Sampler(config, "embedded", cases, tmp_path)
    made.make(sampling.units(cases, ["transfer", "swapped", "none"]))
    run_, networks = Transfer(config, Encoders(config, "embedded")), transfer.load(config, "embedded")
    pairs = held_out(config, "motion", 2)
    for row in ("transfer", "swapped", "none"):
        expected = transfer.with_control(row, run_, networks, pairs)
        for case, clip in zip(cases, expected, strict=True):
            assert (videos.read(sampling.path_of(tmp_path, row, case), config.video) == clip).all()
