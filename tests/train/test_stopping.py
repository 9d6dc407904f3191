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


ANOTHER_THREAD = """
import signal, threading, time
from omnitransfer_jax.train.stopping import Stopped, stop_signals

with stop_signals() as stopping:
    started = time.monotonic()

    def be_given_one():
        time.sleep(0.5)
        signal.pthread_kill(threading.get_ident(), signal.{})
        time.sleep(30)

    threading.Thread(target=be_given_one, daemon=True).start()
    try:
        with stopping.interruptible():
            time.sleep(20)
    except Stopped:
        print(f"stopped, {{len(stopping.signals)}} signal, soon: {{time.monotonic() - started < 10}}")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_another_thread_gets_wakes_the_one_that_waits(name):
    """The system may give it to any thread; the main one would sleep on, as one of 60 runs did."""
    done = subprocess.run([sys.executable, "-c", ANOTHER_THREAD.format(name)], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "stopped, 1 signal, soon: True\n", done.stderr[-500:]
