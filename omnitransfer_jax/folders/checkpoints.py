"""The checkpoints of a run that writes them: written while training goes on, verified by checksums, the oldest removed last.

    save -> Orbax writes STEP.orbax-checkpoint-tmp and renames it -> checksums of its files -> older checkpoints are removed

A checkpoint counts as kept when it has its checksums, so the last one that can be verified is never removed. What the system refuses, such
as a full disk, is told, not raised: the run decides when to try again (train/saving.py). With several processes it is raised.
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from omnitransfer_jax.folders import checksums
from omnitransfer_jax.folders.refusals import refused

PARTIAL = ".orbax-checkpoint-tmp"  # the end of the name of what Orbax has not finished
REMOVED = ".removed"  # the end of the name, which begins with a dot, of what is being removed


class Checkpoints:
    """The checkpoints in a folder; a thread adds the checksums of each when it is complete, and removes what is no longer kept."""

    def __init__(self, folder: epath.Path, keep: int):
        self.folder, self.keep = folder, keep
        self._remove_leftovers()
        self._orbax: ocp.training.Checkpointer | None = None
        self.latest = self.orbax.latest.step if self.orbax.latest else 0
        """The step of the newest checkpoint, 0 if there is none."""
        self.refusal = ""
        """What the system refused of the last save that is over, in a few words."""
        self._thread, self._pending, self._saving = ThreadPoolExecutor(1), Future[None](), 0
        self._pending.set_result(None)

    @property
    def orbax(self) -> ocp.training.Checkpointer:
        """Orbax's own, opened again after a save that failed: it removes what that left behind."""
        if self._orbax is None:
            everything: Any = ocp.training.preservation_policies.PreserveAll()
            self._orbax = ocp.training.Checkpointer(self.folder, preservation_policy=everything, cleanup_tmp_directories=True)
        return self._orbax

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            refusal = self.wait()
            if self._orbax is not None:
                self._orbax.close()
            self._remove_partial()
        finally:
            self._thread.shutdown()
        if refusal and error is None:
            raise OSError(refusal)

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint; when it returns, the items may change again. It waits for the save before."""
        self.wait()
        try:
            complete = (self.folder / str(step)).exists()  # but for its checksums, which were refused
            saving = None if complete else self.orbax.save_checkpointables_async(step, dict(items), force=True)
        except Exception as error:
            self._refuse(error)
            return

        def finish() -> None:
            if complete or (saving and saving.result()):
                checksums.write(self.folder / str(step), jax.process_index(), jax.process_count())
                self._remove_old()

        self._saving, self._pending = step, self._thread.submit(finish)

    def wait(self) -> str:
        """Waits for the save that was started last; what the system refused of it, empty if it is there."""
        pending, self._pending = self._pending, Future[None]()
        self._pending.set_result(None)
        try:
            pending.result()
        except Exception as error:
            self._refuse(error)
            self._saving = 0
        if self._saving:
            self.latest, self.refusal, self._saving = self._saving, "", 0
        return self.refusal

    @property
    def is_saving(self) -> bool:
        """Whether the save that was started last is still being written."""
        return not self._pending.done()

    def _refuse(self, error: Exception) -> None:
        """Keeps what the system refused; another error is raised."""
        refusal = refused(error)
        if not refusal or jax.process_count() > 1:
            raise error
        self.refusal, orbax, self._orbax = refusal, self._orbax, None
        with suppress(Exception):  # it raises the same error once more
            if orbax is not None:
                orbax.close()

    def _remove_old(self) -> None:
        """Removes checkpoints older than the `keep` newest that have checksums; the first process does."""
        if jax.process_index():
            return
        steps = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())
        verified = [step for step in steps if checksums.known(self.folder / str(step))]
        for step in steps if verified else ():
            if step < verified[-self.keep :][0]:
                remove(self.folder / str(step))

    def _remove_partial(self) -> None:
        """Removes what a save has left that the disk refused; no other save is under way."""
        if jax.process_count() == 1 and self.folder.exists():
            for path in self.folder.iterdir():
                if path.name.endswith(PARTIAL):
                    path.rmtree(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Removes what an earlier process has only begun to remove."""
        if self.folder.exists() and not jax.process_index():
            for path in self.folder.iterdir():
                if path.name.startswith(".") and path.name.endswith(REMOVED):
                    path.rmtree()


def remove(folder: epath.Path) -> None:
    """Removes a checkpoint; at no time is a part of it there under its name, unless it is in a bucket."""
    if "://" in str(folder):
        folder.rmtree()
        return
    aside = folder.with_name(f".{folder.name}{REMOVED}")
    folder.rename(aside)
    shutil.rmtree(aside)
