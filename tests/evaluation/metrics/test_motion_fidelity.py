"""The formula against a literal loop, and what it must say of clips that are known."""

import numpy as np
import pytest

from evaluation.metrics.motion_fidelity import LEAST, STILL, motion_fidelity
from evaluation.metrics.tracks import Tracks


def made_up(seed, points=7, frames=6):
    """Tracks that move, rest and are lost at random."""
    random = np.random.default_rng(seed)
    steps = random.normal(size=(points, frames - 1, 2)) * random.choice([0.05, 3.0], (points, frames - 1, 1))
    places = np.concatenate([np.zeros((points, 1, 2)), steps.cumsum(1)], 1) + random.uniform(0, 60, (points, 1, 2))
    lost = random.integers(1, frames + 3, points)
    return Tracks(places.astype(np.float32), np.arange(frames)[None] < lost[:, None])


def loop(clip, reference):
    """The definition, a track and a step at a time."""

    def steps(tracks, n, frames):
        found = []
        for t in range(1, frames):
            move = tracks.places[n, t].astype(float) - tracks.places[n, t - 1].astype(float)
            size = np.hypot(*move)
            found.append(None if not tracks.seen[n, t] else move / size if size > STILL else np.zeros(2))
        return found

    frames = min(clip.seen.shape[1], reference.seen.shape[1])
    sides = []
    for tracks in (clip, reference):
        each = [steps(tracks, n, frames) for n in range(len(tracks.seen))]
        sides.append(
            [s for s in each if sum(d is not None for d in s) >= LEAST * (frames - 1) and any(d is not None and d.any() for d in s)]
        )
    sim = np.zeros((len(sides[0]), len(sides[1])))
    for n, a in enumerate(sides[0]):
        for m, b in enumerate(sides[1]):
            found = [p @ q for p, q in zip(a, b, strict=True) if p is not None and q is not None and (p.any() or q.any())]
            sim[n, m] = np.mean(found) if found else 0
    return (np.mean([max(row) for row in sim]) + np.mean([max(column) for column in sim.T])) / 2


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_formula(seed):
    clip, reference = made_up(seed), made_up(seed + 100, points=9, frames=8)
    assert motion_fidelity(clip, reference) == pytest.approx(loop(clip, reference), abs=1e-12)
    assert motion_fidelity(clip, clip) == pytest.approx(1)


def straight(*velocity, points=4, frames=5):
    places = np.arange(frames)[None, :, None] * np.array(velocity, np.float32) + np.zeros((points, 1, 1), np.float32)
    return Tracks(places, np.ones((points, frames), bool))


def test_known_clips():
    right, left, down, frozen = straight(2.0, 0.0), straight(-2.0, 0.0), straight(0.0, 1.0), straight(0.0, 0.0)
    assert motion_fidelity(straight(9.0, 0.0), right) == pytest.approx(1)  # directions, not speeds
    assert motion_fidelity(left, right) == pytest.approx(-1)
    assert motion_fidelity(down, right) == pytest.approx(0)
    assert motion_fidelity(frozen, right) == motion_fidelity(right, frozen) == 0
    assert motion_fidelity(frozen, frozen) == 1
    both = Tracks(np.concatenate([right.places, frozen.places]), np.concatenate([right.seen, frozen.seen]))
    assert motion_fidelity(both, right) == pytest.approx(1)  # a still background tells nothing
    mixed = Tracks(np.concatenate([right.places, left.places]), np.concatenate([right.seen, left.seen]))
    assert motion_fidelity(right, mixed) == motion_fidelity(mixed, right) == pytest.approx(0.5)  # 1 of one direction, 0 of the other
