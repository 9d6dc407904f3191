"""The whole road at tiny size: three stages from the base that the package holds, transfers of all five tasks, and a page that shows them.

    make demo
    python -m launch.demo --out=out/demo

Everything happens in the procedural world (world/pairs.py), whose pairs share one known factor, so that every transfer has a
true answer and every score its controls. The pairs that are shown and scored share values that training never sees. Started again it
goes on where it stopped. DIR/report.html is the page, DIR/scores.json its numbers, DIR/result.webp a
picture of the first pairs.
"""

import json
import os
import platform
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from configs.errors import RequestError
from configs.run import Config, VideoConfig
from data_pipelines.batches import batches, data_digest, empty_text
from data_pipelines.encoders import Encoders
from evaluation import transfer
from evaluation.report import page as report
from evaluation.report import picture
from evaluation.report.curve import Curve
from evaluation.report.page import Picture, Report, Row, Score, Section, Table
from evaluation.transfer import Results, Transfer
from launch import command, encode_world
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.train import loop
from omnitransfer_jax.train.log import read_lines
from world import pixels, scenes
from world.pairs import SHARES

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string("out", "out/demo", "folder of records, runs and report", flag_values=FLAGS)
PAIRS = flags.DEFINE_integer("pairs", 2500, "pairs to train on", lower_bound=5, flag_values=FLAGS)
SCORED = flags.DEFINE_integer("scored", 40, "held-out pairs of each task that are scored", lower_bound=8, flag_values=FLAGS)
LENGTH = flags.DEFINE_float("length", 1.0, "training steps, as a multiple of the configurations' own", lower_bound=0.001, flag_values=FLAGS)

RECORDS, SCORES, PICTURE, PAGE = "records", "scores.json", "result.webp", "report.html"
STAGES = ("stage1", "stage2", "stage3")
SHARE = {"records": 0.14, "stage1": 0.40, "stage2": 0.08, "stage3": 0.27, "transfers": 0.11}  # of the time, measured on two CPU cores
SHOWN = 6  # pairs of each task on the page, the first ones
TARGETS = {"effect": 0.9, "motion": 0.6, "style": 0.8}  # of retrieval on held-out pairs
MOST_SWAPPED = 0.3  # of retrieval with another pair's reference
PARTS = {"id": "identity", "style": "style", "motion": "motion", "camera": "camera movement", "effect": "effect"}


def main() -> None:
    require_places(OUT.value)
    out, clock = Path(OUT.value), Clock(SHARE)
    configs = {stage: stage_config(stage, out) for stage in STAGES}
    with clock.part("records", f"{PAIRS.value} pairs of the world, rendered and encoded"):
        encode_world.write(command.load_config("stage3:tiny"), out / RECORDS, PAIRS.value, key=0)  # by the encoders of the package
    for stage, config in configs.items():
        with clock.part(stage, f"{config.train.steps} training steps"):
            data = batches(config, seed=config.seed)
            try:
                objective = omnitransfer.objective(config, empty_text(config))
                loop.train(objective, config, out / stage, make_mesh(config.mesh), data, data_digest=data_digest(config))
            except RequestError as error:
                raise RequestError(f"{error}; to begin anew, remove {out}") from None
    with clock.part("transfers", f"{SCORED.value} held-out pairs of each task, with their controls"):
        results, both = transfers(configs["stage3"], str(out / "stage3"))
    (out / SCORES).write_text(json.dumps(results.table(), indent=2) + "\n")
    draw(results, configs["stage3"].video, out / PICTURE)
    report.write(page(configs, out, results, both, clock), out / PAGE)
    print(summary(results))
    print(f"\n{clock.elapsed()} in all. Open {out / PAGE} in a browser.")


