"""The folder of a training run: its configuration, and checkpoints that it, another run and sampling start from.

    WORKDIR/config.json          which training wrote it, and the whole configuration
    WORKDIR/checkpoints/STEP/    trainable, frozen, ema (parameters by path), progress (step, moments, skipped) and data

A checkpoint is whole or absent: Orbax writes it under another name first. `data` is the number of batches read, the same for all
processes, so a run may go on with another number of processes.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import grain
import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from configs import kinds
from configs.errors import RequestError, require
from configs.run import CheckpointConfig, Config, RunConfig
from omnitransfer_jax.folders import atomic, model_folder

CONFIG_FILE, CHECKPOINTS = "config.json", "checkpoints"
PARAMETERS = ("trainable", "frozen", "ema")
# The name of a training: what it trains, and the configurations that name it.
TRAININGS = {"transfer": ("transformer", "stage1, stage2 or stage3"), "vae": ("autoencoder", "vae"), "mllm": ("language model", "mllm")}
ADDED = re.compile(r".*\.lora_\w+\.\w+")  # parameters of a named adapter
Run = TypeVar("Run", bound=RunConfig)
State = TypeVar("State", bound=tuple)  # a NamedTuple like `train.step.TrainState`


def open_checkpoints(workdir: epath.PathLike, config: CheckpointConfig) -> ocp.training.Checkpointer:
    """The run's checkpoints, without what interrupted saves left behind. Closing it waits for a save that is still being written."""
    latest: Any = ocp.training.preservation_policies.LatestN(config.keep)
    return ocp.training.Checkpointer(
        epath.Path(workdir).absolute() / CHECKPOINTS,
        preservation_policy=latest,
        cleanup_tmp_directories=True,
    )


def save(checkpoints: ocp.training.Checkpointer, step: int, state: tuple, data: grain.DatasetIterator) -> None:
    """Starts to write the state and the position in the data; when it returns, both may change again."""
    checkpoints.save_checkpointables_async(step, _items(state) | {"data": data.get_state()}, force=True)


