"""Measures transfers of a suite: --config=NAME --checkpoint=DIR --suite=FILE_OR_NAME --out=DIR.

    python -m launch.evaluate --config=stage3:tiny --checkpoint=embedded --suite=world --out=out/scores
    python -m launch.evaluate --config=stage3 --checkpoint=stage3 --suite=suite.jsonl --out=out/scores
    python -m launch.evaluate --config=stage3 --videos=DIR --suite=suite.jsonl --out=out/other

Clips that are missing are sampled, for the transfer and for each control (evaluation/rows.py), then measured; what is there is neither made
nor measured again. With --videos nothing is sampled: DIR has CASE.mp4 (or another format) for every case, and may have the controls in
folders named after their rows, so that other systems are measured on equal terms. The form of a suite is in evaluation/suites.py.

Written: scores.csv, a row a clip and metric; tables.md; report.html; environment.json, with weights by SHA-256, versions and seeds. Several
processes may share the work, each with --shard_index and --shard_count; the last one to finish writes these. --against=DIR adds the paired
gain over another run.
"""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from configs.errors import RequestError, require
from configs.run import Config, VideoConfig
from evaluation import evaluation_page, given_files, measures, results, suites, tables, videos
from evaluation.measures import Metric, Sample
from evaluation.report import page
from evaluation.results import Line
from evaluation.rows import CONTROLS, ROWS, TRANSFER, Clip
from evaluation.sampling import Sampler, Unit, path_of, units
from evaluation.suites import Case, Suite
from evaluation.tables import Evaluation
from launch import command
from launch.encode import process
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import fingerprint, outputs, run_folder
from omnitransfer_jax.folders.atomic import read_json, sha256, write_whole
from omnitransfer_jax.mesh import with_found_mesh

FLAGS = flags.FlagValues()
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "folder of weights, workdir of launch.train, or `embedded`; train.init_from if not given", flag_values=FLAGS
)
SUITE = flags.DEFINE_string("suite", None, "`world`, `world:N` or a file of JSON lines", required=True, flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "folder of clips, scores and report", required=True, flag_values=FLAGS)
VIDEOS = flags.DEFINE_string("videos", "", "folder of ready clips, CASE.mp4; nothing is sampled", flag_values=FLAGS)
AGAINST = flags.DEFINE_string("against", "", "folder of another launch.evaluate of the suite: paired gains over it", flag_values=FLAGS)
GIVEN = {
    name: flags.DEFINE_string(name, "", f"{given.about}; FILE or FILE@SHA256", flag_values=FLAGS)
    for name, given in given_files.FLAGS.items()
}
ROWS_MADE = flags.DEFINE_list("controls", [*CONTROLS], "controls to make beside the transfer", flag_values=FLAGS)
SHARD_INDEX = flags.DEFINE_integer("shard_index", None, "this process among those that share the work", flag_values=FLAGS)
SHARD_COUNT = flags.DEFINE_integer("shard_count", None, "number of processes that share the work", flag_values=FLAGS)

SETTINGS, TABLES, PAGE, ENVIRONMENT = "settings.json", "tables.md", "report.html", "environment.json"


class Ready:
    """The clips of --videos."""

    def __init__(self, folder: Path, size: VideoConfig, cases: Sequence[Case]):
        self.folder, self.size, self.others = folder, size, suites.others(cases)

    def path(self, row: str, case: Case) -> Path | None:
        """The file of a row's clip."""
        if row == TRANSFER:
            return videos.find(self.folder, case.id)
        found = videos.find(self.folder / row, case.id)
        if found is None and row == "swapped" and not (self.folder / row).is_dir() and case.id in self.others:
            found = videos.find(self.folder, self.others[case.id].id)
        return found

    def has(self, row: str) -> bool:
        """Whether there can be clips of a row."""
        return row in (TRANSFER, "swapped") or not ROWS[row].network or (self.folder / row).is_dir()

    def of_row(self, row: str, case: Case) -> Clip:
        if not ROWS[row].network:
            return given(row, case, self.size)
        path = self.path(row, case)
        if path is None:
            raise RequestError(f"{self.folder / (row if row != TRANSFER else '')}: no clip named {case.id}")
        return videos.read(path, self.size)

    def with_same_noise(self, row: str, case: Case) -> Clip:
        path = videos.find(self.folder / row, case.id)
        if path is None:
            raise RequestError(f"{self.folder / row}: no clip named {case.id}, and this metric compares with it")
        return videos.read(path, self.size)


