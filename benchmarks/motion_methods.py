"""DiTFlow, Follow-Your-Motion and Motion-Textual Inversion, their baselines and OmniTransfer, on one backbone, pair by pair.

    python -m benchmarks.motion_methods --out=out/motion
    python -m benchmarks.motion_methods --out=out/motion --report          # table and figure of what is done
    python -m benchmarks.motion_methods --config=ditflow:t2v_1_3b --follow_your_motion=follow_your_motion:t2v_1_3b \
        --motion_inversion=motion_inversion:t2v_1_3b --checkpoint=wan_t2v --suite=davis.jsonl --out=out/davis

Rows and what they are: evaluation/motion_methods.py. Without `--suite` the cases are held-out motion pairs of the procedural world, where
the true clip is known; the form of a suite is in evaluation/motion_cases.py. All rows have the models, sampler, size and seed of
`--config`, and each case has one noise. Gains are over the backbone (or `--against=still`: over the frozen first frame), case by case, with
95 % bootstrap intervals over the cases.

DIR/results/METHOD-REFERENCE/CASE.json holds the scores of a clip, the clip lies beside it; what is there is not made again. Several
processes may work on one DIR. Written at the end: motion_methods.md, .png and .csv (a line a clip). Results: docs/methods.md.

A reference that is the same clip backwards (a path out and back) is no control, so such a case is in no row of reversed references.

Seconds are those of learning and sampling, the median of the cases; the first one of a row compiles. Memory is the
largest resident memory of the process (VmHWM of Linux, set back before each row): it holds the encoders and all that is loaded.
Text similarity is left out: the package has no text-and-image CLIP to import.
"""

import csv
import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from benchmarks.ablation import claimed
from configs.ditflow import DiTFlow
from configs.errors import require
from configs.follow_your_motion import FollowYourMotion
from configs.motion_inversion import MotionInversion
from configs.run import Config, plain
from evaluation import motion_cases
from evaluation.metrics import motion_fidelity, tracks
from evaluation.motion_cases import Case, Clip
from evaluation.motion_methods import METHODS, REFERENCES, Backbone, Configs, Make, given, is_control, measure, without_network
from evaluation.report.curve import STYLE
from launch import command
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.folders.atomic import read_json, write_whole
from world.scores import interval

FLAGS = flags.FlagValues()
CONFIG = flags.DEFINE_string("config", "ditflow:tiny", "models, sampler and size of all rows, and DiTFlow's numbers", flag_values=FLAGS)
FYM = flags.DEFINE_string("follow_your_motion", "follow_your_motion:tiny", "numbers of Follow-Your-Motion", flag_values=FLAGS)
INVERSION = flags.DEFINE_string("motion_inversion", "motion_inversion:tiny", "numbers of Motion-Textual Inversion", flag_values=FLAGS)
OMNI = flags.DEFINE_string("omnitransfer", "", "workdir of a run, for the row omnitransfer", flag_values=FLAGS)
OMNI_CONFIG = flags.DEFINE_string("omnitransfer_config", "stage1:tiny", "configuration of that run", flag_values=FLAGS)
FEATURES = flags.DEFINE_integer("features_block", None, "block of SMM and MOFT; DiTFlow's if not given", lower_bound=0, flag_values=FLAGS)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder of imported weights; train.init_from if not given", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "out/motion_methods", "folder of clips, scores and results", flag_values=FLAGS)
PAIRS = flags.DEFINE_integer("pairs", 40, "pairs of the procedural world", lower_bound=1, flag_values=FLAGS)
FIRST = flags.DEFINE_integer("first", 0, "the first of these pairs: tune on others than you report", lower_bound=0, flag_values=FLAGS)
SUITE = flags.DEFINE_string("suite", "", "JSON lines file of real clips and prompts, in place of the world", flag_values=FLAGS)
LEVEL = flags.DEFINE_enum("level", "hard", motion_cases.LEVELS, "which prompt of a suite", flag_values=FLAGS)
ROWS = flags.DEFINE_list("methods", [*METHODS], "rows to make", flag_values=FLAGS)
AGAINST = flags.DEFINE_enum("against", "backbone", ("backbone", "still"), "the row that gains are over", flag_values=FLAGS)
GIVEN = flags.DEFINE_list("references", [*REFERENCES], "references to give: own, and the controls reversed, other", flag_values=FLAGS)
REPORT = flags.DEFINE_bool("report", False, "write the results of what is done, and make nothing", flag_values=FLAGS)
SHOWN = flags.DEFINE_integer("shown", 3, "cases in the figure", lower_bound=1, flag_values=FLAGS)

