"""Evaluation of a training while it goes on: what is logged, what is written, and suites that are refused before the training.

The whole way, a minute:

    python -m pytest -n 0 -m slow tests/launch/test_training_evaluation.py
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from configs import stage1
from data_pipelines import example
from evaluation import suites
from launch import command, encode, train
from launch.sampling.evaluation import TrainingEvaluation
from tests.launch.test_training_samples import SMALL
from tests.train import event_files

CONFIG = stage1.get_config("smoke")


def run(module, *args):
    return command.execute(module.main, module.FLAGS, [*SMALL, *args])


def evaluation(folder, cases, clips=None):
    """An evaluation whose samples are given; before the cases there is a prompt of the samples."""
    given = [None, *cases]
    made = [None, *(case.truth(CONFIG.video) for case in cases)] if clips is None else [None, *clips]
    samples = SimpleNamespace(config=CONFIG, asked=given, clips=lambda params, numbers: [made[i] for i in numbers])
    return TrainingEvaluation(samples, cases, folder)


def test_true_clips_are_right_and_what_has_no_value_is_counted(tmp_path):
    cases = [case for case in suites.load("world:2", CONFIG).cases if case.task in ("id", "camera")]
    found = evaluation(tmp_path, cases)(500, {})
    assert found["evaluate/retrieval/id"] == found["evaluate/retrieval/camera"] == 1
    assert "evaluate/adherence/id" not in found  # it compares with other samples of the case
    assert (tmp_path / "evaluation" / "step_000500.webp").stat().st_size > 1000
    assert len(list((tmp_path / "evaluation" / "step_000500").glob("*.mp4"))) == 4
    noise = np.random.default_rng(0).integers(0, 256, (CONFIG.video.frames, CONFIG.video.height, CONFIG.video.width, 3), dtype=np.uint8)
    found = evaluation(tmp_path, cases, [noise] * 4)(1000, {})
    assert found["evaluate/retrieval/id"] < 1
    pytest.importorskip("cv2")
    assert found["evaluate/OpenCV failures/camera"] == 1
    assert not [name for name in found if name.startswith("evaluate/camera rotation")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.evaluate_suite=world:2"], "give train.evaluate_every too"),
        (
            ["--train.evaluate_suite=world:20", "--train.evaluate_every=2"],
            "100 cases, and each is sampled again and again",
        ),
        (["--train.evaluate_suite=absent.jsonl", "--train.evaluate_every=2"], "cannot be read"),
        (["--train.evaluate_suite=world:2", "--train.evaluate_every=2", "--train.references=False"], "reads no references"),
    ],
)
def test_suites_that_are_refused(flags, message, tmp_path, capsys):
    assert run(train, f"--workdir={tmp_path / 'run'}", f"--data.path={tmp_path / 'records'}", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # a minute
def test_a_training_is_evaluated_as_it_goes_on(tmp_path):
    """Every two steps, resumed too; the numbers of a step do not depend on whether samples are made beside."""
    example.write_example(tmp_path / "clips")
    (tmp_path / "clips" / "suite.jsonl").write_text(
        json.dumps({"id": "a", "task": "motion", "reference": "motion_reference.mp4", "target": "motion_target.mp4"}) + "\n"
        + json.dumps({"id": "b", "task": "id", "reference": "id_reference.mp4", "prompt": "a red disc"}) + "\n"
    )  # fmt: skip
    (tmp_path / "clips" / "prompts.jsonl").write_text(json.dumps({"task": "id", "prompt": "a dog", "reference": "id_reference.mp4"}) + "\n")
    assert run(encode, f"--manifest={tmp_path / 'clips' / example.MANIFEST_FILE}", f"--out={tmp_path / 'records'}") == 0
    flags = [f"--data.path={tmp_path / 'records'}", "--train.batch_size=2", "--train.evaluate_every=2", "--optimizer.warmup_steps=1"]
    flags += [f"--train.evaluate_suite={tmp_path / 'clips' / 'suite.jsonl'}", "--train.sample_every=0", "--optimizer.learning_rate=0.01"]
    workdir = tmp_path / "run"
    assert run(train, *flags, f"--workdir={workdir}", "--train.steps=2") == 0
    assert (
        run(train, *flags, f"--workdir={workdir}", "--train.steps=5", f"--train.sample_prompts={tmp_path / 'clips' / 'prompts.jsonl'}") == 0
    )
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line for line in lines if any(name.startswith("evaluate/") for name in line)}
    assert sorted(evaluated) == [2, 4]
    assert evaluated[2]["evaluate/copy distance/motion"] != evaluated[4]["evaluate/copy distance/motion"]
    steps = ("step_000002", "step_000004")
    assert {path.name for path in (workdir / "evaluation").iterdir()} == {*steps, *(f"{step}.webp" for step in steps)}
    assert {path.name for path in (workdir / "evaluation" / "step_000004").iterdir()} == {"a.mp4", "b.mp4"}
    tags = {value.tag for _, value in event_files.values(workdir)}
    assert "evaluate/copy_distance/id" in tags  # TensorBoard's form of it
    assert "copy distance" in (workdir / "report.html").read_text()
    assert run(train, *flags, f"--workdir={tmp_path / 'alone'}", "--train.steps=4") == 0
    alone = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()][3]
    measured = {name: value for name, value in evaluated[4].items() if name.startswith("evaluate/")}
    assert {name: value for name, value in alone.items() if name.startswith("evaluate/")} == measured
