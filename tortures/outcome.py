"""What a torture found."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Outcome(NamedTuple):
    """So many cases, and a line for each that failed; `note` says what a reader of the table should know."""

    cases: int
    failures: list[str]
    note: str = ""


Torture = Callable[[Path, int], Outcome]
"""torture(folder, cases): it writes in `folder`, which is empty, and nowhere else."""
