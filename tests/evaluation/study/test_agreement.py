"""Krippendorff's alpha against the example of his paper, and values that follow from its definition."""

import math

import pytest

from evaluation.study.agreement import alpha

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C: 4 observers, 12 units, some values absent.
OBSERVERS = ("123321412   ", "1233224125 3", " 3332342251 ", "12332441251 ")
UNITS = [[int(row[i]) for row in OBSERVERS if row[i] != " "] for i in range(12)]


def test_the_published_example():
    assert alpha(UNITS) == pytest.approx(0.815, abs=5e-4)  # ordinal; the unit with one value counts nothing


def test_its_ends():
    assert alpha([[1, 1], [3, 3], [5, 5, 5]]) == 1
    assert alpha([[1, 5], [5, 1]]) < 0  # worse than chance
    assert math.isnan(alpha([[4, 4], [4, 4]]))
    assert math.isnan(alpha([[1], [5]]))
    assert alpha([(2, 2, 2), (1, 1, 1), (2, 2, 1), (1, 1, 1)]) == pytest.approx(1 - 11 / 35)  # 1 of 12 disagrees; 7 * 5 / 11 by chance
