"""The answers of a study: files of raters beside the key, and the means, intervals and agreement that are made of them.

A rater is a page and a session of a browser. Of several files of one session the one that was saved last counts.
"""

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.errors import RequestError, require
from evaluation.intervals import crossed_interval
from evaluation.report.page import Table
from evaluation.results import Mean, number
from evaluation.study.agreement import alpha
from evaluation.study.questions import GRADES, PREFERENCE, SCALES, SIDES, Question
from omnitransfer_jax import tasks
from omnitransfer_jax.folders.atomic import read_json

ALL = "all"
COLUMNS = ("rater", "task", "case", "clip", "scale", "system", "other", "value")


class Key(NamedTuple):
    """What pages do not show."""

    study: str
    """What pages and answers of one study have in common."""
    systems: tuple[str, ...]
    pages: dict[str, list[Question]]


class Answer(NamedTuple):
    """One answer."""

    rater: str
    task: str
    case: str
    clip: str
    scale: str
    system: str
    other: str
    """The system that `system` was compared with; empty if it was rated."""
    value: float
    """A grade; or 1 if `system` was preferred, 0 if `other` was, .5 if neither."""


def read_key(path: Path) -> Key:
    """The key of a study."""
    remedy = "give --out=DIR, the folder that launch.study wrote"
    require(path.is_file(), f"{path}: no such file; {remedy}")
    content = read_json(path, remedy, "pages")
    try:
        pages = {
            name: [Question(**{**each, "systems": tuple(each["systems"]), "scales": tuple(each["scales"])}) for each in questions]
            for name, questions in content["pages"].items()
        }
        return Key(content["study"], tuple(content["systems"]), pages)
    except (KeyError, TypeError) as error:
        raise RequestError(f"{path}: not the key of a study ({error}); {remedy}") from None


def read(folder: Path, key: Key) -> tuple[list[Answer], list[str]]:
    """All answers of a folder, and a line for each file that cannot be used and each rater who left questions out."""
    files, problems = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            content = checked(path, key)
        except RequestError as error:
            problems.append(f"left out: {error}")
            continue
        rater = content["page"], content["session"]
        if rater not in files or files[rater]["saved"] < content["saved"]:
            files[rater] = content
    require(bool(files), f"--answers={folder}: no answers of this study{f'; {problems[0]}' if problems else ', which are files *.json'}")
    found: list[Answer] = []
    for (page, session), content in sorted(files.items()):
        others = sum(each == page for each, _ in files) > 1
        name = f"{page} ({session[:6]})" if others else page
        mine = [each for pair in zip(key.pages[page], content["answers"], strict=True) for each in _of_question(name, key, *pair)]
        asked = sum(len(question.scales) for question in key.pages[page])
        if len(mine) < asked:
            problems.append(f"{name}: {asked - len(mine)} of {asked} answers are absent")
        found += mine
    return found, problems


def checked(path: Path, key: Key) -> dict[str, Any]:
    """The content of one file; a `RequestError` says the first that is wrong with it."""
    remedy = "ask the rater to save it again"
    try:
        content = read_json(path, remedy)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'no text'}); {remedy}") from None
    texts = all(isinstance(content.get(name), str) for name in ("study", "page", "session", "saved"))
    require(texts and isinstance(content.get("answers"), list), f"{path}: no answers of a study; {remedy}")
    require(content["study"] == key.study, f"{path}: of study {content['study']}, this one is {key.study}; give the --out of that study")
    questions = key.pages.get(content["page"])
    if questions is None:
        raise RequestError(f"{path}: page {content['page']!r}: this study has none; {remedy}")
    require(len(questions) == len(content["answers"]), f"{path}: {len(content['answers'])} answers, {len(questions)} expected; {remedy}")
    for place, (question, answers) in enumerate(zip(questions, content["answers"], strict=True), 1):
        require(isinstance(answers, dict), f"{path}: question {place}: no JSON object; {remedy}")
        for scale, value in answers.items():
            allowed: Sequence[Any] = SIDES if scale == PREFERENCE else GRADES
            right = scale in question.scales and value in allowed and not isinstance(value, bool | float)
            require(right, f"{path}: question {place}: {scale} {value!r}, expected one of {', '.join(map(str, allowed))}; {remedy}")
    return content


