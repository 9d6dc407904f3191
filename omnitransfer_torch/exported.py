"""What an export says about itself: omnitransfer.json, which `launch.export` writes last.

It holds all that the networks' own config.json files cannot say: the tasks with their flags and offsets, sizes, sampler, alignment. It also
lists the files of the folder with their sizes, so that a folder that was copied or written in part is refused.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from configs.errors import RequestError, require

FILE = "omnitransfer.json"
FORMAT = 1
AGAIN = "write it again with python -m launch.export, or copy the whole folder"


@dataclass(frozen=True)
class Task:
    """One kind of transfer."""

    name: str
    family: Literal["temporal", "appearance"]
    flag: float
    """Value of the reference's mask channels."""
    template: str
    """Instruction for the language model."""


@dataclass(frozen=True)
class Video:
    """The size of a video in frames and pixels."""

    frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class References:
    """How a target reads references."""

    attention: str
    """`split`: a reference attends to itself, the target to itself and to all references."""
    reach: str
    """`all`: a token of the target reads all of a reference."""
    offsets: str
    """`task`: appearance behind the target in time, temporal to its right; `frames`: all behind it."""
    flag: float | None
    """Value of all references' mask channels; None: that of their task."""
    time: float
    """Timestep at which references are modulated."""
    stack: bool
    """Whether the k-th reference of a family is k times as far away."""


@dataclass(frozen=True)
class Sampler:
    """Defaults of a call."""

    steps: int
    guidance: float
    negative_prompt: str


@dataclass(frozen=True)
class Inputs:
    """What the language model reads and gives, from stage 2 on."""

    queries: int
    frames: int
    frame_pixels: int
    prompt_tokens: int
    into: Literal["text_embedder", "blocks"]


@dataclass(frozen=True)
class Transfer:
    """The content of omnitransfer.json."""

    tasks: tuple[Task, ...]
    video: Video
    reference: Video
    text_len: int
    rope_base: float
    rope_top: float
    references: References
    sampler: Sampler
    alignment: Inputs | None

    def task_index(self, name: str) -> int:
        """The place of a task; a `RequestError` for an unknown name."""
        names = [task.name for task in self.tasks]
        if name not in names:
            raise RequestError(f"task {name!r}: not one of {', '.join(names)}")
        return names.index(name)


def read(folder: str | Path) -> Transfer:
    """The description of the export in `folder`; a `RequestError` if it is no export, not whole, or asks for what PyTorch lacks here."""
    path = Path(folder, FILE)
    require(
        path.is_file(),
        f"{folder}: no {FILE}, so it is no whole export of an OmniTransfer model; {AGAIN} --config=stage1|stage2|stage3 --layout=diffusers",
    )
    try:
        content = json.loads(path.read_text())
        require(content["format"] == FORMAT, f"{path}: format {content['format']}, this version reads {FORMAT}; {AGAIN}")
        require_files(Path(folder), content["files"])
        transfer = _parse(content["transfer"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path}: not what launch.export writes ({type(error).__name__}: {error}); {AGAIN}") from None
    found = transfer.references
    require(found.attention in ("split", "joint"), f"{path}: references={found.attention!r}: in PyTorch references read themselves alone")
    require(found.reach == "all", f"{path}: reach={found.reach!r}: in PyTorch a target reads all of a reference")
    require(found.offsets in ("task", "frames"), f"{path}: offsets={found.offsets!r}: in PyTorch task or frames")
    return transfer


def require_files(folder: Path, sizes: dict[str, int]) -> None:
    """A `RequestError` that names the first file that is absent or has another size than was written."""
    for name, size in sizes.items():
        require((folder / name).is_file(), f"{folder / name}: absent, so the export is not whole; {AGAIN}")
        found = (folder / name).stat().st_size
        require(found == size, f"{folder / name}: {found:,} bytes, {size:,} were written; {AGAIN}")


def _parse(content: dict[str, Any]) -> Transfer:
    parts: dict[str, Any] = {"video": Video, "reference": Video, "references": References, "sampler": Sampler}
    values = {name: _of(kind, content[name]) for name, kind in parts.items()}
    alignment = None if content["alignment"] is None else _of(Inputs, content["alignment"])
    tasks = tuple(_of(Task, task) for task in content["tasks"])
    rest = {name: content[name] for name in ("text_len", "rope_base", "rope_top")}
    return Transfer(tasks=tasks, alignment=alignment, **values, **rest)


def _of(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{field.name: values[field.name] for field in fields(kind)})
