"""Published data sets as they lie on disk, read into pairs of clips for a manifest or a suite (data_pipelines/public.py).

What is read, and where the layout was seen. None of the sets was downloaded: where the authors' code and README are silent, names are those
of the set's description, and `--file` and `--columns` name what lies otherwise.

vap_data: VAP-Data (huggingface.co/datasets/BianYx/VAP-Data). Folders and files from the README of bytedance/Video-As-Prompt; the columns of
vap_data.csv from its finetrainers/data/dataset.py, those of benchmark/benchmark.csv from its examples (read there as benchmark.csv). Paths
count from the set's folder. As in its training, rows with `_valid` of 0 or less or a `reference_alignment_score` of 5 or less are passed
over, as targets and as references. The names of its 100 kinds were not seen: a kind or folder has the task that `--tasks` gives it,
vfx_videos_hq_camera is camera, all others are effect.

cameraclone: CameraClone-Dataset (KlingTeam, before KwaiVGI). CamCloneDataset.csv and its columns from the README of KwaiVGI/CamCloneMaster;
its demo/example_csv/infer/example_camclone_testset.csv, without targets but with first frames, was read itself. The content reference
(content_video_path) has no counterpart here and is not used: the target starts from its first frame.

vfxmaster: VFXMaster_datasets. Only the name of its info.json is known; the repository (libaolu312/VFXMaster) has no code yet. A list of
objects, an object {effect: list of objects} and an object {clip: object or prompt} are read, with the keys of `COLUMNS`. Without a key
for the effect it is the clip's folder. The reference of a clip is the next clip of its effect.

mtbench: MTBench of DeT (huggingface.co/datasets/QingyuShi/MTBench). From evaluation.py of Shi-qingyu/DeT and its three examples: a folder a
case with videos/CASE.mp4, eval_prompts.txt (five prompts, one a line), prompts.txt (what the clip shows) and first_frame.jpg. It has no
targets, so it makes suites alone.
"""

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import RequestError, require

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LEAST_SCORE = 5.0  # of VAP-Data's reference_alignment_score: alignment_score_threshold in finetrainers/data/dataset.py

# By layout, what a row is read for and the names that its column or key may have.
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "vap_data": {
        "target": ("video_paths",),
        "references": ("ref_video_paths", "ref_video_path"),
        "kind": ("kind",),
        "split": ("split",),
        "prompt": ("tar_video_caption",),
        "caption": ("ref_video_caption",),
        "valid": ("_valid",),
        "score": ("reference_alignment_score",),
    },
    "cameraclone": {
        "target": ("video_path",),
        "reference": ("ref_video_path",),
        "prompt": ("caption",),
        "first_frame": ("first_frame_path",),
    },
    "vfxmaster": {
        "target": ("video", "video_path", "path", "file", "file_name", "filename"),
        "effect": ("effect", "effect_name", "effect_type", "category", "class", "label"),
        "prompt": ("prompt", "caption", "text", "description"),
    },
    "mtbench": {},
}


class Pair(NamedTuple):
    """One pair as it is published; paths count from the set's folder, or from the folder above it."""

    place: str
    """File and line, or the case."""
    id: str
    """Unique in the set, and fit for a file's name."""
    task: str
    reference: str
    target: str
    """Empty where there is none."""
    prompts: tuple[str, ...] = ("",)
    first_frames: tuple[str, ...] = ()
    """One, or one for each prompt."""
    caption: str = ""
    """What the reference shows."""
    kind: str = ""
    """What is taken from it, by name: the effect, the camera's path; empty if the set does not say it."""


class Left(NamedTuple):
    """A row that cannot be used."""

    place: str
    reason: str


class Options(NamedTuple):
    """What the user chose; each layout reads what it knows."""

    suite: bool
    """Whether a suite is made, else a training's manifest."""
    file: str = ""
    """The table, from the root on; empty is the published one."""
    columns: Mapping[str, str] = {}
    tasks: Mapping[str, str] = {}
    split: str = ""
    """Rows of this one; empty is all of a suite and `train` of a manifest, `all` is all."""
    references: int = 1
    """Of each target, at most."""
    first_frames: str = ""
    """A folder of pictures, CASE-p0.png and so on."""


Found = Iterator[Pair | Left]