SETTINGS_FILE = "settings.json"
GUIDED = ("injection", "smm", "moft", "ditflow", "ditflow_positions")  # rows that read the fields `ditflow`
LOWER_IS_BETTER = ("path", "leak", "leak (colours)")
GAINS = ("path", "retrieval", motion_fidelity.NAME)  # the scores whose gain stands in the table
Results = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""By row and reference, then case: scores, seconds, memory."""


class Job(NamedTuple):
    """A row with one of the references."""

    method: str
    reference: str

    @property
    def folder(self) -> Path:
        return Path(OUT.value) / "results" / f"{self.method}-{self.reference}"

    def path(self, case: Case) -> Path:
        """The scores of a clip; the clip lies beside them."""
        return self.folder / f"{case.id}.json"

    @property
    def title(self) -> str:
        return METHODS[self.method].title + {"own": "", "reversed": ", reversed", "other": ", another's"}[self.reference]


def main(config: DiTFlow) -> None:
    config = replace(config, train=replace(config.train, init_from=folder_of(config)))
    for name, flag, known in (("methods", ROWS, METHODS), ("references", GIVEN, REFERENCES)):
        unknown = [each for each in flag.value if each not in known]
        require(not unknown, f"--{name}={','.join(unknown)}: unknown; there are {', '.join(known)}")
    require(config.sampler.solver == "euler", f"sampler.solver={config.sampler.solver}: euler, for all rows start or steer between steps")
    outputs.require_folder("--out", OUT.value)
    tracks.opencv()
    cases = all_cases(config)
    if not REPORT.value:
        networks = ("dit", "vae", "text", *(["image"] if config.dit.image_dim is not None else []))
        load_models.require_weights(config.train.init_from, config, networks, "--checkpoint")
        configs = configs_of(config)
        jobs = [
            job for job in all_jobs(configs, known=cases[0].truth is not None) if job.method in ROWS.value and job.reference in GIVEN.value
        ]
        for job in jobs:
            require_settings(job.folder / SETTINGS_FILE, settings(job.method, config, configs))
        work(Backbone(config, config.train.init_from), configs, jobs, cases)
    results = read_results(cases)
    require((AGAINST.value, "own") in results, f"--out={OUT.value}: no clip of the row {AGAINST.value} yet; make it")
    page = table(results, AGAINST.value, len(cases))
    write_whole(Path(OUT.value) / "motion_methods.md", page.encode())
    write_whole(Path(OUT.value) / "motion_methods.csv", clip_scores(results).encode())
    write_whole(Path(OUT.value) / "motion_methods.png", png(figure(results, cases[: SHOWN.value])))
    print(page)


def folder_of(config: Config) -> str:
    return config.train.init_from if CHECKPOINT.value is None else CHECKPOINT.value


def all_cases(config: DiTFlow) -> list[Case]:
    """The cases of --suite, or of the world."""
    if not SUITE.value:
        return motion_cases.of_world(config.video, PAIRS.value, FIRST.value)
    return motion_cases.of_suite(SUITE.value, LEVEL.value, config.video, config.dit.image_to_video)


def configs_of(config: DiTFlow) -> Configs:
    """The numbers of the methods that learn, with the models, sampler, size and weights of `config`."""
    same = {name: getattr(config, name) for name in ("dit", "vae", "text", "image", "video", "sampler", "mesh", "seed")}

    def on_backbone(name: str, kind: type) -> Any:
        found = command.load_config(name, (kind,))
        found = replace(found, **same, train=replace(found.train, init_from=config.train.init_from))
        found.validate()
        return found

    run = None
    if OMNI.value:
        read = command.load_config(OMNI_CONFIG.value, (Config,))
        run = replace(read, video=config.video, sampler=config.sampler), OMNI.value
        load_models.require_weights(OMNI.value, run[0], ("dit", "vae"), "--omnitransfer")
    return Configs(on_backbone(FYM.value, FollowYourMotion), on_backbone(INVERSION.value, MotionInversion), run, FEATURES.value)


def all_jobs(configs: Configs, known: bool) -> list[Job]:
    """The backbone first; every other row with its own reference, then the controls. `known` is whether the true clips are."""
    absent = ([] if configs.omnitransfer else ["omnitransfer"]) + ([] if known else ["truth"])
    rows = [name for name in METHODS if name not in absent]
    return [Job(name, each) for name in rows for each in REFERENCES if each == "own" or METHODS[name].reads_reference]


def settings(method: str, config: DiTFlow, configs: Configs) -> dict[str, Any]:
    """What the clips of a row depend on, by dotted names, as JSON has it: the backbone's configuration, and the row's own."""
    tree: dict[str, Any] = {"backbone": asdict(plain(config)), "suite": SUITE.value, "level": LEVEL.value if SUITE.value else ""}
    if method in GUIDED:
        tree["ditflow"] = asdict(config.ditflow)
    if method in ("smm", "moft"):
        tree["features_block"] = configs.features_block
    if method == "follow_your_motion":
        tree[method] = asdict(configs.follow_your_motion)
    if method == "motion_inversion":
        tree[method] = asdict(configs.motion_inversion)
    if configs.omnitransfer and method == "omnitransfer":
        tree[method] = {"config": asdict(configs.omnitransfer[0]), "folder": configs.omnitransfer[1]}
    return json.loads(json.dumps(dict(flat(tree))))


def require_settings(path: Path, asked: dict[str, Any]) -> None:
    """Writes a row's settings into a new folder; a `RequestError` names what differs from those of an old one."""
    if not path.exists():
        write_whole(path, json.dumps(asked, indent=1).encode())
    found = read_json(path, "restore it from a copy, or give another --out")
    changed = [
        f"{name}={found.get(name)} there, {asked.get(name)} now" for name in {**found, **asked} if found.get(name) != asked.get(name)
    ]
    require(not changed, f"{path.parent}: begun with other settings ({'; '.join(changed[:3])}); give those, or another --out")


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries by dotted names."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# Making


