"""One training at a time in a workdir.

    WORKDIR/training.lock    host, process id and start of the training that runs, or ran last

The process holds a lock (flock) on the file, which the system takes back when the process ends, also by SIGKILL; the file stays. On NFS the
lock holds between hosts if the server's lock service runs. Mounts that keep locks to one host (`nolock`, gcsfuse) refuse a second training
there alone, and where a file system has no locks a line says so.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import jax

from configs.errors import require
from omnitransfer_jax.folders.processes import first_text

LOCK_FILE = "training.lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Makes this training the only one in `workdir`; a `RequestError` names the one that runs there. The first process holds the lock."""
    if jax.process_index():
        require(not (refusal := first_text("")), refusal)
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK_FILE).open("a+") as file:
        refusal = first_text(_taken(file.fileno(), workdir))
        require(not refusal, refusal)
        file.truncate(0)
        started = datetime.now().astimezone().isoformat(" ", "seconds")
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "started": started}, file)
        file.flush()
        yield


def _taken(file: int, workdir: Path) -> str:
    """Takes the lock, or says who has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            print(f"{workdir}: this file system has no locks; start no second training there while this one runs", flush=True)
            return ""
        if not isinstance(error, BlockingIOError):
            raise
        return f"{workdir}: a training runs there, {_holder(workdir)}; wait for its end or stop it, or give another --workdir"
    return ""


def _holder(workdir: Path) -> str:
    try:
        holder = json.loads((workdir / LOCK_FILE).read_text())
        return f"process {holder['process']} on host {holder['host']}, since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has just begun"
