"""The rotation equals the original's, depends on coordinates alone, and attention scores depend on their differences alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from omnitransfer_jax.models.rope3d import axis_widths, grid, rotate, rotation
from tests.compare import relative_l2

WAN = (10_000.0, 1.0)  # base and highest frequency


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("base", "top"), [WAN, (20.0, 2.0)], ids=["wan", "tiny grids"])
def test_the_original_formula(base, top):
    """Wan2.1 multiplies complex numbers in float64: 44, 42 and 42 of 128 dimensions turn with time, row and column."""
    assert axis_widths(128) == (44, 42, 42)
    x, places = draw(1, 2 * 3 * 4, 2, 128), [(t, h, w) for t in range(2) for h in range(3) for w in range(4)]
    assert grid(2, 3, 4).tolist() == [list(p) for p in places]
    angles = [
        np.concatenate([p * top * base ** -(np.arange(0, d, 2) / d) for p, d in zip(place, (44, 42, 42), strict=True)]) for place in places
    ]
    pairs = np.asarray(x, np.float64).reshape(1, 24, 2, 64, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.array(angles))[None, :, None]
    wanted = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    assert relative_l2(rotate(x, rotation(grid(2, 3, 4)[None], 128, base, top)), wanted) <= 2e-7


def test_a_table_can_be_computed_in_parts():
    whole, part = rotation(grid(3, 4, 5), 24, *WAN), slice(20, 40)
    assert (rotation(grid(3, 4, 5)[part], 24, *WAN) == whole[:, part]).all()


def test_a_scale_of_time_moves_positions_in_time_alone():
    places = grid(3, 4, 5)
    assert (rotation(places, 24, *WAN, 1.0) == rotation(places, 24, *WAN)).all()
    moved = rotation(places * jnp.array([[3, 1, 1]]), 24, *WAN)
    assert relative_l2(rotation(places, 24, *WAN, 3.0), moved) <= 1e-6
    between = rotation(places, 24, *WAN, 1.5)
    assert relative_l2(between[:, 2 * 20 :], rotation(places, 24, *WAN, 3.0)[:, 20:40]) <= 1e-6  # frame 2 at 1.5 is frame 1 at 3


def test_scores_depend_on_differences_alone():
    q, k = draw(1, 24, 2, 24), draw(1, 24, 2, 24)[:, ::-1]
    places = grid(2, 3, 4)[None]

    def scores(offset_q, offset_k):
        tables = (rotation(places + jnp.array(o), 24, *WAN) for o in (offset_q, offset_k))
        return jnp.einsum("blnk,bsnk->bnls", *(rotate(x, t) for x, t in zip((q, k), tables, strict=True)))

    still = scores([[[0, 0, 0]]], [[[0, 0, 0]]])
    assert relative_l2(scores([[[5, 0, 52]]], [[[5, 0, 52]]]), still) <= 1e-5
    assert relative_l2(scores([[[0, 0, 0]]], [[[0, 0, 52]]]), still) > 0.1
