"""Laws of Follow-Your-Motion: what the bands see, how heads are told apart, and what adapters and stretched positions may not change."""

import json
import re
from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import follow_your_motion as configs
from configs.errors import RequestError
from configs.run import MeshConfig
from omnitransfer_jax.mesh import UNSHARDED
from omnitransfer_jax.methods import follow_your_motion as method
from omnitransfer_jax.methods.follow_your_motion import HeadScores, Sample
from omnitransfer_jax.models import lora
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.lora import merge_lora
from omnitransfer_jax.models.omnitransfer import OmniTransfer
from tests.compare import relative_l2
from tests.test_mesh import differences, on_eight_devices

SMOKE = configs.get_config("smoke")
CONFIG = replace(SMOKE, dit=replace(SMOKE.dit, num_layers=2, num_heads=4, dim=48, text_len=4, text_dim=8), text=replace(SMOKE.text, dim=8))
PATCHES = (4, 3, 5)
HEADS = np.array([[True, False, False, True], [False, True, False, False]])


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def fresh():
    """The parameters before the first step: transformer and both adapters."""

    def make():
        base = OmniTransfer(CONFIG, rngs=nnx.Rngs(0))
        return flat_params(base) | method.objective(CONFIG, HEADS).init()

    return jax.jit(make)()


def plain(params):
    """The transformer without its adapters."""
    model = abstract(lambda rngs: OmniTransfer(CONFIG, rngs=rngs))
    return with_params(model, {path: x for path, x in params.items() if ".lora_" not in path}).dit


def adapted(params):
    """The transformer with its adapters."""
    return with_params(abstract(partial(method.make_model, CONFIG)), params).dit


@jax.jit
def velocity(dit):
    x = draw(0, 1, 3, 4, 6, 16)
    time, text = jnp.array([700.0]), draw(1, 1, 4, 8)
    return dit(x, time, text)


def stretched(dit, time_scale):
    run = jax.jit(partial(method.velocity, image=None, time_scale=time_scale))
    return run(dit, draw(0, 1, 3, 4, 6, 16), jnp.array([700.0]), draw(1, 1, 4, 8))


# ---- Heads


def maps(kind):
    """Queries and keys "L K" of a head that attends to one place: itself, the next pixel, or the same pixel of the next frame."""
    frames, rows, columns = PATCHES
    index = np.arange(frames * rows * columns)
    wanted = {"self": index, "pixel": np.roll(index, 1), "frame": np.roll(index, rows * columns)}[kind]
    keys = np.eye(len(index), dtype=np.float32)
    return 1e3 * keys[wanted], keys


def test_a_head_that_looks_at_the_same_place_of_other_frames_is_temporal():
    (q, k) = (np.stack(each, 1) for each in zip(*[maps(kind) for kind in ("self", "pixel", "frame")], strict=True))
    inside, norm = jax.jit(partial(method.band_weights, patches=PATCHES, band=5))(jnp.asarray(q), jnp.asarray(k))
    tokens = 60
    np.testing.assert_allclose(norm, tokens**0.5, rtol=1e-6)  # 60 rows with a single 1
    # By hand, a band being less than 3 steps of 5 tokens. In the token order another frame is 3 steps away; the neighbour of the first
    # token is the last one. With time fastest another frame is at most 3 tokens away; the 4 tokens of the first pixel have the last pixel
    # as their neighbour.
    np.testing.assert_allclose(inside[0], [60, 59, 0], atol=1e-4)
    np.testing.assert_allclose(inside[1], [60, 56, 60], atol=1e-4)


