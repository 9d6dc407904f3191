"""What is evaluated: a reference, a prompt, a first frame and a seed each, from a file or from the procedural world.

A suite is a file of JSON lines; paths are relative to it.

    {"id": "kite", "task": "motion", "reference": "a.mp4", "prompts": ["..."], "first_frame": "a.png", "seeds": [0, 1]}

`id`, `task` and `reference` are needed. Absent `prompts` (or `prompt`, one text) are one empty prompt, absent `seeds` the seed of the
configuration. Temporal tasks need `first_frame`, one picture or a list with one for each prompt, or `target`, the true clip, whose first
frame is then taken. `start` and `end` are seconds of the reference, `caption` describes it, and `kind` names what is taken from it, an
effect's name for instance: another reference, for the controls, is one of another kind. Every prompt with every seed is a case. A row that
cannot be used is said and left out.

`world` or `world:N` are N held-out pairs (40 if not given) of each task of the procedural world, where the true clip is known. A file with
the key `clip` in its first row is a motion suite of evaluation/motion_cases.py; all its prompts are taken.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from configs.errors import RequestError, require
from configs.run import Config, VideoConfig
from data_pipelines import clips
from evaluation import motion_cases
from evaluation.transfer import held_out
from omnitransfer_jax import tasks
from world import pixels
from world.pairs import SHARES, Example

Clip = UInt8[np.ndarray, "T H W 3"]
Picture = UInt8[np.ndarray, "H W 3"]
WORLD, WORLD_PAIRS = "world", 40
REQUIRED = ("id", "task", "reference")
KNOWN = (*REQUIRED, "prompt", "prompts", "first_frame", "target", "seeds", "start", "end", "caption", "kind")

# Clips of each task and prompts for each of them in the paper's test sets (section 5.2).
PROTOCOLS = {"id": (50, 2), "style": (20, 2), "motion": (50, 1), "camera": (50, 1), "effect": (50, 1)}


class Case(NamedTuple):
    """One clip to make. Clips are read when they are asked for."""

    id: str
    """Its name in files and tables."""
    task: str
    prompt: str
    seed: int
    clip: str
    """What its reference is known by: cases with the same one are not independent."""
    reference: Callable[[VideoConfig], Clip]
    first_frame: Callable[[VideoConfig], Picture] | None = None
    truth: Callable[[VideoConfig], Clip] | None = None
    """The clip to be made, where it is known."""
    pair: Example | None = None
    """The pair of the world that it is."""
    caption: str = ""
    """Of the reference."""
    kind: str = ""
    """What is taken from the reference, by name; empty if that is not known."""

    @property
    def is_temporal(self) -> bool:
        """Whether the task starts from a first frame."""
        return tasks.TASKS[tasks.task_index(self.task)].family == "temporal"


class Suite(NamedTuple):
    """Cases, and what was wrong with the rows that are not among them."""

    name: str
    cases: list[Case]
    problems: list[str]
    files: Sequence[Path] = ()
    """The clips and pictures that its rows name."""

    @property
    def tasks(self) -> list[str]:
        """Those that occur, in the order of `tasks.NAMES`."""
        return [task for task in tasks.NAMES if any(case.task == task for case in self.cases)]


def load(name: str, config: Config) -> Suite:
    """The suite that `--suite=NAME` names."""
    if name.partition(":")[0] == WORLD and not Path(name).exists():
        return of_world(name, config)
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise RequestError(f"--suite={name}: cannot be read ({reason}); give {WORLD}, {WORLD}:N or a file of JSON lines") from None
    first = _object(next((line for line in lines if line.strip()), ""))
    if first is not None and "clip" in first:
        return of_motion_suite(name, lines, config)
    return of_rows(name, lines, Path(name).parent, config.seed)


def of_world(name: str, config: Config) -> Suite:
    """Held-out pairs of each task."""
    number = name.partition(":")[2] or str(WORLD_PAIRS)
    require(number.isdigit() and int(number) > 1, f"--suite={name}: N is the number of pairs of each task, 2 or more")
    pairs = [pair for task in tasks.NAMES for pair in held_out(config, task, int(number))]
    return Suite(name, [_of_pair(pair, config.seed) for pair in pairs], [])


def _of_pair(pair: Example, seed: int) -> Case:
    return Case(
        pair.id,
        pair.task,
        pair.prompt,
        seed,
        pair.id,
        lambda size: pixels.render(pair.reference, size),
        (lambda size: pixels.render(pair.target, size)[0]) if pair.is_temporal else None,
        lambda size: pixels.render(pair.target, size),
        pair,
    )


def of_motion_suite(path: str, lines: Sequence[str], config: Config) -> Suite:
    """All prompts of a motion suite (evaluation/motion_cases.py); clips are read in the size of the configuration's video."""
    found = [each for level in motion_cases.LEVELS for each in motion_cases.of_suite(path, level, config.video, config.dit.image_to_video)]
    cases = [
        Case(
            each.id,
            "motion",
            each.prompt,
            config.seed,
            each.id.rpartition("-")[0],
            lambda size, each=each: _resized(each.reference(), size),
            None if each.first_frame is None else lambda size, read=each.first_frame: _resized(read()[None], size)[0],
            caption=each.caption,
        )
        for each in found
    ]
    rows = [_object(line) or {} for line in lines]
    return Suite(path, cases, [], [Path(path).parent / row[key] for row in rows for key in ("clip", "first_frame") if key in row])


