"""A profile of some steps of a run, for TensorBoard's profiler: WORKDIR/plugins/profile/TIME/HOST.xplane.pb, one of each process.

--train.profile=20:24    from the beginning of step 20 to the end of step 24; compilation is over by then
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

import jax


class Profile:
    """Traces the steps of a window, `(first, last)`. What the system refuses is told: a training does not depend on it."""

    def __init__(self, workdir: Path, window: tuple[int, int] | None):
        self.workdir, self.window, self.is_tracing = workdir, window, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def step(self, n: int) -> AbstractContextManager[object]:
        """The context in which step `n` is started."""
        if self.window is None or not self.window[0] <= n <= self.window[1]:
            return nullcontext()
        if not self.is_tracing:
            jax.profiler.start_trace(str(self.workdir))
            self.is_tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=n)

    def after(self, n: int, wait: Callable[[], object]) -> None:
        """Ends the window if step `n` is its last; `wait` returns when the devices have done it."""
        if self.is_tracing and self.window is not None and n >= self.window[1]:
            wait()
            self.end()

    def end(self) -> None:
        """Writes what was traced."""
        if not self.is_tracing:
            return
        self.is_tracing = False
        try:
            jax.profiler.stop_trace()
            print(f"the profile is written; look at it with TensorBoard: tensorboard --logdir={self.workdir}", flush=True)
        except (OSError, RuntimeError) as error:
            print(f"no profile: {' '.join(str(error).split())[:200]}; training goes on", flush=True)