@pytest.mark.parametrize(("patches", "band"), [((4, 3, 5), 1), ((4, 3, 5), 4), ((3, 10, 10), 16), ((2, 4, 4), 16)])
def test_bands_by_brute_force(patches, band):
    frames, rows, columns = patches
    tokens = frames * rows * columns
    space = np.array([f * rows * columns + p for f in range(frames) for p in range(rows * columns)])
    time = np.array([p * frames + f for f in range(frames) for p in range(rows * columns)])
    q, k = draw(0, tokens, 2, 8), draw(1, tokens, 2, 8)
    weights = jax.nn.softmax(jnp.einsum("lnk,snk->nls", q, k) * 8**-0.5, -1)
    inside, norm = jax.jit(partial(method.band_weights, patches=patches, band=band))(q, k)
    for order, found in zip((space, time), inside, strict=True):
        near = np.abs(order[:, None] // band - order[None] // band) < rows * columns // band
        assert relative_l2(found, (np.asarray(weights) * near).sum((1, 2))) <= 1e-6
        assert method.band_size(patches, band) == near.sum()
    assert relative_l2(norm, np.sqrt(np.square(weights).sum((1, 2)))) <= 1e-6


def scores(spatial, temporal):
    """Scores with these numbers as weights and as cosines."""
    return HeadScores(*(np.array(x, np.float32) for x in (spatial, temporal, spatial, temporal)))


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("paper", [[0, 1, 1, 1], [1, 1, 0, 0]]),  # temporal above 0.8 times the spatial score
        ("released", [[0, 0, 0, 1], [0, 1, 0, 0]]),  # from 1.3 times it on
        ("ranked", [[0, 0, 1, 1], [1, 1, 0, 0]]),
    ],
)
def test_rules(rule, wanted):
    given = scores([[1, 1, 1, 1], [1, 1, 1, 1]], [[0.7, 0.9, 1.2, 1.4], [1.25, 1.31, 0.1, 0.2]])
    assert method.temporal_heads(given, replace(CONFIG.motion, rule=rule)).astype(int).tolist() == wanted


def test_a_uniform_head_is_spatial_to_the_released_rule_and_temporal_to_the_paper():
    inside, norm = method.band_weights(jnp.zeros((60, 1, 4)), jnp.zeros((60, 1, 4)), PATCHES, 1)
    np.testing.assert_allclose(inside[0], inside[1], rtol=1e-5)
    share = inside / 60
    given = HeadScores(*np.asarray([share[0], share[1], share[0] / norm, share[1] / norm])[:, None] + np.zeros((1, 1, 2), np.float32))
    both = given._replace(temporal_weight=given.temporal_weight * np.array([[1, 2.0]]), temporal_cosine=given.temporal_cosine * [[1, 0.1]])
    assert method.temporal_heads(both, replace(CONFIG.motion, rule="released")).tolist() == [[False, True]]
    assert method.temporal_heads(both, replace(CONFIG.motion, rule="paper")).tolist() == [[True, False]]


def test_heads_of_one_kind():
    """In one block they are marked; in all blocks there is nothing to train on."""
    one = method.temporal_heads(scores([[1, 1], [1, 1]], [[9, 9], [0, 9]]), replace(CONFIG.motion, rule="paper"))
    assert method.head_table(one).splitlines()[1:] == ["    0        0         2   all of one kind", "    1        1         1"]
    for weight, kind in ((0.1, "temporal"), (9.0, "spatial")):
        with pytest.raises(RequestError, match=f"it finds no {kind} head in any block.*--motion.rule=ranked"):
            method.temporal_heads(scores([[1, 1]], [[weight, weight]]), replace(CONFIG.motion, rule="released"))


def test_masks_partition_the_heads(fresh):
    names = method.ADAPTERS.values()
    masks = {name: [np.asarray(x) for path, x in fresh.items() if path.endswith(f".{name}.head_mask")] for name in names}
    for spatial, temporal in zip(*masks.values(), strict=True):
        assert set(np.unique(spatial)) == {0, 1}
        assert (spatial + temporal == 1).all()
        assert (temporal == HEADS).all()
    assert len(masks["lora_spatial"]) == 3