class Made:
    """The clips that were sampled."""

    def __init__(self, out: Path, config: Config, cases: Sequence[Case]):
        self.out, self.config, self.others = out, config, suites.others(cases)

    def path(self, row: str, case: Case) -> Path | None:
        """The file of a row's clip."""
        path = path_of(self.out, row, case)
        return path if path.exists() else None

    def has(self, row: str) -> bool:
        return True

    def of_row(self, row: str, case: Case) -> Clip:
        size = self.config.video
        if not ROWS[row].network:
            return given(row, case, size)
        path = self.path(row, case)
        if path is None:
            self.require_inputs(row, case)
            raise RequestError(f"no clip of {row}: not made yet; --controls leaves the row out, or it is another process's")
        return videos.read(path, size)

    with_same_noise = of_row

    def require_inputs(self, row: str, case: Case) -> None:
        """A `RequestError` if what the network is given cannot be read, which is why there is no clip."""
        if row == "swapped" and case.id not in self.others:
            raise RequestError(f"{case.id}: the suite has no other reference of task {case.task}")
        (self.others[case.id] if row == "swapped" else case).reference(self.config.data.reference)
        if case.first_frame is not None:
            case.first_frame(self.config.video)


def given(row: str, case: Case, size: VideoConfig) -> Clip:
    """The clip of a control that no network makes."""
    reference = case.reference(size)
    if row == "copied":
        return reference
    frame = case.first_frame(size) if case.first_frame is not None and case.is_temporal else reference[0]
    return frame[None].repeat(size.frames, 0)


def main(config: Config) -> None:
    out, folder = Path(OUT.value or ""), config.train.init_from if CHECKPOINT.value is None else CHECKPOINT.value
    check(config, folder)
    config = with_found_mesh(config)
    suite = suites.load(SUITE.value or "", config)
    for problem in suite.problems:
        print(f"left out: {problem}", flush=True)
    against = results.read(Path(AGAINST.value, results.FILE)) if AGAINST.value else None
    metrics, missing = measures.without_weights()
    given_metrics, absent = given_files.load({name: flag.value or "" for name, flag in GIVEN.items()})
    metrics, missing = [*metrics, *given_metrics], missing | absent
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}", flush=True)
    clips = Ready(Path(VIDEOS.value), config.video, suite.cases) if VIDEOS.value else Made(out, config, suite.cases)
    rows = [row for row in ROWS if row == TRANSFER or row in ROWS_MADE.value]
    missing |= {f"row {row}": f"{Path(VIDEOS.value, row)}: no such folder" for row in rows if not clips.has(row)}
    rows = [row for row in rows if clips.has(row)]
    require_settings(out / SETTINGS, settings(config, folder, suite))
    everything = units(suite.cases, rows)
    index, count = process(SHARD_INDEX.value, SHARD_COUNT.value)
    mine = everything[index::count]
    if not VIDEOS.value:
        sample(config, folder, suite, [unit for unit in mine if ROWS[unit.row].network])
    measure(metrics, config.video, clips, mine)
    left = [unit for unit in everything if not all(scores_path(out, unit.row, case).exists() for case in unit.cases)]
    if left:
        print(f"{len(left)} of {len(everything)} parts are not done; the last process to finish writes {results.FILE} and {PAGE}")
        return
    lines = measure(metrics, config.video, clips, everything, quiet=True)
    lines += results.of_sets(metrics, suite.cases, rows, lambda row, case: scores_path(out, row, case))
    name = Path(AGAINST.value).name if AGAINST.value else ""
    found = Evaluation(suite.name, lines, measures.score_of(metrics), suites.protocols(suite), missing, suite.problems, against, name)
    report(found, config, suite, clips, environment(config, folder, suite, metrics, missing))


