"""All commands in turn: clips -> records -> training, stopped and continued -> a video for every task and a combination.

On real clips: python -m pytest -n 0 -m slow tests/launch/test_road.py
"""

import json

import pytest
from PIL import Image

from data_pipelines import clips, example
from launch import command, encode, sample, train
from omnitransfer_jax import tasks

SMOKE = ["--config=stage1:smoke", "--vae.base_dim=4", "--vae.num_res_blocks=1", "--dit.num_layers=1"]


def run(module, *args):
    assert command.execute(module.main, module.FLAGS, [*SMOKE, *args]) == 0


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def travel(tmp_path, manifest, pairs):
    """`pairs` is task -> (reference, first frame or None)."""
    records, workdir = tmp_path / "records", tmp_path / "run"
    run(encode, f"--manifest={manifest}", f"--out={records}", "--allow_outside")
    training = [f"--data.path={records}", f"--workdir={workdir}"]
    run(train, *training, "--train.steps=30")
    run(train, *training, "--train.steps=60")
    curve = losses(workdir)
    assert len(curve) == 60
    assert sum(curve[-10:]) < 0.8 * sum(curve[:10])

    wanted = [[task] for task in pairs] + [["style", "motion"]]
    for chosen in wanted:
        out = tmp_path / f"{'_'.join(chosen)}.mp4"
        request = [arg for task in chosen for arg in (f"--task={task}", f"--reference={pairs[task][0]}")]
        frame = next((pairs[task][1] for task in chosen if pairs[task][1]), None)
        request += [f"--first_frame={frame}"] if frame else ["--prompt=a person walks on the beach"]
        run(sample, *request, f"--checkpoint={workdir}", f"--out={out}", "--sampler.steps=2")
        height, width = (32, 48)
        if frame:
            rows, columns, _ = clips.read_image(frame).shape
            height, width = sample.same_area(rows / columns, 32 * 48, 16)
        assert clips.read_clip(out, frames=9, fps=8, height=height, width=width).std() > 0


def example_pairs(manifest, tmp_path):
    """task -> (reference, first frame or None) of the project's own clips; a temporal target's first frame where none is given."""
    pairs, here = {}, manifest.parent
    for row in map(json.loads, manifest.read_text().splitlines()):
        frame = here / row["first_frame"] if "first_frame" in row else None
        if frame is None and tasks.TASKS[tasks.task_index(row["task"])].family == "temporal":
            frame = tmp_path / f"{row['task']}.png"
            Image.fromarray(clips.read_clip(here / row["target"], frames=1, fps=8, height=32, width=48)[0]).save(frame)
        pairs[row["task"]] = (here / row["reference"], frame)
    assert set(pairs) == set(tasks.NAMES)
    return pairs


def real_manifest(shared, tmp_path):
    """The five sets the paper's authors show, their result as the target: manifest, and pairs as in `example_pairs`."""
    folder = shared / "clips" / "omnitransfer"
    sets = {"camera": "Camera__{}2", "effect": "Effect__{}1", "motion": "Motion__{}1", "id": "ID__{}1", "style": "Style__{}1"}
    rows, pairs = [], {}
    for task, name in sets.items():
        reference, target = (folder / f"{name.format(kind)}.mp4" for kind in ("ref", "result"))
        frame = reference.with_suffix(".jpg") if reference.with_suffix(".jpg").exists() else None
        row = {"id": task, "task": task, "reference": str(reference), "target": str(target), "prompt": ""}
        rows.append(row | ({"first_frame": str(frame)} if frame else {}))
        pairs[task] = (reference, frame)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest, pairs


def test_on_clips_the_project_makes(tmp_path):
    manifest = example.write_example(tmp_path / "clips")
    travel(tmp_path, manifest, example_pairs(manifest, tmp_path))


@pytest.mark.slow  # a minute: the same as on clips the project makes
def test_on_real_clips(shared, tmp_path):
    travel(tmp_path, *real_manifest(shared, tmp_path))