def require_places(out: str) -> None:
    """A `RequestError`, before minutes of training, if a folder or a file of the demo cannot be written."""
    outputs.require_folder("--out", out)
    outputs.require_folder("--out", f"{out}/{RECORDS}", holds="records")
    for stage in STAGES:
        outputs.require_folder("--out", f"{out}/{stage}", holds="run")
    for name in (SCORES, PICTURE, PAGE):
        outputs.require_file("--out", f"{out}/{name}")


class Clock:
    """Says what is being done, how long it took, and about how long the rest will take, from the shares parts have of the whole."""

    def __init__(self, share: dict[str, float]):
        self.share, self.started, self.seconds = share, time.monotonic(), {}

    def part(self, name: str, what: str) -> "Clock":
        """Opens a part; the context that is left closes it."""
        self.name, self.begun = name, time.monotonic()
        ran = [each for each, seconds in self.seconds.items() if seconds > 5]  # what was there already tells nothing
        spent, done = sum(self.seconds[each] for each in ran), sum(self.share[each] for each in ran)
        ahead = sum(self.share.values()) - sum(self.share[each] for each in self.seconds)
        left = f", about {timedelta(seconds=round(spent / done * ahead))} to go in all" if ran else ""
        number = len(self.seconds) + 1
        print(f"\n[{number}/{len(self.share)}] {name}: {what} ({self.elapsed()} so far{left})", flush=True)
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] = time.monotonic() - self.begun

    def elapsed(self) -> str:
        """Since the beginning, as minutes and seconds."""
        return f"{timedelta(seconds=round(time.monotonic() - self.started))}"


def stage_config(stage: str, out: Path) -> Config:
    """The stage's configuration, on the records of `out`, from the stage before."""
    config = command.load_config(f"{stage}:tiny")
    before = STAGES.index(stage) - 1
    steps = max(1, round(config.train.steps * LENGTH.value))
    train = replace(config.train, steps=steps, log_every=min(25, steps), init_from=str(out / STAGES[before]) if before >= 0 else "embedded")
    return replace(config, data=replace(config.data, path=str(out / RECORDS)), train=train)


def transfers(config: Config, folder: str) -> tuple[Results, list[Row]]:
    """The clips and scores of all tasks and controls, and one transfer from two references at once."""
    made = Transfer(config, Encoders(config, folder))
    networks = transfer.load(config, folder)
    pairs = {task: transfer.held_out(config, task, SCORED.value) for task in tasks.NAMES}
    with tqdm(total=len(pairs) * 3 * SCORED.value, desc="sampling", unit="clip", disable=None) as bar:
        results = transfer.measure(made, networks, pairs, transfer.CONTROLS, bar.update)
    return results, combination(made, networks)


def combination(made: Transfer, networks: transfer.Networks) -> list[Row]:
    """Identity from one reference and style from another, which training never asks for."""
    styled = transfer.held_out(made.config, "style", SHOWN, key=2)
    others = transfer.held_out(made.config, "id", SHOWN, key=2)
    prompts = [scenes.caption(pair.target, {"identity", "style"}) for pair in styled]
    style = [pair._replace(prompt=prompt) for pair, prompt in zip(styled, prompts, strict=True)]
    identity = [
        pair._replace(task="id", reference=other.reference._replace(identity=pair.target.identity))
        for pair, other in zip(style, others, strict=True)
    ]
    return [
        Row(
            f"Pair {i + 1}",
            (
                Picture("identity from", pixels.render(one.reference, made.config.video)),
                Picture("style from", pixels.render(two.reference, made.config.video)),
                Picture("truth", pixels.render(two.target, made.config.video), "truth"),
                Picture("generated", clip, "generated"),
            ),
            two.prompt,
        )
        for i, (one, two, clip) in enumerate(zip(identity, style, made.combined(networks, style, identity), strict=True))
    ]


