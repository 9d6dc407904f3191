"""Records: the samples of a training on disk, each encoded once. What a sample holds is `omnitransfer_jax.batch.sample_spec`.

    DIR/records-train.array_record-00000-of-00012   shards; each appears under its name when it is complete
    DIR/dataset_info.json, features.json            what makes the folder a TFDS dataset, written when all shards are there
    DIR/records.json                                what the records were made of; written first
    DIR/empty_text.npy                              the encoding of the empty prompt
    DIR/contents.json                               the id of every record in its order, and digests of the small files; written last

Real numbers are stored as bfloat16, half the size of float32 and the precision the network computes in; TFDS has no bfloat16, so its
bits are stored as uint16. Shards are not compressed: latents would not become smaller, and compressed shards are slower to open.
With `alignment.enabled` records also hold what the language model reads (mllm_inputs.py).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from configs.errors import RequestError, require
from configs.kinds import flat
from configs.run import Config, record_fields
from data_pipelines import examples
from omnitransfer_jax import tasks
from omnitransfer_jax.batch import Batch, sample_spec
from omnitransfer_jax.folders.atomic import place, read_json, sha256, write_whole
from omnitransfer_jax.folders.checksums import print_once
from omnitransfer_jax.folders.inputs import BUCKETS_FILE, RECORDS_FILE
from omnitransfer_jax.folders.model_folder import MODEL_FILE
from omnitransfer_jax.models.alignment import MLLMInputs

FORMAT = 1
NAME, SPLIT = "records", "train"
RANDOM = "random"  # what records.json says of weights that were not loaded
TFDS_FILES = ("dataset_info.json", "features.json")
MADE_FILE, EMPTY_TEXT_FILE, CONTENTS_FILE = RECORDS_FILE, "empty_text.npy", "contents.json"
SAMPLED = 16  # records that the digest of a data set reads
WRITER_OPTIONS = "group_size:1,uncompressed"  # one record a read, as random access wants it
AGAIN = "and run the command that makes the records again, it writes what is not there"
ENCODE = "python -m launch.encode --config=NAME --manifest=FILE.jsonl --out=DIR"


def record_spec(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of what a record holds of a sample (`sample_spec`), by the names it has there."""
    require(
        config.dit.image_to_video,
        f"dit.in_channels={config.dit.in_channels}: records are for an image-to-video network; take a configuration like stage1",
    )
    return named(sample_spec(config))


def schema(config: Config) -> tfds.features.FeaturesDict:
    """The TFDS features of a record: `id`, a name of the example for people, and what `record_spec` names.

    Of `text` there are only the rows of the prompt's tokens; arrays of real numbers are stored as the bits of bfloat16.
    """
    features: dict[str, Any] = {"id": tfds.features.Text()}
    for name, leaf in record_spec(config).items():
        shape, dtype = (None, *leaf.shape[1:]) if name == "text" else leaf.shape, np.uint16 if _as_bits(leaf) else leaf.dtype
        features[name] = tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes") if shape else tfds.features.Scalar(dtype)
    return tfds.features.FeaturesDict(features)


def to_record(id: str, sample: Batch, text_rows: int) -> dict[str, Any]:
    """The record of one sample whose text has `text_rows` rows and padding behind them."""
    arrays = named(sample._replace(text=sample.text[:text_rows]))
    return {"id": id} | {name: to_bits(array) if _as_bits(array) else array for name, array in arrays.items()}


