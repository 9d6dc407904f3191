"""Camera paths: errors whose answer is known, files, and paths of the procedural world found again from its pictures.

Sixteen clips of the world, half a minute:

    python -m pytest -n 0 -s -m slow tests/evaluation/metrics/test_cameras.py
"""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from configs import stage1
from configs.errors import RequestError
from configs.run import VideoConfig
from evaluation.metrics import cameras
from evaluation.metrics.cameras import Trajectory
from evaluation.transfer import held_out
from world import pixels

cv2 = pytest.importorskip("cv2")
SIZE = VideoConfig(frames=17, height=96, width=128, fps=8)


def path(seed=0, frames=9):
    """A smooth path that turns and moves in all directions."""
    random = np.random.default_rng(seed)
    turns = Rotation.from_rotvec(np.cumsum(random.normal(0, 0.05, (frames, 3)), 0)).as_matrix()
    return Trajectory(turns, np.cumsum(random.normal(0, 0.3, (frames, 3)), 0), np.ones(frames, bool))


def elsewhere(true, scale=3.0):
    """The same path in another world: turned, moved and of another unit."""
    turn = Rotation.from_rotvec([0.4, -1.0, 0.3]).as_matrix()
    return Trajectory(turn @ true.rotations, scale * true.positions @ turn.T + [5, 6, 7], true.known)


def test_the_same_path_in_another_world_has_no_error():
    assert cameras.errors(elsewhere(path()), path()) == pytest.approx((0, 0), abs=1e-5)


def test_known_errors():
    true = path()
    turned = true._replace(rotations=true.rotations @ Rotation.from_rotvec(np.radians([[0, 0, 5 * t] for t in range(9)])).as_matrix())
    assert cameras.errors(turned, true)[0] == pytest.approx(np.mean([5 * t for t in range(1, 9)]))
    assert cameras.errors(true._replace(positions=-true.positions), true)[1] == pytest.approx(1), "the other way"
    assert cameras.errors(true.standing(), true)[1] == pytest.approx(1)
    assert cameras.errors(true.standing(), true.standing()) == pytest.approx((0, 0))
    assert cameras.errors(true, true.standing())[1] == 1
    shaken = true._replace(positions=true.positions + np.random.default_rng(1).normal(0, 0.05, (9, 3)))
    assert 0 < cameras.errors(shaken, true)[1] < 0.5
    lost = true._replace(known=np.arange(9) != 4, positions=np.where(np.arange(9)[:, None] == 4, 99.0, true.positions))
    assert lost.lost == pytest.approx(1 / 9)
    assert cameras.errors(lost, true) == pytest.approx((0, 0), abs=1e-5)
    with pytest.raises(RequestError, match="56% of the camera poses of the clip not found; 20% at most"):
        cameras.errors(true._replace(known=np.arange(9) < 4), true)


