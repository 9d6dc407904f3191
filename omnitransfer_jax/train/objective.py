"""What a training is. train/loop.py runs any objective; a new one is this type filled in (methods/omnitransfer.py is an example)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from configs.run import Config
from omnitransfer_jax.mesh import Rules, Shard, Stacks
from omnitransfer_jax.train.optimizer import dimension_numbers

Params = dict[str, Array]
"""Parameters by path."""
Metrics = dict[str, Float[Array, " B"]]


class Form(NamedTuple):
    """A size of batch."""

    batch: Any
    """Shape and dtype of a whole batch: a tree of arrays whose first axis is the batch."""
    flops: int
    """Useful floating-point operations of a step; 0 if they are not counted."""
    tokens: int
    """Tokens of a step, of targets and references; 0 if they are not counted."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss, the parameters it depends on, and the batches it takes."""

    params: Mapping[str, jax.ShapeDtypeStruct]
    """Shape and dtype of every parameter by path."""
    sharding: Rules
    """The axes of every parameter (omnitransfer_jax/mesh.py)."""
    trainable: tuple[str, ...]
    """Regular expressions of the parameters that train, by name: a path whose first dot is a slash, `dit/blocks.ffn.up.kernel`."""
    batch: Any
    """Shape and dtype of a whole batch: any tree of arrays whose first axis is the batch."""
    others: tuple["Form", ...] = ()
    """Further sizes of batch; the step is compiled once for each."""
    draw: Callable[[Array, Any], Any]
    """draw(key, batch) -> every random number of a step, a tree whose first axis is the batch.

    It is drawn before the batch is divided over devices, so that no division changes it.
    """
    loss: Callable[[Params, Any, Any, Shard], tuple[Float[Array, " B"], Metrics]]
    """loss(params, batch, drawn, shard) -> the loss of each sample, and further metrics of each sample; `params` with those of `base`."""
    init: Callable[[], Params]
    """Random parameters."""
    root_key: Callable[[], Array]
    """The key that step n folds n into."""
    base: Mapping[str, jax.ShapeDtypeStruct] = field(default_factory=dict)
    """Further parameters of the loss, of another folder: no step changes them and no checkpoint holds them.

    `loop.train` is given their arrays, placed on the mesh, whenever the run starts or goes on."""
    stacks: Stacks = field(default_factory=dict)
    """Where the paths of stacked layers begin, and the dtype in which their matrices are used.

    The loss gathers the layers one at a time with `shard.gather_layer`; other parameters arrive whole."""
    frozen_dtype: str = "float32"
    """What frozen parameters are kept in."""
    models: Config
    """The configuration of the models that imported weights must match."""
    imported: Mapping[str, str]
    """Where paths begin, and the model of launch.import_weights that the rest of the path belongs to."""
    matrices: Callable[[Any], Any] = dimension_numbers
    """By path the axes that Muon takes for a matrix, None for what is no matrix (optimizer.py)."""
    flops: int | None = None
    """Useful floating-point operations of a step, if they are counted."""
    tokens: int | None = None
    """Tokens of a step, of targets and references, if they are counted."""

    @property
    def forms(self) -> list[Form]:
        """All sizes of batch."""
        return [Form(self.batch, self.flops or 0, self.tokens or 0), *self.others]
