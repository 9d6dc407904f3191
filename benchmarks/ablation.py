"""What each part of the method adds, in the procedural world: the paper's Table 7, with scores instead of votes.

    python -m benchmarks.ablation --out=out/ablation
    python -m benchmarks.ablation --out=out/ablation --core=1     # a second process at the same time, on another core
    python -m benchmarks.ablation --out=out/ablation --report     # the results of the jobs that are done

    none        no reference
    joint       target and reference are one longer video under plain Wan: the paper's baseline
    bias        joint, with the task's RoPE offset on the reference: task-aware positional bias
    decoupled   the reference attends to itself and the target to both: reference-decoupled causal learning
    alignment   decoupled, with the same steps divided over three stages; the context comes from the language model

All rows start from the base in the package and take as many steps over the same batches. Their prompts are the same and leave out the
factor that the reference transfers, and they sample the same held-out pairs from the same noise. Stages 2 and 3 of `alignment` continue
with the batches where the stage before stopped; each has its own warm-up, and its steps draw times and noise from the start again.

A job is one row with one seed. DIR/jobs/ROW-SEED.json holds its scores, one number a pair; a job with that file is not run again.
Several processes may work on one DIR, and a job that was killed resumes from its last checkpoint. The last process writes ablation.md,
ablation.svg and ablation.json. Results: docs/ablation.md.
"""

import os
import sys
from contextlib import contextmanager, suppress

from absl import flags

FLAGS = flags.FlagValues()
CORE = flags.DEFINE_integer("core", None, "the one core to run on; all cores if not given", flag_values=FLAGS)
if __name__ == "__main__":
    with suppress(flags.Error):  # command.run reports it
        FLAGS(sys.argv, known_only=True)
        if CORE.value in os.sched_getaffinity(0):
            os.sched_setaffinity(0, {CORE.value})  # before any library counts the cores

import fcntl
import json
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from configs import stage1, stage2, stage3
from configs.errors import require
from configs.run import CheckpointConfig, Config
from data_pipelines.batches import batches, empty_text
from data_pipelines.encoders import Encoders
from evaluation import transfer
from evaluation.report.curve import SERIES, STYLE, svg
from evaluation.transfer import BATCH, Networks, Transfer
from launch import command, encode_world
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import model_folder, outputs, run_folder
from omnitransfer_jax.folders.atomic import read_json, sha256, write_whole
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.train import loop
from omnitransfer_jax.train.log import read_lines
from world.pairs import Example


class Row(NamedTuple):
    """One line of the table."""

    name: str
    changes: Mapping[str, str]
    """Fields of `dit` that differ from those of stage 1."""
    references: bool = True
    stages: tuple[str, ...] = ("stage1",)


ROWS = {
    "none": Row("no reference", {}, references=False),
    "joint": Row("joint", {"references": "bidirectional", "offsets": "frames"}),
    "bias": Row("+ bias", {"references": "bidirectional"}),
    "decoupled": Row("+ decoupled", {}),
    "alignment": Row("+ alignment", {}, stages=("stage1", "stage2", "stage3")),
}
STAGES = {"stage1": stage1, "stage2": stage2, "stage3": stage3}

OUT = flags.DEFINE_string("out", "out/ablation", "folder of records, runs, jobs and results", flag_values=FLAGS)
STEPS = flags.DEFINE_integer("steps", 300, "training steps of every row", lower_bound=1, flag_values=FLAGS)
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of every row", lower_bound=1, flag_values=FLAGS)
PAIRS = flags.DEFINE_integer("pairs", 3600, "pairs to train on", lower_bound=5, flag_values=FLAGS)
SCORED = flags.DEFINE_integer("scored", 200, "held-out pairs of each task that are scored", lower_bound=2, flag_values=FLAGS)
ROWS_FLAG = flags.DEFINE_list("rows", list(ROWS), "rows to run", flag_values=FLAGS)
SHARES = flags.DEFINE_list("shares", ["0.6", "0.15", "0.25"], "shares of the steps that the stages of alignment take", flag_values=FLAGS)
SAMPLER_STEPS = flags.DEFINE_integer("sampler_steps", 10, "denoising steps of the clips that are scored", lower_bound=1, flag_values=FLAGS)
REPORT = flags.DEFINE_bool("report", False, "write the results of the jobs that are done, and run none", flag_values=FLAGS)
DOCS = flags.DEFINE_string("docs", "", "folder of ablation.md and ablation.svg; that of --out if empty", flag_values=FLAGS)