def work(backbone: Backbone, configs: Configs, jobs: Sequence[Job], cases: Sequence[Case]) -> None:
    """Makes and measures what is not there yet."""
    wanted = {reference: given_to(reference, cases) for reference in {job.reference for job in jobs}}
    left = [(job, i) for job in jobs for i in wanted[job.reference] if not job.path(cases[i]).exists()]
    started, prepared, make = time.monotonic(), "", None
    for done, (job, i) in enumerate(left):
        with claimed(job.path(cases[i]).with_suffix(".lock")) as held:
            if not held or job.path(cases[i]).exists():  # another process makes or has made it
                continue
            if job.method != prepared:
                jax.clear_caches()  # no row uses the programs of another
                make, prepared = METHODS[job.method].prepare(backbone, configs), job.method
                reset_memory()
            seconds = run_job(backbone, make, job, cases[i], backbone.noise(FIRST.value + i))
        to_go = timedelta(seconds=round((time.monotonic() - started) / (done + 1) * (len(left) - done - 1)))
        print(f"[{done + 1} of {len(left)}] {job.title}, {cases[i].id}: {seconds:.1f} s, {to_go} to go at this rate", flush=True)


def given_to(reference: str, cases: Sequence[Case]) -> list[int]:
    """The cases of a row: all, or those for which the reference is a control."""
    return [i for i, case in enumerate(cases) if reference == "own" or is_control(case, reference)]


def run_job(backbone: Backbone, make: Make | None, job: Job, case: Case, noise: jax.Array) -> float:
    """Writes the clip, then its scores; returns the seconds that the clip took."""
    begun = time.perf_counter()
    if make is None:
        clip = without_network(job.method, case, first_frame(case))
    else:
        clip = backbone.decode(jax.block_until_ready(make(case, given(case, job.reference), noise)))
    seconds = time.perf_counter() - begun
    row = {"scores": measure(case, clip, backbone.config), "seconds": seconds, "memory": peak_memory()}
    write_clip(job.path(case).with_suffix(".npz"), clip)
    write_whole(job.path(case), json.dumps(row).encode())
    return seconds


def first_frame(case: Case) -> np.ndarray:
    """The case's own first frame, or without one that of the backbone's clip."""
    if case.first_frame is not None:
        return case.first_frame()
    made = Job("backbone", "own").path(case).with_suffix(".npz")
    require(made.exists(), f"--methods=still: needs {made}, for the case has no first frame; make the row backbone too")
    return read_clip(made)[0]


def write_clip(path: Path, clip: Clip) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, clip=clip)
    write_whole(path, file.getvalue())


def read_clip(path: Path) -> Clip:
    with np.load(path) as found:
        return found["clip"]


def reset_memory() -> None:
    """Sets the kernel's record of this process's largest resident memory back to what it is now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("memory is the largest since the process began: the record cannot be set back here", flush=True)


def peak_memory() -> float:
    """The largest resident memory since `reset_memory`, in MB; NaN where the system does not tell."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return int(found[1]) / 1024 if found else float("nan")


# Results