def check(config: Config, folder: str) -> None:
    """A `RequestError` for what cannot work, before anything is computed."""
    unknown = [row for row in ROWS_MADE.value if row not in CONTROLS]
    require(not unknown, f"--controls={','.join(unknown)}: unknown; there are {', '.join(CONTROLS)}")
    reads = [SUITE.value or "", VIDEOS.value, AGAINST.value, folder]
    outputs.require_folder("--out", OUT.value or "", [path for path in reads if Path(path).exists()])
    require(
        not VIDEOS.value or Path(VIDEOS.value).is_dir(), f"--videos={VIDEOS.value}: no such folder; give one with a clip for every case"
    )
    if not VIDEOS.value:
        require(
            config.dit.image_to_video,
            "--config: a text-to-video network; sample its clips with launch.sample, and measure them with --videos=DIR",
        )
        networks = ("dit", "vae", *(["mllm"] if config.alignment.enabled else ["text"]), *(["image"] if config.dit.image_dim else []))
        load_models.require_weights(folder, config, networks, "--checkpoint" if CHECKPOINT.value is not None else load_models.INIT_FROM)


def settings(config: Config, folder: str, suite: Suite) -> dict[str, Any]:
    """What the clips and their measures depend on, as JSON has it."""
    found: dict[str, Any] = {"suite": sha256(suite.name) if Path(suite.name).is_file() else suite.name, "video": asdict(config.video)}
    found["clips of the suite"] = fingerprint.of_pairs((str(path), sha256(path)) for path in suite.files)
    if VIDEOS.value:
        return found | {"videos": str(Path(VIDEOS.value).absolute())}
    names = ("dit", "vae", "text", "image", "mllm", "lora", "alignment", "sampler", "seed")
    same = {name: getattr(config, name) for name in names}
    found |= {name: asdict(value) if name != "seed" else value for name, value in same.items()}
    found["reference"] = asdict(config.data.reference)
    found["checkpoint"] = checkpoint_digest(config, folder)
    return json.loads(json.dumps(found))


def checkpoint_digest(config: Config, folder: str) -> str:
    """What the weights are known by, wherever they lie; empty for random ones."""
    source = run_folder.imported_weights(folder)
    parts = fingerprint.of_model(source, ("dit", "vae", "text", "image", "mllm"), ()) if source else {}
    own = run_folder.origin_digest(folder, ("dit",)) if run_folder.is_run(folder) else ""
    return fingerprint.of_pairs([*parts.items(), ("run", own)]) if folder else ""


def require_settings(path: Path, asked: dict[str, Any]) -> None:
    """Writes the settings of a new folder; a `RequestError` names what differs from those of an old one."""
    if not path.exists():
        write_whole(path, json.dumps(asked, indent=1))
    there = read_json(path, "restore it from a copy, or give another --out")
    changed = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
    require(not changed, f"{path.parent}: begun with other values of: {', '.join(changed)}; give the same, or another --out")


def sample(config: Config, folder: str, suite: Suite, wanted: list[Unit]) -> None:
    """Makes the clips of `wanted` that are not there."""
    sampler = Sampler(config, folder, suite.cases, Path(OUT.value or ""))
    if not folder:
        print("no --checkpoint: the weights are random, so the clips will be noise; this only shows that every part runs", flush=True)
    left = sum(len(unit.cases) for unit in wanted if not sampler.is_made(unit))
    if left:
        with tqdm(total=left, desc="sampling", unit="clip", disable=None) as bar:
            sampler.make(wanted, lambda unit: bar.update(len(unit.cases)))


def measure(metrics: Sequence[Metric], size: VideoConfig, clips: Ready | Made, wanted: Sequence[Unit], quiet: bool = False) -> list[Line]:
    """The lines of all cases of `wanted`; what is not kept yet is measured."""
    out, lines = Path(OUT.value or ""), []
    with tqdm(total=sum(len(unit.cases) for unit in wanted), desc="measuring", unit="clip", disable=True if quiet else None) as bar:
        for unit in wanted:
            for case in unit.cases:
                found = lines_of(metrics, Sample(case, unit.row, size, clips), clips.path(unit.row, case), scores_path(out, unit.row, case))
                if not quiet:
                    failed = [f"{case.id}, {unit.row}: {line.failure}" for line in found if line.metric == results.CLIP]
                    for text in failed:
                        tqdm.write(text)
                lines += found
                bar.update()
    return lines