def _of_question(rater: str, key: Key, question: Question, answers: dict[str, Any]) -> Iterable[Answer]:
    """The answers to one question. Systems of a pair are in the order of the key, whichever was A."""
    place = (rater, question.task, question.case, question.clip)
    for scale, value in answers.items():
        if scale == PREFERENCE:
            a, b = question.systems
            share = (1.0, 0.5, 0.0)[SIDES.index(value)]
            turned = key.systems.index(a) > key.systems.index(b)
            yield Answer(*place, scale, *((b, a, 1 - share) if turned else (a, b, share)))
        else:
            yield Answer(*place, scale, question.systems[0], "", float(value))


def mean(answers: Sequence[Answer]) -> Mean:
    """The mean of answers, with its interval over clips and raters."""
    if not answers:
        return Mean(math.nan, math.nan, math.nan, 0, 0)
    values = [each.value for each in answers]
    low, high = crossed_interval(values, [each.clip for each in answers], [each.rater for each in answers])
    return Mean(float(np.mean(values)), low, high, len(values), 0)


def _of_task(answers: Sequence[Answer], task: str) -> list[Answer]:
    return [each for each in answers if task in (ALL, each.task)]


def _tasks(answers: Sequence[Answer]) -> list[str]:
    found = [task for task in tasks.NAMES if any(each.task == task for each in answers)]
    return [*found, ALL] if len(found) > 1 else found


def ratings(answers: Sequence[Answer], systems: Sequence[str]) -> Table:
    """Means of every scale and task, a column a system."""
    rows = []
    for task in _tasks(answers):
        for scale in SCALES:
            chosen = [each for each in _of_task(answers, task) if each.scale == scale]
            if chosen:
                rows.append((f"{task}, {scale}", *(mean([each for each in chosen if each.system == name]).text for name in systems)))
    return Table(("1 (bad) to 5 (excellent)", *systems), tuple(rows))


def preferences(answers: Sequence[Answer]) -> Table:
    """For every two systems and every task, the share of answers that prefer the first; one that prefers neither counts half."""
    rows = []
    compared = [each for each in answers if each.scale == PREFERENCE]
    for system, other in dict.fromkeys((each.system, each.other) for each in compared):
        for task in _tasks(compared):
            chosen = [each for each in _of_task(compared, task) if (each.system, each.other) == (system, other)]
            counts = tuple(str(sum(each.value == value for each in chosen)) for value in (1, 0.5, 0))
            rows.append((f"{task}, {system} over {other}", mean(chosen).text, *counts))
    return Table(("", "preferred", "first", "neither", "second"), tuple(rows))


def agreement(answers: Sequence[Answer]) -> Table:
    """Krippendorff's alpha of every scale; a unit is a clip that was rated, or two that were compared."""
    rows = []
    for scale in (*SCALES, PREFERENCE):
        chosen = [each for each in answers if each.scale == scale]
        units: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for each in chosen:
            units[each.case, each.system, each.other].append(each.value)
        shared = [values for values in units.values() if len(values) > 1]
        value = alpha(shared)
        text = number(value) if math.isfinite(value) else "none: no clip has two raters" if not shared else "none: all answers are equal"
        if chosen:
            rows.append((scale, text, str(len({each.rater for each in chosen})), str(len(shared))))
    return Table(("", "Krippendorff's alpha, ordinal", "raters", "clips or pairs of two raters or more"), tuple(rows))


def write(answers: Sequence[Answer]) -> bytes:
    """answers.csv, a row an answer."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([COLUMNS, *answers])
    return file.getvalue().encode()


def key_content(key: Key, **about: Any) -> str:
    """key.json; `about` is what else it records."""
    pages = {name: [question._asdict() for question in questions] for name, questions in key.pages.items()}
    return json.dumps({"study": key.study, "systems": key.systems, **about, "pages": pages}, indent=1)