def test_scores_are_averaged_over_noises(fresh):
    clip = Sample(draw(0, 1, 3, 4, 6, 16), draw(1, 1, 4, 8))

    def run(draws):
        config = replace(CONFIG, motion=replace(CONFIG.motion, head_draws=draws))
        return method.head_scores(config, plain(fresh), clip, jax.random.key(3))

    one, three = run(1), run(3)
    assert one.spatial_weight.shape == (2, 4)
    assert all((x > 0).all() and (x < 1.001).all() for x in three)
    assert 1e-6 < relative_l2(one.spatial_weight, three.spatial_weight) < 1


# ---- Adapters and positions


def test_fresh_adapters_change_nothing_bit_for_bit(fresh):
    assert sum(".lora_" in path for path in fresh) == 18
    assert (velocity(plain(fresh)) == velocity(adapted(fresh))).all()


def test_positions_at_factor_1_change_nothing_bit_for_bit(fresh):
    dit = plain(fresh)
    assert (stretched(dit, 1.0) == velocity(dit)).all()
    assert relative_l2(stretched(dit, 2.5), velocity(dit)) > 1e-3


@pytest.mark.parametrize(
    ("frames", "sparse", "stretch", "factor", "picked"),
    [
        (81, 17, "latent", 5.0, [0, 5, 10, 80]),
        (81, 17, "paper", 81 / 17, [0, 5, 10, 80]),
        (81, 17, "none", 1.0, [0, 5, 10, 80]),
        (21, 21, "latent", 1.0, [0, 1, 2, 20]),
    ],
)
def test_sparse_frames_keep_the_ends_of_the_clip(frames, sparse, stretch, factor, picked):
    config = configs.get_config()
    config = replace(
        config, video=replace(config.video, frames=frames), motion=replace(config.motion, sparse_frames=sparse, stretch=stretch)
    )
    found = method.sparse_frames(config)
    assert len(found) == sparse
    assert found[[0, 1, 2, -1]].tolist() == picked
    assert config.time_scale == pytest.approx(factor)
    assert method.stage(config, "spatial", "").time_scale == 1


def trained(params):
    return {
        path: draw(i, *x.shape) * 0.1 if ".lora_" in path and not path.endswith("head_mask") else x
        for i, (path, x) in enumerate(params.items())
    }


def test_one_adapter_and_the_merged_network_are_the_two_adapters(fresh):
    config = replace(CONFIG, motion=replace(CONFIG.motion, lora=replace(CONFIG.motion.lora, alpha=8.0)))  # a scale of 2
    params = trained(fresh)
    wanted = velocity(with_params(abstract(partial(method.make_model, config)), params).dit)
    assert relative_l2(velocity(plain(fresh)), wanted) > 1e-2
    assert relative_l2(velocity(plain(merge_lora(params, 2.0))), wanted) <= 1e-5
    one = method.one_adapter(params, config)
    assert {x.shape for path, x in one.items() if path.endswith("down")} == {(2, 48, 8)}
    bare = {path: x for path, x in fresh.items() if ".lora_" not in path}
    assert relative_l2(velocity(plain(merge_lora(bare | one, 1.0))), wanted) <= 1e-5


@pytest.mark.parametrize("name", ["spatial", "temporal"])
def test_an_adapter_learns_on_its_own_heads_alone(name, fresh):
    """Gradients of either stage with respect to its adapter, which alone trains: they are in the columns of its heads."""
    config = method.stage(CONFIG, name, "")
    trained_on = method.objective(config, HEADS)
    (pattern,) = config.train.trainable
    chosen = {path: x for path, x in fresh.items() if re.fullmatch(pattern, path.replace(".", "/", 1)) and path.endswith(".up")}
    others = {path: x for path, x in fresh.items() if path in trained_on.params or path in trained_on.base}
    batch = jax.tree.map(lambda x: draw(5, *x.shape), trained_on.batch)
    drawn = trained_on.draw(jax.random.key(0), batch)
    grads = jax.jit(jax.grad(lambda up: trained_on.loss(others | up, batch, drawn, UNSHARDED)[0].sum()))(chosen)
    assert len(grads) == 3
    for up in grads.values():
        by_head = np.abs(up).reshape(2, -1, 4, 12).sum((1, 3))
        assert ((by_head > 0) == (HEADS if name == "temporal" else ~HEADS)).all()


