"""Transfers of the tiny model: each control reads only what it should, and results are means over pairs."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from configs import stage3
from configs.errors import RequestError
from data_pipelines.encoders import Encoders
from evaluation import transfer
from evaluation.transfer import Networks, Results, Transfer, held_out, swapped, with_control
from launch import sample
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.models.alignment import Alignment
from world import pixels, scenes
from world.pairs import SHARES

TINY = stage3.get_config("tiny")
TINY = replace(TINY, sampler=replace(TINY.sampler, steps=2))
PLAIN = replace(TINY, alignment=replace(TINY.alignment, enabled=False))
BATCH = 3
GREATEST = 1  # of a byte, between programs that compute the same


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "BATCH", BATCH)
        yield


@pytest.fixture(scope="module")
def encoders():
    return Encoders(TINY, model_folder.EMBEDDED)


@pytest.fixture(scope="module")
def dit():
    """The package's transformer."""
    return load_models.load_dit(model_folder.EMBEDDED, TINY, make_mesh(TINY.mesh))


@pytest.fixture(scope="module")
def aligned(encoders, dit):
    """Transfers whose context is the alignment's, and their networks."""
    networks = Networks(dit, jax.jit(lambda: Alignment(TINY, rngs=nnx.Rngs(jax.random.key(1, impl="unsafe_rbg"))))())
    return Transfer(TINY, encoders), networks


@pytest.fixture(scope="module")
def plain(encoders, dit):
    """Transfers whose context is the encoded prompt, and their networks."""
    return Transfer(PLAIN, encoders), Networks(dit, None)


@pytest.fixture(params=["plain", "aligned"])
def made(request):
    return request.getfixturevalue(request.param)


def with_other_references(pairs):
    """The same pairs with other references."""
    others = held_out(TINY, pairs[0].task, len(pairs), key=7)
    return [pair._replace(reference=other.reference) for pair, other in zip(pairs, others, strict=True)]


@pytest.mark.parametrize("task", tasks.NAMES)
def test_another_reference_is_one_of_another_value(task):
    factor, pairs = SHARES[task], held_out(TINY, task, 24)
    references = [pair.reference for pair in pairs]
    for pair, other in zip(pairs, swapped(pairs), strict=True):
        assert other.reference in references
        assert getattr(other.reference, factor) != getattr(pair.target, factor)
        assert other._replace(reference=pair.reference) == pair


def test_pairs_of_one_value_have_nothing_to_swap():
    pair = held_out(TINY, "style", 1)[0]
    with pytest.raises(RequestError, match="2 pairs of task 'style' that all share one style"):
        swapped([pair, pair])


def test_held_out_pairs_share_what_training_never_saw():
    for task in tasks.NAMES:
        for pair in held_out(TINY, task, 8):
            assert getattr(pair.target, SHARES[task]) in scenes.HELD_OUT[SHARES[task]]
            assert pair.task == task


@pytest.mark.parametrize("task", ["motion", "id"])
def test_what_a_transfer_reads(made, task):
    run, networks = made
    pairs = held_out(TINY, task, BATCH)
    clips = run(networks, pairs)
    assert clips.shape == (BATCH, 9, 32, 32, 3)
    assert clips.std() > 0
    assert (run(networks, pairs) == clips).all()
    others = with_other_references(pairs)
    read = run(networks, others)
    assert all((a != b).any() for a, b in zip(read, clips, strict=True))
    without = run(networks, pairs, with_reference=False)
    assert (run(networks, others, with_reference=False) == without).all()
    assert all((a != b).any() for a, b in zip(without, clips, strict=True))
    swapped_clips = with_control("swapped", run, networks, pairs)
    assert (swapped_clips == run(networks, swapped(pairs))).all()
    assert (with_control("none", run, networks, pairs) == without).all()


def test_the_clip_of_a_pair_depends_on_its_place_alone(plain):
    run, networks = plain
    pairs = held_out(TINY, "motion", BATCH + 2)
    counts = []
    clips = run(networks, pairs, on_batch=counts.append)
    assert counts == [BATCH, 2]
    assert len(clips) == BATCH + 2
    fewer = run(networks, [*pairs[2:4], pairs[2], *pairs[3:4]])  # another batch around it, padded otherwise
    assert (fewer[3] == clips[3]).all()
    assert (fewer[0] != clips[2]).any()