def summary(results: Results) -> str:
    """The scores as a table for the console."""
    lines = [f"{'retrieval of 8':15}" + "".join(f"{control:>10}" for control in transfer.CONTROLS) + f"{'psnr gain':>12}"]
    for task in tasks.NAMES:
        shares = "".join(f"{results.mean(task, 'retrieval', control):10.2f}" for control in transfer.CONTROLS)
        lines.append(f"{task:15}{shares}{results.mean(task, 'psnr gain'):9.1f} dB")
    return "\n".join(lines)


def draw(results: Results, video: VideoConfig, path: Path) -> None:
    """Writes the first pair of every task as one moving picture."""
    columns = [
        picture.Column(
            PARTS[task],
            (
                pixels.render(pairs[0].reference, video),
                results.clips[task]["transfer"][0],
                pixels.render(pairs[0].target, video),
            ),
        )
        for task, pairs in results.pairs.items()
    ]
    picture.write(columns, ("reference", "generated", "truth"), path, video.fps)


def page(configs: dict[str, Config], out: Path, results: Results, both: list[Row], clock: Clock) -> Report:
    """The report of the run."""
    video = configs["stage3"].video
    opening = tuple(
        Row(PARTS[task].capitalize(), (
            Picture("reference", pixels.render(pairs[0].reference, video)),
            Picture("generated", results.clips[task]["transfer"][0], "generated"),
        ))
        for task, pairs in results.pairs.items()
    )  # fmt: skip
    cards = [
        Score(
            f"{PARTS[task].capitalize()}: the true one of 8 is the nearest",
            100 * results.mean(task, "retrieval"),
            100 * target,
            controls=(("swapped reference", 100 * results.mean(task, "retrieval", "swapped")), ("chance", 12.5)),
        )
        for task, target in TARGETS.items()
    ]
    swapped = max(results.mean(task, "retrieval", "swapped") for task in tasks.NAMES)
    cards.append(
        Score("The same with another pair's reference, the worst of five tasks", 100 * swapped, 100 * MOST_SWAPPED, better="lower")
    )
    sections = [section(task, results, video) for task in tasks.NAMES]
    sections.append(Section("Two references at once", BOTH, tuple(both)))
    return Report(
        "A reference video, and what is taken from it",
        f"OmniTransfer at tiny size: {clock.elapsed()} on {os.cpu_count()} CPU cores, from the base in the package to transfers of five "
        "kinds. Each section shows its first pairs; none was selected.",
        opening,
        tuple(cards),
        tuple(sections),
        curves(configs, out),
        facts(configs, clock),
        NEXT,
        fps=float(video.fps),
    )


BOTH = (
    "Identity from one clip and style from another. No training pair has both: the target attends to the tokens of two references, and "
    "the language model reads the inputs of both (paper, appendix B)."
)
ABOUT = {
    "id": "The sprite of the reference, in a scene that the prompt describes. Held out: combinations of colours, texture and shape.",
    "style": "The drawing of the reference, for a scene that the prompt describes. Held out: combinations of hue and drawing.",
    "motion": "The path of the reference's sprite, for the sprite of the first frame. Held out: directions.",
    "camera": "The camera of the reference, for the scene of the first frame. Held out: directions.",
    "effect": "The effect that sweeps over the reference, for the scene of the first frame. Held out: combinations of colour, kind, side.",
}
SCORE_NAMES = {
    "retrieval": "true one of 8", "psnr": "PSNR", "psnr gain": "above no reference", "path": "path error", "camera": "camera error",
    "colour": "colour error", "texture": "texture error", "leak": "nearer to the reference",
}  # fmt: skip
NAMES = {
    "transfer": "transfer", "swapped": "swapped reference", "none": "no reference", "still": "still first frame",
    "copied": "copied reference",
}  # fmt: skip