def _resized(clip: Clip, size: VideoConfig) -> Clip:
    """A clip at the height and width of `size`."""
    same = clip.shape[1:3] == (size.height, size.width)
    return clip if same else np.stack([clips.fit(frame, size.height, size.width) for frame in clip])


def of_rows(name: str, lines: Sequence[str], folder: Path, seed: int) -> Suite:
    """The cases of a file's lines; a `RequestError` if none can be used."""
    cases: list[Case] = []
    problems: list[str] = []
    files: list[Path] = []
    ids: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _checked(line, folder)
            require(row["id"] not in ids, f"id {row['id']!r}: another row has it; every id once")
            ids.add(row["id"])
            cases += _of_row(row, folder, seed)
            files += [path for _, path in _files(row, folder)]
        except RequestError as error:
            problems.append(f"{name}:{number}: {error}")
    require(bool(cases), f"--suite={name}: no row can be used; {problems[0] if problems else 'it is empty'}")
    return Suite(name, cases, problems, files)


def _checked(line: str, folder: Path) -> dict[str, Any]:
    """A row with all its keys; a `RequestError` says the first that is wrong with it."""
    row = _object(line)
    if row is None:
        raise RequestError("not a JSON object; give one a line")
    absent = [key for key in REQUIRED if key not in row]
    require(not absent, f"{', '.join(absent)}: absent; every row needs {', '.join(REQUIRED)}")
    unknown = [key for key in row if key not in KNOWN]
    require(not unknown, f"{', '.join(unknown)}: no such key; there are {', '.join(KNOWN)}")
    row = {"prompts": [row["prompt"]] if "prompt" in row else [""], "seeds": None, "start": 0.0, "end": None, "caption": ""} | row
    for key in ("id", "reference", "target", "caption", "kind"):
        require(isinstance(row.get(key, ""), str), f"{key} {row.get(key)!r}: not a text")
    safe = row["id"] and not set(row["id"]) & set("/\\\0") and not row["id"].startswith(".")
    require(safe, f"id {row['id']!r}: it names files; give letters and digits")
    tasks.task_index(row["task"])
    texts = isinstance(row["prompts"], list) and bool(row["prompts"]) and all(isinstance(text, str) for text in row["prompts"])
    require(texts, f"prompts {row['prompts']!r}: not a list of texts")
    if "first_frame" in row:
        frames = row["first_frame"] if isinstance(row["first_frame"], list) else [row["first_frame"]] * len(row["prompts"])
        right = len(frames) == len(row["prompts"]) and all(isinstance(frame, str) for frame in frames)
        require(right, f"first_frame {row['first_frame']!r}: not a picture, nor a list with one for each of {len(row['prompts'])} prompts")
        row["first_frame"] = frames
    seeds = row["seeds"]
    numbers = seeds is None or (isinstance(seeds, list) and bool(seeds) and all(_is_count(each) for each in seeds))
    require(numbers, f"seeds {row['seeds']!r}: not a list of whole numbers from 0 on")
    times = [each for each in (row["start"], row["end"]) if each is not None]
    right = all(isinstance(each, int | float) and not isinstance(each, bool) and each >= 0 for each in times) and times == sorted(times)
    require(right, f"start {row['start']!r}, end {row['end']!r}: seconds from 0 on, the end after the start")
    temporal = tasks.TASKS[tasks.task_index(row["task"])].family == "temporal"
    require(not temporal or "first_frame" in row or "target" in row, f"task {row['task']}: needs first_frame, a picture, or target, a clip")
    require(temporal or "first_frame" not in row, f"first_frame: {row['task']} starts from none; leave it out")
    for key, path in _files(row, folder):
        require(path.is_file(), f"{key} {path}: no such file")
    return row


