"""Makes the clips of a suite's rows with the networks of one configuration, those that are not there yet.

A unit is what one program makes at once: `transfer.BATCH` pairs of the world, or one case of a file. Its noise depends on seed and place
alone, so a run that was killed goes on to the same clips, and a clip of a file is that of `launch.sample --seed=SEED` at the size of the
configuration. The networks are loaded one after the other, for up to `GROUP` units at a time: encoders, transformer, decoder.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import RequestError
from configs.run import Config
from data_pipelines import clips
from data_pipelines.encoders import Encoders
from evaluation import transfer, videos
from evaluation.rows import shuffled
from evaluation.suites import Case, others
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.folders.atomic import write_whole
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.models.wan_dit import WanDiT

GROUP = 32  # units whose conditions are in the host's memory at once


class Unit(NamedTuple):
    """Cases of one task that are made together as one row."""

    row: str
    place: int
    """Of the first of them among the cases of the task."""
    size: int
    """Of the batch: the cases are repeated up to it."""
    cases: tuple[Case, ...]

    @property
    def padded(self) -> list[Case]:
        return [*self.cases, *[self.cases[-1]] * (self.size - len(self.cases))]


def units(cases: Sequence[Case], rows: Sequence[str]) -> list[Unit]:
    """All units, by task, then row. They depend on the suite alone and not on what has been made."""
    swappable, found = others(cases), []
    for task in tasks.NAMES:
        of_task = [case for case in cases if case.task == task]
        for row in rows:
            size = min(transfer.BATCH, len(of_task)) if of_task and of_task[0].pair is not None else 1
            if row == "swapped":
                wanted = [case.id in swappable for case in of_task]
            else:
                wanted = [row != "neutral" or bool(case.prompt) for case in of_task]
            for i in range(0, len(of_task), max(size, 1)):
                chosen = tuple(case for case, want in zip(of_task[i : i + size], wanted[i : i + size], strict=True) if want)
                if chosen:
                    found.append(Unit(row, i, size, chosen))
    return found


def path_of(out: Path, row: str, case: Case) -> Path:
    """Where the clip of a case lies."""
    return out / "clips" / row / f"{case.id}.mp4"


class Sampler:
    """The networks of a folder."""

    def __init__(self, config: Config, folder: str, cases: Sequence[Case], out: Path):
        self.config, self.folder, self.out = config, folder, out
        self.encoders, self.mesh = Encoders(config, folder), make_mesh(config.mesh)
        self.denoise = omnitransfer.denoise_on(self.mesh, config)
        self.others = others(cases)
        self.held: tuple[str, WanDiT] | None = None

    def is_made(self, unit: Unit) -> bool:
        """Whether all its clips are there."""
        return all(path_of(self.out, unit.row, case).exists() for case in unit.cases)

    def make(self, wanted: Sequence[Unit], on_unit: Callable[[Unit], object] = lambda unit: None) -> None:
        """Writes the clips of `wanted` that are not there."""
        missing = [unit for unit in wanted if not self.is_made(unit)]
        for i in range(0, len(missing), GROUP):
            group = missing[i : i + GROUP]
            to_sample = [unit for unit in group if not self.latents_path(unit).exists()]
            for unit, conditions in list(self.encode(to_sample)):
                write_latents(self.latents_path(unit), self.sample(unit, conditions))
            self.release()
            for unit in (each for each in group if self.latents_path(each).exists()):
                latents = np.load(self.latents_path(unit))
                made = clips.to_bytes(self.encoders.decode(jnp.asarray(latents)))
                for case, clip in zip(unit.cases, made, strict=False):
                    videos.write(path_of(self.out, unit.row, case), clip, self.config.video.fps)
                self.latents_path(unit).unlink()
                on_unit(unit)
            self.encoders.release()

    def latents_path(self, unit: Unit) -> Path:
        """Where the latents lie until they are decoded."""
        return self.out / "latents" / f"{unit.row}-{unit.cases[0].id}.npy"

    def encode(self, wanted: Sequence[Unit]) -> Iterator[tuple[Unit, Conditions]]:
        """What the transformer reads of each unit, in the host's memory; the encoders are let go at the end."""
        if not wanted:
            return
        alignment = load_models.load_alignment(self.folder, self.config) if self.config.alignment.enabled else None
        for unit in wanted:
            try:
                yield unit, jax.device_get(self.conditions(unit, alignment))
            except RequestError:  # an input that does not decode costs its cases, not the run; they are failures when they are measured
                continue
        self.encoders.release()

    def conditions(self, unit: Unit, alignment: Any) -> Conditions:
        """What the transformer reads of one unit."""
        config, cases = self.config, unit.padded
        prompts = ["" if unit.row == "neutral" else case.prompt for case in cases]
        has_frame = np.array([case.is_temporal for case in cases], np.float32)
        # Where no first frame is given, its pixels are not read.
        black = np.zeros((config.video.height, config.video.width, 3), np.uint8)
        frames = np.stack([case.first_frame(config.video) if case.first_frame else black for case in cases])
        references = np.stack([self.reference(unit.row, case) for case in cases])
        given = [(np.array([tasks.task_index(case.task) for case in cases], np.int32), clips.to_unit(references))]
        return transfer.conditions_of(
            self.encoders, alignment, prompts, clips.to_unit(frames), has_frame, given, with_reference=unit.row != "none"
        )

    def reference(self, row: str, case: Case) -> np.ndarray:
        """The clip that the network is given, uint8 "T H W 3"."""
        size = self.config.data.reference
        found = self.others[case.id].reference(size) if row == "swapped" else case.reference(size)
        return shuffled(found) if row == "shuffled" else found

    def sample(self, unit: Unit, conditions: Conditions) -> np.ndarray:
        """Latents of one unit."""
        shape, first = self.config.video.latent_shape(self.config.vae), unit.cases[0]
        key = jax.random.key(first.seed)
        if first.pair is not None:
            key = jax.random.fold_in(key, unit.place)  # as in transfer.Transfer
        noise = jax.random.normal(key, (unit.size, *shape))
        return np.asarray(self.denoise(self.load, jax.tree.map(jnp.asarray, conditions), noise))

    def load(self, part: str) -> WanDiT:
        """A transformer of the folder; one is in memory at a time."""
        if self.held is None or self.held[0] != part:
            self.release()
            self.held = part, load_models.load_dit(self.folder, self.config, self.mesh, part)
        return self.held[1]

    def release(self) -> None:
        """Lets the transformer go."""
        self.held = None


def write_latents(path: Path, latents: np.ndarray) -> None:
    """Writes an array whole or not at all."""
    file = io.BytesIO()
    np.save(file, latents)
    write_whole(path, file.getvalue())
