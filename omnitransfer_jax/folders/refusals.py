"""What the operating system refused: a full disk, a file that may not be read or written, a disk that fails."""

import re

FULL = ("No space left on device", "Disk quota exceeded")
# Libraries that write files themselves raise their own errors with the system's words.
WORDS = (*FULL, "Input/output error", "Read-only file system", "Permission denied", "Stale file handle")


def refused(error: BaseException | None) -> str:
    """What the system refused, if that is why `error` was raised; empty if it is not."""
    while error is not None:
        text = str(error)
        if words := next((words for words in WORDS if words in text), ""):
            file = getattr(error, "filename", None) or next(iter(re.findall('"(/[^"]*)"', text)), "writing")
            return f"{file}: {words}"
        if isinstance(error, OSError):
            return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text or type(error).__name__
        error = error.__cause__
    return ""


def is_full(refusal: str) -> bool:
    """Whether there was no room."""
    return any(words in refusal for words in FULL)
