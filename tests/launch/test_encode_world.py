"""The command that encodes the world; what it writes is tested in tests/world/test_pair_records.py."""

import pytest

from launch import command, encode_world


@pytest.fixture
def written(monkeypatch):
    """What `write` is called with."""
    calls = []
    monkeypatch.setattr(encode_world, "write", lambda config, folder, *given: calls.append((config, str(folder), *given)))
    return calls


def test_the_flags_say_what_is_written(written, capsys):
    args = ["--config=stage3:tiny", "--pairs=7", "--key=2", "--out=some/records", "--train.init_from=weights"]
    assert command.execute(encode_world.main, encode_world.FLAGS, args) == 0
    ((config, *rest),) = written
    assert rest == ["some/records", 7, 2, False]
    assert config.train.init_from == "weights"
    assert capsys.readouterr().out == "Next: python -m launch.train --config=stage3:tiny --workdir=DIR --data.path=some/records\n"


def test_wrong_requests_are_errors_of_one_line(written, capsys):
    for args, words in (([], "--out"), (["--out=x", "--pairs=0"], "pairs"), (["--out=x", "--two"], "--two: for --config=stage0")):
        assert command.execute(encode_world.main, encode_world.FLAGS, ["--config=stage3:tiny", *args]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1
    assert not written