def section(task: str, results: Results, video: VideoConfig) -> Section:
    """One task: its first pairs, and its scores beside those of the controls."""
    rows = []
    for i, pair in enumerate(results.pairs[task][:SHOWN]):
        truth = pixels.render(pair.target, video)
        given = [Picture("reference", pixels.render(pair.reference, video))]
        given += [Picture("first frame", truth[0])] if pair.is_temporal else []
        clips = results.clips[task]
        made = [Picture("generated", clips["transfer"][i], "generated"), Picture("swapped reference", clips["swapped"][i], "control")]
        value = " ".join(getattr(pair.target, SHARES[task]))
        rows.append(Row(value, (*given, Picture("truth", truth, "truth"), *made), pair.prompt))
    known = [name for name in SCORE_NAMES if name in results.scores[task]["transfer"]]
    table = Table(
        ("", *(SCORE_NAMES[name] for name in known)),
        tuple(
            (NAMES[control], *(score_text(name, results.scores[task][control][name]) for name in known)) for control in transfer.CONTROLS
        ),
        f"Means over {len(results.pairs[task])} held-out pairs, 95% bootstrap intervals. Errors of path and camera in pixels of a picture "
        "64 high.",
    )
    return Section(PARTS[task].capitalize(), ABOUT[task], tuple(rows), table)


def score_text(name: str, values: np.ndarray) -> str:
    """The mean of a score with its 95% interval, for the page."""
    mean, (low, high) = float(values.mean()), transfer.interval(values)
    if name in ("retrieval", "leak"):
        return f"{100 * mean:.0f}% ({100 * low:.0f} to {100 * high:.0f})"
    digits, unit = {"psnr": (1, " dB"), "psnr gain": (1, " dB"), "path": (1, " px"), "camera": (1, " px")}.get(name, (3, ""))
    return f"{mean:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def curves(configs: dict[str, Config], out: Path) -> tuple[Curve, ...]:
    """The training losses of all stages in one chart."""
    series = {}
    for stage in configs:
        lines = read_lines(out / stage)
        series[stage] = ([line["step"] for line in lines], [line["loss"] for line in lines])
    return (Curve("Training loss of the stages", "step", "weighted velocity error", series),)


def facts(configs: dict[str, Config], clock: Clock) -> Table:
    """The settings of the run, the machine and the times."""
    final = configs["stage3"]
    rows = [
        ("machine", f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}"),
        ("versions", f"Python {platform.python_version()}, jax {jax.__version__}, numpy {np.__version__}"),
        ("clips", f"{final.video.frames} frames of {final.video.width} x {final.video.height} pixels, {final.video.fps} a second"),
        ("training pairs", f"{PAIRS.value}, key 0; held-out pairs: key 1"),
        ("seed", f"{final.seed}"),
        *((stage, f"{config.train.steps} steps of {config.train.batch_size} pairs") for stage, config in configs.items()),
        ("sampler", f"{final.sampler.solver}, {final.sampler.steps} steps, no guidance, references cached"),
        *((f"time: {name}", f"{timedelta(seconds=round(seconds))}") for name, seconds in clock.seconds.items()),
        ("base", "omnitransfer_jax/embedded; made.json there says how it was made"),
        ("not measured", "anything at full size: no weights of the paper exist, and nothing was trained on real clips here"),
    ]
    return Table(("", ""), tuple(rows))


NEXT = (
    ("Train longer: the same command with three times the steps.", "python -m launch.demo --out=out/long --length=3 --pairs=10000"),
    ("Bring the real weights of the base.", "python -m launch.import_weights --source=Wan2.1-I2V-14B-480P-Diffusers --out=wan_i2v"),
    ("And of the language model.", "python -m launch.import_weights --source=Qwen2.5-VL-3B-Instruct --out=wan_i2v"),
    ("Encode your own clips.", "python -m launch.encode --config=stage3 --manifest=clips.jsonl --out=records --train.init_from=wan_i2v"),
    (
        "Train the first stage on them.",
        "python -m launch.train --config=stage1 --data.path=records --train.init_from=wan_i2v --workdir=stage1",
    ),
)


if __name__ == "__main__":
    command.run(main, FLAGS)