def from_record(record: Mapping[str, Any], spec: Batch) -> Batch:
    """One sample of a batch, a `sample_spec`, from its record; real numbers stay bfloat16, but for scalars (`mesh.to_mesh` widens them)."""

    def read(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        array = record[name].view(jnp.bfloat16) if _as_bits(leaf) else np.asarray(record[name], leaf.dtype)
        return pad_rows(array, leaf.shape[0]) if name == "text" else array

    return jax.tree.map(read, _names(spec), spec)


def named(sample: Batch) -> dict[str, Any]:
    """The arrays of a sample by their names in a record."""
    return dict(zip(jax.tree.leaves(_names(sample)), jax.tree.leaves(sample), strict=True))


def _names(sample: Batch) -> Any:
    """The name in a record of each array of `sample`: that of its field, with `shown_` before the language model's inputs (format 1)."""
    names: Any = Batch._make(name if value is not None else None for name, value in sample._asdict().items())
    return names._replace(mllm_inputs=sample.mllm_inputs and MLLMInputs._make(f"shown_{field}" for field in MLLMInputs._fields))


def _as_bits(leaf: Any) -> bool:
    """Whether an array is stored as the bits of bfloat16: all real numbers but scalars."""
    return leaf.dtype == np.float32 and leaf.ndim > 0


def to_bits(x: np.ndarray) -> np.ndarray:
    """The bits of `x` rounded to bfloat16: uint16."""
    return np.asarray(x).astype(jnp.bfloat16).view(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """float32 from the bits of bfloat16, which are its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def begin(folder: Path, config: Config, source: Mapping[str, Any]) -> None:
    """Prepares a new folder for writing; a folder that was begun before must have the same configuration and source.

    `source` says in JSON what the records are made of besides the configuration: a manifest and weights, or a world and its key.
    """
    made = {"format": FORMAT, "config": _configuration(config), "source": json.loads(json.dumps(source))}
    if (folder / MADE_FILE).exists():
        before, weights = read_made(folder), made["source"].get("weights")
        if isinstance(weights, dict) and MODEL_FILE in (before["source"].get("weights") or {}):
            before["source"]["weights"] = weights  # earlier versions wrote the digest of model.json, which "config" has too, and a path
        known, now = flat(before), flat(made)
        changed = [f"{key}={known.get(key)} there, {now.get(key)} now" for key in {**known, **now} if known.get(key) != now.get(key)]
        require(not changed, f"{folder}: begun as other records ({'; '.join(changed)}); give another folder, or remove this one")
        return
    require_place(folder)
    write_whole(folder / MADE_FILE, json.dumps(made, indent=2).encode())


def require_place(folder: Path) -> None:
    """A `RequestError` if something other than records is in `folder`."""
    others = [path.name for path in folder.glob("*") if not path.name.startswith(".")]  # hidden files: another process begins just now
    begun = (folder / MADE_FILE).exists() or (folder / BUCKETS_FILE).exists()
    require(begun or not others, f"{folder}: no records, but {', '.join(others[:3])}; give a new or empty folder")


def read_made(folder: Path) -> dict[str, Any]:
    """The content of records.json: what the records of `folder` were made of."""
    try:
        made = read_json(folder / MADE_FILE, f"restore it from a copy, or make the records again: {ENCODE}", "config", "source")
    except OSError:
        raise RequestError(f"{folder}: no records, {MADE_FILE} is absent; make some: {ENCODE}") from None
    require(
        made.get("format") == FORMAT,
        f"{folder}: records of format {made.get('format')}, this version reads {FORMAT}; make them again: {ENCODE}",
    )
    return made


def write_empty_text(folder: Path, text: np.ndarray) -> None:
    """Writes the encoding "S E" of the empty prompt beside the shards."""
    content = BytesIO()
    np.save(content, to_bits(text))
    write_whole(folder / EMPTY_TEXT_FILE, content.getvalue())


def shard_path(folder: Path, index: int, count: int) -> Path:
    """The path of shard `index` of `count` once it is complete."""
    return folder / f"{NAME}-{SPLIT}.array_record-{index:05d}-of-{count:05d}"


@contextmanager
def shard_writer(path: Path, features: tfds.features.FeaturesDict) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that appends a record to a shard. The shard appears when the context ends, unless an error ends it."""
    partial = path.with_name(f".{path.name}.partial")
    writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
    try:
        yield lambda record: writer.write(features.serialize_example(record))
    finally:
        writer.close()
    place(partial, path)


def finish(folder: Path, config: Config, lengths: Sequence[int], ids: Sequence[str] = ()) -> None:
    """Writes the dataset's metadata for shards of `lengths` records; several processes may do it at once.

    `ids` are those of all records: a record is then known to be the one that belongs in its place, whatever happens to the shards.
    """
    template = tfds.core.ShardedFileTemplate(data_dir=epath.Path(folder), dataset_name=NAME, split=SPLIT, filetype_suffix="array_record")
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=list(lengths), num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=folder, features=schema(config), split_infos=[split], check_data=False)
    files = {name: sha256(folder / name) for name in (*TFDS_FILES, EMPTY_TEXT_FILE)}
    write_whole(folder / CONTENTS_FILE, json.dumps({"files": files, "ids": list(ids)}))


def _known_ids(folder: Path) -> list[str]:
    """The ids of the records in `folder`, none of an earlier version's. A small file that was changed is a `RequestError`."""
    if not (folder / CONTENTS_FILE).exists():
        return []
    remedy = f"restore it from a copy, or remove it and {CONTENTS_FILE} and run the command that makes the records again"
    contents = read_json(folder / CONTENTS_FILE, f"remove it and run the command that makes the records again: {ENCODE}", "files")
    for name, digest in contents["files"].items():
        require((folder / name).exists() and sha256(folder / name) == digest, f"{folder / name}: not as it was written; {remedy}")
    ids: Any = contents.get("ids")
    require(isinstance(ids, list), f"{folder / CONTENTS_FILE}: ids is no list; {remedy}")
    return ids


def require_same_encoding(folder: Path, made: Mapping[str, Any], config: Config) -> None:
    """A `RequestError` unless the records hold what the encoders of `config` make of videos of its rate and size.

    The precision may change, the models may not; how long texts may be is compared by the caller.
    """
    found = flat(made["config"])
    changed = [
        f"{key}={found[key]} there, {value} now"
        for key, value in flat(_configuration(config)).items()
        if found.get(key, value) != value and key != "dit.text_len" and not key.endswith(".dtype")
    ]
    require(not changed, f"{folder}: records of another encoding ({'; '.join(changed)}); give those numbers, or make others: {ENCODE}")


def require_same_weights(folder: Path, weights: str | Mapping[str, str], origin: str) -> None:
    """A `RequestError` unless the encoders that made the records have the weights and vocabularies of those in `origin`.

    `weights` is what `encoders.weights_of` says of `origin`, the value of train.init_from. A part that `origin` lacks is not compared:
    the transformer's weights may lie apart from the encoders'. Records of earlier versions do not say what made them; a line is printed.
    """
    made = read_made(folder)["source"].get("weights")
    if made != RANDOM and (not isinstance(made, dict) or MODEL_FILE in made):
        print_once(f"{folder}: does not say which weights made it, as records of earlier versions; they are not compared")
        return
    remedy = f"give --train.init_from the weights that made the records, or make others with this one: {ENCODE}"
    given = f"train.init_from={origin!r}"
    require(
        weights == RANDOM or not weights or made != RANDOM,
        f"{folder}: records made by random encoders, but {given} has weights of {_listed(weights)}; {remedy}",
    )
    require(
        weights != RANDOM or made == RANDOM,
        f"{folder}: records made with weights of {_listed(made)}, but {given} has none; {remedy}",
    )
    if isinstance(made, dict) and isinstance(weights, dict):
        others = [name for name, digest in weights.items() if made.get(name) != digest]
        require(not others, f"{folder}: records made by another {_listed(others)} than {given} has; {remedy}")


def _listed(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))


