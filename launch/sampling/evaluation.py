"""Evaluation of a training while it goes on: the cases of a small suite are sampled, always with the same noise, and measured.

    train.evaluate_suite -> cases -> training.py samples them -> metrics that need no files -> metrics.jsonl, TensorBoard, report.html
                                                             -> WORKDIR/evaluation/step_000500.webp, step_000500/CASE.mp4

A number is the mean over the cases of a task, `evaluate/METRIC/TASK`; the share of cases of which a metric has no value is
`evaluate/METRIC failures/TASK`. What compares with other samples of a case (another reference, no prompt) is left to launch.evaluate.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from configs.errors import RequestError, require
from configs.run import Config
from data_pipelines import clips
from data_pipelines.prompts import Pictures, Prompt
from evaluation import measures, suites
from evaluation.measures import Sample
from evaluation.rows import TRANSFER
from evaluation.suites import Case, Clip
from launch.sampling import grid
from launch.sampling.training import TrainingSamples
from omnitransfer_jax.train.log import EVALUATION
from omnitransfer_jax.train.objective import Params

FOLDER = "evaluation"
MOST = 64  # cases; more belong to launch.evaluate


def require_suite(config: Config) -> list[Case]:
    """The cases of `train.evaluate_suite`, none without it; one that cannot be used is a `RequestError`."""
    given = config.train.evaluate_suite
    if not given:
        return []
    require(config.train.evaluate_every > 0, f"train.evaluate_suite={given}: give train.evaluate_every too, the steps between evaluations")
    require(config.train.references, f"train.evaluate_suite={given}: this training reads no references; launch.sample shows what it makes")
    require(config.dit.image_to_video, f"train.evaluate_suite={given}: a text-to-video network; its cases need a first frame")
    try:
        suite = suites.load(given, config)
        require(not suite.problems, suite.problems[0] if suite.problems else "")
        require(len(suite.cases) <= MOST, f"{len(suite.cases)} cases, and each is sampled again and again; give at most {MOST}")
    except RequestError as error:
        raise RequestError(f"train.evaluate_suite: {str(error).removeprefix('--')}") from None
    return suite.cases


def asked(case: Case, config: Config) -> tuple[Prompt, Pictures]:
    """What is sampled of a case; a `RequestError` where its clips cannot be read."""
    frame = case.first_frame(config.video) if case.first_frame is not None and case.is_temporal else None
    return Prompt(case.task, case.prompt), Pictures(case.reference(config.data.reference), frame)


class Made:
    """The clips of one evaluation, as metrics ask for them."""

    def __init__(self, made: Mapping[str, Clip]):
        self.made = made

    def of_row(self, row: str, case: Case) -> Clip:
        return self.made[case.id]

    with_same_noise = of_row


class TrainingEvaluation:
    """evaluate(step, params) of a training (train/loop.py); the cases are the last ones of what `samples` makes."""

    def __init__(self, samples: TrainingSamples, cases: Sequence[Case], workdir: Path):
        self.samples, self.cases, self.folder, self.config = samples, cases, workdir / FOLDER, samples.config
        found, missing = measures.without_weights()
        self.metrics = [metric for metric in found if metric.keeps and metric.of_all is None]
        for name, reason in missing.items():
            print(f"not measured: {name}: {reason}", flush=True)

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        """Samples, writes and measures; of several processes the first one does more than sample."""
        first = len(self.samples.asked) - len(self.cases)
        made = self.samples.clips(params, range(first, len(self.samples.asked)))
        if jax.process_index():
            return {}
        by_id = {case.id: clip for case, clip in zip(self.cases, made, strict=True)}
        self.write(step, by_id)
        return self.measure(by_id)

    def measure(self, made: Mapping[str, Clip]) -> dict[str, float]:
        """The means of the clips, by metric and task."""
        values, failed, known = defaultdict(list), defaultdict(int), Made(made)
        for case in self.cases:
            found = measures.of_sample(self.metrics, Sample(case, TRANSFER, self.config.video, known))
            for metric in self.metrics:
                if metric.name in found and found[metric.name].failure:
                    failed[metric.name, case.task] += 1
                for name, value in found[metric.name].values.items() if metric.name in found else ():
                    values[name, case.task].append(value)
        means = {f"{EVALUATION}{name}/{task}": float(np.mean(each)) for (name, task), each in values.items()}
        counts = {task: sum(case.task == task for case in self.cases) for _, task in failed}
        return means | {f"{EVALUATION}{name} failures/{task}": count / counts[task] for (name, task), count in failed.items()}

    def write(self, step: int, made: Mapping[str, Clip]) -> None:
        """Every clip as an mp4, and all beside what was given as one picture that moves."""
        video, name = self.config.video, f"step_{step:06d}"
        seconds, rows = grid.times(video.frames, video.fps), []
        for case, clip in ((case, made[case.id]) for case in self.cases):
            clips.write_clip(self.folder / name / f"{case.id}.mp4", clip, video.fps)
            truth = None if case.truth is None else grid.small(case.truth(video), video.fps, seconds)
            reference = grid.small(case.reference(video), video.fps, seconds)
            rows.append(grid.Row(f"{case.task}  {case.prompt}", (reference, truth, grid.small(clip, video.fps, seconds))))
        grid.write(self.folder / f"{name}.webp", ("reference", "truth", f"step {step}"), rows, seconds)
