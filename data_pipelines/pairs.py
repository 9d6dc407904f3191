"""Pairs of clips to samples of a training: the rows of a manifest one by one, or any pixels a batch at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int

from configs.errors import RequestError
from configs.run import Config, VideoConfig
from data_pipelines import clips, decoding
from data_pipelines.encoders import Encoders
from data_pipelines.manifest import Clip, Row, refuse_same
from data_pipelines.records import named, to_record
from omnitransfer_jax import tasks
from omnitransfer_jax.batch import Batch, sample_spec

Item = TypeVar("Item")
Result = TypeVar("Result")


class Clips(NamedTuple):
    """The pixels of a batch of pairs, float32 in [-1, 1]."""

    targets: Float[np.ndarray, "B T H W 3"]
    references: Float[np.ndarray, "B t h w 3"] | None
    """None for networks that read no reference, whose latents are then zeros."""
    first_frames: Float[np.ndarray, "B H W 3"]
    has_first_frame: Float[np.ndarray, " B"]
    """1 if the target starts from its first frame; 0 if not, and then the frame is not used."""


def encode_batch(
    encoders: Encoders, task_names: Sequence[str], prompts: Sequence[str], videos: Clips
) -> tuple[Batch, Int[np.ndarray, " B"]]:
    """A batch of any mix of tasks, and how many rows of `text` each prompt has."""
    task = np.array([tasks.task_index(name) for name in task_names], np.int32)
    frames, has_frame, inputs = videos.first_frames, videos.has_first_frame, None
    if videos.references is None:
        reference = np.zeros((len(task), *sample_spec(encoders.config).reference.shape), np.float32)
    else:
        reference = encoders.latents(videos.references)
        if encoders.config.alignment.enabled:
            inputs = encoders.mllm_inputs(task, prompts, frames, has_frame, videos.references)
    text, rows = encoders.text(prompts)
    image, condition = encoders.first_frames(frames, has_frame)
    batch = Batch._make((task, encoders.latents(videos.targets), condition, reference, text, image, has_frame, inputs))
    return batch, rows


class Pixels(NamedTuple):
    """The pictures of a manifest's row, uint8."""

    reference: np.ndarray
    """ "T H W 3"."""
    target: np.ndarray
    """ "T H W 3"."""
    first_frame: np.ndarray | None
    """ "H W 3", as large as the target; None for appearance tasks."""


def read_pixels(row: Row, config: Config) -> Pixels:
    """The clips of a row in the sizes of the configuration. What cannot be used is a `RequestError` that begins with its path."""
    refuse_same(row)
    reference, target = _read(row.reference, config.data.reference), _read(row.target, config.video)
    if not row.is_temporal:
        return Pixels(reference, target, None)
    if row.first_frame is None:
        return Pixels(reference, target, target[0])
    return Pixels(reference, target, clips.fit(_read_image(row.first_frame), config.video.height, config.video.width))


def encode(row: Row, pixels: Pixels, encoders: Encoders) -> dict[str, Any]:
    """The record of a row (`records.schema`). Encodings that are not finite are a `RequestError`."""
    (found,) = encode_together([(row, pixels)], encoders)
    if isinstance(found, RequestError):
        raise found
    return found


def encode_together(pairs: Sequence[tuple[Row, Pixels]], encoders: Encoders) -> list[dict[str, Any] | RequestError]:
    """The records of some rows, as `encode` makes each of them, or what it raises."""
    frames = [pixels.target[0] if pixels.first_frame is None else pixels.first_frame for _, pixels in pairs]
    videos = Clips(
        targets=np.stack([clips.to_unit(pixels.target) for _, pixels in pairs]),
        references=np.stack([clips.to_unit(pixels.reference) for _, pixels in pairs]),
        first_frames=np.stack([clips.to_unit(frame) for frame in frames]),
        has_first_frame=np.array([pixels.first_frame is not None for _, pixels in pairs], np.float32),
    )
    batch, rows = encode_batch(encoders, [row.task for row, _ in pairs], [row.prompt for row, _ in pairs], videos)
    return [_record(row, jax.tree.map(lambda x, i=i: x[i], batch), rows[i]) for i, (row, _) in enumerate(pairs)]


def _record(row: Row, sample: Batch, text_rows: int) -> dict[str, Any] | RequestError:
    for name, array in named(sample).items():
        if not np.isfinite(array).all():
            return RequestError(f"{row.target.path}: the {name} of {row.id!r} is encoded as NaN or infinity; encode in float32")
    return to_record(row.id, sample, text_rows)


def _read(clip: Clip, size: VideoConfig) -> np.ndarray:
    with decoding.decoder() as decoder:
        return decoder.clip(
            clip.path, frames=size.frames, fps=size.fps, height=size.height, width=size.width, start=clip.start, end=clip.end
        )


def _read_image(path: Path) -> np.ndarray:
    with decoding.decoder() as decoder:
        return decoder.image(path)


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[tuple[Item, Future[Result]]]:
    """Each item with the future of `function(item)`, in order; meanwhile threads compute those of the next items."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)