def test_both_forms_of_files(tmp_path):
    true = path()
    quaternions = Rotation.from_matrix(true.rotations).as_quat()
    (tmp_path / "tum.txt").write_text("# time x y z qx qy qz qw\n" + "".join(
        " ".join(map(str, [t / 8, *true.positions[t], *quaternions[t]])) + "\n" for t in range(9)))  # fmt: skip
    poses = np.concatenate([true.rotations, true.positions[:, :, None]], 2).reshape(9, 12)
    (tmp_path / "kitti.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in poses))
    for name in ("tum", "kitti"):
        found = cameras.read(tmp_path / f"{name}.txt", 9)
        np.testing.assert_allclose(found.rotations, true.rotations, atol=1e-9)
        np.testing.assert_allclose(found.positions, true.positions, atol=1e-9)
    for text, words in (
        ("1 2 3\n", "no camera path"), ("a b\n", "no camera path"), ("0 " * 8 + "\n", "quaternion of 0"),
        ("2 0 0 0 0 2 0 0 0 0 2 0\n", "no rotations"), ("1 0 0 0 0 1 0 0 0 0 1 0\n", "1 poses, 9 needed"),
    ):  # fmt: skip
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(RequestError, match=words):
            cameras.read(tmp_path / "bad.txt", 9)
    with pytest.raises(RequestError, match="No such file"):
        cameras.read(tmp_path / "absent.txt", 9)


def test_a_scene_in_space():
    """Points at many depths: the pose in units of their median depth."""
    random = np.random.default_rng(0)
    focal = cameras.FOCAL * 128
    camera = np.array([[focal, 0, 63.5], [0, focal, 47.5], [0, 0, 1]])
    points = np.stack([random.uniform(-2, 2, 300), random.uniform(-1.5, 1.5, 300), random.uniform(2, 9, 300)], 1)
    rotation, translation = Rotation.from_rotvec([0.02, -0.15, 0.05]).as_matrix(), np.array([0.6, 0.1, -0.3])
    seen = [x @ camera.T for x in (points, points @ rotation.T + translation)]
    a, b = (x[:, :2] / x[:, 2:] for x in seen)
    pose = cameras.of_tracks(a, b + random.normal(0, 0.05, b.shape), camera)
    assert np.degrees(Rotation.from_matrix(pose.rotation.T @ rotation).magnitude()) < 0.3
    np.testing.assert_allclose(pose.translation, translation / np.median(points[:, 2]), atol=0.01)
    assert cameras.of_tracks(a[:20], b[:20], camera) is None
    assert cameras.of_tracks(a, random.permutation(b), camera) is None


def truth(scene, size):
    """The path with which pixels.py draws a scene: a camera before a plane that shifts, comes nearer and rolls."""
    time = pixels._screen(size)[0]
    x, y, zoom, roll = (np.broadcast_to(np.asarray(each, np.float64), time.shape).ravel() for each in pixels._camera(scene.camera, time))
    depth = cameras.FOCAL * max(size.height, size.width) / (size.height / 2)
    turns = Rotation.from_rotvec(np.stack([0 * roll, 0 * roll, 2 * np.pi * roll], 1)).as_matrix()
    return Trajectory(turns, np.stack([x, y, -depth * zoom], 1), np.ones(len(x), bool))


def found_again(pairs):
    """The errors of each clip; None where the estimator says that it failed."""
    for pair in pairs:
        try:
            yield cameras.errors(cameras.estimate(pixels.render(pair.reference, SIZE)), truth(pair.reference, SIZE))
        except RequestError:
            yield None


def test_paths_of_the_world_are_found_again():
    pairs = held_out(stage1.get_config("smoke"), "camera", 7)
    known = [pairs[i] for i in (1, 5, 6)]
    assert {pair.reference.camera.view for pair in known} == {"pulls", "tilts", "rolls"}
    for rotation, translation in found_again(known):
        assert rotation < 1
        assert translation < 0.1


def test_a_frame_around_the_picture_that_does_not_move_is_a_failure():
    (pair,) = held_out(stage1.get_config("smoke"), "camera", 1)
    assert pair.reference.style.drawing == "framed"
    assert list(found_again([pair])) == [None]


def test_a_clip_that_does_not_move_and_one_of_noise():
    frame = pixels.render(held_out(stage1.get_config("smoke"), "camera", 2)[1].reference, SIZE)[:1]
    still = cameras.estimate(frame.repeat(5, 0))
    assert cameras.errors(still, still.standing()) == pytest.approx((0, 0), abs=0.05)
    assert cameras.estimate(np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)).lost > cameras.MOST_LOST
    assert cameras.estimate(np.zeros((3, 48, 64, 3), np.uint8)).lost > cameras.MOST_LOST


@pytest.mark.slow
def test_every_path_that_is_found_is_right():
    pairs = held_out(stage1.get_config("smoke"), "camera", 16)
    found = list(found_again(pairs))
    drawn = [pair.reference.style is not None and pair.reference.style.drawing != "duotone" for pair in pairs]  # fixed to the picture
    print([each and tuple(round(x, 2) for x in each) for each in found])
    assert all(each is None or each[0] < 1 for each in found)
    assert sum(each is None for each, fixed in zip(found, drawn, strict=True) if not fixed) <= 2