def test_stages_have_their_own_numbers():
    config = replace(
        CONFIG, motion=replace(CONFIG.motion, spatial_steps=7, spatial_learning_rate=0.5, spatial_weight_decay=0.25),
        train=replace(CONFIG.train, steps=9), optimizer=replace(CONFIG.optimizer, learning_rate=0.125, weight_decay=0.75),
    )  # fmt: skip
    first, second = method.stage(config, "spatial", "base"), method.stage(config, "temporal", "first")
    numbers = [(c.train.steps, c.optimizer.learning_rate, c.optimizer.weight_decay, c.train.init_from) for c in (first, second)]
    assert numbers == [(7, 0.5, 0.25, "base"), (9, 0.125, 0.75, "first")]
    assert method.sample_spec(first).latents.shape == (1, 1, 4, 6, 16)
    assert method.sample_spec(second).latents.shape == (1, 2, 4, 6, 16)


# ---- Losses


def test_the_motion_loss_of_known_velocities():
    a = draw(0, 2, 4, 3, 3, 16)
    for kind, opposite in (("signed", 2.0), ("absolute", 0.0)):
        np.testing.assert_allclose(method.motion_loss(a, a, kind), 0, atol=1e-6)
        np.testing.assert_allclose(method.motion_loss(2 * a + 5, a, kind), 0, atol=1e-6)  # neither size nor what stands still counts
        np.testing.assert_allclose(method.motion_loss(-a, a, kind), opposite, atol=1e-6)
    still = jnp.zeros_like(a)
    np.testing.assert_allclose(method.motion_loss(still, a, "signed"), 1)
    assert np.isfinite(jax.grad(lambda x: method.motion_loss(x, a, "signed").sum())(still)).all()


# ---- Configuration


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("motion", {"sparse_frames": 4}, r"motion.sparse_frames=4: 4n\+1, from 5 to video.frames=9"),
        ("motion", {"sparse_frames": 13}, "from 5 to video.frames=9"),
        ("motion", {"band_tokens": 7}, "motion.band_tokens=7: at most 6, the tokens of a latent frame"),
        ("motion", {"head_time": 1.0}, "motion.head_time=1.0: from 0 to below 1"),
        ("motion", {"spatial_steps": -1}, "motion.spatial_steps=-1: at least 0"),
        ("train", {"references": True}, "train.references=True: Follow-Your-Motion reads no reference"),
        ("alignment", {"enabled": True}, "alignment.enabled=True: Follow-Your-Motion reads UMT5"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(part, change, message):
    with pytest.raises(RequestError, match=message):
        replace(CONFIG, **{part: replace(getattr(CONFIG, part), **change)}).validate()


def test_every_preset_works():
    for config in configs.VARIANTS.values():
        config.validate()
        params = flat_params(abstract(partial(method.make_model, config)))
        adapters = [lora.PATH.fullmatch(path.removeprefix("dit.")) for path in params if ".lora" in path]
        linears = {f"blocks.self_attention.{name}" for name in ("query", "key", "value")}
        assert {(match["linear"], match["name"]) for match in adapters} == set(product(linears, method.ADAPTERS.values()))


# ---- Devices


def test_sharded_equals_single():
    """A step of the temporal stage: each device holds a part of the adapters, of the clips and of their tokens."""
    report = on_eight_devices("tests.methods.test_follow_your_motion")
    assert report["dead"] == []
    ((loss, gradient),) = report["cases"].values()
    assert loss < 1e-6
    assert gradient < 1e-5


if __name__ == "__main__":
    eight = replace(CONFIG, train=replace(CONFIG.train, batch_size=8))
    trained_on = method.objective(method.stage(eight, "temporal", ""))
    clips = jax.tree.map(lambda x: np.asarray(draw(5, *x.shape)), trained_on.batch)
    print(json.dumps(differences(trained_on, eight, clips, {"all": (MeshConfig(data=2, heads=2, keys=2), 1)})))
