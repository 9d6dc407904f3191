"""What makes the method what it is: the invariants that follow from the paper's equations."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.errors import RequestError
from configs.run import SamplerConfig
from omnitransfer_jax import tasks
from omnitransfer_jax.mesh import UNSHARDED
from omnitransfer_jax.models.attend import Streams, plain
from omnitransfer_jax.models.flat_params import flat_params, with_params
from omnitransfer_jax.models.kv_cache import quantize
from omnitransfer_jax.models.omnitransfer import Conditions, denoise, make_reference, reference_latents
from omnitransfer_jax.models.rope3d import grid
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.samplers import experts, start
from omnitransfer_jax.train.flops import cache_bytes
from tests.compare import relative_l2
from tests.models.test_wan_dit import TINY

PATCHES = (2, 2, 3)  # of the target
MIXED = jnp.array([2, 1], jnp.int32)  # motion and style in one batch


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def model():
    """Random everywhere, norms and biases too, so that no branch is silent."""
    graphdef, state = nnx.split(WanDiT(TINY, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(state)
    return nnx.merge(graphdef, jax.tree.unflatten(tree, [x + 0.1 * draw(i, *x.shape) for i, x in enumerate(leaves)]))


def joint(model):
    """The same weights, references read in one masked call."""
    return nnx.merge(nnx.split(WanDiT(replace(TINY, references="joint"), rngs=nnx.Rngs(0)))[0], nnx.state(model))


@pytest.fixture(scope="module")
def batch():
    return {
        "latents": draw(0, 2, 2, 4, 6, 36),
        "timestep": jnp.array([700.0, 30.0]),
        "text": draw(1, 2, 16, 8),
        "image": draw(2, 2, 5, 8),
        "has_image": jnp.array([1.0, 0.0]),
    }


def baseline(model):
    """The same weights as the paper's baseline reads references."""
    config = replace(TINY, references="bidirectional", offsets="frames")
    return nnx.merge(nnx.split(WanDiT(config, rngs=nnx.Rngs(0)))[0], nnx.state(model))


def references(*seeds):
    """References of another length and another size than the target."""
    return tuple(make_reference(draw(s, 2, 3, 6, 4, 16), MIXED, PATCHES) for s in seeds)


@jax.jit
def make_kv_cache(model, references):
    return model.make_kv_cache(references, PATCHES)


@jax.jit
def run(model, batch, references=(), kv_cache=None):
    return model(**batch, references=references, kv_cache=kv_cache)


@jax.jit
def streams(model, batch, references):
    """The tokens of the target and of each reference after all layers."""
    x, inputs, context, _ = model.prepare(**batch, references=references)
    x, _ = model.run(x, inputs, context, model.strategy(True), None, UNSHARDED)
    return x.target, *x.references


def test_three_forms_are_one_function(model, batch):
    """Invariant 3, with two references."""
    split = run(model, batch, references(3, 4))
    assert relative_l2(run(joint(model), batch, references(3, 4)), split) <= 1e-5
    assert relative_l2(run(model, batch, (), make_kv_cache(model, references(3, 4))), split) <= 1e-5


def test_masked_and_separate_attention_have_one_gradient(model, batch):
    @jax.jit
    @jax.grad
    def gradients(both):
        model, latents = both
        return jnp.square(model(**batch, references=(make_reference(latents, MIXED, PATCHES),))).mean()

    latents = draw(3, 2, 3, 6, 4, 16)
    (a, from_mask), (b, from_calls) = gradients((joint(model), latents)), gradients((model, latents))
    assert relative_l2(from_mask, from_calls) <= 1e-4  # D17: the reference branch is not detached
    masked, separate = flat_params(a), flat_params(b)
    for path, wanted in separate.items():
        scale = np.abs(wanted).max()
        assert scale < 1e-6 or relative_l2(masked[path], wanted) <= 1e-4, path


def test_nothing_flows_to_a_reference(model, batch):
    """Invariants 1 and 2: a reference's tokens are the same bits whatever the target, its time, its text or its image."""
    other = {k: 1 - v if k == "has_image" else v + 1 for k, v in batch.items()}
    for form in (model, joint(model)):
        (target, still), (moved, same) = streams(form, batch, references(3)), streams(form, other, references(3))
        assert not (target == moved).any()
        assert (still == same).all()


def test_a_reference_is_read(model, batch):
    """Flag, content and place of the reference all reach the target; swapping them is seen."""
    base = run(model, batch, references(3))
    (reference,) = references(3)
    flag = reference.latents.at[..., 16:20].add(-1)
    for changed in (reference._replace(latents=flag), references(4)[0], reference._replace(offset=reference.offset * 0)):
        assert relative_l2(run(model, batch, (changed,)), base) > 1e-4


