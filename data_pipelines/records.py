"""Records: what a training reads, one example of transfer each, encoded once. The one schema, whoever makes them.

    DIR/records-train.array_record-00000-of-00012   shards; each appears under its name when it is complete
    DIR/dataset_info.json, features.json            what makes the folder a TFDS dataset, written when all shards are there
    DIR/records.json                                what the records were made of; written first
    DIR/empty_text.npy                              the encoding of the empty prompt

Real numbers are kept as bfloat16, whose bits go into uint16, for TFDS has no name for bfloat16: half the disk of float32, and the
precision the network computes in. Shards are not compressed: latents gain nothing from it, and compressed ones are slower to open.
With `alignment.enabled` records hold, beside all the rest, what the language model is shown (mllm_inputs.py).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from configs.errors import RequestError, require
from configs.run import Config
from data_pipelines import mllm_inputs
from omnitransfer_jax import tasks
from omnitransfer_jax.models.omnitransfer import MASK_CHANNELS

FORMAT = 1
NAME, SPLIT = "records", "train"
TFDS_FILES = ("dataset_info.json", "features.json")
MADE_FILE, EMPTY_TEXT_FILE = "records.json", "empty_text.npy"
WRITER_OPTIONS = "group_size:1,uncompressed"  # one record a read, as random access wants it
SHOWN = {"tokens": np.int32, "mask": np.bool_, "positions": np.int32, "source": np.int32, "features": np.uint16}  # of mllm_inputs.shapes
ENCODE = "python -m launch.encode --config=NAME --manifest=FILE.jsonl --out=DIR"


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The arrays of a record whose shape the configuration decides.

    target "F h w C", condition "F h w c" (mask, then first frame and grey), reference "f h w C", image "I J".
    """
    require(
        config.dit.image_dim is not None,
        "dit.image_dim=None: records are for an image-to-video network; take a configuration like stage1",
    )
    target, image = config.video.latent_shape(config.vae), config.image
    return {
        "target": target,
        "condition": (*target[:-1], MASK_CHANNELS + config.vae.z_dim),
        "reference": config.data.reference.latent_shape(config.vae),
        "image": (1 + (image.image_size // image.patch) ** 2, image.dim),
    }


def schema(config: Config) -> tfds.features.FeaturesDict:
    """The features of a record: the arrays of `shapes`, and

    id         name of the example, for people
    task       index into `tasks.TASKS`
    text       the prompt's features, "S E", as many rows as it has tokens
    has_image  1 if the target starts from a given frame; 0 if not, and then `image` is zeros that stand for nothing
    shown_*    with `alignment.enabled`: the arrays of `shown.shapes`
    """
    arrays = {**shapes(config), "text": (None, config.text.dim)}
    tensors = {name: tfds.features.Tensor(shape=shape, dtype=np.uint16, encoding="bytes") for name, shape in arrays.items()}
    scalars = {"task": tfds.features.Scalar(np.int32), "has_image": tfds.features.Scalar(np.float32)}
    if config.alignment.enabled:
        for name, shape in mllm_inputs.shapes(config).items():
            tensors[f"shown_{name}"] = tfds.features.Tensor(shape=shape, dtype=SHOWN[name], encoding="bytes")
    return tfds.features.FeaturesDict({"id": tfds.features.Text(), **scalars, **tensors})


def to_bits(x: np.ndarray) -> np.ndarray:
    """The bits of `x` rounded to bfloat16: uint16."""
    return np.asarray(x).astype(jnp.bfloat16).view(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """float32 from the bits of bfloat16, which are its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def begin(folder: Path, config: Config, source: Mapping[str, Any]) -> None:
    """Opens a folder for writing, or for going on: then it must have been begun with the same configuration and source.

    `source` is what the records come from beside the configuration, in words of JSON: a manifest and weights, or a world and its key.
    """
    made = json.loads(json.dumps({"format": FORMAT, "config": _configuration(config), "source": source}))
    if (folder / MADE_FILE).exists():
        known, now = _flat(read_made(folder)), _flat(made)
        changed = [f"{key}={known.get(key)} there, {now.get(key)} now" for key in {**known, **now} if known.get(key) != now.get(key)]
        require(not changed, f"{folder}: begun as other records ({'; '.join(changed)}); give another folder, or remove this one")
        return
    strangers = [path.name for path in folder.glob("*") if not path.name.startswith(".")]  # hidden: another process begins just now
    require(not strangers, f"{folder}: no records, but {', '.join(strangers[:3])}; give a new or empty folder")
    write_whole(folder / MADE_FILE, json.dumps(made, indent=2).encode())


def read_made(folder: Path) -> dict[str, Any]:
    """What the records of `folder` were made of."""
    try:
        made = json.loads((folder / MADE_FILE).read_text())
    except OSError:
        raise RequestError(f"{folder}: no records, {MADE_FILE} is absent; make some: {ENCODE}") from None
    require(
        made["format"] == FORMAT, f"{folder}: records of format {made['format']}, this version reads {FORMAT}; make them again: {ENCODE}"
    )
    return made


def write_empty_text(folder: Path, text: np.ndarray) -> None:
    """Keeps the encoding "S E" of the empty prompt beside the shards."""
    content = BytesIO()
    np.save(content, to_bits(text))
    write_whole(folder / EMPTY_TEXT_FILE, content.getvalue())


def shard_path(folder: Path, index: int, count: int) -> Path:
    """Where shard `index` of `count` is when it is complete."""
    return folder / f"{NAME}-{SPLIT}.array_record-{index:05d}-of-{count:05d}"


@contextmanager
def shard_writer(path: Path, features: tfds.features.FeaturesDict) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends a record to a shard. The shard is there once the context is left, and not if an error leaves it."""
    partial = path.with_name(f".{path.name}.partial")
    writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
    try:
        yield lambda record: writer.write(features.serialize_example(record))
    finally:
        writer.close()
    _place(partial, path)


def finish(folder: Path, config: Config, lengths: Sequence[int]) -> None:
    """Makes a dataset of the shards, whose numbers of records are `lengths`; several processes may do it at once."""
    template = tfds.core.ShardedFileTemplate(data_dir=epath.Path(folder), dataset_name=NAME, split=SPLIT, filetype_suffix="array_record")
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=list(lengths), num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=folder, features=schema(config), split_infos=[split], check_data=False)


def require_shown(folder: Path, made: Mapping[str, Any], config: Config) -> None:
    """A `RequestError` unless the records hold what the language model of `config` is shown."""
    require(
        "alignment" in made["config"],
        f"{folder}: records without what alignment.enabled needs, features for the language model; "
        f"make others with a configuration that has it: {ENCODE}",
    )
    needs = _flat(_alignment(config))
    found = _flat({name: made["config"].get(name) for name in _alignment(config)})
    changed = [
        f"{key}={found.get(key)} there, {needs.get(key)} now"
        for key in {**found, **needs}
        if found.get(key) != needs.get(key) and key != "mllm.dtype"  # how it computes, not what it is
    ]
    require(not changed, f"{folder}: records for another alignment ({'; '.join(changed)}); give those numbers, or make others: {ENCODE}")


class Records:
    """The records of a folder by number: dictionaries of numpy arrays, as `schema` has them."""

    def __init__(self, folder: Path, config: Config):
        """A folder without records, with unfinished ones, or with records of other shapes than `config` needs is a `RequestError`."""
        made = read_made(folder)
        if not all((folder / name).exists() for name in (*TFDS_FILES, EMPTY_TEXT_FILE)):
            raise RequestError(f"{folder}: unfinished records; run the command that makes them again, it goes on where it stopped")
        builder: Any = tfds.builder_from_directory(folder)
        features: Any = schema(config)
        found, needs = builder.info.features.shape, features.shape
        if config.alignment.enabled:
            require_shown(folder, made, config)
        wrong = [f"{name} is {_times(found[name])}, not {_times(needs[name])}" for name in needs if found[name] != needs[name]]
        rows, length = made["config"]["dit"]["text_len"], config.dit.text_len
        wrong += [f"prompts have up to {rows} rows, dit.text_len is {length}"] if rows > length else []
        if wrong:
            raise RequestError(
                f"{folder}: not records of this configuration: {'; '.join(wrong)}; "
                f"give the --config they were made for (its numbers are in {MADE_FILE}), or make others: {ENCODE}"
            )
        self.folder, self.split = folder, builder.info.splits[SPLIT]
        self._source = builder.as_data_source(SPLIT)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._source[index]
        except RuntimeError as error:
            ends = np.cumsum(self.split.shard_lengths)
            path = self.split.filepaths[int(np.searchsorted(ends, index, side="right"))]
            raise RequestError(
                f"{path}: record {index} of the dataset cannot be read ({error}); "
                "remove this shard and run the command that makes them again, it writes what is not there"
            ) from None


def empty_text(folder: Path, length: int) -> np.ndarray:
    """The encoding of the empty prompt, zero rows beyond its end: float32 "S E"."""
    return pad_rows(from_bits(np.load(folder / EMPTY_TEXT_FILE)), length)


def pad_rows(x: np.ndarray, length: int) -> np.ndarray:
    """`x` "s E" with zero rows after its own, `length` in all."""
    return np.pad(x, ((0, length - x.shape[0]), (0, 0)))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, whenever the process dies and whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    partial.write_bytes(content)
    _place(partial, path)


def _place(partial: Path, path: Path) -> None:
    """Moves a file to its name when the disk has all of it."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _configuration(config: Config) -> dict[str, Any]:
    """The fields that decide what a record holds."""
    encoders = {name: asdict(getattr(config, name)) for name in ("vae", "text", "image")}
    for name in ("encode_frames", "decode_frames"):  # they change the memory alone
        encoders["vae"].pop(name)
    if config.alignment.enabled:
        encoders |= _alignment(config)
    return {
        "video": asdict(config.video),
        "data": {"reference": asdict(config.data.reference)},
        "dit": {"text_len": config.dit.text_len},
    } | encoders


def _alignment(config: Config) -> dict[str, Any]:
    """The fields that decide what the language model is shown, in words of JSON."""
    fields = {name: getattr(config.alignment, name) for name in ("frames", "frame_pixels", "prompt_tokens")}
    templates = hashlib.sha256("\n".join(task.template for task in tasks.TASKS).encode()).hexdigest()
    return json.loads(json.dumps({"alignment": fields | {"templates": templates}, "mllm": asdict(config.mllm)}))


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted paths."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: leaf for name, branch in tree.items() for key, leaf in _flat(branch, f"{path}.{name}" if path else name).items()}


def _times(shape: Sequence[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape)