def restore(checkpoints: ocp.training.Checkpointer, like: State, data: grain.DatasetIterator) -> State:
    """The latest state, with the shapes and shardings of `like`; `data` goes on behind the last batch that was read."""
    items = checkpoints.load_checkpointables(abstract_checkpointables=_items(like) | {"data": data.get_state()})
    data.set_state(items["data"])
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
    is a `RequestError`. Frozen parameters are stored in the narrow dtype of the computation; if the run before, which trained them, is
    still there, they are read from it.
    """
    folder, found = latest(workdir), {}
    names = [path.name for path in folder.iterdir()]
    for name in ("frozen", "ema" if "ema" in names else "trainable"):
        if name in names:
            found |= {path: (name, leaf) for path, leaf in ocp.metadata(folder, checkpointable_name=name).metadata.items()}
    _require_same_shapes(folder, params, {path: leaf for path, (_, leaf) in found.items()})
    if not isinstance(sharding, Mapping):
        sharding = dict.fromkeys(found, sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    wanted = {path for path in params if path in found and (only is None or path in only)}
    before, frozen = _origin(workdir), {path for path in wanted if found[path][0] == "frozen"}
    loaded = load_params(before, params, sharding, dtype, frozen) if is_run(before) and frozen else {}
    for path in sorted(wanted - loaded.keys()):  # one by one, because Orbax takes twice the memory of what it reads at once
        name, leaf = found[path]
        target = jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding[path])
        others = dict.fromkeys((p for p, (part, _) in found.items() if part == name), ocp.PLACEHOLDER)
        loaded[path] = ocp.load(folder, others | {path: target}, checkpointable_name=name)[path]
    return loaded


def require_same_model(workdir: epath.PathLike, config: RunConfig) -> None:
    """A `RequestError` for the first field in which `config` has another model than the run, one of the same kind of training."""
    stored = read_config(workdir, type(config))
    before, now = (kinds.flat(kinds.select(each, ("model",))) for each in (stored, config))
    if isinstance(stored, Config):  # the models that a stage trains; it reads the others from records
        parts = ("dit.", "mllm.", "lora.") if stored.alignment.enabled else ("dit.",)
        before = {name: value for name, value in before.items() if name.startswith(parts)}
    for name, value in before.items():
        require(
            now[name] == value,
            f"--{name}={now[name]!r}: the run in {workdir} has {value!r}; give its --config, or --{name}={value!r}",
        )


def training_of(workdir: epath.PathLike) -> str:
    """The name of the training that wrote a run."""
    return _content(workdir)["training"]


def require_same_run(workdir: epath.PathLike, config: RunConfig) -> None:
    """A `RequestError` for the first field that makes `config` another run than the one in `workdir`."""
    before, now = read_config(workdir, type(config)), kinds.flat(kinds.select(config, kinds.FIXED))
    if config.optimizer.schedule == "cosine":  # the rate falls to 0 at the last step, so all rates depend on their number
        now["train.steps"] = config.train.steps
    stored = kinds.flat(asdict(before))
    for name, value in now.items():
        require(
            stored[name] == value,
            f"--{name}={value!r}: the run in {workdir} was started with {stored[name]!r}; give that, or another --workdir",
        )


def is_run(folder: str) -> bool:
    """Whether `folder` is the workdir of a run."""
    return bool(folder) and (epath.Path(model_folder.resolve(folder)) / CONFIG_FILE).exists()


def imported_weights(folder: str, of: type[RunConfig] = Config) -> str:
    """The model folder that a run started from, directly or by way of other runs of any training; empty if from random weights.

    It holds the parts that the runs do not train: autoencoder, encoders, tokenizer. `model_folder.EMBEDDED` becomes its path. A run of
    one of the `TRAININGS` other than `of.training` is a `RequestError`: an autoencoder's run is not where a transformer's parts are.
    """
    if is_run(folder) and (training := _content(folder)["training"]) in TRAININGS:
        _require_training(folder, training, of)
    while is_run(folder):
        folder = _origin(folder)
    return model_folder.resolve(folder)


def latest(workdir: epath.PathLike) -> epath.Path:
    """The folder of the newest complete checkpoint."""
    root = epath.Path(workdir).absolute() / CHECKPOINTS
    steps = [found.step for found in ocp.path.step.standard_name_format().find_all(root)] if root.exists() else []
    if not steps:
        raise RequestError(f"{workdir}: this run has no checkpoint yet; wait for its first, or start from what it started from")
    return root / str(max(steps))


def write_config(workdir: epath.PathLike, config: RunConfig) -> None:
    """Writes the configuration and the name of its training."""
    content = {"training": config.training} | asdict(config)
    atomic.write_whole(epath.Path(workdir) / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def read_config(workdir: epath.PathLike, of: type[Run] = Config) -> Run:
    """The configuration that a run was started with; a run of another training than `of.training` is a `RequestError`."""
    content = _content(workdir)
    _require_training(workdir, content.pop("training"), of)
    return model_folder.configuration(of, content, str(epath.Path(workdir) / CONFIG_FILE), "use the one that wrote it")


def _content(workdir: epath.PathLike) -> dict[str, Any]:
    """config.json as it is. Earlier versions wrote no name of the training; it follows from the fields."""
    path = epath.Path(workdir) / CONFIG_FILE
    require(path.exists(), f"{workdir}: no training run, {CONFIG_FILE} is absent; give another folder")
    content = json.loads(path.read_text())
    return {"training": "transfer" if "dit" in content else "mllm" if "model" in content else "vae"} | content


def _origin(workdir: epath.PathLike) -> str:
    """The folder that the run started from; empty if from random weights."""
    return _content(workdir).get("train", {}).get("init_from", "")


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
    shared = {path.partition(".")[0] for path in found} & {path.partition(".")[0] for path in params}
    wrong = sorted(
        path
        for path in {*params, *found} - {path for path in params if ADDED.fullmatch(path) and path not in found}
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
