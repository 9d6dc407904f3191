"""Clips and pictures of strangers, decoded where they can do no harm: in a process of its own with limits, which is replaced if it dies.

    parent -> {"path": ..., "frames": 81} -> child: clips.read_clip -> {"shape": [81, 480, 832, 3]} and the bytes, or {"error": ...}

The child knows neither JAX nor the parent's memory. It may not write files, has so much memory, and so many seconds a clip; decoders
crash, hang and grow on damaged files, and what is lost then is one clip, with the reason. What comes back is numbers and a line of JSON:
nothing of the child's is ever run.
"""

import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from configs.errors import RequestError

SECONDS = 60.0  # of a clip
GIBIBYTES = 6  # of a child
MOST_BYTES = 16 * 2**30  # of a file
LINE = 4096  # bytes of an answer's first line at most


class Decoder:
    """One child, started when it is first needed, and again after it died. For one thread at a time (`decoder`)."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds, self._child = seconds, None

    def clip(self, path: Path, **size: Any) -> np.ndarray:
        """`clips.read_clip` in the child."""
        return self._ask({"kind": "clip", "path": str(path)} | size)

    def image(self, path: Path) -> np.ndarray:
        """`clips.read_image` in the child."""
        return self._ask({"kind": "image", "path": str(path)})

    def measure(self, path: Path) -> tuple[int, int, float]:
        """`clips.measure` in the child."""
        height, width, seconds = self._answer({"kind": "measure", "path": str(path)})[0]["measured"]
        return int(height), int(width), float(seconds)

    @property
    def cpu_seconds(self) -> float:
        """What the child has spent of the processor (Linux)."""
        if self._child is None:
            return 0.0
        user, system = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
            self._child = None

    def __del__(self) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> np.ndarray:
        """The pixels that were asked for."""
        answer, content = self._answer(request)
        return content.reshape(answer["shape"])

    def _answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """The line of JSON that answers a request, and the bytes behind it."""
        path, until = request["path"], time.monotonic() + self.seconds
        child = self._child = self._child or _start()
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            answer = json.loads(self._read_line(until))
            refusal, shape = answer.get("error", ""), tuple(int(size) for size in answer.get("shape", ()))
            content = self._read(int(np.prod(shape)) if shape else 0, until)
        except TimeoutError:
            self.close()
            raise RequestError(f"{path}: not decoded within {self.seconds:g} s; give a clip that is undamaged and shorter") from None
        except (EOFError, BrokenPipeError, ValueError):
            child.kill()
            code = child.wait()
            self.close()
            raise RequestError(f"{path}: its decoder died (code {code}); give an undamaged video file") from None
        if refusal:
            raise RequestError(refusal)
        return answer, content

    def _read_line(self, until: float) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            line += self._read(1, until).tobytes()
            if len(line) > LINE:
                raise ValueError("no answer")
        return line

    def _read(self, size: int, until: float) -> np.ndarray:
        """Exactly so many bytes: uint8."""
        assert self._child is not None
        assert self._child.stdout is not None
        file, found, place = self._child.stdout.fileno(), np.empty(size, np.uint8), 0
        while place < size:
            left = until - time.monotonic()
            if left <= 0 or not select.select([file], [], [], left)[0]:
                raise TimeoutError
            count = os.readv(file, [found.data[place:]])
            if not count:
                raise EOFError
            place += count
        return found


_idle: list[Decoder] = []


@contextmanager
def decoder() -> Iterator[Decoder]:
    """A decoder that no other thread has meanwhile; its child lives on for the next one."""
    try:
        taken = _idle.pop()
    except IndexError:
        taken = Decoder()
    try:
        yield taken
    finally:
        _idle.append(taken)


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "data_pipelines.decoding"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=os.environ | {"PYTHONPATH": path})


def limit() -> None:
    """No more memory than `GIBIBYTES`, no files written, no core dumps, few files open."""
    for what, most in (
        (resource.RLIMIT_AS, GIBIBYTES * 2**30),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answers requests until there are no more."""
    from data_pipelines import clips

    for line in requests:
        request = json.loads(line)
        kind, path = request.pop("kind"), Path(request.pop("path"))
        try:
            if path.exists() and path.stat().st_size > MOST_BYTES:
                raise RequestError(f"{path}: {path.stat().st_size / 2**30:.0f} GiB; at most {MOST_BYTES / 2**30:.0f} are read: cut it")
            if kind == "measure":
                answers.write(json.dumps({"measured": clips.measure(path)}).encode() + b"\n")
                answers.flush()
                continue
            found = clips.read_image(path) if kind == "image" else clips.read_clip(path, **request)
        except RequestError as error:
            answers.write(json.dumps({"error": str(error)[: LINE // 2]}).encode() + b"\n")
        except (MemoryError, OSError, ValueError, ArithmeticError, LookupError) as error:
            reason = f"{path}: cannot be decoded ({type(error).__name__}: {str(error)[:100]}); give an undamaged video file"
            answers.write(json.dumps({"error": reason}).encode() + b"\n")
        else:
            answers.write(json.dumps({"shape": found.shape}).encode() + b"\n")
            answers.write(np.ascontiguousarray(found).data)
        answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    limit()
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
