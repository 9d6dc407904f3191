"""A published data set into a training's manifest or a suite: --layout=NAME --root=DIR --out=FILE.jsonl.

    python -m data_pipelines.public --layout=vap_data --root=VAP-Data --out=VAP-Data/manifest.jsonl
    python -m data_pipelines.public --layout=mtbench --root=MTBench --as=suite --out=MTBench/suite.jsonl

A manifest goes to launch.encode, a suite to launch.evaluate. The layouts, and where they were seen, are in data_pipelines/layouts.py. A
pair that cannot be used (a file that is absent, lies outside the root or cannot be decoded, a clip that is its own reference) is left
out, one line each, and the others go on; a table that cannot be read or lacks a column ends the command.
"""

import argparse
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.errors import RequestError, require
from data_pipelines import decoding, layouts, manifest
from data_pipelines.layouts import Left, Options, Pair
from data_pipelines.pairs import prefetch
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.folders.atomic import open_whole

THREADS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python -m data_pipelines.public --layout=NAME --root=DIR --out=FILE.jsonl; --help lists all flags",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--layout", required=True, choices=list(layouts.READERS), help="of the data set")
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--out", required=True, help="the file to write, *.jsonl")
    parser.add_argument("--as", dest="kind", choices=("manifest", "suite"), default="manifest", help="what to write (default manifest)")
    parser.add_argument("--file", default="", help="the table that lists the clips, from --root on, if it is not the published one")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="columns or keys with another name than published")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="KIND=TASK", help="vap_data: tasks of kinds or folders; others are effect"
    )
    parser.add_argument(
        "--split", default="", help="vap_data: rows of this split, or `all` (default train for a manifest, all for a suite)"
    )
    parser.add_argument("--references", type=int, default=1, help="vap_data, vfxmaster: references of a target at most (default 1)")
    parser.add_argument(
        "--first_frames", default="", help="mtbench: folder of pictures, CASE-p0.png for the first prompt of CASE and so on"
    )
    parser.add_argument("--limit", type=int, default=0, help="pairs to draw from all, by --seed; 0 takes all (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of --limit (default 0)")
    parser.add_argument("--no_decode", action="store_true", help="only look whether files are there; launch.encode --check decodes them")
    parser.add_argument("--allow_outside", action="store_true", help="files may lie outside --root, as links into a download cache do")
    args = parser.parse_args()
    try:
        write(args)
    except RequestError as error:
        parser.error(" ".join(str(error).split()))
    except OSError as error:
        sys.exit(f"{error.filename or args.out}: {error.strerror or error}")


def write(args: argparse.Namespace) -> None:
    """Writes the file and prints what was left out; a `RequestError` if nothing is left, and then nothing is written."""
    root, out = Path(args.root), Path(args.out)
    require(root.is_dir(), f"--root={args.root}: no such folder; give the folder of the data set")
    require(out.suffix == ".jsonl", f"--out={args.out}: not a name that ends in .jsonl; give one")
    require(args.references > 0, f"--references={args.references}: 1 or more")
    require(args.limit >= 0, f"--limit={args.limit}: 0 or more")
    outputs.require_file("--out", args.out, [args.root])
    require(args.layout == "vap_data" or not args.tasks, f"--tasks: {args.layout} has one task; leave it out")
    named, of_kind = assignments("--columns", args.columns), assignments("--tasks", args.tasks)
    for kind, task in of_kind.items():
        require(task in tasks.NAMES, f"--tasks {kind}={task}: not one of {', '.join(tasks.NAMES)}")
    options = Options(args.kind == "suite", args.file, named, of_kind, args.split, args.references, args.first_frames)
    look = partial(row_of, root=root, folder=Path(os.path.realpath(out.parent)), options=options, args=args, wrong=cache(wrong_file))
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    found = drawn(layouts.READERS[args.layout](root, options), args.limit, args.seed)
    with open_whole(out) as file, tqdm(unit="pair", disable=None) as bar:
        for each, future in prefetch(look, found, THREADS):
            row = future.result()
            if isinstance(row, Left):
                tqdm.write(f"left out: {row.place}: {row.reason}")
            else:
                file.write(json.dumps(row) + "\n")
            counts[not isinstance(row, Left)][each.task if isinstance(each, Pair) else "unread"] += 1
            bar.update()
        kept = counts[True].total()
        require(kept > 0, f"--root={args.root}: no pair can be used, {counts[False].total()} left out; the lines above say why")
    for task in (*tasks.NAMES, "unread"):
        if counts[True][task] or counts[False][task]:
            print(f"{task:8} {counts[True][task]:8} kept {counts[False][task]:8} left out")
    print(f"wrote {out}")
    print(f"Next: {following(args, out, root)}")


