"""The context is that of one task's queries, and depends on all inputs; of the language model only the adapters train."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import stage1, stage2, stage3
from configs.run import Config
from omnitransfer_jax import tasks
from omnitransfer_jax.flow import loss_per_example
from omnitransfer_jax.methods.omnitransfer import objective
from omnitransfer_jax.models.alignment import Alignment, MLLMInputs
from omnitransfer_jax.models.flat_params import abstract, count, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import OmniTransfer, make_reference
from omnitransfer_jax.train.step import init_state, split_trainable
from tests.compare import relative_l2

SMOKE = stage2.get_config("smoke")
SMALL = replace(
    SMOKE,
    dit=replace(SMOKE.dit, dim=24, ffn_dim=32, num_layers=1, text_dim=8, image_dim=8, freq_dim=16),
    text=replace(SMOKE.text, dim=8),
    image=replace(SMOKE.image, dim=8),
    mllm=replace(SMOKE.mllm, num_layers=1),
    alignment=replace(SMOKE.alignment, queries=3, connector_dim=16),
)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_inputs(batch=2, length=10, features=4):
    """Four features, text around them, and padding behind the second sample."""
    source = np.full((batch, length), -1)
    source[:, 2:6] = range(4)
    mask = np.ones((batch, length), bool)
    mask[1:, 8:] = False
    positions = np.broadcast_to(np.arange(length), (batch, 3, length)) * mask[:, None]
    tokens = np.random.default_rng(5).integers(0, 256, (batch, length))
    return MLLMInputs(*(jnp.asarray(x) for x in (tokens, mask, positions)), draw(6, batch, features, SMALL.mllm.dim), jnp.asarray(source))


@pytest.fixture(scope="module")
def alignment():
    """Random everywhere, adapters and biases too."""
    model = Alignment(SMALL, rngs=nnx.Rngs(0))
    params = {path: leaf + 0.1 * draw(i, *leaf.shape) for i, (path, leaf) in enumerate(flat_params(model).items())}
    return with_params(model, params)


@jax.jit
def align(model, given, task):
    return model(given, task)


def test_the_context_is_the_queries_states(alignment):
    context = align(alignment, make_inputs(), jnp.array([0, 3]))
    assert context.shape == (2, 3, SMALL.dit.text_dim)
    assert not any("vision" in path for path in flat_params(alignment))


@pytest.mark.parametrize("change", ["features", "tokens", "task", "positions"])
def test_every_input_is_read(alignment, change):
    given, task = make_inputs(), jnp.array([0, 3])
    moved = {
        "features": (given._replace(features=given.features + 1), task),
        "tokens": (given._replace(tokens=given.tokens.at[:, 7].add(1)), task),
        "task": (given, jnp.array([1, 4])),
        "positions": (given._replace(positions=given.positions * jnp.array([1, 2, 3])[None, :, None]), task),
    }[change]
    assert relative_l2(align(alignment, *moved), align(alignment, given, task)) > 1e-4


def test_what_is_no_input_is_not_read(alignment):
    """Padding, the token under a feature, and a feature no token points at."""
    given, task = make_inputs(features=5), jnp.array([0, 3])
    other = given._replace(
        tokens=given.tokens.at[:, 3].set(0).at[1, 9].set(0),
        features=given.features.at[:, 4].add(9),
        positions=given.positions.at[1, :, 9].set(99),
    )
    assert relative_l2(align(alignment, other, task), align(alignment, given, task)) <= 1e-6


def loss(model, given, task):
    """A training loss by hand."""
    x, noise = draw(1, 2, 2, 4, 6, 16), draw(2, 2, 2, 4, 6, 16)
    latents = jnp.concatenate([x, jnp.zeros((2, 2, 4, 6, 20))], -1)
    reference = make_reference(draw(3, 2, 2, 4, 6, 16), task, (2, 2, 3))
    out = model.dit(latents, jnp.array([500.0, 500.0]), model.alignment(given, task), references=(reference,))
    return loss_per_example(out, x, noise).mean()


def test_a_task_moves_its_own_queries_alone():
    model = OmniTransfer(SMALL, rngs=nnx.Rngs(0))
    task = jnp.array([4, 1])
    grads = jax.jit(jax.grad(lambda m: loss(m, make_inputs(), task)))(model)
    moved = np.abs(flat_params(grads)["alignment.queries"]).max(axis=(1, 2)) > 0
    assert [name for name, yes in zip(tasks.NAMES, moved, strict=True) if yes] == ["style", "effect"]


def test_a_connector_may_lead_into_the_blocks():
    direct = replace(SMALL, alignment=replace(SMALL.alignment, into="blocks"))
    model = OmniTransfer(direct, rngs=nnx.Rngs(0))
    context = model.alignment(make_inputs(), jnp.array([0, 3]))
    assert context.shape[-1] == direct.dit.dim
    latents = draw(1, 2, 2, 4, 6, 36)
    out = model.dit(latents, jnp.array([500.0, 500.0]), context, embed_text=model.embed_text)
    by_hand = replace_text_embedder(model.dit)(latents, jnp.array([500.0, 500.0]), context)
    assert relative_l2(out, by_hand) <= 1e-6


def replace_text_embedder(dit):
    """The same transformer whose text projection is the identity."""
    dit = nnx.clone(dit)
    dit.text_embedder = lambda text: text
    return dit


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("stage", "trains"), [(stage1, "dit"), (stage2, "alignment"), (stage3, "both")])
def test_stages_train_what_they_align(stage, trains):
    """Parameters by stage, and the optimizer's memory: two float32 numbers for each trainable one, none for the others."""
    config: Config = stage.get_config()
    of_stage = objective(config)
    params = dict(of_stage.params)
    trainable, frozen = split_trainable(params, of_stage)
    parts = {path.partition(".")[0] for path in trainable}
    assert parts == {"dit": {"dit"}, "alignment": {"alignment"}, "both": {"dit", "alignment"}}[trains]
    assert all(path.startswith("alignment.mllm.") and ".lora." not in path for path in frozen) or trains == "alignment"
    if trains != "dit":
        assert {path for path in trainable if path.startswith("alignment.mllm.")} == {p for p in params if ".lora." in p}
    state = jax.eval_shape(lambda p: init_state(p, of_stage, config, optax.adam(1e-3)), params)
    assert bytes_of(state.moments) == 2 * bytes_of(state.trainable) + 4
    assert all(leaf.dtype == jnp.bfloat16 for leaf in state.frozen.values())
    assert config.train.steps == {"dit": 10_000, "alignment": 2_000, "both": 5_000}[trains]


def test_the_default_is_the_3b_model():
    config = stage2.get_config()
    model = abstract(lambda rngs: Alignment(config, rngs=rngs))
    assert config.alignment.queries == 256
    assert config.alignment.frames == 13
    base = count(model) - sum(leaf.size for path, leaf in flat_params(model).items() if ".lora." in path or not path.startswith("mllm."))
    assert base == 3_754_622_976 - 668_684_288  # without its vision tower
