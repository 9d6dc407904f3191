"""What a sweep needs of launch.train, in milliseconds: a process that writes metrics.jsonl, obeys STOP and goes on.

A file KILL in the workdir's parent ends it by SIGKILL at the step that is written in it, the variable DIES_FROM at every step from that on;
a rate above 0.5 is not finite at step 3.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

given = dict(arg[2:].split("=", 1) for arg in sys.argv[1:])
workdir, rate, steps = Path(given["--workdir".lstrip("-")]), float(given["optimizer.learning_rate"]), int(given.get("train.steps", 60))
workdir.mkdir(parents=True, exist_ok=True)
log, kill, stop = workdir / "metrics.jsonl", workdir.parent / "KILL", workdir / "STOP"
done = len(log.read_text().splitlines()) if log.exists() else 0
print("started", flush=True)  # in the trial's log.txt
dies_from = int(os.environ.get("DIES_FROM", steps + 1))
if done >= dies_from:
    os.kill(os.getpid(), signal.SIGKILL)
with log.open("a") as file:
    for step in range(done + 1, steps + 1):
        if rate > 0.5 and step == 3:
            print(f"step {step}: loss or gradients were not finite 10 times in a row; lower --optimizer.learning_rate", file=sys.stderr)
            sys.exit(1)
        file.write(json.dumps({"step": step, "loss": rate + 1 / step, "loss/t0.0-0.2": rate, "loss/t0.2-0.4": 3 * rate}) + "\n")
        file.flush()
        if kill.exists() and int(kill.read_text()) == step:
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if step >= dies_from:
            os.kill(os.getpid(), signal.SIGKILL)
        if stop.exists():
            stop.unlink()
            break
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
