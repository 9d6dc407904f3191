"""What a training run leaves behind: its configuration, and checkpoints that it, another run and sampling start from.

    WORKDIR/config.json          the resolved configuration
    WORKDIR/checkpoints/STEP/    trainable, frozen, ema (parameters by path), progress (step, moments, skipped) and data

A checkpoint is whole or it is not there: Orbax writes it under another name first. `data` is the number of batches read, the same for
all processes, so a run may go on with another number of them.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_type_hints

import grain
import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from configs.errors import RequestError, require
from configs.run import CheckpointConfig, Config, RunConfig
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.train.step import TrainState

CONFIG_FILE, CHECKPOINTS = "config.json", "checkpoints"
# What may change when a run goes on. None of it decides what is learnt; the mesh and kernels change rounding.
FREE = ("train.steps", "train.log_every", "checkpoint.", "mesh.", "sampler.", "data.threads", "dit.attention", "dit.remat")
PARAMETERS = ("trainable", "frozen", "ema")


def open_checkpoints(workdir: epath.PathLike, config: CheckpointConfig) -> ocp.training.Checkpointer:
    """The run's checkpoints; what interrupted saves left is removed. Closing it waits for the save under way."""
    latest: Any = ocp.training.preservation_policies.LatestN(config.keep)
    return ocp.training.Checkpointer(
        epath.Path(workdir).absolute() / CHECKPOINTS,
        preservation_policy=latest,
        cleanup_tmp_directories=True,
    )


def save(checkpoints: ocp.training.Checkpointer, step: int, state: TrainState, data: grain.DatasetIterator) -> None:
    """Starts to write state and data position; returns when both may change again."""
    checkpoints.save_checkpointables_async(step, _items(state) | {"data": data.get_state()}, force=True)


def restore(checkpoints: ocp.training.Checkpointer, like: TrainState, data: grain.DatasetIterator) -> TrainState:
    """The latest state, placed as `like`; `data` is moved to where it was."""
    items = checkpoints.load_checkpointables(abstract_checkpointables=_items(like) | {"data": data.get_state()})
    data.set_state(items["data"])
    step, moments, skipped = items["progress"]
    trainable, frozen, ema = (items.get(name, {}) for name in PARAMETERS)
    return TrainState(step, trainable, frozen, moments, ema, skipped)


def load_params(
    workdir: epath.PathLike,
    params: Mapping[str, Any],
    sharding: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None = None,
    dtype: Any = None,
    only: Collection[str] | None = None,
) -> dict[str, jax.Array]:
    """Those of `params` that the run's latest checkpoint has, or `only` some paths, averaged if the run keeps an average.

    Arguments are as for `checkpoint.load_part`.
    A part (`dit`, `alignment`) of another model is a `RequestError`. What the run kept frozen, in the narrower dtype it computed
    in, is taken from the run before, where it was trained, as long as that is there.
    """
    folder, found = latest(workdir), {}
    names = [path.name for path in folder.iterdir()]
    for name in ("frozen", "ema" if "ema" in names else "trainable"):
        if name in names:
            found |= {path: (name, leaf) for path, leaf in ocp.metadata(folder, checkpointable_name=name).metadata.items()}
    shared = {path.partition(".")[0] for path in found} & {path.partition(".")[0] for path in params}
    wrong = sorted(
        path
        for path in {*params, *found}
        if path.partition(".")[0] in shared and (path not in params or path not in found or params[path].shape != found[path][1].shape)
    )
    require(
        not wrong,
        f"{folder}: not the model of this configuration, {len(wrong)} of its parameters differ, {', '.join(wrong[:3])} among them; "
        f"give the configuration in {epath.Path(workdir) / CONFIG_FILE}",
    )
    if not isinstance(sharding, Mapping):
        sharding = dict.fromkeys(found, sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    wanted = {path for path in params if path in found and (only is None or path in only)}
    before, frozen = read_config(workdir).train.init_from, {path for path in wanted if found[path][0] == "frozen"}
    loaded = load_params(before, params, sharding, dtype, frozen) if is_run(before) and frozen else {}
    for path in sorted(wanted - loaded.keys()):  # one by one: Orbax needs as much memory again for what it reads at once
        name, leaf = found[path]
        target = jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding[path])
        others = dict.fromkeys((p for p, (part, _) in found.items() if part == name), ocp.PLACEHOLDER)
        loaded[path] = ocp.load(folder, others | {path: target}, checkpointable_name=name)[path]
    return loaded