def read_results(cases: Sequence[Case]) -> Results:
    """What is done of `cases`, in the order of the rows."""
    found: Results = {}
    asked = {reference: [cases[i] for i in given_to(reference, cases)] for reference in REFERENCES}
    for name in METHODS:
        for reference in REFERENCES:
            paths = {case.id: Job(name, reference).path(case) for case in asked[reference]}
            read = {case: read_json(path, "remove it: it is made again") for case, path in paths.items() if path.exists()}
            if read:
                found[name, reference] = read
    return found


def clip_scores(results: Results) -> str:
    """A line for each clip: row, reference, case, then its scores, seconds and memory."""
    names = [*next(iter(next(iter(results.values())).values()))["scores"]]
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["method", "reference", "case", *names, "seconds", "MB"])
    for (method, reference), rows in results.items():
        for case, row in rows.items():
            figures = [*(row["scores"][name] for name in names), row["seconds"], row["memory"]]
            lines.writerow([method, reference, case, *(f"{figure:.6g}" for figure in figures)])
    return file.getvalue()


def table(results: Results, against: str, count: int) -> str:
    """A line for each method and reference: means, gains over the row `against`, in controls the gain of the own reference over them."""
    base = results[against, "own"]
    names = [*next(iter(base.values()))["scores"]]
    gained = [name for name in GAINS if name in names]
    head = ["", "cases", *names, *(f"gain in {name}" for name in gained), f"own above it, {names[0]}", "s a clip", "MB"]
    lines = [head, ["---"] * len(head)]
    for (method, reference), rows in results.items():
        means = [f"{np.mean([row['scores'][name] for row in rows.values()]):.3g}" for name in names]
        gains = ["" if method == against else gain(rows, base, name) for name in gained]
        own = "" if reference == "own" else gain(results.get((method, "own"), {}), rows, names[0])
        seconds = [row["seconds"] for row in rows.values()]
        memory = max(row["memory"] for row in rows.values())
        lines.append(
            [Job(method, reference).title, str(len(rows)), *means, *gains, own, f"{np.median(seconds):.2g}",
             f"{memory:.0f}"]
        )  # fmt: skip
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    what = f"--suite={SUITE.value}, prompts {LEVEL.value}" if SUITE.value else "held-out motion pairs of the procedural world"
    gains = f"Gains over {METHODS[against].title}: positive is better, 95 % intervals over cases."
    return f"{count} cases: {what}. Backbone `{CONFIG.value}`. {gains}\n\n{body}\n"


def gain(rows: dict[str, dict[str, Any]], base: dict[str, dict[str, Any]], name: str) -> str:
    """Mean and interval of the gain over `base` in the cases that both have; positive is better."""
    sign = -1 if name in LOWER_IS_BETTER else 1
    values = [sign * (row["scores"][name] - base[case]["scores"][name]) for case, row in rows.items() if case in base]
    if not values:
        return ""
    low, high = interval(values)
    return f"{np.mean(values):+.2f} ({low:+.2f} to {high:+.2f})"


@mpl.rc_context(STYLE)
def figure(results: Results, cases: Sequence[Case], moments: int = 3) -> Figure:
    """The reference, the truth where it is known, and the clip of each row with its own reference: a few frames of some cases."""

    def made(job: Job, case: Case) -> Clip | None:
        path = job.path(case).with_suffix(".npz")
        return read_clip(path) if path.exists() else None

    shown = {"reference": [case.reference() for case in cases], "truth": [case.truth() if case.truth else None for case in cases]}
    rows = [Job(name, each) for name, each in results if each == "own" and name not in ("copied", "truth")]
    shown |= {job.title: [made(job, case) for case in cases] for job in rows}
    shown = {title: found for title, found in shown.items() if any(clip is not None for clip in found)}
    page = Figure((1.9 + 0.75 * moments * len(cases), 0.8 * len(shown) + 0.4), layout="constrained")
    axes = page.subplots(len(shown), moments * len(cases), squeeze=False)
    for line, (title, found) in zip(axes, shown.items(), strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        for cell, (j, k) in zip(line, np.ndindex(len(cases), moments), strict=True):
            cell.set(xticks=[], yticks=[])
            if (clip := found[j]) is not None:
                cell.imshow(clip[round(k * (len(clip) - 1) / (moments - 1))], interpolation="nearest")
    for case, cell in zip(cases, axes[0, ::moments], strict=True):
        cell.set_title(case.id, fontsize=8, loc="left")
    return page


def png(page: Figure) -> bytes:
    file = io.BytesIO()
    page.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


if __name__ == "__main__":
    command.run(main, FLAGS)
