"""A new objective is one function: a low-rank adapter on the transformer that learns one clip. It has all that every training has."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float
from orbax.checkpoint import v1 as ocp

from configs.base import LoRAConfig
from configs.run import CheckpointConfig, Config, MeshConfig, OptimizerConfig, TransferTrainConfig
from omnitransfer_jax.flow import TIMESTEPS, draw_time, interpolate, loss_per_example
from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.mesh import UNSHARDED, Shard, make_mesh, specs
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.models import lora
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import SHARDING, OmniTransfer
from omnitransfer_jax.train import loop, plan
from omnitransfer_jax.train.objective import Metrics, Objective, Params
from omnitransfer_jax.train.optimizer import make_optimizer
from omnitransfer_jax.train.step import TrainState, placed_state
from tests.test_mesh import differences, on_eight_devices
from tests.train.test_loop import lines, with_steps
from tests.train.tiny_run import TINY, sample

CONFIG = replace(
    TINY,
    lora=LoRAConfig(rank=4, alpha=4.0, targets=(r"blocks\.self_attention\..*", r"blocks\.ffn\..*")),
    train=TransferTrainConfig(steps=60, batch_size=8, evaluate_every=20, trainable=(r"dit/.*\.lora_clip\..*",)),
    optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=2, weight_decay=0.0),
    checkpoint=CheckpointConfig(every=100),
)


class Drawn(NamedTuple):
    time: Float[Array, " B"]
    noise: Float[Array, "B F H W C"]


def clip_adapter(config: Config) -> Objective:
    """Flow matching on the latents of one clip, without prompt or first frame; the adapter trains and the transformer is frozen."""

    def make(rngs: nnx.Rngs) -> OmniTransfer:
        model = OmniTransfer(config, rngs=rngs)
        lora.add_lora(model.dit, config.lora, "lora_clip", rngs=rngs)
        return model

    def draw(key: Array, clips: Array) -> Drawn:
        key_time, key_noise = jax.random.split(key)
        return Drawn(draw_time(key_time, len(clips), config.train.shift), jax.random.normal(key_noise, clips.shape))

    def loss(params: Params, clips: Array, drawn: Drawn, shard: Shard) -> tuple[Array, Metrics]:
        x = interpolate(clips, drawn.noise, drawn.time)
        condition = jnp.zeros((*x.shape[:-1], config.dit.in_channels - x.shape[-1]))
        text = jnp.zeros((len(x), config.dit.text_len, config.dit.text_dim))
        dit = with_params(model, params).dit
        velocity = dit(jnp.concatenate([x, condition], axis=-1), TIMESTEPS * drawn.time, text, shard=shard)
        return loss_per_example(velocity, clips, drawn.noise), {}

    model = abstract(make)
    return Objective(
        params=flat_params(model),
        sharding=SHARDING,
        trainable=config.train.trainable,
        batch=jax.ShapeDtypeStruct((config.train.batch_size, *config.video.latent_shape(config.vae)), jnp.float32),
        draw=draw,
        loss=loss,
        init=lambda: flat_params(make(nnx.Rngs(config.seed))),
        root_key=lambda: jax.random.key(config.seed),
        stacks={"dit.blocks.": config.dit.dtype},
        models=config,
        imported={"dit.": "dit"},
    )


def clip(config: Config) -> grain.DatasetIterator[np.ndarray]:
    """Endless batches of one clip's latents."""
    return iter(grain.MapDataset.source([sample(0)["target"]]).repeat().batch(config.train.batch_size).to_iter_dataset())


def train(config: Config, workdir: Path) -> Params | None:
    loss = fixed_loss(config)
    return loop.train(clip_adapter(config), config, workdir, make_mesh(config.mesh), clip(config), lambda step, params: loss(params))