def require_same_model(workdir: epath.PathLike, config: Config) -> None:
    """A `RequestError` for the first field in which `config` has another transformer than the run, or another aligned model."""
    stored = read_config(workdir)
    parts = ("dit", "mllm", "lora") if stored.alignment.enabled else ("dit",)
    for part in parts:
        for name, found in model_folder.differences(getattr(stored, part), getattr(config, part)):
            value = getattr(getattr(stored, part), name)
            raise RequestError(
                f"--{part}.{name}={found!r}: the run in {workdir} has {value!r}; give its --config, or --{part}.{name}={value!r}"
            )


def is_run(folder: str) -> bool:
    """Whether `folder` is the workdir of a run."""
    return bool(folder) and (epath.Path(model_folder.resolve(folder)) / CONFIG_FILE).exists()


def imported_weights(folder: str) -> str:
    """The folder of launch.import_weights that a run started from, directly or by way of other runs; empty if from random weights.

    That is where the parts are that a run does not train: autoencoder, encoders, tokenizer. `checkpoint.EMBEDDED` is resolved.
    """
    while is_run(folder):
        folder = read_config(folder).train.init_from
    return model_folder.resolve(folder)


def latest(workdir: epath.PathLike) -> epath.Path:
    """The folder of the newest complete checkpoint."""
    root = epath.Path(workdir).absolute() / CHECKPOINTS
    steps = [found.step for found in ocp.path.step.standard_name_format().find_all(root)] if root.exists() else []
    if not steps:
        raise RequestError(f"{workdir}: this run has no checkpoint yet; wait for its first, or start from what it started from")
    return root / str(max(steps))


def write_config(workdir: epath.PathLike, config: RunConfig) -> None:
    """Puts the configuration in place at once, so that a kill leaves the old one or the new."""
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(asdict(config), indent=2) + "\n")
    partial.replace(folder / CONFIG_FILE)


def read_config(workdir: epath.PathLike) -> Config:
    """The configuration a run was started with; a field this version does not know is a `RequestError`."""
    path = epath.Path(workdir) / CONFIG_FILE
    require(path.exists(), f"{workdir}: no training run, {CONFIG_FILE} is absent; give another folder")
    return _parse(Config, json.loads(path.read_text()), str(path))


def require_same_run(workdir: epath.PathLike, config: RunConfig) -> None:
    """A `RequestError` for the first field in which `config` would make another run of the one in `workdir`."""
    before = flat_fields(read_config(workdir))
    for name, value in flat_fields(config).items():
        require(
            before[name] == value or name.startswith(FREE),
            f"--{name}={value!r}: the run in {workdir} was started with {before[name]!r}; give that, or another --workdir",
        )


def flat_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of a configuration by its dotted name."""
    found = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= flat_fields(value, f"{prefix}{field.name}.") if is_dataclass(value) else {prefix + field.name: value}
    return found


def _parse(kind: Any, value: Any, path: str) -> Any:
    """`value` of a JSON file as a configuration of type `kind`, or as a plain value."""
    make: Any = kind
    if not is_dataclass(kind):
        return tuple(value) if isinstance(value, list) else value
    hints, unknown = get_type_hints(kind), sorted(set(value) - {field.name for field in fields(kind)})
    require(not unknown, f"{path}: {', '.join(unknown)} of {make.__name__} is unknown to this version; use the one that wrote it")
    return make(**{name: _parse(hints[name], inner, path) for name, inner in value.items()})


def _items(state: TrainState) -> dict[str, Any]:
    """The state as what a checkpoint consists of; Orbax takes no empty dictionaries."""
    items = {name: getattr(state, name) for name in PARAMETERS if getattr(state, name)}
    return items | {"progress": (state.step, state.moments, state.skipped)}
