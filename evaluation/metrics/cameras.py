"""Camera paths and how far two of them are apart: angles in degrees, translations as a share of the path.

A path comes from a file (of SLAM or of a renderer) or from the clip alone, by classical geometry (OpenCV):

    corners of a key frame and their tracks -> the homography that makes the whole pictures alike (ECC); where none does, a homography or
    an essential matrix from the tracks -> pose, in units of the scene's median depth in the key frame
    -> the next key frame, where half of the points are lost or after `STRETCH` frames

The focal length is not known: `FOCAL` is assumed. A homography is split into rotation and translation in two ways; the one whose plane
faces the camera more is taken. A frame is lost where no homography and too few tracks agree on a pose; it is then said to stand where the
frame before it stood, and counted.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.spatial.transform import Rotation

from configs.errors import RequestError, require
from evaluation.metrics.tracks import grid, opencv, track

NAME = "OpenCV"
FOCAL = 0.9  # of the longer side: 58 degrees across it
POINTS = 400  # at most
STRETCH = 16  # frames between key frames at most
KEPT, FEW = 0.5, 8  # share of the points, and their number, below which the next key frame begins
JUMP = 0.125  # of the longer side: how far a corner of the picture may move from one frame to the next
LEAST = 40  # tracks that must agree on a pose,
AGREEING = 0.4  # and their share of those that are seen
APART = 1.0  # pixels within which a track agrees
PLANE = 0.9  # share of the tracks that agree on a homography, from which on the scene is a plane
ALIKE = 0.98  # correlation of two frames after a homography, from which on it is the camera's
MOST_LOST = 0.2  # share of the frames; a path that has lost more says nothing
RESTS = 1e-3  # of a path, in its unit: below it there is no translation
FORMS = "8 numbers a line (TUM: time, position, quaternion x y z w) or 12 (KITTI: three rows of a pose)"


class Trajectory(NamedTuple):
    """Poses of a camera, from its coordinates (x right, y down, z forward) to the world's."""

    rotations: Float[np.ndarray, "T 3 3"]
    positions: Float[np.ndarray, "T 3"]
    known: Bool[np.ndarray, " T"]
    """Whether the pose was found."""

    @property
    def lost(self) -> float:
        """The share of frames without a pose."""
        return float(1 - self.known.mean())

    def standing(self) -> "Trajectory":
        """A camera that does not move."""
        return Trajectory(self.rotations[:1].repeat(len(self.known), 0), self.positions[:1].repeat(len(self.known), 0), self.known)


def read(path: Path, frames: int) -> Trajectory:
    """The path of a text file, in one of `FORMS`, of a clip of `frames` frames; a `RequestError` where it is none."""
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        numbers = np.array([[float(each) for each in line] for line in lines])
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{path}: no camera path ({getattr(error, 'strerror', None) or error}); give {FORMS}") from None
    require(numbers.ndim == 2 and numbers.shape[1] in (8, 12) and bool(np.isfinite(numbers).all()), f"{path}: no camera path; give {FORMS}")
    if numbers.shape[1] == 8:
        require(bool((np.linalg.norm(numbers[:, 4:], axis=1) > 0.5).all()), f"{path}: a quaternion of 0; give {FORMS}")
        rotations, positions = Rotation.from_quat(numbers[:, 4:]).as_matrix(), numbers[:, 1:4]
    else:
        poses = numbers.reshape(-1, 3, 4)
        rotations, positions = poses[:, :, :3], poses[:, :, 3]
        orthogonal = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max() < 1e-2
        require(bool(orthogonal and (np.linalg.det(rotations) > 0).all()), f"{path}: its poses are no rotations; give {FORMS}")
    require(len(positions) == frames, f"{path}: {len(positions)} poses, {frames} needed, one a frame")
    return Trajectory(rotations, positions, np.ones(len(positions), bool))


def errors(found: Trajectory, true: Trajectory) -> tuple[float, float]:
    """The mean angle between the rotations, in degrees, and the distance of the positions as a share of the true path, 0 to 1.

    Both paths start from their first camera; then one scale is fitted, so the unit of neither matters, and a camera that goes elsewhere has
    1. Where the true camera does not move, 1 is any motion. Over the frames that are known in both.
    """
    for which, path in (("the clip", found), ("the reference", true)):
        require(
            path.lost <= MOST_LOST,
            f"{path.lost:.0%} of the camera poses of {which} not found; {MOST_LOST:.0%} at most",
        )
    frames = min(len(found.known), len(true.known))
    both = found.known[:frames] & true.known[:frames]
    require(both.sum() > 1, f"camera poses of {int(both.sum())} of {frames} frames: two are needed")
    a, b = (from_first(Trajectory(*(x[:frames][both] for x in path))) for path in (found, true))
    turned = Rotation.from_matrix(a.rotations.transpose(0, 2, 1) @ b.rotations).magnitude()[1:]
    return float(np.degrees(turned).mean()), apart(a.positions, b.positions)


