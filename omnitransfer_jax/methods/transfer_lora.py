"""Stage 1 as adapters: the training of methods/omnitransfer.py, in which the transformer's own weights never move.

    weights of train.init_from, in dit.dtype or int8 -> base      adapters A, B: y + (x A) B alpha / rank -> what trains and is kept

References, offsets and flags are as in stage 1. A checkpoint holds the adapters alone; sampling adds them to the kernels.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from configs.errors import require
from configs.run import Config
from configs.stage1 import TransferLoRA
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import model_folder, run_folder
from omnitransfer_jax.mesh import specs
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.models import int8
from omnitransfer_jax.models.flat_params import abstract, flat_params
from omnitransfer_jax.models.omnitransfer import SHARDING
from omnitransfer_jax.models.transfer_adapters import adapters, make_model
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.train.objective import Objective, Params


def objective(config: TransferLoRA, empty_text: Float[np.ndarray, "S E"] | None = None) -> Objective:
    """That of stage 1 on the adapters; the transformer is its `base`. `empty_text` as for `omnitransfer.objective`."""
    model, plain = abstract(partial(make_model, config)), omnitransfer.objective(config, empty_text)
    params = adapters(model)
    empty = np.zeros((config.dit.text_len, config.dit.text_dim), np.float32) if empty_text is None else empty_text
    base = {path: x for path, x in flat_params(model).items() if path not in params}
    first, *others = omnitransfer.forms(config, "adapters")
    return Objective(
        params=params,
        base={path: jax.ShapeDtypeStruct(x.shape, kept_in(path, x, config)) for path, x in base.items()},
        sharding=SHARDING,
        trainable=config.train.trainable,
        batch=first.batch,
        others=tuple(others),
        draw=plain.draw,
        loss=partial(omnitransfer.loss, config, model, empty),
        init=partial(init, config),
        root_key=plain.root_key,
        stacks={"dit.blocks.": config.dit.dtype},
        frozen_dtype=config.dit.dtype,
        models=config,
        imported={"dit.": "dit"},
        flops=first.flops,
        tokens=first.tokens,
    )


def kept_in(path: str, leaf: Any, config: Config) -> Any:
    """The type that a weight of the base is kept in."""
    return leaf.dtype if leaf.dtype == jnp.int8 or path.endswith(".kernel_scale") else jnp.dtype(config.dit.dtype)


def init(config: TransferLoRA) -> Params:
    """Fresh adapters, or those of `adapter_from`."""
    key = omnitransfer.keys(config)[0]
    fresh = adapters(make_model(config, nnx.Rngs(key)))
    if not config.adapter_from:
        return fresh
    return {f"dit.{path}": jnp.asarray(x) for path, x in load_models.given_adapters(config).items()}


def require_imported(config: TransferLoRA) -> None:
    """A `RequestError` if train.init_from is a run, which may go on and so change under its adapters."""
    origin = config.train.init_from
    require(
        not run_folder.is_run(origin),
        f"train.init_from={origin}: a run, and adapters stand on imported weights; make those of it: launch.export, launch.import_weights",
    )


def load_base(config: TransferLoRA, trained: Objective, mesh: Mesh) -> Params:
    """The arrays of `trained.base` from the imported weights of train.init_from, read leaf by leaf; int8 is made on the host.

    Without a folder they are the random ones of `load_models`.
    """
    where = specs(dict(trained.base), trained.sharding, config.mesh)
    folder = run_folder.imported_weights(config.train.init_from)
    found: Params = {}
    for path, leaf in model_folder.read_part(folder, "dit") if folder else random_leaves(config):
        narrow = f"dit.{path}_scale" in trained.base
        for name, x in int8.to_int8(path, leaf) if narrow else [(path, leaf)]:
            name, values = f"dit.{name}", np.asarray(x).astype(trained.base[f"dit.{name}"].dtype)
            found[name] = jax.device_put(values, NamedSharding(mesh, where[name]))
    return found


def random_leaves(config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of a transformer with random weights of a fixed seed, those that `load_models` makes."""
    dit = jax.jit(lambda: WanDiT(config.dit, rngs=nnx.Rngs(jax.random.key(0, impl="unsafe_rbg"))))()
    yield from ((path, np.asarray(x)) for path, x in flat_params(dit).items())
