"""The folder of a training run: its configuration, and checkpoints that it, another run and sampling start from.

    WORKDIR/config.json          which training wrote it, digests of its data and of the weights it started from, the whole configuration
    WORKDIR/checkpoints/STEP/    trainable, frozen, ema (parameters by path), progress (step, moments, skipped), data, quarantine if any
                                 record was damaged, and checksums

Parameters of another folder that a training only reads are not in it (`Objective.base`).

A checkpoint is whole or absent: Orbax writes it under another name first, and checksums of its files follow (checksums.py). `data` is the
number of batches read, the same for all processes, so a run may go on with another number of processes.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import count
from typing import Any, TypeVar

import grain
import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from configs import kinds, named
from configs.errors import RequestError, require
from configs.run import CheckpointConfig, Config, RunConfig
from omnitransfer_jax.folders import atomic, checksums, fingerprint, model_folder
from omnitransfer_jax.folders.checkpoints import Checkpoints, remove
from omnitransfer_jax.folders.finite import require_finite
from omnitransfer_jax.folders.processes import first_text, wait_for_all
from omnitransfer_jax.folders.typed import require_type
from omnitransfer_jax.folders.whole import METADATA, damage
from omnitransfer_jax.quarantine import Quarantine

CONFIG_FILE, CHECKPOINTS = "config.json", "checkpoints"
DATA_DIGEST, ORIGIN_DIGEST = "data_digest", "origin_digest"  # in config.json, beside the fields of the configuration
CUT_OFF = "its checksums, which are written last, are absent"
REMEDY = "restore it from a copy, or give another folder"
# Fields of `Config` and its kinds; the last three belong to the alignment.
NETWORKS = ("dit", "vae", "text", "image", "motion", "mllm", "lora", "alignment")
PARAMETERS = ("trainable", "frozen", "ema")
ASIDE = "quarantine"
# The name of a training: what it trains, and the configurations that name it.
TRAININGS = {
    "transfer": ("transformer", "stage1, stage2 or stage3"),
    "transfer_lora": ("transformer's adapters", "stage1:lora"),
    "motion_inversion": ("tokens of a motion", "motion_inversion"),
    "follow_your_motion": ("motion adapter", "follow_your_motion"),
    "vae": ("autoencoder", "vae"),
    "mllm": ("language model", "mllm"),
}
ON_A_MODEL = ("follow_your_motion", "transfer_lora")  # trainings that add to a whole model, whose parts are those that the run started from
ADDED = re.compile(r".*\.lora_\w+\.\w+")  # parameters of a named adapter
Run = TypeVar("Run", bound=RunConfig)
State = TypeVar("State", bound=tuple)  # a NamedTuple like `train.step.TrainState`


def open_checkpoints(workdir: epath.PathLike, config: CheckpointConfig) -> Checkpoints:
    """The run's checkpoints, without what interrupted saves left behind. Closing it waits for a save that is still being written.

    Damaged ones that are newer than the newest whole one get another name, so that the run goes on from that; what a killed save has left
    is removed.
    """
    newest, damaged = _newest_whole(workdir)
    _require_one(newest, damaged)
    if newest:
        _say_if_unverified(newest)
    wait_for_all("looked for damaged checkpoints")
    for folder, reason in damaged.items() if jax.process_index() == 0 else ():
        if reason == CUT_OFF:
            remove(folder)
            print(f"{folder}: removed, its save was cut off; the run goes on from checkpoint {newest and newest.name}", flush=True)
            continue
        aside = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}.damaged{n}")).exists())
        folder.rename(aside)
        print(f"{folder}: damaged, {reason}; it is {aside.name} now", flush=True)
    wait_for_all("renamed damaged checkpoints")
    return Checkpoints(epath.Path(workdir).absolute() / CHECKPOINTS, config.keep)


def save(checkpoints: Checkpoints, step: int, state: tuple, data: grain.DatasetIterator, quarantine: Quarantine | None = None) -> None:
    """Starts to write the state, the position in the data and what of these is set aside; when it returns, all may change again.

    `checkpoints.refusal` says if not.
    """
    aside = {ASIDE: {"places": quarantine.state}} if quarantine is not None and quarantine.places else {}
    checkpoints.save(step, _items(state) | {"data": data.get_state()} | aside)


def restore(checkpoints: Checkpoints, like: State, data: grain.DatasetIterator, quarantine: Quarantine | None = None) -> State:
    """The latest state, with the shapes and shardings of `like`; `data` goes on behind the last batch that was read."""
    folder, wanted = checkpoints.folder / str(checkpoints.latest), _items(like) | {"data": data.get_state()}
    with _readable(folder):
        if quarantine is not None and (folder / ASIDE).exists():
            shape = ocp.metadata(folder, checkpointable_name=ASIDE).metadata["places"].shape
            wanted[ASIDE] = {"places": np.empty(shape, np.int64)}
        items = checkpoints.orbax.load_checkpointables(abstract_checkpointables=wanted)
    data.set_state(items["data"])
    if quarantine is not None and ASIDE in items:
        quarantine.restore(items[ASIDE]["places"])
    fields: Any = like
    rest = [name for name in fields._fields if name not in PARAMETERS]
    return fields._replace(**{name: items.get(name, {}) for name in PARAMETERS}, **dict(zip(rest, items["progress"], strict=True)))


def load_params(
    workdir: epath.PathLike,
    params: Mapping[str, Any],
    sharding: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None = None,
    dtype: Any = None,
    only: Collection[str] | None = None,
) -> dict[str, jax.Array]:
    """Those of `params` that the run's latest checkpoint has, or `only` some paths; their averages if the run keeps averages.

    `sharding` and `dtype` are as for `model_folder.load_part`. A part (`dit`, `alignment`) whose parameters have other names or shapes
    is a `RequestError`, and so are numbers that are not finite. Frozen parameters are stored in the narrow dtype of the computation; if
    the run before, which trained them, is still there and has not gone on since, they are read from it.
    """
    folder, found = latest(workdir), {}
    for name in _weights(folder):
        found |= {path: (name, leaf) for path, leaf in ocp.metadata(folder, checkpointable_name=name).metadata.items()}
    _require_same_shapes(folder, params, {path: leaf for path, (_, leaf) in found.items()})
    if not isinstance(sharding, Mapping):
        sharding = dict.fromkeys(found, sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    wanted = {path for path in params if path in found and (only is None or path in only)}
    before, frozen = _origin(workdir), {path for path in wanted if found[path][0] == "frozen"}
    recorded = digests(workdir)[ORIGIN_DIGEST]
    same = is_run(before) and (not recorded or recorded == origin_digest(before, ()))
    loaded = load_params(before, params, sharding, dtype, frozen) if same and frozen else {}
    for path in sorted(wanted - loaded.keys()):  # one by one, because Orbax takes twice the memory of what it reads at once
        name, leaf = found[path]
        target = jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding[path])
        others = dict.fromkeys((p for p, (part, _) in found.items() if part == name), ocp.PLACEHOLDER)
        with _readable(folder):
            loaded[path] = ocp.load(folder, others | {path: target}, checkpointable_name=name)[path]
    require_finite(loaded, str(folder), "move it elsewhere, and the checkpoint before it is taken")
    return loaded


def require_same_model(workdir: epath.PathLike, config: RunConfig) -> None:
    """A `RequestError` for the first field in which `config` has another model than the run, one of the same kind of training.

    A training may add the alignment to a run that had none.
    """
    _require_same(workdir, config, ("model",), except_for=("alignment.enabled",))


def require_same_function(folder: str, config: Config) -> None:
    """A `RequestError` unless the networks of `config` compute what those in `folder`, a run or imported weights, were made to compute.

    Every command that uses weights calls it before it loads any; an empty `folder` stands for random weights.
    """
    if is_run(folder):
        _require_same(folder, config, ("model", "method", "data"))
    if imported := imported_weights(folder, type(config)):
        parts = model_folder.require_model(imported, config, ("model",) if is_run(folder) else ("model", "method"))
        _require_experts(folder, config, [] if is_run(folder) else parts)


def _require_experts(folder: str, config: Config, imported: Collection[str]) -> None:
    """A `RequestError` unless `config` has a boundary for two experts, and none for the one network of a run or of other weights."""
    boundary, experts = config.sampler.boundary, {"dit": "high-noise", model_folder.LOW_NOISE: "low-noise"}
    absent = [name for part, name in experts.items() if part not in imported]
    given, one = f"--sampler.boundary={boundary:g}", "--sampler.boundary=0 --sampler.low_noise_guidance=None"
    require(not (boundary and is_run(folder)), f"{given}: {folder} is a run, which has one network; give {one}")
    require(
        not boundary or len(absent) != 1,
        f"{given}: {folder} has no {' and no '.join(absent)} expert; import it too, or give {one} for one network",
    )
    require(
        boundary > 0 or bool(absent),
        f"{given}: {folder} has two experts (Wan2.2), and one would run at all noise levels; give a configuration such as "
        "wan:i2v_2_2_14b, or --sampler.boundary=0.9",
    )


def _require_same(workdir: epath.PathLike, config: RunConfig, of: Collection[kinds.Kind], except_for: Collection[str] = ()) -> None:
    """A `RequestError` for the first field of the networks, of these kinds, in which `config` differs from the run."""
    stored = read_config(workdir, type(config))
    for name, value, now in _other_networks(stored, config, of):
        if name not in except_for:
            fits = {each: known for each, known in named.variants(type(config)).items() if not any(_other_networks(stored, known, of))}
            raise RequestError(
                f"--{name}={now!r}: the run in {workdir} has {value!r}; give its --config, or --{name}={value!r}{named.fit(fits)}"
            )


def _other_networks(stored: RunConfig, config: RunConfig, of: Collection[kinds.Kind]) -> Iterator[tuple[str, Any, Any]]:
    """The fields of these kinds in which two configurations differ; of those of a whole model, the fields of networks that both use."""
    for name, value, now in kinds.differences(stored, config, of):
        if isinstance(stored, Config) and isinstance(config, Config):
            part, aligned = name.partition(".")[0], stored.alignment.enabled and config.alignment.enabled
            others = {field.name for field in fields(Config)} - set(NETWORKS[: None if aligned else -3])
            if part in others and name != "alignment.enabled":
                continue
        yield name, value, now


def training_of(workdir: epath.PathLike) -> str:
    """The name of the training that wrote a run."""
    return _content(workdir)["training"]


def require_same_run(workdir: epath.PathLike, config: RunConfig, data_digest: str = "", origin: str = "") -> None:
    """A `RequestError` for the first field that makes `config` another run than the one in `workdir`, or for other data or weights.

    Data, and the weights the run started from, may lie elsewhere by now if their digests are known, then and now; runs of earlier
    versions have none. `origin` is the `origin_digest` of train.init_from.
    """
    before, moved = read_config(workdir, type(config)), set()
    records = "other records than --data.path has now"
    if config.training == "follow_your_motion":
        records = "another clip, caption or model than --reference, --prompt and --train.init_from have now"
    for name, what, digest, now in (
        ("data.path", records, digests(workdir)[DATA_DIGEST], data_digest),
        ("train.init_from", "other weights than --train.init_from has now", digests(workdir)[ORIGIN_DIGEST], origin),
    ):
        moved |= {name, name.replace("data.path", "data.more")} if digest and now else set()
        require(name not in moved or digest == now, f"{workdir}: was started with {what}; give those, or another --workdir")
    changed = [each for each in kinds.differences(before, config, kinds.FIXED) if each[0] not in moved]
    if config.optimizer.schedule != "constant":  # the rate falls to 0 at the last step, so all rates depend on their number
        steps = kinds.differences(before.train, config.train, ("run",), "train.")
        changed += [each for each in steps if each[0] == "train.steps"]
    for name, value, now in changed:
        raise RequestError(f"--{name}={now!r}: the run in {workdir} was started with {value!r}; give that, or another --workdir")


def base_of(workdir: str, of: type[RunConfig]) -> str:
    """The folder of the networks that the run in `workdir` learnt something for, as `load_models` takes it; another folder is a
    `RequestError`."""
    name, configs = TRAININGS[of.training]
    require(is_run(workdir), f"{workdir!r}: no run, and the {name} are in one; give the workdir of launch.train --config={configs}")
    _require_training(workdir, training_of(workdir), of)
    return _origin(workdir)


def digests(workdir: epath.PathLike) -> dict[str, str]:
    """The digests that config.json keeps of the data and of the weights that the run started from; empty texts if it keeps none."""
    content = _content(workdir)
    return {name: content.get(name, "") for name in (DATA_DIGEST, ORIGIN_DIGEST)}


def about(workdir: epath.PathLike) -> dict[str, Any]:
    """config.json of a run, digests included, and as `steps` how many are in its newest whole checkpoint."""
    return _content(workdir) | {"steps": steps_done(workdir)}


def origin_digest(folder: str, parts: Collection[str], recorded: str = "") -> str:
    """What the weights that a run starts from are known by, wherever `folder` lies: `parts` of a model folder, or a run's checkpoint.

    Of a run, which may have gone on since, it is the step and the checksums of the newest checkpoint, or of the one in `recorded`, an
    earlier result. Empty if the checkpoint is gone or has no checksums, and for random weights.
    """
    if is_run(folder):
        step = recorded.partition(":")[0] or latest(folder).name
        at = epath.Path(folder) / CHECKPOINTS / step
        known = checksums.known(at, _weights(at)) if at.exists() else {}
        return f"{step}:{fingerprint.of_pairs(known.items())}" if known else ""
    if not model_folder.exists(folder):
        return ""
    found = fingerprint.of_model(model_folder.resolve(folder), parts, ()) if jax.process_index() == 0 else {}
    return first_text(fingerprint.of_pairs(found.items()) if found else "")


def is_run(folder: str) -> bool:
    """Whether `folder` is the workdir of a run."""
    return bool(folder) and (epath.Path(model_folder.resolve(folder)) / CONFIG_FILE).exists()


def imported_weights(folder: str, of: type[RunConfig] = Config) -> str:
    """The model folder that a run started from, directly or by way of other runs of any training; empty if from random weights.

    It holds the parts that the runs do not train: autoencoder, encoders, tokenizer. `model_folder.EMBEDDED` becomes its path. A run of
    one of the `TRAININGS` other than `of.training` is a `RequestError`: an autoencoder's run is not where a transformer's parts are.
    """
    if is_run(folder) and (training := _content(folder)["training"]) in TRAININGS and training not in ON_A_MODEL:
        _require_training(folder, training, of)
    while is_run(folder):
        folder = _origin(folder)
    return model_folder.resolve(folder)


def latest(workdir: epath.PathLike) -> epath.Path:
    """The folder of the newest checkpoint whose weights are whole; a line is printed for each newer one that is damaged."""
    newest, damaged = _newest_whole(workdir, weights=True)
    _require_one(newest, damaged)
    if newest is None:
        raise RequestError(f"{workdir}: this run has no checkpoint yet; wait for its first, or start from what it started from")
    for folder, reason in damaged.items():
        checksums.print_once(f"{folder}: damaged, {reason}; checkpoint {newest.name} is taken")
    _say_if_unverified(newest)
    return newest


def steps_done(workdir: epath.PathLike) -> int:
    """The step of the newest whole checkpoint; 0 if there is none."""
    newest, _ = _newest_whole(workdir)
    return 0 if newest is None else int(newest.name)


def _newest_whole(workdir: epath.PathLike, weights: bool = False) -> tuple[epath.Path | None, dict[epath.Path, str]]:
    """The newest whole checkpoint, None if there is none, and by newer ones what is wrong with them.

    One without checksums, which are written last, counts only if no older one has any, as in runs of earlier versions.
    All processes of a run look together. With `weights` the values of other items than those that sampling reads are not compared.
    """
    root, damaged, share = epath.Path(workdir).absolute() / CHECKPOINTS, {}, (jax.process_index(), jax.process_count())
    steps = [found.step for found in ocp.path.step.standard_name_format().find_all(root)] if root.exists() else []
    unverified: dict[epath.Path, str] = {}
    for step in sorted(steps, reverse=True):
        folder = root / str(step)
        within = (METADATA, *_weights(folder)) if weights else ()
        if reason := first_text(damage(folder) or checksums.mismatch(folder, within, *share)):
            damaged[folder] = reason
        elif not checksums.known(folder):
            unverified[folder] = CUT_OFF
        else:
            return folder, {path: reason for path, reason in (damaged | unverified).items() if int(path.name) > step}
    newest = next(iter(unverified), None)
    return newest, {path: reason for path, reason in damaged.items() if newest is None or int(path.name) > int(newest.name)}


def _weights(folder: epath.Path) -> list[str]:
    """The items of a checkpoint that its weights are read from: averages instead of what trains, if there are averages."""
    names = {path.name for path in folder.iterdir()}
    return [name for name in ("frozen", "ema" if "ema" in names else "trainable") if name in names]


def _say_if_unverified(folder: epath.Path) -> None:
    if not checksums.known(folder):
        checksums.print_once(f"{folder}: has no checksums, as an earlier version or a killed run leaves it; its values are not compared")


def _require_one(newest: epath.Path | None, damaged: Mapping[epath.Path, str]) -> None:
    """A `RequestError` if all checkpoints that there are are damaged."""
    found = "; ".join(f"{folder}: damaged, {reason}" for folder, reason in damaged.items())
    require(newest is not None or not damaged, f"{found}; no other checkpoint is whole: restore it from a copy, or remove it")


@contextmanager
def _readable(folder: epath.PathLike) -> Iterator[None]:
    """Makes a `RequestError` of what Orbax raises, of many types, if the bytes of a checkpoint are not those that were written."""
    try:
        yield
    except (OSError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise RequestError(f"{folder}: cannot be read ({reason}); move it elsewhere, and the checkpoint before it is taken") from None


def write_config(workdir: epath.PathLike, config: RunConfig, data_digest: str = "", origin: str = "") -> None:
    """Writes the configuration, the name of its training, and the digests of its data and origin that there are; the first process does."""
    known = {name: digest for name, digest in ((DATA_DIGEST, data_digest), (ORIGIN_DIGEST, origin)) if digest}
    content = {"training": config.training} | known | asdict(config)
    if jax.process_index() == 0:
        atomic.write_whole(epath.Path(workdir) / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def read_config(workdir: epath.PathLike, of: type[Run] = Config) -> Run:
    """The configuration that a run was started with; a run of another training than `of.training` is a `RequestError`."""
    content = _content(workdir)
    _require_training(workdir, content.pop("training"), of)
    for name in (DATA_DIGEST, ORIGIN_DIGEST):
        content.pop(name, None)
    return model_folder.configuration(of, content, str(epath.Path(workdir) / CONFIG_FILE), "use the one that wrote it")


def _content(workdir: epath.PathLike) -> dict[str, Any]:
    """config.json as this version writes it. Earlier ones wrote no name of the training; it follows from the fields."""
    path = epath.Path(workdir) / CONFIG_FILE
    require(path.exists(), f"{workdir}: no training run, {CONFIG_FILE} is absent; give another folder")
    content = atomic.read_json(path, REMEDY)
    for name in ("training", DATA_DIGEST, ORIGIN_DIGEST):
        require_type(content.get(name, ""), str, f"{path}: {name}", f"; {REMEDY}")
    mesh = content.get("mesh", {})
    if isinstance(mesh, dict) and "context" in mesh:  # earlier versions divided the tokens along one axis, which gathered keys
        content["mesh"] = {"keys" if name == "context" else name: size for name, size in mesh.items()}
    return {"training": "transfer" if "dit" in content else "mllm" if "model" in content else "vae"} | content


def _origin(workdir: epath.PathLike) -> str:
    """The folder that the run started from; empty if from random weights."""
    train = _content(workdir).get("train", {})
    origin = train.get("init_from", "") if isinstance(train, dict) else None
    require_type(origin, str, f"{epath.Path(workdir) / CONFIG_FILE}: train.init_from", f"; {REMEDY}")
    return origin or ""


def _require_training(workdir: epath.PathLike, found: str, wanted: type[RunConfig]) -> None:
    """A `RequestError` unless `found` is the name of the wanted training."""
    (trained, _), (needed, names) = (TRAININGS.get(name, (name, name)) for name in (found, wanted.training))
    require(
        found == wanted.training, f"{workdir}: a run of the {trained}'s training; give one of the {needed}'s, made with --config={names}"
    )


def _require_same_shapes(folder: epath.Path, params: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """A `RequestError` unless the parts that `params` and `found` share have the same parameters, of the same shapes.

    `found` may lack a named adapter (models/lora.py), which a training adds to the model it starts from.
    """
    absent = {path for path in params if path not in found and ADDED.fullmatch(path)}
    shared = {path.partition(".")[0] for path in found} & {path.partition(".")[0] for path in params}
    wrong = sorted(
        path
        for path in {*params, *found} - absent
        if path.partition(".")[0] in shared and (path not in params or path not in found or params[path].shape != found[path].shape)
    )
    require(
        not wrong,
        f"{folder}: not the model of this configuration, {len(wrong)} of its parameters differ, {', '.join(wrong[:3])} among them; "
        f"give the configuration in {folder.parents[1] / CONFIG_FILE}",
    )


def _items(state: Any) -> dict[str, Any]:
    """The state as what a checkpoint consists of; Orbax takes no empty dictionaries."""
    values = state._asdict()
    items = {name: params for name in PARAMETERS if (params := values.pop(name))}
    return items | {"progress": tuple(values.values())}
