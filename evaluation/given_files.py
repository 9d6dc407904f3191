"""The metrics that need a file which the user names: by flag of launch.evaluate, what the file is and which metrics it gives.

A file that is absent, or has another SHA-256 than was given, costs its metrics, by name, and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.errors import RequestError, require
from evaluation.measures import Metric, Sample, Score, camera_scores, camera_values
from evaluation.metrics import cameras, embeddings, faces, frechet, i3d, lpips, motion_fidelity, text_images, track_files
from evaluation.metrics.weight_file import checked
from evaluation.rows import TRANSFER
from omnitransfer_jax.folders import fingerprint


class Given(NamedTuple):
    """A flag that names a file."""

    title: str
    """Of the metrics, where they are missing."""
    about: str
    metrics: Callable[[Mapping[str, str]], list[Metric]]
    """From the values of all these flags; a `RequestError` where the file is not what is named."""


def load(values: Mapping[str, str]) -> tuple[list[Metric], dict[str, str]]:
    """The metrics of the files that are named, and by name the reason why some are missing."""
    found, missing = [], {}
    for name, given in FLAGS.items():
        if values[name]:
            try:
                found += given.metrics(values)
            except RequestError as error:
                missing[given.title] = str(error)
    return found, missing


def with_lpips(values: Mapping[str, str]) -> list[Metric]:
    """LPIPS to the first frame and to the truth."""
    path, digest = checked(values["lpips"])
    params = lpips.load(path)
    first, truth = "LPIPS to the first frame", "LPIPS to the truth"
    return [
        Metric(
            first,
            {first: Score("lower", "distance of each frame to the first frame that was given; 0 for a frozen clip")},
            lambda sample: {first: lpips.lpips(params, sample.clip, sample.first_frame[None])},
            lambda sample: sample.case.first_frame is not None and sample.case.is_temporal,
            digest,
        ),
        Metric(
            truth,
            {truth: Score("lower", "distance of each frame to the true clip's")},
            lambda sample: {truth: lpips.lpips(params, sample.clip, sample.truth)},
            lambda sample: sample.case.truth is not None,
            digest,
        ),
    ]


def with_i3d(values: Mapping[str, str]) -> list[Metric]:
    """The Fréchet video distance to the references, and to the true clips where they are known."""
    path, digest = checked(values["i3d"])
    params = i3d.load(path)

    def measure(sample: Sample) -> dict[str, float]:
        clips = {"clip": sample.clip}
        if sample.row == TRANSFER:
            clips["reference"] = sample.reference
            clips |= {"truth": sample.truth} if sample.case.truth is not None else {}
        return {f"{kind} {i}": float(x) for kind, clip in clips.items() for i, x in enumerate(i3d.logits_of(params, clip))}

    def of_all(own: Sequence[dict[str, float]], transfer: Sequence[dict[str, float]]) -> dict[str, float]:
        made, others = features(own, "clip"), {name: features(transfer, name) for name in ("reference", "truth")}
        known = {name: found for name, found in others.items() if len(found)} or {"reference": others["reference"]}
        return {FVD[name]: frechet.distance(made, found) for name, found in known.items()}

    about = "Fréchet distance of I3D's logits, all clips of the row together, to those of the"
    scores = {
        FVD["reference"]: Score("lower", f"{about} references; biased upwards where clips are few"),
        FVD["truth"]: Score("lower", f"{about} true clips; biased upwards where clips are few"),
    }
    return [Metric("FVD", scores, measure, weights=digest, of_all=of_all)]


FVD = {"reference": "FVD to the references", "truth": "FVD to the truths"}


def features(values: Sequence[dict[str, float]], kind: str) -> np.ndarray:
    """The logits of one kind of clip, a row each; those of one reference in several cases once."""
    rows = [tuple(found[f"{kind} {i}"] for i in range(i3d.CLASSES)) for found in values if f"{kind} 0" in found]
    return np.array(rows if kind == "clip" else list(dict.fromkeys(rows))).reshape(-1, i3d.CLASSES)


def with_style(values: Mapping[str, str]) -> list[Metric]:
    """How alike the style descriptors of the clip and of four frames of its reference are."""
    path, digest = checked(values["style"])
    network = embeddings.Network(path, embeddings.CLIP)
    mean, best = (f"style {kind} ({Path(path).stem})" for kind in ("mean", "best"))

    def measure(sample: Sample) -> dict[str, float]:
        found = embeddings.similarity(network(sample.clip), network(embeddings.spaced(sample.reference)))
        return dict(zip((mean, best), found, strict=True))

    scores = {
        mean: Score("higher", "cosine of style descriptors, all frames with 4 of the reference"),
        best: Score("higher", "the same, of the nearest two frames"),
    }
    return [Metric(mean, scores, measure, lambda sample: sample.case.task == "style", digest)]


def with_faces(values: Mapping[str, str]) -> list[Metric]:
    """How alike the faces of the clip and of four frames of its reference are, and in how many frames there is none."""
    path, digest = checked(values["face"])
    network, find = faces.load(path), faces.detector()
    mean, best, without = (f"{kind} ({Path(path).stem})" for kind in ("identity mean", "identity best", "frames without a face"))

    def measure(sample: Sample) -> dict[str, float]:
        own, given = (faces.faces_of(clip, find, network) for clip in (sample.clip, embeddings.spaced(sample.reference)))
        require(len(given) > 0, f"no face in {embeddings.REFERENCES} frames of the reference")
        require(len(own) > 0, f"no face in {len(sample.clip)} frames")
        found = embeddings.similarity(network.embed(own), network.embed(given))
        return {mean: found[0], best: found[1], without: 1 - len(own) / len(sample.clip)}

    scores = {
        mean: Score("higher", "cosine of the faces' vectors, all frames that have one with 4 of the reference"),
        best: Score("higher", "the same, of the nearest two faces"),
        without: Score("", "share of the frames in which no face was found; a clip without any is a failure"),
    }
    return [Metric(mean, scores, measure, lambda sample: sample.case.task == "id", digest)]


def with_clip(values: Mapping[str, str]) -> list[Metric]:
    """How well the clip fits its prompt."""
    folder, digest = checked(values["clip"])
    network, name = text_images.load(folder), f"text similarity ({Path(folder).name})"
    return [
        Metric(
            name,
            {name: Score("higher", f"cosine of the vectors of the prompt and of {text_images.FRAMES} frames, mean")},
            lambda sample: {name: float((network.images(frames_of(sample)) @ network.text(sample.case.prompt)).mean())},
            lambda sample: bool(sample.case.prompt),
            digest,
        )
    ]


def with_aesthetic(values: Mapping[str, str]) -> list[Metric]:
    """How the clip looks, by a linear head on the vectors of `--clip`."""
    require(bool(values["clip"]), "its head stands on the network of --clip; give that too")
    (path, own), (folder, digest) = (checked(values[flag]) for flag in ("aesthetic", "clip"))
    head, network, name = text_images.AestheticHead(path), text_images.load(folder), f"aesthetic ({Path(path).stem})"
    about = f"a linear head on the vectors of {text_images.FRAMES} frames, a tenth of it; knows nothing of the reference"
    return [
        Metric(
            name,
            {name: Score("higher", about)},
            lambda sample: {name: head(network.images(frames_of(sample)))},
            weights=fingerprint.of_pairs((("head", own), ("network", digest))),
        )
    ]


def frames_of(sample: Sample) -> np.ndarray:
    """The frames that are compared with a text."""
    return embeddings.spaced(sample.clip, text_images.FRAMES)


def with_tracks(values: Mapping[str, str]) -> list[Metric]:
    """Motion fidelity from tracks in files, DIR/ROW/CASE.npz and DIR/reference/CLIP.npz."""
    folder, digest = checked(values["tracks"])
    name = f"MF ({Path(folder).name})"

    def measure(sample: Sample) -> dict[str, float]:
        own, given = (track_files.read(path, sample.size.frames) for path in paths(folder, sample, ".npz"))
        if sample.row == "still":
            own = own.standing()
        return {name: motion_fidelity.motion_fidelity(own, given)}

    about = "cosine of the motion of given tracks with the reference's, two-sided"
    return [Metric(name, {name: Score("higher", about)}, measure, lambda sample: is_given(folder, sample), digest)]


def with_cameras(values: Mapping[str, str]) -> list[Metric]:
    """Errors of camera paths in files, DIR/ROW/CASE.txt and DIR/reference/CLIP.txt."""
    folder, digest = checked(values["cameras"])

    def measure(sample: Sample) -> dict[str, float]:
        own, given = (cameras.read(path, sample.size.frames) for path in paths(folder, sample, ".txt"))
        return camera_values(Path(folder).name, own.standing() if sample.row == "still" else own, given)

    scores = camera_scores(Path(folder).name)
    return [Metric(next(iter(scores)), scores, measure, lambda sample: is_given(folder, sample), digest)]


def is_given(folder: str, sample: Sample) -> bool:
    """Whether the folder has files of a row, and the clip is of a task about motion."""
    return sample.case.task in ("motion", "camera") and (sample.row in ("copied", "still") or Path(folder, sample.row).is_dir())


def paths(folder: str, sample: Sample, ending: str) -> tuple[Path, Path]:
    """The files of a clip and of its reference; controls that are made of the reference have its file."""
    reference = Path(folder, "reference", sample.case.clip + ending)
    own = reference if sample.row in ("copied", "still") else Path(folder, sample.row, sample.case.id + ending)
    for path in (own, reference):
        require(path.is_file(), f"{path}: no such file")
    return own, reference


FLAGS: dict[str, Given] = {
    "lpips": Given("LPIPS", "weights of LPIPS (evaluation/metrics/lpips.py)", with_lpips),
    "i3d": Given("FVD", "weights of I3D, for the Fréchet video distance (evaluation/metrics/i3d.py)", with_i3d),
    "face": Given("identity", "a face network, safetensors of dlib's or ONNX (evaluation/metrics/faces.py)", with_faces),
    "style": Given("style", "a style descriptor, ONNX (evaluation/metrics/embeddings.py)", with_style),
    "clip": Given("text similarity", "folder of a CLIP in transformers' layout (evaluation/metrics/text_images.py)", with_clip),
    "aesthetic": Given("aesthetic", "a linear head on the vectors of --clip (evaluation/metrics/text_images.py)", with_aesthetic),
    "tracks": Given("MF of given tracks", "folder of tracks, ROW/CASE.npz (evaluation/metrics/track_files.py)", with_tracks),
    "cameras": Given("given camera paths", "folder of camera paths, ROW/CASE.txt (evaluation/metrics/cameras.py)", with_cameras),
}
