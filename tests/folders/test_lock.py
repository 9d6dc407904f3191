"""One training in a workdir: a second one is refused by name, whatever became of the first it may begin."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import RequestError
from omnitransfer_jax.folders import lock
from omnitransfer_jax.folders.lock import alone

HERE = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from omnitransfer_jax.folders.lock import alone
with alone(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_second_training_is_refused_until_the_first_is_dead(tmp_path, holder, number):
    with pytest.raises(RequestError) as refused, alone(tmp_path):
        pass
    expected = (
        rf"{tmp_path}: a training runs there, process {holder.pid} on host {re.escape(socket.gethostname())}, "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d; wait for its end or stop it, or give another --workdir"
    )
    assert re.fullmatch(expected, str(refused.value))
    with pytest.raises(RequestError, match=f"process {holder.pid}"), alone(tmp_path):  # the refused one changed nothing
        pass
    holder.send_signal(number)
    holder.wait()
    assert f'"process": {holder.pid}' in (tmp_path / lock.LOCK_FILE).read_text()  # it stays, and stops nobody
    with alone(tmp_path):
        assert f'"process": {os.getpid()}' in (tmp_path / lock.LOCK_FILE).read_text()


def test_an_error_in_a_training_gives_the_workdir_free(tmp_path):
    with pytest.raises(KeyError), alone(tmp_path / "new"):
        raise KeyError
    with alone(tmp_path / "new"), pytest.raises(RequestError, match=f"process {os.getpid()} on host"), alone(tmp_path / "new"):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_a_holder_that_has_not_said_its_name_is_named_as_such(tmp_path, content):
    with alone(tmp_path):
        (tmp_path / lock.LOCK_FILE).write_text(content)
        with pytest.raises(RequestError, match="a training runs there, which has just begun; wait"), alone(tmp_path):
            pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def none(file, operation):
        raise OSError(lock.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with alone(tmp_path):
        assert f"{tmp_path}: this file system has no locks; start no second training there" in capsys.readouterr().out