class DamagedRecordError(RequestError):
    """The bytes of one record are not those that were written; others of its shard can be read."""


class Records:
    """The records of a folder by number: dictionaries of NumPy arrays, as in `schema`."""

    def __init__(self, folder: Path, config: Config):
        """A folder whose records are absent, unfinished or of other shapes than `config` needs is a `RequestError`."""
        made = read_made(folder)
        if not all((folder / name).exists() for name in (*TFDS_FILES, EMPTY_TEXT_FILE)):
            raise RequestError(f"{folder}: unfinished records; run the command that makes them again, it goes on where it stopped")
        self.ids = _known_ids(folder)
        """The id of every record; empty if they were written by an earlier version."""
        try:
            builder: Any = tfds.builder_from_directory(folder)
        except OSError:
            raise
        except Exception as error:  # of many types
            raise RequestError(f"{folder}: its metadata cannot be read ({str(error)[:100]}); remove {TFDS_FILES[0]}, {AGAIN}") from None
        features: Any = schema(config)
        found, needs = builder.info.features.shape, features.shape
        require(
            "alignment" in made["config"] or not config.alignment.enabled,
            f"{folder}: records without inputs for the language model, which alignment.enabled needs; "
            f"make others with a configuration that has it: {ENCODE}",
        )
        wrong = [f"{name} is {_times(found[name])}, not {_times(needs[name])}" for name in needs if found[name] != needs[name]]
        rows, length = made["config"]["dit"]["text_len"], config.dit.text_len
        wrong += [f"prompts have up to {rows} rows, dit.text_len is {length}"] if rows > length else []
        if wrong:
            raise RequestError(
                f"{folder}: not records of this configuration: {'; '.join(wrong)}; "
                f"give the --config they were made for (its numbers are in {MADE_FILE}), or make others: {ENCODE}"
            )
        require_same_encoding(folder, made, config)
        self.folder, self.split = folder, builder.info.splits[SPLIT]
        self._shapes, self._dtypes = found, builder.info.features.np_dtype
        self._shards = builder.as_data_source(SPLIT).data_source
        count = self.split.num_examples
        require(len(self.ids) in (0, count), f"{folder}: {count} records, {CONTENTS_FILE} names {len(self.ids)}; remove it, {AGAIN}")

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = {name: self._array(name, value) for name, value in examples.fields(self.serialized(index)).items()}
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # of many types
            reason = str(error)
            one = (
                reason.startswith("Corrupted") and "Failed to read" not in reason
            )  # not the end of the shard, which says where records are
            raise (DamagedRecordError if one else RequestError)(
                f"{self.shard(index)}: record {index} of the dataset cannot be read ({reason[:200]}); remove this shard, {AGAIN}"
            ) from None
        if self.ids and record["id"] != self.ids[index].encode():
            raise RequestError(
                f"{self.shard(index)}: record {index} is {record['id'].decode(errors='replace')!r}, not {self.ids[index]!r}: "
                f"another shard's file, or changed; remove this shard, {AGAIN}"
            )
        return record

    def name(self, index: int) -> str:
        """The id of a record that may not be readable."""
        return self.ids[index] if self.ids else f"record {index}"

    def serialized(self, index: int) -> bytes:
        """The bytes of a record, which ArrayRecord has compared with their hash."""
        return self._shards[index]

    def _array(self, name: str, value: memoryview | float | int) -> Any:
        """What TFDS makes of a field, but that arrays are not copied."""
        if not isinstance(value, memoryview):
            return value
        shape = self._shapes[name]
        return np.frombuffer(value, self._dtypes[name]).reshape([-1 if size is None else size for size in shape]) if shape else bytes(value)

    def shard(self, index: int) -> str:
        """The file that record `index` is in."""
        return str(self.split.filepaths[int(np.searchsorted(np.cumsum(self.split.shard_lengths), index, side="right"))])