def apart(found: Float[np.ndarray, "T 3"], true: Float[np.ndarray, "T 3"]) -> float:
    """The distance of positions after one scale that is not negative, as a share of the true ones."""
    if np.abs(true).max() < RESTS:
        return float(np.abs(found).max() >= RESTS)
    scale = max(0.0, (found * true).sum() / max(np.square(found).sum(), 1e-12))
    return float(np.linalg.norm(scale * found - true) / np.linalg.norm(true))


def from_first(path: Trajectory) -> Trajectory:
    """The same path in the coordinates of its first camera."""
    first = path.rotations[0].T
    return Trajectory(first @ path.rotations, (path.positions - path.positions[0]) @ first.T, path.known)


def estimate(clip: UInt8[np.ndarray, "T H W 3"]) -> Trajectory:
    """The path of the camera from the pictures alone; positions in units of the scene's depth. Without OpenCV a `RequestError`."""
    focal, (height, width) = FOCAL * max(clip.shape[1:3]), clip.shape[1:3]
    camera = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    rotations, positions, known, depth, key = [np.eye(3)], [np.zeros(3)], [True], 1.0, 0
    while key < len(clip) - 1:
        poses = stretch(clip[key : key + STRETCH + 1], camera)
        base = rotations[key], positions[key]
        for pose in poses or [Pose(np.eye(3), np.zeros(3), 1.0)]:
            rotations.append(base[0] @ pose.rotation.T)
            positions.append(base[1] - depth * base[0] @ pose.rotation.T @ pose.translation)
            known.append(bool(poses))
        depth *= poses[-1].depth if poses else 1.0
        key = len(positions) - 1
    return Trajectory(np.stack(rotations), np.stack(positions), np.array(known))


def corners(frame: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "N 2"]:
    """Points whose place is well defined in both directions, as those of an edge are not."""
    cv2 = opencv()
    apart = max(2, min(frame.shape[:2]) // 40)
    found = cv2.goodFeaturesToTrack(grey(frame), POINTS, 0.01, apart)
    return np.zeros((0, 2), np.float32) if found is None else found.reshape(-1, 2)


class Pose(NamedTuple):
    """From the coordinates of a key frame to those of another one, in units of the scene's depth in the key frame."""

    rotation: Float[np.ndarray, "3 3"]
    translation: Float[np.ndarray, " 3"]
    depth: float
    """The scene's median depth in the other frame."""


def stretch(clip: UInt8[np.ndarray, "T H W 3"], camera: Float[np.ndarray, "3 3"]) -> list[Pose]:
    """The poses of the frames after a key frame, the first, up to one that cannot be found or has few of its points left.

    The first of them decides whether whole pictures are aligned or points are compared.
    """
    points, pictures = corners(clip[0]), [grey(frame) for frame in clip]
    if not len(points):  # one colour
        return []
    tracks = track(clip, points)
    found, last, is_plane, view = [], np.eye(3), True, rays(grid(clip.shape[1:3]), camera)
    for frame in range(1, len(clip)):
        seen = tracks.seen[:, frame]
        if found and (seen.mean() < KEPT or seen.sum() < FEW):
            break
        a, before, b = (tracks.places[seen, i].astype(np.float64) for i in (0, frame - 1, frame))
        homography = aligned(pictures[0], pictures[frame], similarity(before, b) @ last) if is_plane else None
        if homography is not None and agrees(homography @ np.linalg.inv(last), before, b, clip.shape[1:3]):
            last, pose = homography, of_homography(homography, view, camera)
        elif is_plane and found:
            break
        else:
            is_plane, pose = False, of_tracks(a, b, camera)
        if pose is None:
            break
        found.append(pose)
    return found


def of_tracks(a: Float[np.ndarray, "N 2"], b: Float[np.ndarray, "N 2"], camera: Float[np.ndarray, "3 3"]) -> Pose | None:
    """The pose from points of two frames: of a plane if most are on one, else of a scene in space; None if too few agree."""
    cv2 = opencv()
    if len(a) < LEAST:
        return None
    cv2.setRNGSeed(0)  # the same clip has the same path
    homography, on_plane = cv2.findHomography(a, b, cv2.RANSAC, APART)
    if homography is not None and on_plane.mean() > PLANE:
        return of_homography(homography, rays(a, camera), camera)
    essential, mask = cv2.findEssentialMat(a, b, camera, cv2.USAC_MAGSAC, 0.999, APART)
    if essential is None or essential.shape != (3, 3) or mask.sum() < max(LEAST, AGREEING * len(a)):
        return None
    return of_essential(essential, a, b, mask, camera)


def similarity(a: Float[np.ndarray, "N 2"], b: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "3 3"]:
    """Shift, turn and scale on which most points agree, as a homography; none of them where the points are too few."""
    if len(a) < FEW:
        return np.eye(3)
    opencv().setRNGSeed(0)
    found, _ = opencv().estimateAffinePartial2D(a, b, ransacReprojThreshold=APART)
    return np.eye(3) if found is None else np.concatenate([found, [[0, 0, 1]]])


def aligned(key: np.ndarray, frame: np.ndarray, guess: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3 3"] | None:
    """The homography from a key frame's pixels to those of another frame that makes both alike; None if none does."""
    cv2 = opencv()
    until = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-6)
    try:
        alike, found = cv2.findTransformECC(key, frame, guess.astype(np.float32), cv2.MOTION_HOMOGRAPHY, until, None, 5)
    except cv2.error:  # it does not converge
        return None
    return found.astype(np.float64) if alike > ALIKE else None


def agrees(step: Float[np.ndarray, "3 3"], a: Float[np.ndarray, "N 2"], b: Float[np.ndarray, "N 2"], shape: tuple[int, ...]) -> bool:
    """Whether a homography from one frame to the next moves no corner of the picture too far, and most points as they were seen to move.

    Something that is fixed to the picture, or a pattern that repeats, may make pictures alike after a homography that is not the camera's.
    """
    height, width = shape[:2]
    edges = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64)
    jump = np.linalg.norm(moved(edges, step) - edges, axis=1).max()
    return jump < JUMP * max(height, width) and (not len(a) or float(np.median(np.linalg.norm(moved(a, step) - b, axis=1))) < APART)


