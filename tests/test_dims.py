"""Every letter of a shape annotation is explained in dims.py."""

import re
from pathlib import Path

from omnitransfer_jax import dims

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "omnitransfer_jax", "data_pipelines", "world", "evaluation", "launch")


def test_every_letter_is_explained():
    explained = set(re.findall(r"(?:^ {4}|  )([A-Z])  (?=\w)", dims.__doc__ or "", re.MULTILINE))
    used = {}
    for path in (path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py")):
        for shape in re.findall(r"\b(?:Float|Int|Bool|UInt|Shaped)\d*\[[\w.]+, f?\"([^\"]*)\"\]", path.read_text()):
            used |= {letter.upper(): f"{path.name}: {shape}" for letter in re.findall(r"(?<![\w{/])[*#]?([A-Za-z])(?!\w)", shape)}
    assert {letter: where for letter, where in used.items() if letter not in explained} == {}
    assert explained - used.keys() <= {"R"}  # adapters are multiplied without an annotation of their rank