def test_one_reference_combined_is_a_plain_transfer(made):
    run, networks = made
    pairs = held_out(TINY, "style", 2)
    apart = run.combined(networks, pairs).astype(int) - run(networks, pairs)
    assert np.abs(apart).max() <= GREATEST


def test_two_references_are_both_read(made):
    run, networks = made
    style = held_out(TINY, "style", 2)
    identity = [pair._replace(task="id", reference=other.reference) for pair, other in zip(style, held_out(TINY, "id", 2), strict=True)]
    both = run.combined(networks, style, identity)
    assert both.shape[0] == 2
    for changed in (
        run.combined(networks, with_other_references(style), identity),
        run.combined(networks, style, [pair._replace(reference=style[0].target) for pair in identity]),
        run.combined(networks, style),
    ):
        assert all((a != b).any() for a, b in zip(changed, both, strict=True))


def request_of(*pairs):
    """What launch.sample is asked for to make the transfer that these pairs of one target and prompt ask for."""
    references = tuple((tasks.task_index(pair.task), pixels.render(pair.reference, TINY.data.reference)) for pair in pairs)
    frame = pixels.render(pairs[0].target, TINY.video)[0] if any(pair.is_temporal for pair in pairs) else None
    return sample.Request(pairs[0].prompt, frame, references, TINY.video)


@pytest.mark.parametrize("asked", [["id"], ["motion"], ["style", "motion"]], ids="+".join)
@pytest.mark.parametrize("kind", ["plain", "aligned"])
def test_conditions_are_those_of_sampling(request, monkeypatch, kind, asked):
    """The negative context among them, and the first frame if any of the tasks needs it."""
    run, networks = request.getfixturevalue(kind)
    first = held_out(TINY, asked[0], 1)[0]
    pairs = [first._replace(task=task, reference=held_out(TINY, task, 1)[0].reference) for task in asked]
    monkeypatch.setattr(load_models, "load_alignment", lambda *_: networks.alignment)
    config = replace(run.config, sampler=replace(run.config.sampler, guidance=5.0))
    expected, _ = sample.encode(Encoders(config, model_folder.EMBEDDED), request_of(*pairs))
    found = Transfer(config, run.encoders).conditions(networks, *([pair] for pair in pairs))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
    assert found.negative_context.any() == (kind == "plain")
    assert (found.image is not None) == ("motion" in asked)


def test_controls_without_a_network(plain):
    run, networks = plain
    pairs = held_out(TINY, "camera", 2)
    still, copied = (with_control(name, run, networks, pairs) for name in ("still", "copied"))
    for i, pair in enumerate(pairs):
        assert (still[i] == pixels.render(pair.target, TINY.video)[0]).all()
        assert (copied[i] == pixels.render(pair.reference, TINY.video)).all()


def test_results_are_of_every_pair_and_control(plain):
    run, networks = plain
    pairs = {"camera": held_out(TINY, "camera", 2), "id": held_out(TINY, "id", 2)}
    found = transfer.measure(run, networks, pairs)
    assert found.scores.keys() == found.clips.keys() == pairs.keys()
    for task, controls in found.scores.items():
        assert tuple(controls) == transfer.CONTROLS
        for control, scores in controls.items():
            for i, pair in enumerate(pairs[task]):
                alone = transfer.scores(pair, found.clips[task][control][i], TINY.video)
                assert {name: values[i] for name, values in scores.items() if name != "psnr gain"} == alone
            assert (scores["psnr gain"] == scores["psnr"] - controls["none"]["psnr"]).all()
        assert controls["copied"]["leak"].tolist() == [1, 1]


def test_a_table_of_results():
    values = np.array([0.0, 1.0, 1.0, 1.0])
    results = Results({}, {}, {"id": {"transfer": {"retrieval": values}, "swapped": {"retrieval": 0 * values}}})
    assert (results.mean("id", "retrieval"), results.mean("id", "retrieval", "swapped")) == (0.75, 0)
    table = results.table()
    assert table["id"]["transfer"]["retrieval"] == {"mean": 0.75, "interval": transfer.interval(values), "pairs": 4}
    assert table["id"]["swapped"]["retrieval"]["mean"] == 0