Scores = Float[np.ndarray, "K S N"]
"""Tasks, seeds, pairs."""
Jobs = dict[tuple[str, int], dict[str, Any]]
"""The contents of DIR/jobs by row and seed."""
Estimate = tuple[float, float, float]
"""A mean and the two ends of its interval."""

DRAWS = 4000  # of the bootstrap
CHANCE = 0.125  # of retrieval: one of eight
SETTINGS_FILE = "settings.json"
AGAIN = "restore it from a copy, or give another --out"
PROSE = ("<!-- prose -->", "<!-- end of prose -->")  # the text between them in ablation.md is kept when the page is written again


def main() -> None:
    out = Path(OUT.value)
    unknown = [row for row in ROWS_FLAG.value if row not in ROWS]
    require(not unknown, f"--rows={','.join(unknown)}: no such rows; there are {', '.join(ROWS)}")
    require(
        CORE.value is None or os.sched_getaffinity(0) == {CORE.value},
        f"--core={CORE.value}: this process may use {sorted(os.sched_getaffinity(0))}; give one of those",
    )
    outputs.require_folder("--out", OUT.value)
    for page in ("ablation.md", "ablation.svg"):
        outputs.require_file("--docs", f"{DOCS.value or OUT.value}/{page}")
    if REPORT.value:
        require((out / SETTINGS_FILE).exists(), f"--out={out}: no ablation, {SETTINGS_FILE} is absent; run one without --report")
    else:
        asked = [(row, seed) for seed in range(SEEDS.value) for row in ROWS if row in ROWS_FLAG.value]
        require_settings(out, settings())
        jax.config.update("jax_compilation_cache_dir", str(out / "programs"))  # the seeds of a row share their programs
        with claimed(out / "records.lock", wait=True):
            encode_world.write(stage3.get_config("tiny"), out / "records", PAIRS.value, key=0)
        work(out, asked)
        left = [job for job in asked if not job_path(out, *job).exists()]
        if left:
            names = ", ".join(f"{row}-{seed}" for row, seed in left)
            print(f"{names}: other processes run these, and the last one writes the results; --report writes those that are done")
            return
    report(out, Path(DOCS.value or out))


def settings() -> dict[str, Any]:
    """The settings that all jobs of a folder share, as JSON values."""
    weights = {path.name: sha256(path) for path in sorted(model_folder.EMBEDDED_FOLDER.glob("*.safetensors"))}
    return {
        "steps": STEPS.value,
        "pairs": PAIRS.value,
        "scored": SCORED.value,
        "shares": SHARES.value,
        "sampler_steps": SAMPLER_STEPS.value,
        "batch_size": stage1.get_config("tiny").train.batch_size,
        "weights": weights,
    }


def require_settings(out: Path, asked: dict[str, Any]) -> None:
    """Writes the settings into a new folder; raises a `RequestError` if the folder has other settings."""
    path = out / SETTINGS_FILE
    if not path.exists():
        write_whole(path, json.dumps(asked, indent=2).encode())
    found = read_json(path, AGAIN)
    changed = [f"{name}={found[name]} there, {value} now" for name, value in asked.items() if found[name] != value]
    require(not changed, f"{out}: begun with other settings ({'; '.join(changed)}); give those, or another --out")


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Takes a lock and yields whether this process has it. The system releases the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        yield held


def job_path(out: Path, row: str, seed: int) -> Path:
    return out / "jobs" / f"{row}-{seed}.json"