def lines_of(metrics: Sequence[Metric], sample: Sample, file: Path | None, kept: Path) -> list[Line]:
    """The lines of one clip: a line a score, or one that says why there is no clip."""
    case, row = sample.case, sample.row

    def line(metric: str, value: float | None, failure: str = "") -> Line:
        return Line(row, case.task, case.id, case.clip, case.prompt, case.seed, metric, value, " ".join(failure.split()))

    try:
        sample.clip  # noqa: B018
    except RequestError as error:
        write_whole(kept, json.dumps({}))
        return [line(results.CLIP, None, str(error))]
    found = measures.measure(metrics, sample, kept, sha256(file) if file and ROWS[row].network else "")
    lines = []
    for metric in metrics:
        if (measured := found.get(metric.name)) is not None:
            names = [name for name in metric.scores if measured.failure or name in measured.values]
            lines += [line(name, measured.values.get(name), measured.failure) for name in names]
    return lines


def scores_path(out: Path, row: str, case: Case) -> Path:
    """What was measured of a clip."""
    return out / "scores" / row / f"{case.id}.json"


def environment(config: Config, folder: str, suite: Suite, metrics: Sequence[Metric], missing: dict[str, str]) -> dict[str, Any]:
    """environment.json: all that the figures depend on."""
    return {
        "command": " ".join(sys.argv),
        "config": FLAGS["config"].value,
        "suite": {"name": suite.name, "sha256": sha256(suite.name) if Path(suite.name).is_file() else None, "cases": len(suite.cases)},
        "protocols": suites.protocols(suite),
        "seeds": sorted({case.seed for case in suite.cases}),
        "checkpoint": {"folder": folder, "digest": "" if VIDEOS.value else checkpoint_digest(config, folder)},
        "videos": VIDEOS.value,
        "video": asdict(config.video),
        "sampler": asdict(config.sampler),
        "weights": {metric.name: metric.weights for metric in metrics if metric.weights},
        "absent": missing,
        "versions": {"python": platform.python_version(), **measures.versions()},
        "machine": {"platform": platform.platform(), "device": jax.devices()[0].device_kind, "processes": jax.process_count()},
    }


def report(found: Evaluation, config: Config, suite: Suite, clips: Ready | Made, about: dict[str, Any]) -> None:
    """Writes scores.csv, tables.md, environment.json and report.html."""
    out = Path(OUT.value or "")
    write_whole(out / results.FILE, results.write(found.lines))
    write_whole(out / TABLES, tables.markdown(found))
    write_whole(out / ENVIRONMENT, json.dumps(about, indent=1))
    facts = {
        "command": about["command"],
        "seeds": ", ".join(map(str, about["seeds"])),
        "checkpoint": about["checkpoint"]["digest"] or about["videos"] or "random weights",
        "clips": f"{config.video.frames} frames of {config.video.width} x {config.video.height} pixels",
        **{f"weights of {name}": digest for name, digest in about["weights"].items()},
        **{name: version for name, version in about["versions"].items() if version},
    }
    again = f"python -m launch.evaluate --config={FLAGS['config'].value} --suite={suite.name}"
    steps = (
        ("Compare another checkpoint, case by case.", f"{again} --checkpoint=OTHER --out={out}-other --against={out}"),
        ("Measure the clips of another system.", f"{again} --videos=DIR --out={out}-videos --against={out}"),
    )
    page.write(evaluation_page.page(found, suite.cases, config.video, clips.of_row, facts, steps), out / PAGE)
    failed = len(results.failures(found.lines))
    print(tables.markdown(found).split("\n## Metrics")[0])
    print(f"wrote {out / results.FILE}, {TABLES}, {ENVIRONMENT} and {PAGE}; {failed} failures" + (", named there" if failed else ""))


if __name__ == "__main__":
    command.run(main, FLAGS)