def digest(folder: Path, config: Config) -> str:
    """A digest of the records of `folder`, wherever it lies: of what they were made of, their number, and the arrays of some of them.

    A data set may have terabytes, so of all records `SAMPLED` are read, evenly spaced. The order in which a record stores its arrays
    does not matter.
    """
    records, made = Records(folder, config), flat(read_made(folder))
    found = hashlib.sha256(json.dumps([len(records), {key: made[key] for key in sorted(made) if key != "source.weights.path"}]).encode())
    for index in dict.fromkeys(np.linspace(0, len(records) - 1, SAMPLED).round().astype(int).tolist() if len(records) else []):
        for name, value in sorted(records[index].items()):
            found.update(name.encode() + (value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()))
    return found.hexdigest()[:32]


def empty_text(folder: Path, length: int) -> np.ndarray:
    """The encoding of the empty prompt, zero rows beyond its end: float32 "S E"."""
    try:
        return pad_rows(from_bits(np.load(folder / EMPTY_TEXT_FILE)), length)
    except ValueError as error:
        raise RequestError(f"{folder / EMPTY_TEXT_FILE}: cannot be read ({str(error)[:100]}); remove it, {AGAIN}") from None


def pad_rows(x: np.ndarray, length: int) -> np.ndarray:
    """`x` "s E" with zero rows after its own, `length` in all."""
    return np.pad(x, ((0, length - x.shape[0]), (0, 0)))


def _configuration(config: Config) -> dict[str, Any]:
    """The fields of the configuration that the content of a record depends on, and the templates' digest, as JSON has them."""
    fields = record_fields(config)
    if config.alignment.enabled:
        fields["alignment"]["templates"] = hashlib.sha256("\n".join(task.template for task in tasks.TASKS).encode()).hexdigest()
    return json.loads(json.dumps(fields))


def _times(shape: Sequence[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape)