def read_vap_data(root: Path, options: Options) -> Found:
    """Targets with the first of their references that are there; for a suite the rows of the benchmark."""
    benchmark = ("benchmark/benchmark.csv", "benchmark.csv")
    path = table(root, options.file, benchmark if options.suite else ("vap_data.csv",))
    needed = ("target", "references") if options.suite else ("target", "references", "kind")
    poor = {row["target"] for _, row in csv_rows(path, "vap_data", options, needed) if is_poor(row)}
    tasks, unused = {"vfx_videos_hq_camera": "camera"} | dict(options.tasks), set(options.tasks)
    split = options.split or ("all" if options.suite else "train")
    for place, row in csv_rows(path, "vap_data", options, needed):
        target = row["target"]
        if target in poor or split not in ("all", row.get("split", split)):
            continue
        try:
            named = references_of(row["references"])
        except ValueError:
            yield Left(place, f"ref_video_paths {row['references'][:60]!r}: not a JSON list of paths")
            continue
        usable = [each for each in named if each != target and each not in poor]
        chosen = ([each for each in usable if locate(root, each)] or usable)[: options.references]
        if not chosen:
            yield Left(place, "no reference that is another clip")
        kind = next((name for name in (row.get("kind", ""), *Path(target).parts) if name in tasks), "")
        unused.discard(kind)
        for rank, reference in enumerate(chosen):
            name, prompts = name_of(place, rank, target), (row.get("prompt", ""),)
            caption, told = row.get("caption", ""), row.get("kind", "")
            yield Pair(place, name, tasks.get(kind, "effect"), reference, target, prompts, (), caption, told)
    for kind in sorted(unused):
        yield Left("--tasks", f"{kind}: no row has this kind or folder")


def references_of(text: str) -> list[str]:
    """The paths of a JSON list, or the path itself; a `ValueError` if the list is damaged."""
    if not text.startswith("["):
        return [text] if text else []
    paths = json.loads(text)
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(text)
    return paths


def is_poor(row: Mapping[str, str]) -> bool:
    """Whether the authors' training passes over this clip."""
    return any(number(row[name]) <= least for name, least in (("valid", 0.0), ("score", LEAST_SCORE)) if row.get(name))


def number(text: str) -> float:
    """A number of a table; nan if it is none, which no comparison holds for."""
    try:
        return float({"True": "1", "False": "0"}.get(text, text))
    except ValueError:
        return float("nan")


def read_cameraclone(root: Path, options: Options) -> Found:
    """A pair a row: the camera's reference and the target; a suite may have a first frame in place of the target."""
    path = table(root, options.file, ("CamCloneDataset.csv",))
    needed = ("reference", "prompt") if options.suite else ("reference", "prompt", "target")
    for place, row in csv_rows(path, "cameraclone", options, needed):
        target, frame = row.get("target", ""), row.get("first_frame", "")
        if not (target or frame):
            yield Left(place, "neither video_path nor first_frame_path")
            continue
        name, frames = name_of(place, 0, target or frame), (frame,) if frame else ()
        folder = Path(row["reference"]).parent.name  # traj_1_01 holds the clips of one path of the camera
        yield Pair(place, name, "camera", row["reference"], target, (row["prompt"],), frames, "", folder * folder.startswith("traj"))


def read_vfxmaster(root: Path, options: Options) -> Found:
    """Every clip with the next ones of its effect as references."""
    path = table(root, options.file, ("info.json",))
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not JSON that can be read ({error})") from None
    names = names_of("vfxmaster", options)
    of_effect: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for place, hint, entry in entries(path.name, content):
        row = {name: str(entry[key]) for name, keys in names.items() for key in reversed(keys) if isinstance(entry.get(key), str | int)}
        target = row.get("target") or hint.get("target", "")
        if not target:
            yield Left(place, f"no text under {', '.join(names['target'])}; name the clip's key: --columns target=KEY")
            continue
        effect = row.get("effect") or hint.get("effect") or Path(target).parent.name
        of_effect[effect].append((place, target, row.get("prompt") or hint.get("prompt", "")))
    for effect, clips in of_effect.items():
        if len(clips) == 1:
            yield Left(clips[0][0], f"the only clip of {effect!r}, so it has no reference")
        for i, (place, target, prompt) in enumerate(clips):
            for rank in range(min(options.references, len(clips) - 1)):
                _, reference, shows = clips[(i + rank + 1) % len(clips)]
                yield Pair(place, name_of(place, rank, target), "effect", reference, target, (prompt,), (), shows, effect)


def entries(file: str, content: Any) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """The clips of an info.json in any of its forms: the place, what the form says of it, and its own keys."""
    if isinstance(content, dict) and len(content) == 1 and isinstance(only := next(iter(content.values())), list):
        content = only  # {"data": [...]}
    numbers = count(1)
    for key, value in content.items() if isinstance(content, dict) else [("", content)]:
        for each in value if isinstance(value, list) else [value]:
            hint = {"effect": key} if isinstance(value, list) else {"target": key}
            if isinstance(each, str):
                hint |= {"target": each} if isinstance(value, list) else {"prompt": each}
            yield f"{file}:{next(numbers)}", hint, each if isinstance(each, dict) else {}


