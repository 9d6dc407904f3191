"""The comparison of motion methods: gains are case by case, a clip is made once, a suite runs at the smallest size."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import motion_methods as bench
from configs import ditflow, stage1
from data_pipelines import clips
from evaluation import motion_cases, motion_methods
from launch import command
from omnitransfer_jax.flow import time_grid

pytest.importorskip("cv2")
SMOKE = ["--config=ditflow:smoke", "--follow_your_motion=follow_your_motion:smoke", "--motion_inversion=motion_inversion:smoke"]


@pytest.fixture(autouse=True)
def defaults(tmp_path):
    bench.FLAGS.unparse_flags()
    bench.FLAGS(["", f"--out={tmp_path / 'out'}"])


@pytest.fixture
def suite(tmp_path):
    """Two clips of noise that move, each with a first frame."""
    random, rows = np.random.default_rng(0), []
    for n in range(2):
        wide = random.integers(0, 256, (40, 90, 3), dtype=np.uint8)
        clips.write_clip(tmp_path / f"{n}.mp4", np.stack([wide[:32, 2 * t : 2 * t + 48] for t in range(12)]), 8)
        clips.Image.fromarray(wide[:32, :48]).save(tmp_path / f"{n}.png")
        rows.append({"clip": f"{n}.mp4", "first_frame": f"{n}.png", "easy": "it moves", "hard": "another"})
    (tmp_path / "suite.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"--suite={tmp_path / 'suite.jsonl'}"


def run(*given):
    return command.execute(bench.main, bench.FLAGS, [*SMOKE, *given])


def test_a_suite_is_made_once(suite, tmp_path, monkeypatch, capsys):
    out, rows = f"--out={tmp_path / 'out'}", "--methods=backbone,still,copied"
    assert run(suite, out, rows, "--references=own,reversed") == 0
    printed = capsys.readouterr().out
    assert "[6 of 6] copy of the reference" in printed
    page = Path(tmp_path, "out", "motion_methods.md").read_text()
    assert page in printed
    assert [line.split(" | ")[:2] for line in page.splitlines()[4:]] == [
        [f"| {title}", "2"] for title in ("backbone, not guided", "first frame, frozen", "copy of the reference")
    ]
    assert "nan" not in page
    assert clips.read_image(tmp_path / "out" / "motion_methods.png").std() > 0
    lines = Path(tmp_path, "out", "motion_methods.csv").read_text().splitlines()
    assert lines[0] == "method,reference,case,MF-LK,leak (colours),consistency (pixels),seconds,MB"
    cases = ("000-0-hard", "001-1-hard")
    assert [line.split(",")[:3] for line in lines[1:]] == [[row, "own", case] for row in ("backbone", "still", "copied") for case in cases]
    copied = bench.read_results(bench.all_cases(ditflow.get_config("smoke")))["copied", "own"]
    assert all(row["scores"]["MF-LK"] == pytest.approx(1) for row in copied.values())
    made = sorted(Path(tmp_path, "out").rglob("*.json"))
    times = [path.stat().st_mtime_ns for path in made]
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("made again"))
    assert run(suite, out, rows, "--references=own,reversed") == 0
    assert run(suite, out, "--report") == 0
    assert run(suite, out, "--report", "--against=still") == 0
    page = Path(tmp_path, "out", "motion_methods.md").read_text()
    assert "Gains over first frame, frozen:" in page
    assert page.splitlines()[5].split(" | ")[5] == ""
    assert [path.stat().st_mtime_ns for path in made] == times
    assert run(suite, out, rows, "--seed=3") == 2
    assert "begun with other settings (backbone.seed=0 there, 3 now)" in capsys.readouterr().err


@pytest.mark.slow
def test_every_row(suite, tmp_path):
    assert run(suite, f"--out={tmp_path / 'out'}", "--references=own,other") == 0
    rows = [name for name in motion_methods.METHODS if name not in ("omnitransfer", "truth")]
    results = bench.read_results(bench.all_cases(ditflow.get_config("smoke")))
    assert [name for name, reference in results if reference == "own"] == rows
    assert all(np.isfinite(list(row["scores"].values())).all() for each in results.values() for row in each.values())


@pytest.mark.slow
def test_a_run_of_omnitransfer():
    config = ditflow.get_config("smoke")
    same = {name: getattr(config, name) for name in ("vae", "text", "image", "video", "sampler")}
    run = replace(stage1.get_config("smoke"), **same)
    backbone, pixels = motion_methods.Backbone(config, ""), np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    case = motion_methods.Case("", "a prompt", "", lambda: pixels, lambda: pixels, lambda: pixels[0])
    make = motion_methods.with_run(backbone, run, "")
    clips_of = [np.asarray(make(case, clip, backbone.noise(0))) for clip in (pixels, pixels, pixels[::-1])]
    assert np.array_equal(clips_of[0], clips_of[1])
    assert not np.array_equal(clips_of[0], clips_of[2])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--methods=backbone,ditflo", "--methods=ditflo: unknown; there are backbone"),
        ("--references=mine", "--references=mine: unknown; there are own, reversed, other"),
        ("--sampler.solver=unipc", "sampler.solver=unipc: euler"),
        ("--suite=none.jsonl", "--suite=none.jsonl: cannot be read"),
        ("--motion_inversion=wan", "the configuration of another command"),
        ("--report", "no clip of the row backbone yet; make it"),
        ("--checkpoint=none", "none"),
    ],
)
def test_wrong_requests_are_errors_of_one_line(tmp_path, capsys, flag, message):
    assert run(f"--out={tmp_path / 'out'}", "--pairs=2", flag) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def rows_of(*values, name="path"):
    return {str(n): {"scores": {name: value}} for n, value in enumerate(values)}


def test_gains_are_case_by_case_and_positive_is_better():
    """Cases differ by 10 and rows by 1: only differences within a case are certain."""
    base, row = rows_of(10.0, 20.0, 30.0), rows_of(9.0, 19.0, 29.0)
    assert bench.gain(row, base, "path") == "+1.00 (+1.00 to +1.00)"
    assert bench.gain(rows_of(9.0, 19.0, name="MF-LK"), rows_of(10.0, 20.0, name="MF-LK"), "MF-LK") == "-1.00 (-1.00 to -1.00)"
    assert bench.gain(row | {"9": {"scores": {"path": 0.0}}}, base, "path") == "+1.00 (+1.00 to +1.00)"
    assert bench.gain({"9": {"scores": {"path": 0.0}}}, base, "path") == ""
    assert bench.gain(rows_of(10.0, 16.0), rows_of(10.0, 20.0), "path") == "+2.00 (+0.00 to +4.00)"


@pytest.mark.parametrize(("against", "gains"), [("backbone", ["", "+2.00"]), ("still", ["-2.00", ""])])
def test_gains_are_over_the_row_that_is_named(against, gains):
    results = {
        (name, "own"): {"0": {"scores": {"path": path}, "seconds": 1.0, "memory": 1.0}}
        for name, path in (("backbone", 10.0), ("still", 8.0))
    }
    lines = [line.split(" | ") for line in bench.table(results, against, 1).splitlines()[4:]]
    assert [line[3].split(" ")[0] for line in lines] == gains


def test_later_pairs_are_those_of_a_longer_run(monkeypatch, tmp_path):
    """The same pairs with the same noise, so tuning on some and reporting others is one numbering."""
    config, made = ditflow.get_config("tiny"), {}
    fake = SimpleNamespace(noise=lambda index: index)
    monkeypatch.setattr(bench, "run_job", lambda _, make, job, case, noise: made.update({case.id: noise}) or 0.0)
    for given in (["--pairs=5"], ["--pairs=2", "--first=3"]):
        made.clear()
        bench.FLAGS(["", f"--out={tmp_path / given[-1]}", *given])
        bench.work(fake, None, [bench.Job("still", "own")], bench.all_cases(config))
        if "--first=3" not in given:
            later = dict([*made.items()][3:])
    assert list(made.values()) == [3, 4]
    assert made == later


def test_a_control_gets_another_clip():
    case = motion_methods.Case("", "", "", lambda: np.arange(3)[:, None, None, None], lambda: np.full((3, 1, 1, 1), 9))
    assert motion_methods.given(case, "own").ravel().tolist() == [0, 1, 2]
    assert motion_methods.given(case, "reversed").ravel().tolist() == [2, 1, 0]
    assert motion_methods.given(case, "other").ravel().tolist() == [9, 9, 9]


def test_a_path_out_and_back_is_no_control_backwards():
    """In the world those are the swings; the rows of reversed references leave them out."""
    cases = motion_cases.of_world(ditflow.get_config("tiny").video, 40)
    swings = [i for i, case in enumerate(cases) if case.pair.reference.motion.path == "swings"]
    assert 0 < len(swings) < 40
    assert bench.given_to("reversed", cases) == [i for i in range(40) if i not in swings]
    assert bench.given_to("own", cases) == bench.given_to("other", cases) == list(range(40))


def test_the_noised_reference_starts_where_its_strength_says(monkeypatch):
    """Of 4 steps the last 3, from the reference with the noise of the first of them."""
    config = ditflow.get_config("smoke")
    latents, noise = (np.random.default_rng(n).normal(size=(1, 3, 4, 6, 16)).astype(np.float32) for n in range(2))
    seen = []
    monkeypatch.setattr(motion_methods.omnitransfer, "denoise", lambda *given: seen.append(given[4]) or given[2])
    fake = SimpleNamespace(config=config, dit=0, conditions=lambda case: 0, latents=lambda clip: latents)
    time = time_grid(4, config.sampler.shift)[1]
    assert np.allclose(motion_methods.noised(fake)(None, None, noise), (1 - time) * latents + time * noise, atol=1e-6)
    assert list(seen[0].steps) == [1, 2, 3]


def test_memory_is_that_of_a_row():
    bench.reset_memory()
    before = bench.peak_memory()
    block = np.ones(2**24)  # 128 MB
    del block
    assert bench.peak_memory() > before + 100
    bench.reset_memory()
    assert bench.peak_memory() < before + 100