def fixed_loss(config: Config):
    """evaluate(params): the mean loss of 32 times and noises that are always the same."""
    objective, clips = clip_adapter(config), jnp.asarray(np.stack([sample(0)["target"]] * 32))
    drawn = objective.draw(jax.random.key(7), clips)
    loss = jax.jit(lambda params: objective.loss(params, clips, drawn, UNSHARDED)[0].mean())
    return lambda params: {"fixed_loss": float(loss(params))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that was not interrupted, and the parameters it returned."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(CONFIG, workdir)


def test_its_loss_falls(whole):
    first = fixed_loss(CONFIG)(clip_adapter(CONFIG).init())["fixed_loss"]
    losses = [line["fixed_loss"] for line in lines(whole[0]) if "fixed_loss" in line]
    assert len(losses) == 3
    assert first > losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.8 * first


def test_the_adapter_trains_and_nothing_else(whole):
    first, last = jax.jit(clip_adapter(CONFIG).init)(), whole[1]
    assert last.keys() == first.keys()
    moved = {path for path, x in last.items() if not np.array_equal(x, first[path])}
    assert moved == {path for path in first if ".lora_clip." in path}
    checkpoint = run_folder.latest(whole[0])
    stored = {name: set(ocp.metadata(checkpoint, checkpointable_name=name).metadata) for name in ("trainable", "frozen")}
    assert stored == {"trainable": moved, "frozen": last.keys() - moved}


def test_resumed_equals_uninterrupted(whole, tmp_path):
    train(with_steps(7, CONFIG), tmp_path)
    again = train(CONFIG, tmp_path)
    assert [path for path, x in whole[1].items() if not np.array_equal(x, again[path])] == []
    for name in ("loss", "grad_norm", "skipped"):
        assert [line[name] for line in lines(tmp_path)] == [line[name] for line in lines(whole[0])]


def test_it_starts_from_a_trained_transformer(tmp_path):
    """The adapter, which no other run has, starts as it is drawn; the transformer is the one of the run it starts from."""
    trained = {path: jnp.full(leaf.shape, i, jnp.float32) for i, (path, leaf) in enumerate(omnitransfer.objective(TINY).params.items())}
    with run_folder.open_checkpoints(tmp_path / "base", TINY.checkpoint) as checkpoints:
        run_folder.save(checkpoints, 1, TrainState(jnp.int32(1), trained, {}, {"mu": jnp.zeros(1)}, {}, jnp.int32(0)), clip(CONFIG))
    run_folder.write_config(tmp_path / "base", TINY)
    config = replace(CONFIG, train=replace(CONFIG.train, init_from=str(tmp_path / "base")))
    objective, optimizer, mesh = clip_adapter(config), make_optimizer(config.optimizer, config.train.steps), make_mesh(config.mesh)
    like = placed_state(objective, config, optimizer, mesh, specs(objective.params, objective.sharding, config.mesh))
    with run_folder.open_checkpoints(tmp_path / "run", config.checkpoint) as checkpoints:
        params = loop.start(objective, config, tmp_path / "run", checkpoints, like, optimizer, clip(config)).params
    assert all(np.array_equal(x, params[path]) for path, x in trained.items())
    assert {path for path in params if path not in trained} == {path for path in params if ".lora_clip." in path}


def test_a_base_is_read_and_not_stored(whole, tmp_path):
    """With the transformer as `base` the run is the same: the losses of the run that stores it, interrupted or not."""
    stored = clip_adapter(CONFIG)
    drawn = jax.jit(stored.init)()
    of_adapter = {path for path in drawn if ".lora_clip." in path}
    base = {path: x for path, x in drawn.items() if path not in of_adapter}
    objective = replace(
        stored,
        params={path: leaf for path, leaf in stored.params.items() if path in of_adapter},
        base={path: leaf for path, leaf in stored.params.items() if path in base},
        init=lambda: {path: stored.init()[path] for path in of_adapter},
    )
    for steps in (3, 6):
        config = with_steps(steps, CONFIG)
        loop.train(objective, config, tmp_path, make_mesh(config.mesh), clip(config), base=base)
    np.testing.assert_allclose([line["loss"] for line in lines(tmp_path)], [line["loss"] for line in lines(whole[0])[:6]], rtol=1e-6)
    checkpoint = run_folder.latest(tmp_path)
    assert set(ocp.metadata(checkpoint, checkpointable_name="trainable").metadata) == of_adapter
    assert not (checkpoint / "frozen").exists()
    assert plan.parameter_table(objective) == plan.parameter_table(stored)
    assert plan.memory(objective, CONFIG) == plan.memory(stored, CONFIG)


def test_it_stays_as_small_as_promised():
    assert len(inspect.getsource(clip_adapter).splitlines()) <= 60


def test_sharded_equals_single():
    """Each device holds a part of the adapters' parameters, and of the clips and their tokens."""
    report = on_eight_devices("tests.train.test_objective")
    assert report["dead"] == []
    ((loss, gradient),) = report["cases"].values()
    assert loss < 1e-6
    assert gradient < 1e-5


if __name__ == "__main__":
    print(
        json.dumps(
            differences(
                clip_adapter(CONFIG),
                CONFIG,
                np.stack([sample(i)["target"] for i in range(8)]),
                {"all": (MeshConfig(data=2, heads=2, keys=2), 1)},
            )
        )
    )