def moved(points: Float[np.ndarray, "N 2"], homography: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "N 2"]:
    """Where a homography takes points."""
    found = rays(points, np.eye(3)) @ homography.T
    return found[:, :2] / found[:, 2:]


def grey(frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"]:
    return opencv().cvtColor(frame, opencv().COLOR_RGB2GRAY)


def of_homography(homography: np.ndarray, seen: Float[np.ndarray, "N 3"], camera: np.ndarray) -> Pose | None:
    """The pose from a homography; of two planes that are before the camera in all directions `seen`, the one that faces it more."""
    _, rotations, translations, normals = opencv().decomposeHomographyMat(homography, camera)
    choices = [
        (normal.ravel(), rotation, translation.ravel())
        for rotation, translation, normal in zip(rotations, translations, normals, strict=True)
        if np.linalg.det(rotation) > 0 and (np.linalg.norm(translation) < RESTS or (seen @ normal.ravel() > 0).mean() > 0.9)
    ]
    if not choices:
        return None
    normal, rotation, translation = max(choices, key=lambda choice: choice[0][2])
    if np.linalg.norm(translation) < RESTS:  # a rotation alone: no plane
        return Pose(rotation, np.zeros(3), 1.0)
    points = seen / (seen @ normal)[:, None]  # on the plane at distance 1
    return in_units_of_depth(rotation, translation, points[points[:, 2] > 0])


def of_essential(essential: np.ndarray, a: np.ndarray, b: np.ndarray, mask: np.ndarray, camera: np.ndarray) -> Pose | None:
    """The pose for which the points lie before both cameras."""
    _, rotation, translation, _, points = opencv().recoverPose(essential, a, b, camera, distanceThresh=1e3, mask=mask.copy())
    points = (points[:3] / points[3:]).T[mask.ravel().astype(bool)]
    return in_units_of_depth(rotation, translation.ravel(), points[np.isfinite(points).all(1) & (points[:, 2] > 0)])


def in_units_of_depth(rotation: np.ndarray, translation: np.ndarray, points: Float[np.ndarray, "N 3"]) -> Pose | None:
    """A pose in units of the median depth of the points, which are in the key frame's coordinates; None if few are before it."""
    if len(points) < LEAST:
        return None
    depth = float(np.median(points[:, 2]))
    after = float(np.median((points @ rotation.T + translation)[:, 2]))
    return Pose(rotation, translation / depth, after / depth) if after > 0 else None


def rays(places: Float[np.ndarray, "N 2"], camera: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "N 3"]:
    """The directions of pixels, of depth 1."""
    return np.concatenate([places, np.ones((len(places), 1))], 1) @ np.linalg.inv(camera).T
