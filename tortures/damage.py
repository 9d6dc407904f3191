"""Files that are damaged: checkpoints and records. What is then read is what was written, or it is refused in one line."""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from configs.errors import RequestError
from data_pipelines import records
from launch import command, train
from omnitransfer_jax.folders import run_folder
from tortures import tiny
from tortures.outcome import Outcome

Damage = Callable[[Path, Sequence[Path], random.Random], None]
"""damage(file, others, draw): changes `file`; it may take from the `others`."""
PAGE = 4096


def flip(file: Path, others: Sequence[Path], draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(content))


def cut(file: Path, others: Sequence[Path], draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content) + 1)])


def remove(file: Path, others: Sequence[Path], draw: random.Random) -> None:
    file.unlink()


def blank(file: Path, others: Sequence[Path], draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content) + 1)
    content[at : at + PAGE] = bytes(len(content[at : at + PAGE]))
    file.write_bytes(bytes(content))


def grow(file: Path, others: Sequence[Path], draw: random.Random) -> None:
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randrange(1, 100)))


def exchange(file: Path, others: Sequence[Path], draw: random.Random) -> None:
    """Two files of one folder, each with the name of the other."""
    other = draw.choice(others)
    ours, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(ours)


def double(file: Path, others: Sequence[Path], draw: random.Random) -> None:
    """One file twice."""
    file.write_bytes(draw.choice(others).read_bytes())


KINDS: dict[str, Damage] = {
    "flip": flip, "cut": cut, "remove": remove, "blank": blank, "grow": grow, "exchange": exchange, "double": double,
}  # fmt: skip


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def checkpoints(folder: Path, count: int) -> Outcome:
    """A run with four checkpoints of which the newest, or the newest three, are damaged; also with files of another step."""
    data, workdir = tiny.write_records(folder / "records"), folder / "run"
    given = tiny.arguments(workdir, data, train__steps=8, checkpoint__keep=4)
    if command.execute(train.main, train.FLAGS, given):
        raise RuntimeError("the run did not train")
    root, failures, fallen_back = workdir / "checkpoints", [], 0
    steps = sorted((int(path.name) for path in root.iterdir()), reverse=True)
    expected = {step: tiny.state(workdir, step) for step in steps}
    kept = shutil.copytree(root, folder / "kept")
    kinds = [*KINDS, "of another step", "all of another step", "without checksums and flipped"]
    for case in range(count):
        draw, kind = random.Random(case), kinds[case % len(kinds)]
        hurt = steps[: draw.choice([1, 1, 1, 3])]
        for step in hurt:
            hurt_checkpoint(root, step, kind, steps[-1], draw)
        try:
            step = run_folder.steps_done(workdir)
            if tiny.state(workdir, step) != expected.get(step):
                failures.append(f"case {case}, {kind}: {step} is taken, with other values")
            fallen_back += step != steps[0]
        except RequestError as error:
            failures.append(f"case {case}, {kind}: checkpoint {steps[-1]} is whole, yet {error}")
        except Exception as error:
            failures.append(f"case {case}, {kind}: {type(error).__name__}: {str(error)[:200]}")
        for step in hurt:
            shutil.rmtree(root / str(step))
            shutil.copytree(kept / str(step), root / str(step))
    return Outcome(count, failures, f"{fallen_back} fell back to an older one, in {count - fallen_back} nothing that is read had changed")


def hurt_checkpoint(root: Path, step: int, kind: str, oldest: int, draw: random.Random) -> None:
    folder = root / str(step)
    files = files_in(folder)
    file = draw.choice(files)
    if kind == "of another step":
        other = root / str(oldest) / file.relative_to(folder)
        shutil.copyfile(other if other.exists() else draw.choice(files_in(root / str(oldest))), file)
    elif kind == "all of another step":  # of one item, checksums and all
        item = file.relative_to(folder).parts[0]
        (shutil.rmtree if (folder / item).is_dir() else Path.unlink)(folder / item)
        source = root / str(oldest) / item
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / item)
    elif kind == "without checksums and flipped":
        for path in folder.glob("checksums.*"):
            path.unlink()
        flip(draw.choice([path for path in files if "checksums." not in path.name]), files, draw)
    else:
        KINDS[kind](file, files, draw)


def damaged_records(folder: Path, count: int) -> Outcome:
    """Shards and the files beside them. Each record is read as it was written, or refused with the name of a file."""
    data = tiny.write_records(folder / "records", (3, 4, 3, 4))
    config = replace(tiny.config(), data=replace(tiny.config().data, path=str(data)))

    def read() -> list[dict[str, np.ndarray]]:
        opened = records.Records(data, config)
        return [opened[index] for index in range(len(opened))]

    expected, kept, failures, harmless = read(), shutil.copytree(data, folder / "kept"), [], 0
    empty = records.empty_text(data, config.dit.text_len)
    for case in range(count):
        draw, kind = random.Random(case), list(KINDS)[case % len(KINDS)]
        files = files_in(data)
        shards = [path for path in files if "array_record" in path.name]
        file = draw.choice(shards if draw.random() < 0.7 else files)
        KINDS[kind](file, shards if file in shards else files, draw)
        try:
            found = read()
            same = len(found) == len(expected) and all(
                np.array_equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in b
            )
            if not same or not np.array_equal(records.empty_text(data, config.dit.text_len), empty):
                failures.append(f"case {case}, {kind} {file.name}: other values are read")
            harmless += 1
        except RequestError as error:
            if str(data) not in str(error):
                failures.append(f"case {case}, {kind} {file.name}: no file is named: {error}")
        except Exception as error:
            failures.append(f"case {case}, {kind} {file.name}: {type(error).__name__}: {str(error)[:200]}")
        for path in files_in(data):
            path.unlink()
        shutil.copytree(kept, data, dirs_exist_ok=True)
    return Outcome(count, failures, f"{harmless} changed nothing that is read")