def test_a_reference_is_at_time_zero_without_noise_and_text(model, batch):
    """Its stream is the blocks at time 0, without cross-attention, on [z, flag, z]: written out here once more."""
    (reference,) = references(3)
    z = draw(3, 2, 3, 6, 4, 16)
    assert (reference.latents[..., :16] == z).all()
    assert (reference.latents[..., 20:] == z).all()
    x, table = model.embed(reference.latents, reference.offset)
    modulation = model.project_time(model.time_embedder(jnp.zeros((2, 1))))
    graphdef, layers = nnx.split(model.blocks)
    for i in range(TINY.num_layers):
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], layers))  # noqa: B023
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation + block.modulation[:, None, None]
        qkv = block.self_attention.project(block.norm(x) * (1 + scale) + shift, table)
        outputs, _ = plain(Streams(None, (qkv,)), None, "auto")
        x = x + gate * block.self_attention.join(outputs.references[0])
        x = x + ffn_gate * block.ffn(block.norm(x) * (1 + ffn_scale) + ffn_shift)
    assert relative_l2(streams(model, batch, references(3))[1], x) <= 1e-5


def test_an_offset_moves_a_reference_against_the_target_alone(model, batch):
    """Invariant 4: RoPE is relative, so the reference's own attention does not notice."""
    (reference,) = references(3)
    moved = reference._replace(offset=reference.offset + jnp.array([[3, 1, 7]]))
    (target, still), (changed, same) = streams(model, batch, (reference,)), streams(model, batch, (moved,))
    assert relative_l2(same, still) <= 1e-5
    assert relative_l2(changed, target) > 1e-4


def test_the_baseline_is_wan_on_more_frames(model, batch):
    """Its definition: the references' latents appended as frames of one longer video, of whose velocity the target's part counts."""
    one, two = (make_reference(draw(s, 2, frames, 4, 6, 16), MIXED, PATCHES, by="frames") for s, frames in ((3, 3), (4, 1)))
    two = two._replace(offset=two.offset + jnp.array([[3, 0, 0]]))
    longer = batch | {"latents": jnp.concatenate([batch["latents"], one.latents, two.latents], axis=1)}
    assert relative_l2(run(baseline(model), batch, (one, two)), run(model, longer)[:, :2]) <= 1e-5


def denoised(model, conditions, noise, sampler):
    """Clean latents by one network."""
    (expert,) = experts(sampler)
    return jax.jit(lambda model: denoise(model, conditions, start(noise), sampler, expert).latents)(model)


def test_the_baseline_has_no_cache(model):
    """Its references change from step to step: every cache setting computes them anew."""
    conditions = Conditions(draw(1, 1, 16, 8), draw(5, 1, 16, 8), draw(2, 1, 5, 8), draw(6, 1, 2, 4, 6, 20))
    conditions = conditions._replace(references=jax.tree.map(lambda x: x[:1], references(3)))
    noise = draw(7, 1, 2, 4, 6, 16)

    def sample(model, cache):
        return denoised(model, conditions, noise, SamplerConfig(steps=2, reference_cache=cache))

    anew = sample(baseline(model), "none")
    assert (sample(baseline(model), "full") == anew).all()
    assert relative_l2(sample(model, "none"), anew) > 1e-4
    with pytest.raises(RequestError, match=r"dit\.references='bidirectional': references attend to the target; pass them at each step"):
        baseline(model).make_kv_cache(references(3), PATCHES)


def test_offsets_are_adjacent_in_patches():
    """Invariants 5 and 9: temporal references start one column right of the target, appearance references one frame after it."""
    target = (21, 30, 52)  # 480 x 832 x 81
    for name, task in zip(tasks.NAMES, range(len(tasks.TASKS)), strict=True):
        offset = tasks.offsets(jnp.array([task]), target)[0]
        first, last = grid(*target)[0] + offset, grid(*target)[-1]
        if tasks.TASKS[task].family == "temporal":
            assert first.tolist() == [0, 0, last[2] + 1], name
        else:
            assert first.tolist() == [last[0] + 1, 0, 0], name
    assert tasks.offsets(MIXED, target, rank=2).tolist() == [[0, 0, 104], [42, 0, 0]]
    assert tasks.offsets(MIXED, target, rank=2, by="frames").tolist() == [[42, 0, 0], [42, 0, 0]]


def test_flags_change_the_mask_channels_alone():
    """Invariant 7: -1 temporal, -2 identity, -3 style, in all four channels."""
    z = jnp.broadcast_to(draw(3, 1, 3, 6, 4, 16), (5, 3, 6, 4, 16))
    made = reference_latents(z, tasks.flags(jnp.arange(5)))
    assert made.shape[-1] == 36
    for name, flag in {"id": -2, "style": -3, "motion": -1, "camera": -1, "effect": -1}.items():
        assert (made[tasks.NAMES.index(name), ..., 16:20] == flag).all()
    assert (made[:, ..., :16] == z).all()
    assert (made[:, ..., 20:] == z).all()


