"""What raters are asked, and in which order each of them is asked it.

A clip is rated on the scales of the paper's study (section 5.2): fidelity to the reference, image consistency with the first frame, and
quality, from 1 to 5. Then clips of two systems are compared. All raters answer the same questions, each in another order and with A and B
changed, so that their agreement can be measured. Which system made a clip is in the key alone.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from evaluation.suites import Case

FIDELITY, CONSISTENCY, QUALITY, PREFERENCE = "fidelity", "image consistency", "quality", "preference"
SCALES = (FIDELITY, CONSISTENCY, QUALITY)
GRADES = (1, 2, 3, 4, 5)
WORDS = ("bad", "poor", "fair", "good", "excellent")  # ITU-T P.910, absolute category rating
SIDES = ("A", "neither", "B")

TAKEN = {
    "id": "the person or thing of the reference",
    "style": "the style of the reference",
    "motion": "the motion of the reference",
    "camera": "the camera movement of the reference",
    "effect": "the visual effect of the reference",
}


class Question(NamedTuple):
    """One clip to rate, or two to compare."""

    task: str
    case: str
    clip: str
    """What the reference is known by: cases with the same one are not independent."""
    systems: tuple[str, ...]
    """One that made the clip; or two, of the clips A and B."""
    scales: tuple[str, ...]
    """What is asked."""


def of_case(case: Case, systems: Sequence[str]) -> list[Question]:
    """All questions about a case; image consistency only where there is a first frame to be consistent with."""
    scales = tuple(scale for scale in SCALES if scale != CONSISTENCY or (case.first_frame is not None and case.is_temporal))
    rated = [Question(case.task, case.id, case.clip, (system,), scales) for system in systems]
    return rated + [Question(case.task, case.id, case.clip, pair, (PREFERENCE,)) for pair in combinations(systems, 2)]


def arranged(questions: Sequence[Question], seed: int, rater: int) -> list[Question]:
    """The questions in the order of one rater: ratings first, so that no comparison influences them. Which of a pair is A is random."""
    random = np.random.default_rng([seed, rater])
    found = []
    for count in (1, 2):
        chosen = [question for question in questions if len(question.systems) == count]
        for i in random.permutation(len(chosen)):
            turned = count == 2 and random.random() < 0.5
            found.append(chosen[i]._replace(systems=chosen[i].systems[::-1]) if turned else chosen[i])
    return found


def text(task: str, scale: str) -> str:
    """A question as raters read it."""
    return {
        FIDELITY: f"How well does the clip show {TAKEN[task]}?",
        CONSISTENCY: "How well does the clip keep what the first frame shows?",
        QUALITY: "How good is the clip as a video: sharp, natural, without faults?",
        PREFERENCE: f"Which clip is better? It should show {TAKEN[task]} and be a good video.",
    }[scale]
