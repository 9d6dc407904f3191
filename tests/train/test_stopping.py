"""The watchdog ends a process that makes no progress, and lets one alone that does."""

import subprocess
import sys
import time

import pytest

from omnitransfer_jax.train.stopping import Stopped, Stopping, Watchdog

HANGS = """
import time
from omnitransfer_jax.train.stopping import Watchdog

with Watchdog(1) as watchdog:
    watchdog.progress("step 7, waiting for its batch")
    time.sleep(30)
"""


def test_a_run_that_hangs_says_where_it_stands_and_ends():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, check=False, timeout=25)
    assert done.returncode == 1
    assert "no progress for 1 s: step 7, waiting for its batch; the run ends, and the same command goes on" in done.stderr
    assert 'File "<string>", line 7' in done.stderr  # where the main thread stands


@pytest.mark.parametrize("seconds", [0, 2])
def test_a_run_that_goes_on_is_let_alone(seconds):
    with Watchdog(seconds) as watchdog:
        for step in range(5):
            watchdog.progress(f"step {step}")
            time.sleep(0.6)  # 3 s in all


def test_what_waits_is_not_begun_after_a_signal():
    stopping = Stopping()
    stopping.signals.append(15)
    with pytest.raises(Stopped), stopping.interruptible():
        raise AssertionError("begun")