def test_no_reference_is_plain_wan_bit_for_bit(model, batch):
    """Invariant 6: the network tests/parity holds against diffusers, whatever the form, and with all switches of a mixed batch on."""
    plain = run(model, {k: v for k, v in batch.items() if k != "has_image"})
    switched = batch | {"has_image": jnp.ones(2)}
    for form in (model, joint(model), baseline(model)):
        assert (run(form, switched) == plain).all()


def test_references_have_no_order(model, batch):
    """Invariant 8: branches are independent, and softmax does not count positions."""
    assert relative_l2(run(model, batch, references(4, 3)), run(model, batch, references(3, 4))) <= 1e-5
    assert relative_l2(run(model, batch, references(3)), run(model, batch, references(3, 4))) > 1e-4


def test_one_batch_mixes_tasks_in_one_program(model, batch):
    """Each sample of a mixed batch is what it is alone; a sample without an image does not notice what stands in its place."""
    whole = run(model, batch, references(3))
    for i in range(2):
        one = jax.tree.map(lambda x: x[i : i + 1], (batch, references(3)))  # noqa: B023
        assert relative_l2(run(model, *one), whole[i : i + 1]) <= 1e-5
    garbage = batch | {"image": batch["image"].at[1].set(1e3)}
    assert (run(model, garbage, references(3)) == whole).all()
    alone = {k: v[1:] for k, v in batch.items()} | {"image": None, "has_image": None}
    assert relative_l2(run(model, alone, jax.tree.map(lambda x: x[1:], references(3))), whole[1:]) <= 1e-5


def test_sampling_with_a_cache_equals_recomputing(model):
    """One cache serves all steps and both guidance passes; one byte a number costs a little accuracy, measured here."""
    conditions = Conditions(draw(1, 1, 16, 8), draw(5, 1, 16, 8), draw(2, 1, 5, 8), draw(6, 1, 2, 4, 6, 20))
    conditions = conditions._replace(references=jax.tree.map(lambda x: x[:1], references(3, 4)))
    noise = draw(7, 1, 2, 4, 6, 16)

    def sample(cache):
        return denoised(model, conditions, noise, SamplerConfig(steps=4, reference_cache=cache))

    recomputed = sample("none")
    assert relative_l2(sample("full"), recomputed) <= 1e-5
    assert relative_l2(sample("activations"), recomputed) <= 1e-5
    assert 0 < relative_l2(sample("int8"), recomputed) <= 0.01
    assert 0 < relative_l2(sample("float8"), recomputed) <= 0.05


def test_each_of_two_experts_has_its_own_cache(model):
    """Wan2.2: what one expert cached is of no use to the other, whose weights differ."""
    conditions = Conditions(draw(1, 1, 16, 8), draw(5, 1, 16, 8), draw(2, 1, 5, 8), draw(6, 1, 2, 4, 6, 20))
    conditions = conditions._replace(references=jax.tree.map(lambda x: x[:1], references(3)))
    models = {"dit": model, "dit_low_noise": with_params(model, {path: 0.8 * x for path, x in flat_params(model).items()})}

    def sample(cache):
        sampler = SamplerConfig(steps=4, boundary=0.9, guidance=3.0, low_noise_guidance=1.0, reference_cache=cache)

        def both(models):
            state = start(draw(7, 1, 2, 4, 6, 16))
            for expert in experts(sampler):
                state = denoise(models[expert.part], conditions, state, sampler, expert)
            return state.latents

        return jax.jit(both)(models)

    assert relative_l2(sample("full"), sample("none")) <= 1e-5


def held(kv_cache):
    """Bytes of what is kept of all references."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(kv_cache.kept))


def test_activations_are_half_of_keys_and_values(model):
    """And the counts that people are told before anything is loaded are the bytes that are kept."""
    both, tokens = references(3, 4), 2 * 3 * 3 * 2  # two references of 3 frames of 3 x 2 patches
    full = make_kv_cache(model, both)
    kept = jax.jit(lambda model, both: model.make_kv_cache(both, PATCHES, activations=True))(model, both)
    assert held(full) == 2 * held(kept)
    for name, found in {"full": full, "activations": kept, "int8": quantize(full, "int8")}.items():
        assert held(found) == 2 * cache_bytes(TINY, name, tokens)  # of two samples


def test_a_quantized_cache_is_small_and_near(model):
    kv_cache = make_kv_cache(model, references(3, 4))
    for storage, error in {"int8": 0.01, "float8": 0.04}.items():
        narrow = quantize(kv_cache, storage)
        for ours, wanted in zip(sum(narrow.kept, ()), sum(kv_cache.kept, ()), strict=True):
            assert ours.values.dtype.itemsize == 1
            assert 0 < relative_l2(ours.read(jnp.dtype("float32")), wanted.values) <= error


def test_a_cache_belongs_to_one_target(model, batch):
    kv_cache = make_kv_cache(model, references(3))
    taller = batch | {"latents": draw(0, 2, 2, 6, 6, 36)}
    with pytest.raises(RequestError, match=r"cached references of a \(2, 2, 3\) target: this one is \(2, 3, 3\)"):
        model(**taller, kv_cache=kv_cache)
