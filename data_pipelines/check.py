"""Reads all clips of a manifest and says what an encoding would keep, what it would leave out and why, and what a person should look at.

task      pairs  kept  left out
effect        9     8         1
left out: cup: clips/cup.mp4: 6 frames at 16 fps from 0 s, 81 needed; ...
look at: kite: its prompt names the effect ("melts"): what the reference shows need not be told
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from tqdm import tqdm

from configs.buckets import bucket_configs, written
from configs.errors import RequestError, require
from configs.run import Config
from data_pipelines import sources
from data_pipelines.buckets import bucket_of
from data_pipelines.manifest import Row
from data_pipelines.pairs import prefetch, read_pixels
from omnitransfer_jax import tasks

LISTED = 20  # lines of each kind; the others are counted
# Words of a prompt that tell what the task is to take from the reference.
TELLING = {
    "style": r"style|painting|watercolou?r|sketch|anime|cartoon|pixel art|oil on|cinematic|render",
    "motion": r"danc\w*|jump\w*|spin\w*|wav(?:es|ing)|run(?:s|ning)|walk\w*|rotat\w*",
    "camera": r"camera|zoom\w*|pan(?:s|ning)?|tilt\w*|dolly|orbit\w*|tracking shot|crane|handheld",
    "effect": r"effect|melt\w*|explod\w*|explosion|dissolv\w*|morph\w*|transform\w*|burn\w*|shatter\w*|inflat\w*|crumbl\w*|glitch\w*",
}


class Finding(NamedTuple):
    """What was found out about one pair."""

    row: Row
    described: dict[str, Any]
    reason: str
    """Why it is left out; empty if it is kept."""
    bucket: str
    """Its size (configs/buckets.py)."""


def check(rows: Sequence[Row], config: Config) -> None:
    """Prints the table and the lists; a `RequestError` if nothing would be left."""
    findings, configs = [], bucket_configs(config)
    with tqdm(total=len(rows), unit="pair", disable=None) as bar:
        for _, future in prefetch(partial(examine, configs=configs), rows, config.data.threads):
            findings.append(future.result())
            bar.update()
    counts = {name: Counter(bool(each.reason) for each in findings if each.row.task == name) for name in tasks.NAMES}
    print(f"{'task':8} {'pairs':>8} {'kept':>8} {'left out':>8}")
    for name, count in {**counts, "all": sum(counts.values(), Counter())}.items():
        print(f"{name:8} {count.total():8} {count[False]:8} {count[True]:8}")
    print_sizes(findings, configs)
    print_list("left out", [f"{each.row.id}: {each.reason}" for each in findings if each.reason])
    print_list("look at", [f"{name}: {note}" for name, note in notes(findings)])
    require(any(not each.reason for each in findings), f"all {len(findings)} pairs are left out; the lines above say why")


def print_sizes(findings: Sequence[Finding], configs: Mapping[str, Config]) -> None:
    """Prints the pairs of each size, and how many programs a training compiles."""
    print(f"{'target':>16} {'reference':>16} {'pairs':>8} {'kept':>8}")
    filled = 0
    for name, config in configs.items():
        of_size = [each for each in findings if each.bucket == name]
        kept = sum(not each.reason for each in of_size)
        filled += kept > 0
        print(f"{written(config.video):>16} {written(config.data.reference):>16} {len(of_size):8} {kept:8}")
    rates = next(iter(configs.values()))
    print(f"targets at {rates.video.fps} and references at {rates.data.reference.fps} fps; a training compiles {len(configs)} program(s)")
    if filled < len(configs):
        print(f"{len(configs) - filled} of these sizes have no pair: leave them out of --data.buckets")


def examine(row: Row, configs: Mapping[str, Config]) -> Finding:
    """Reads the clips of a row as the encoding does."""
    described, name = sources.describe(row), next(iter(configs))
    try:
        sources.require_stated(row, described)
        name = bucket_of(row, configs) if len(configs) > 1 or name else name
        read_pixels(row, configs[name])
    except RequestError as error:
        return Finding(row, described, str(error), name)
    return Finding(row, described, "", name)


def notes(findings: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """What does not keep a pair out, but may not be meant: clips and pairs that are there twice, prompts that tell too much."""
    seen: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for each in findings:
        row, digests = each.row, {what: file["sha256"] for what, file in each.described.items()}
        if all(digests.values()):
            span = str((row.reference.start, row.target.start))
            seen["pair", row.task, digests["reference"], digests["target"], span].append(row.id)
            seen["target", digests["target"], str(row.target.start)].append(row.id)
        if found := re.search(rf"\b(?:{TELLING[row.task]})\b", row.prompt, re.IGNORECASE) if row.task in TELLING else None:
            yield row.id, f'its prompt names what the reference is to show ("{found[0]}"); the model would learn it from the words'
    for (what, *_), names in seen.items():
        if len(names) > 1:
            words = "the same pair as" if what == "pair" else "the same target as"
            yield names[0], f"{words} {', '.join(names[1:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


def print_list(title: str, lines: Sequence[str]) -> None:
    for line in lines[:LISTED]:
        print(f"{title}: {line}")
    if len(lines) > LISTED:
        print(f"{title}: and {len(lines) - LISTED} more")