def _files(row: dict[str, Any], folder: Path) -> list[tuple[str, Path]]:
    """The files that a checked row names, each with its key."""
    names = [(key, row[key]) for key in ("reference", "target") if key in row]
    return [(key, folder / name) for key, name in (*names, *(("first_frame", each) for each in row.get("first_frame", [])))]


def _of_row(row: dict[str, Any], folder: Path, seed: int) -> list[Case]:
    """A case for every prompt and seed of a checked row."""

    def clip(key: str) -> Callable[[VideoConfig], Clip]:
        stretch = {"start": float(row["start"]), "end": row["end"]} if key == "reference" else {}
        return lambda size: clips.read_clip(
            folder / row[key], frames=size.frames, fps=size.fps, height=size.height, width=size.width, **stretch
        )

    temporal = tasks.TASKS[tasks.task_index(row["task"])].family == "temporal"
    truth = clip("target") if "target" in row else None

    def first_frame(i: int) -> Callable[[VideoConfig], Picture] | None:
        if "first_frame" in row:
            return lambda size: clips.fit(clips.read_image(folder / row["first_frame"][i]), size.height, size.width)
        return (lambda size: clip("target")(size)[0]) if temporal else None

    found = []
    seeds = row["seeds"] or [seed]
    for i, prompt in enumerate(row["prompts"]):
        frame = first_frame(i)
        for each in seeds:
            name = row["id"] + (f"-p{i}" if len(row["prompts"]) > 1 else "") + (f"-s{each}" if len(seeds) > 1 else "")
            told = {"caption": row["caption"], "kind": row.get("kind", "")}
            found.append(Case(name, row["task"], prompt, each, row["id"], clip("reference"), frame, truth, **told))
    return found


def protocols(suite: Suite) -> dict[str, str]:
    """For each task of a suite, whether it has as many clips and prompts as the paper's test set."""
    found = {}
    for task in suite.tasks:
        prompts: dict[str, set[str]] = defaultdict(set)
        for case in suite.cases:
            if case.task == task:
                prompts[case.clip].add(case.prompt)
        clips_needed, prompts_needed = PROTOCOLS[task]
        fewest = min(map(len, prompts.values()))
        whole = len(prompts) >= clips_needed and fewest >= prompts_needed
        counts = f"{len(prompts)} of {clips_needed} clips, {min(fewest, prompts_needed)} of {prompts_needed} prompts a clip"
        found[task] = f"complete: {counts}" if whole else f"incomplete: {counts}"
    return found


def others(cases: Sequence[Case]) -> dict[str, Case]:
    """By case, the next case of its task with another reference, of another kind (in the world: another value of what is transferred)."""

    def differs(a: Case, b: Case) -> bool:
        if a.pair is None or b.pair is None:
            return a.clip != b.clip and (not a.kind or a.kind != b.kind)
        factor = SHARES[a.task]
        return getattr(a.pair.target, factor) != getattr(b.pair.target, factor)

    found = {}
    for task in tasks.NAMES:
        of_task = [case for case in cases if case.task == task]
        for i, case in enumerate(of_task):
            later = (of_task[(i + k) % len(of_task)] for k in range(1, len(of_task)))
            other = next((each for each in later if differs(case, each)), None)
            if other is not None:
                found[case.id] = other
    return found


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