def work(out: Path, jobs: Sequence[tuple[str, int]]) -> None:
    """Runs the jobs that are not done and that no other process is running."""

    def count() -> int:
        return sum(job_path(out, *job).exists() for job in jobs)

    started, before = time.monotonic(), count()
    for row, seed in jobs:
        path = job_path(out, row, seed)
        with claimed(path.with_suffix(".lock")) as held:
            if not held or path.exists():
                continue
            done, spent = count(), time.monotonic() - started
            left = f", about {timedelta(seconds=round(spent / (done - before) * (len(jobs) - done)))} to go" if done > before else ""
            print(f"\n[job {done + 1} of {len(jobs)}] {row}, seed {seed}{left}", flush=True)
            write_whole(path, json.dumps(run_job(out, row, seed)).encode())
            jax.clear_caches()  # no job uses the programs of another


# One job


def run_job(out: Path, row: str, seed: int) -> dict[str, Any]:
    """Trains a row and scores it; the weights stay in DIR/runs/ROW-SEED."""
    folder, begun, seconds = out / "runs" / f"{row}-{seed}", 0, 0.0
    for stage, steps in zip(ROWS[row].stages, divided(STEPS.value, row), strict=True):
        config = stage_config(row, stage, seed, steps, out)
        seconds += steps * train(config, folder / stage, skip=begun)
        begun += steps
    found, clip = score(config, str(folder / stage), seed)
    return {"row": row, "seed": seed, "seconds a step": seconds / STEPS.value, "seconds a clip": clip, "scores": found}


def divided(steps: int, row: str) -> list[int]:
    """How many of the steps each stage of a row takes."""
    if len(ROWS[row].stages) == 1:
        return [steps]
    try:
        shares = [float(share) for share in SHARES.value]
    except ValueError:
        shares = []
    require(
        len(shares) == len(STAGES) and min(shares) > 0 and abs(sum(shares) - 1) < 1e-6,
        f"--shares={','.join(SHARES.value)}: {len(STAGES)} positive numbers whose sum is 1",
    )
    ends = [0, *(round(steps * end) for end in np.cumsum(shares))]
    counts = [end - start for start, end in pairwise(ends)]
    require(min(counts) > 0, f"--steps={steps}: {' + '.join(map(str, counts))} steps for the stages of alignment; give more, at least 4")
    return counts