def read_mtbench(root: Path, options: Options) -> Found:
    """A case a folder, with all its prompts."""
    require(options.suite, "--layout=mtbench: a test set, its clips have no targets to train on; make a suite: --as=suite")
    require(not options.file, "--file: mtbench has no table; leave it out")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    require(bool(folders), f"--root={root}: no folders; give the one that holds MTBench's cases")
    for folder in folders:
        name = folder.name
        try:
            prompts = tuple(filter(None, map(str.strip, (folder / "eval_prompts.txt").read_text(encoding="utf-8").splitlines())))
        except (OSError, UnicodeDecodeError) as error:
            yield Left(name, f"eval_prompts.txt: cannot be read ({getattr(error, 'strerror', None) or 'no text'})")
            continue
        frames = frames_of(folder, options.first_frames, len(prompts))
        if not prompts or not frames:
            missing = f"a first frame for each prompt: {options.first_frames}/{name}-p0.png and so on" if options.first_frames else ""
            yield Left(name, f"needs {missing or 'first_frame.jpg, or --first_frames=DIR'}" if prompts else "eval_prompts.txt: no prompt")
            continue
        shows = folder / "prompts.txt"
        caption = shows.read_text(encoding="utf-8", errors="replace").strip() if shows.is_file() else ""
        yield Pair(name, safe(name), "motion", f"{name}/videos/{name}.mp4", "", prompts, frames, caption)


def frames_of(folder: Path, given: str, prompts: int) -> tuple[str, ...]:
    """The first frames of a case, whole paths; empty if one is absent."""
    if not given:
        own = folder / "first_frame.jpg"
        return (f"{folder.name}/{own.name}",) if own.is_file() else ()
    found = [
        next((str(path) for end in PICTURES if (path := Path(given).absolute() / f"{folder.name}-p{i}{end}").is_file()), "")
        for i in range(prompts)
    ]
    return tuple(found) if all(found) else ()


READERS: dict[str, Callable[[Path, Options], Found]] = {
    "vap_data": read_vap_data,
    "cameraclone": read_cameraclone,
    "vfxmaster": read_vfxmaster,
    "mtbench": read_mtbench,
}


def locate(root: Path, path: str) -> Path | None:
    """The file of a published path, which counts from the root or from the folder above it; None if there is none."""
    return next((place / path for place in (root, root.absolute().parent) if os.path.isfile(place / path)), None)


def table(root: Path, given: str, published: Sequence[str]) -> Path:
    """The file that lists a set's clips; a `RequestError` if it is absent."""
    found = next((root / name for name in ([given] if given else published) if (root / name).is_file()), None)
    if found is None:
        names = given or " or ".join(published)
        raise RequestError(f"--root={root}: no {names} in it; give the folder of the set, and --file if the table has another name")
    return found


def names_of(layout: str, options: Options) -> dict[str, tuple[str, ...]]:
    """The names of each column; the one that the user gives is the only one."""
    known = COLUMNS[layout]
    unknown = [name for name in options.columns if name not in known]
    require(not unknown, f"--columns {', '.join(unknown)}: {layout} is not read for it; there are {', '.join(known) or 'none'}")
    return known | {name: (given,) for name, given in options.columns.items()}


def csv_rows(path: Path, layout: str, options: Options, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table with their places; a `RequestError` if a column that is `needed` is absent. Absent others are left out."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            there = list(lines.fieldnames or [])
            found = {name: key for name, keys in names_of(layout, options).items() for key in reversed(keys) if key in there}
            absent = [f"{name} ({' or '.join(names_of(layout, options)[name])})" for name in needed if name not in found]
            require(
                not absent,
                f"{path}: no column for {', '.join(absent)}; it has {', '.join(there)[:200] or 'none'}; name yours: --columns NAME=COLUMN",
            )
            for line in lines:
                yield f"{path.name}:{lines.line_num}", {name: (line[key] or "").strip() for name, key in found.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{path}: not a table that can be read ({getattr(error, 'strerror', None) or error})") from None


def name_of(place: str, rank: int, path: str) -> str:
    """An id: the line of the set, which of its references, and the clip's name."""
    return f"{int(place.rpartition(':')[2]):07}{f'.{rank}' if rank else ''}-{safe(Path(path).stem)}"


def safe(name: str) -> str:
    """A name with letters, digits, dots, dashes and underscores alone."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[:80].lstrip(".") or "_"