def following(args: argparse.Namespace, out: Path, root: Path) -> str:
    """The command that reads what was written."""
    if args.kind == "suite":
        return f"python -m launch.evaluate --config=NAME --checkpoint=DIR --suite={out} --out=DIR"
    inside = not args.allow_outside and root.resolve().is_relative_to(out.parent.resolve())
    return f"python -m launch.encode --config=NAME --manifest={out} --check" + ("" if inside else " --allow_outside")


def assignments(flag: str, given: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE, each."""
    for each in given:
        require("=" in each.strip("="), f"{flag} {each}: not NAME=VALUE")
    return dict(each.split("=", 1) for each in given)


def drawn(found: Iterable[Pair | Left], limit: int, seed: int) -> Iterator[Pair | Left]:
    """All, or `limit` pairs drawn evenly, in their order, after what cannot be used."""
    if not limit:
        yield from found
        return
    generator, kept, seen = random.Random(seed), {}, 0
    for each in found:
        if isinstance(each, Left):
            yield each
            continue
        place = seen if seen < limit else generator.randrange(seen + 1)
        if place < limit:
            kept[place] = (seen, each)
        seen += 1
    yield from (pair for _, pair in sorted(kept.values(), key=lambda item: item[0]))


def row_of(pair: Pair | Left, root: Path, folder: Path, options: Options, args: argparse.Namespace, wrong: Any) -> dict[str, Any] | Left:
    """The line of a pair, its paths from `folder` on; or why it is left out."""
    if isinstance(pair, Left):
        return pair
    names = {"reference": [pair.reference], "target": [pair.target] if pair.target else [], "first_frame": list(pair.first_frames)}
    paths: dict[str, list[str]] = {}
    try:
        for what, given in names.items():
            is_picture = what == "first_frame"
            allowed = args.allow_outside or (is_picture and bool(options.first_frames))
            files = [inside(what, name, root, allowed) for name in given]
            reasons = [] if args.no_decode else [f"{what} {reason}" for path in files if (reason := wrong(path, is_picture))]
            require(not reasons, "; ".join(reasons))
            paths[what] = [os.path.relpath(path, folder) for path in files]
        row = {"id": pair.id, "task": pair.task, "reference": paths["reference"][0]}
        return row | (suite_keys(pair, paths) if options.suite else manifest_keys(pair, paths, folder))
    except RequestError as error:
        return Left(pair.place, str(error))


def inside(what: str, name: str, root: Path, allowed: bool) -> Path:
    """The file of a published path; a `RequestError` if it is absent, or outside the root and that is not allowed."""
    require(bool(name), f"{what}: no path")
    path = layouts.locate(root, name)
    if path is None:
        raise RequestError(f"{what} {root / name}: no such file")
    within = path.resolve().is_relative_to(root.resolve())
    require(allowed or within, f"{what} {path}: outside {root}; move it there, or allow it: --allow_outside")
    return path.parent.resolve() / path.name


def wrong_file(path: Path, is_picture: bool) -> str:
    """Why a file cannot be used; empty if it can. Of a clip the first picture is decoded, in a process of its own."""
    try:
        with decoding.decoder() as decoder:
            _ = decoder.image(path) if is_picture else decoder.measure(path)
    except RequestError as error:
        return str(error)
    return ""


def manifest_keys(pair: Pair, paths: Mapping[str, list[str]], folder: Path) -> dict[str, Any]:
    """What a manifest's line has beside id, task and reference, checked as launch.encode checks it."""
    keys = {"target": paths["target"][0], "prompt": pair.prompts[0]}
    if paths["first_frame"]:
        keys["first_frame"] = paths["first_frame"][0]
    line = json.dumps({"id": pair.id, "task": pair.task, "reference": paths["reference"][0], **keys})
    wrong = manifest.read_object(line, manifest.REQUIRED, manifest.OPTIONAL)[1]
    require(not wrong, "; ".join(wrong))
    reference, target = manifest.Clip(folder / paths["reference"][0]), manifest.Clip(folder / keys["target"])
    manifest.refuse_same(manifest.Row(pair.id, pair.task, reference, target, pair.prompts[0]))
    return keys


def suite_keys(pair: Pair, paths: Mapping[str, list[str]]) -> dict[str, Any]:
    """What a suite's line has beside id, task and reference (evaluation/suites.py)."""
    keys: dict[str, Any] = {"prompts": list(pair.prompts), "kind": pair.kind or pair.reference}
    if paths["target"]:
        keys["target"] = paths["target"][0]
    if frames := paths["first_frame"]:
        keys["first_frame"] = frames if len(frames) > 1 else frames[0]
    return keys | ({"caption": pair.caption} if pair.caption else {})


if __name__ == "__main__":
    main()