def stage_config(row: str, stage: str, seed: int, steps: int, out: Path) -> Config:
    """The configuration of one stage of a row."""
    config, names = STAGES[stage].get_config("tiny"), ROWS[row].stages
    before = names.index(stage) - 1
    origin = str(out / "runs" / f"{row}-{seed}" / names[before]) if before >= 0 else model_folder.EMBEDDED
    train = replace(config.train, steps=steps, log_every=max(1, steps // 12), references=ROWS[row].references, init_from=origin)
    return replace(
        config,
        dit=replace(config.dit, **ROWS[row].changes),
        data=replace(config.data, path=str(out / "records")),
        train=train,
        sampler=replace(config.sampler, steps=SAMPLER_STEPS.value),
        checkpoint=CheckpointConfig(every=100, keep=1),
        seed=seed,
    )


def train(config: Config, workdir: Path, skip: int) -> float:
    """Trains from batch `skip` on; returns the median seconds of a step. Ends the process if a signal stopped the training."""
    data = batches(config, seed=config.seed)
    for _ in range(skip):
        next(data)
    loop.train(omnitransfer.objective(config, empty_text(config)), config, workdir, make_mesh(config.mesh), data)
    if int(run_folder.latest(workdir).name) < config.train.steps:
        raise SystemExit("stopped; the same command resumes here")
    lines = [line["seconds"] for line in read_lines(workdir)]
    return statistics.median(lines[1:] or lines)


def score(config: Config, folder: str, seed: int) -> tuple[dict[str, Any], float]:
    """The scores, as task -> control -> score -> one number a pair, and the denoising seconds a clip. The first seed has controls too."""
    prompted = replace(config, train=replace(config.train, references=True))  # so that all rows have the prompts of rows with references
    made, networks = Transfer(config, Encoders(prompted, folder)), transfer.load(config, folder)
    pairs = {task: transfer.held_out(prompted, task, SCORED.value) for task in tasks.NAMES}
    controls = ("transfer", "swapped", "none") if seed == 0 and config.train.references else ("transfer",)
    results = transfer.measure(made, networks, pairs, controls)
    found = {
        task: {control: {name: values.tolist() for name, values in scores.items()} for control, scores in of_task.items()}
        for task, of_task in results.scores.items()
    }
    return found, seconds_a_clip(made, networks, pairs["motion"])


def seconds_a_clip(made: Transfer, networks: Networks, pairs: Sequence[Example], rounds: int = 3) -> float:
    """The median time of denoising a full batch, divided by its clips; without computing conditions and without decoding."""
    conditions, seconds = made.conditions(networks, (list(pairs) * BATCH)[:BATCH]), []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        made.sample(networks, conditions, 0).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) / BATCH


# Results of the jobs


class Column(NamedTuple):
    """A score averaged over tasks."""

    name: str
    score: str
    tasks: tuple[str, ...]
    control: str = "transfer"
    above_none: bool = False
    """Whether the score of the same pair in the row without a reference is subtracted."""


APPEARANCE, TEMPORAL = (tuple(t.name for t in tasks.TASKS if t.family == family) for family in ("appearance", "temporal"))
BY_TASK = tuple(Column(task, "retrieval", (task,)) for task in tasks.NAMES)
FAMILIES = (Column("appearance", "retrieval", APPEARANCE), Column("temporal", "retrieval", TEMPORAL))
RETRIEVAL = (
    *BY_TASK,
    *FAMILIES,
    Column("swapped reference", "retrieval", tasks.NAMES, control="swapped"),
)
OTHERS = (
    Column("PSNR above no reference", "psnr", tasks.NAMES, above_none=True),
    Column("path error", "path", ("motion",)),
    Column("camera error", "camera", ("camera",)),
    Column("leak", "leak", tasks.NAMES),
)
STEP_BY_STEP = (*FAMILIES, Column("PSNR", "psnr", tasks.NAMES))


def estimate(values: Scores) -> Estimate:
    """The mean over tasks, seeds and pairs, and its 95% bootstrap interval.

    Every draw takes seeds with replacement, and the pairs of each task with replacement. All seeds of a draw have the same pairs,
    because all seeds are scored on the same pairs: pairs drawn for each seed alone would make the interval too narrow.
    """
    seeds, pairs = draws(*values.shape)
    means = np.einsum("ds,ksn,dkn->d", seeds, values, pairs, optimize=True) / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


@cache
def draws(k: int, s: int, n: int) -> tuple[Float[np.ndarray, "D S"], Float[np.ndarray, "D K N"]]:
    """The weight of each seed, and of each pair of each task, in every draw."""
    random = np.random.default_rng(0)
    return random.multinomial(s, [1 / s] * s, DRAWS) / s, random.multinomial(n, [1 / n] * n, (DRAWS, k)) / n


def values_of(jobs: Jobs, row: str, column: Column, minus: str | None = None) -> Scores | None:
    """The scores of a column in a row, less those of row `minus` if given, for the seeds that have them; None if no seed does."""

    def read(row: str, seed: int, task: str) -> list[float]:
        return jobs[row, seed]["scores"][task][column.control][column.score]

    minus = "none" if column.above_none else minus
    seeds = [
        seed
        for of, seed in sorted(jobs)
        if of == row
        and (minus is None or (minus, seed) in jobs)
        and column.score in jobs[row, seed]["scores"][column.tasks[0]].get(column.control, {})
    ]
    if not seeds or row == minus:
        return None
    values = np.array([[read(row, seed, task) for seed in seeds] for task in column.tasks])
    if minus is not None:
        values = values - np.array([[read(minus, seed, task) for seed in seeds] for task in column.tasks])
    return values


def read_jobs(out: Path) -> Jobs:
    """The jobs that are done."""
    found = [read_json(path, "remove it, and the job runs again") for path in (out / "jobs").glob("*.json")]
    return {(job["row"], job["seed"]): job for job in found}


def report(out: Path, docs: Path) -> None:
    """Prints the tables and writes them: ablation.md and ablation.svg into `docs`, ablation.json into `out`."""
    jobs, made = read_jobs(out), read_json(out / SETTINGS_FILE, AGAIN)
    require(bool(jobs), f"--out={out}: no job is done yet; run it without --report")
    written = tables(jobs)
    print(f"\n{written}")
    page, old = docs / "ablation.md", ""
    if page.exists():
        text = page.read_text()
        require(all(text.count(mark) == 1 for mark in PROSE), f"{page}: {' and '.join(PROSE)} are not there once each; put them back")
        old = text.partition(PROSE[0])[2].partition(PROSE[1])[0].strip("\n")
    write_whole(page, document(made, jobs, written, old).encode())
    write_whole(docs / "ablation.svg", svg(figure(jobs), "Retrieval of each row, by task").encode())
    write_whole(out / "ablation.json", (json.dumps({"settings": made, "rows": numbers(jobs)}, indent=2) + "\n").encode())
    print(f"wrote {page}, {docs / 'ablation.svg'} and {out / 'ablation.json'}")


def rows_of(jobs: Jobs) -> list[str]:
    return [row for row in ROWS if any(of == row for of, _ in jobs)]


def numbers(jobs: Jobs) -> dict[str, Any]:
    """Every score of every row, task and control: mean, interval, seeds and pairs; and the times."""
    found: dict[str, Any] = {}
    for row in rows_of(jobs):
        of_row = [job for (of, _), job in sorted(jobs.items()) if of == row]
        first: dict[str, dict[str, dict[str, Any]]] = of_row[0]["scores"]
        found[row] = {name: statistics.median(job[name] for job in of_row) for name in ("seconds a step", "seconds a clip")}
        for task, controls in first.items():
            for control, scores in controls.items():
                for name in scores:
                    values = values_of(jobs, row, Column(name, name, (task,), control))
                    assert values is not None  # the first job has it
                    mean, *ends = estimate(values)
                    summary = {"mean": mean, "interval": ends, "seeds": values.shape[1], "pairs": values.shape[2]}
                    found[row].setdefault("scores", {}).setdefault(task, {}).setdefault(control, {})[name] = summary
    return found


def tables(jobs: Jobs) -> str:
    """The results as Markdown."""
    rows = rows_of(jobs)

    def cells(row: str, columns: Sequence[Column], minus: str | None = None) -> list[str]:
        texts = []
        for column in columns:
            values = values_of(jobs, row, column, minus)
            texts.append("" if values is None else written(column.score, estimate(values), signed=column.above_none or minus is not None))
        return texts

    def seconds(row: str, name: str) -> str:
        return f"{statistics.median(job[name] for (of, _), job in jobs.items() if of == row):.3f}"

    retrieval = [[ROWS[row].name, *cells(row, RETRIEVAL)] for row in rows]
    others = [[ROWS[row].name, *cells(row, OTHERS), seconds(row, "seconds a step"), seconds(row, "seconds a clip")] for row in rows]
    changes = [[f"{ROWS[row].name}, from {ROWS[before].name}", *cells(row, STEP_BY_STEP, minus=before)] for before, row in pairwise(rows)]
    sections = [
        "## Retrieval",
        "The share of clips whose nearest candidate is the truth, among it and 7 clips that differ from it only in the transferred factor; "
        f"chance is {100 * CHANCE:.1f}%. `swapped reference`: the share over all tasks with another pair's reference, first seed only.",
        table(["", *(column.name for column in RETRIEVAL)], retrieval),
        "## The rest",
        "Errors in pixels of a picture 64 high, lower is better. Leak: the share of clips nearer to the reference than to the truth. "
        f"Seconds: the median over seeds; a clip is denoised in a batch of {BATCH}, with cached keys and values of the reference where "
        "the row allows it; encoding the conditions and decoding are not counted.",
        table(["", *(column.name for column in OTHERS), "seconds a step", "seconds a clip"], others),
        "## Step by step",
        "The difference between a row and the row before it, pair by pair: retrieval over the tasks of a family, PSNR over all tasks.",
        table(["", *(column.name for column in STEP_BY_STEP)], changes),
    ]
    return "\n\n".join(sections)


def written(score: str, found: Estimate, signed: bool) -> str:
    """An estimate as text for the tables."""
    scale, digits, unit = {"retrieval": (100, 0, "%"), "leak": (100, 0, "%"), "psnr": (1, 1, " dB")}.get(score, (1, 1, " px"))
    mean, low, high = (0.0 + round(scale * x, digits) for x in found)  # 0.0 + -0.0 is 0.0
    sign = "+" if signed else ""
    return f"{mean:{sign}.{digits}f}{unit} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def document(made: Mapping[str, Any], jobs: Jobs, results: str, prose: str) -> str:
    """The page around the tables."""
    seeds = {row: sum(of == row for of, _ in jobs) for row in rows_of(jobs)}
    runs = f"{min(seeds.values())} seeds" if len(set(seeds.values())) == 1 else ", ".join(f"{row} {n} seeds" for row, n in seeds.items())
    flags_given = " ".join(
        f"--{name}={','.join(made[name]) if name == 'shares' else made[name]}"
        for name in ("steps", "pairs", "scored", "shares", "sampler_steps")
    )
    facts = (
        f"{made['steps']} steps of {made['batch_size']} pairs a row, {runs}, {made['pairs']} training pairs, {made['scored']} held-out "
        f"pairs of each task, {made['sampler_steps']} denoising steps. {platform.machine()}, jax {jax.__version__}."
    )
    intervals = (
        "In brackets: 95% bootstrap intervals of the mean over seeds and pairs. Every draw takes seeds with replacement, and the pairs of "
        "each task with replacement, the same pairs for all seeds. With three seeds an interval says little about other seeds."
    )
    command_line = f"```\npython -m benchmarks.ablation --out=out/ablation --seeds={max(seeds.values())} {flags_given}\n```"
    # The descriptions of the rows are the lines of this file's docstring that start with a row's name.
    rows = "```\n" + "\n".join(line[4:] for line in (__doc__ or "").splitlines() if line[4:].split(" ")[0] in ROWS) + "\n```"
    picture = "![Retrieval of each row, by task](ablation.svg)"
    kept = "\n".join([PROSE[0], *([prose] if prose else []), PROSE[1]])
    return "\n\n".join(["# Ablation", kept, rows, command_line, facts, picture, intervals, results]) + "\n"


@mpl.rc_context(STYLE)
def figure(jobs: Jobs) -> Figure:
    """Retrieval with its interval: a panel for each task, a line for each row."""
    rows, made = rows_of(jobs), Figure((13, 2.9))
    panels, places = made.subplots(1, len(BY_TASK), sharey=True), range(len(rows))
    for panel, column in zip(panels, BY_TASK, strict=True):
        values = [values_of(jobs, row, column) for row in rows]
        means, lows, highs = np.transpose([estimate(each) for each in values if each is not None])  # every job has transfers
        panel.axvline(CHANCE, color=SERIES[1], linewidth=1, linestyle="--")
        panel.hlines(places, lows, highs, color=SERIES[0], linewidth=2)
        panel.plot(means, places, "o", color=SERIES[0])
        panel.set(title=column.name, xlim=(0, 1), xticks=(0, 0.5, 1), xticklabels=("0%", "50%", "100%"))
        panel.margins(y=0.12)
        panel.grid(axis="x")
    panels[0].set_yticks(places, [ROWS[row].name for row in rows])
    panels[0].invert_yaxis()
    made.subplots_adjust(left=0.115, right=0.975, bottom=0.24, top=0.87, wspace=0.3)
    made.text(0.115, 0.04, "retrieval, the true one of 8; dashed: chance; bars: 95% bootstrap intervals")
    return made


if __name__ == "__main__":
    command.run(main, FLAGS)
