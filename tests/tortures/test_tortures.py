"""The short form of the tortures: a few cases of those that are quick. All: python -m tortures"""

import pytest

from tortures import suite


@pytest.mark.parametrize("name", suite.SHORT)
def test_a_few_cases(name, tmp_path):
    outcome = suite.TORTURES[name](tmp_path, suite.SHORT[name])
    assert outcome.failures == []
    assert outcome.cases == suite.SHORT[name]


def test_every_torture_has_a_number_of_cases():
    assert suite.FULL.keys() == suite.TORTURES.keys()
    assert suite.SHORT.keys() <= suite.TORTURES.keys()
