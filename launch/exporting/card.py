"""README.md of an export: a model card as the hub reads it, from the configuration, the run and the scores that there are."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import RequestError, require
from configs.run import Config
from omnitransfer_jax import tasks

CARD = """---
license: {licence}
library_name: diffusers
pipeline_tag: video-to-video
tags: [omnitransfer, {tags}]
---
# OmniTransfer ({name})

A reference video gives its identity, style, motion, camera movement or effect to a new video: OmniTransfer (arXiv 2601.14250), an
independent implementation, on Wan2.1.

## Run it

```python
import torch
from omnitransfer_torch import OmniTransferPipeline  # pip install '.[torch]' in the project that made this folder
pipe = OmniTransferPipeline.from_pretrained("{folder}", torch_dtype=torch.bfloat16).to("cuda")
frames = pipe(task=["motion"], reference=["ref.mp4"], first_frame="image.png", prompt="...").frames[0]
```

or `python -m omnitransfer_torch --model={folder} --task=motion --reference=ref.mp4 --first_frame=image.png --out=out.mp4`. Plain Wan
pipelines load the transformer and give a video that knows nothing of the reference: they have no reference branch.

## Tasks

| task | family | starts from | mask channels of the reference | its tokens stand |
|---|---|---|---|---|
{tasks}

Videos of {frames} frames, {height} x {width}, {fps} fps; references of {reference_frames} frames, {reference_height} x {reference_width}.

## Base model and licence

{base}

## Training

{training}

## Evaluation

{evaluation}

## Files

| | |
|---|---|
| `omnitransfer.json` | tasks, offsets, sizes, sampler; and every file with its size, by which a folder that is not whole is refused |
{files}
"""
FILES = {
    "model_index.json": "the parts and their classes, as diffusers reads them",
    "transformer": "Wan's transformer, trained to read references (diffusers' WanTransformer3DModel)",
    "vae": "Wan's video autoencoder",
    "text_encoder": "UMT5",
    "tokenizer": "its vocabulary",
    "image_encoder": "CLIP, for first frames",
    "mllm": "Qwen2.5-VL",
    "mllm_tokenizer": "its vocabulary",
    "alignment": "adapters of Qwen2.5-VL (PEFT), MetaQueries and connector; it has a README of its own",
    "scheduler": "the solver's settings",
    "training.json": "the configuration of the training",
}
QWEN = {2048: ("3B", "Qwen Research License: not for commercial use", "other"), 3584: ("7B", "Apache-2.0", "apache-2.0")}
WIDTH = 5120  # of Wan2.1 14B


def write(config: Config, name: str, folder: Path, run: Mapping[str, Any] | None, scores: Mapping[str, Any] | None, out: Path) -> None:
    """Writes README.md, and training.json if the weights come from a run; `folder` is where the export will lie.

    `run` is what the run's config.json holds beside `steps`; `scores` a table as `evaluation.transfer.Results.table` makes it.
    """
    if run is not None:
        (out / "training.json").write_text(json.dumps(_without_paths(run), indent=2) + "\n")
    base, licence = base_models(config)
    rows = [f"| `{task.name}` | {task.family} | {_start(task)} | {task.flag:g} | {_place(config, task)} |" for task in tasks.TASKS]
    video, reference = config.video, config.data.reference
    content = CARD.format(
        licence=licence,
        tags="image-to-video, text-to-video",
        name=name,
        folder=folder.name,
        tasks="\n".join(rows),
        frames=video.frames,
        height=video.height,
        width=video.width,
        fps=video.fps,
        reference_frames=reference.frames,
        reference_height=reference.height,
        reference_width=reference.width,
        base=base,
        training=training(name, run),
        evaluation=evaluation(scores),
        files="\n".join(f"| `{file}` | {what} |" for file, what in FILES.items() if (out / file).exists()),
    )
    (out / "README.md").write_text(content)


def base_models(config: Config) -> tuple[str, str]:
    """What the weights are made of, and the licence as the hub names it. Sizes that nobody published have no name."""
    published = config.dit.dim == WIDTH
    lines = ["Wan2.1-I2V-14B (Apache-2.0)." if published else f"A transformer of Wan2.1's architecture, width {config.dit.dim}."]
    licence = "apache-2.0"
    if config.alignment.enabled:
        size, words, name = QWEN.get(config.mllm.dim, ("", "", "apache-2.0"))
        lines.append(
            f"Qwen2.5-VL-{size} ({words})." if size else f"A language model of Qwen2.5-VL's architecture, width {config.mllm.dim}."
        )
        licence = licence if name == "apache-2.0" else name
    lines.append("The licences are those of the published weights at the time of writing; look them up where yours came from.")
    return "\n".join(lines), licence


def training(name: str, run: Mapping[str, Any] | None) -> str:
    """Configuration, steps and digests of the training."""
    if run is None:
        return f"These are imported weights under the configuration `{name}`; no training of this project is in them."
    train, digest = run["train"], run.get("data_digest", "")
    lines = [f"Configuration `{name}` (`training.json`), {run['steps']} steps of {train['batch_size']} samples."]
    lines.append(f"Digest of the training data: `{digest}`." if digest else "The run has no digest of its data.")
    if run.get("origin_digest"):
        lines.append(f"Digest of the weights it started from: `{run['origin_digest']}`.")
    return "\n".join(lines)


def evaluation(scores: Mapping[str, Any] | None) -> str:
    """The table of scores, with 95% bootstrap intervals."""
    if scores is None:
        return "Not evaluated."
    lines = ["| task | control | score | mean | 95% interval | pairs |", "|---|---|---|---|---|---|"]
    for task, controls in scores.items():
        for control, found in controls.items():
            for name, entry in found.items():
                low, high = entry["interval"]
                lines.append(f"| {task} | {control} | {name} | {entry['mean']:.3g} | {low:.3g} to {high:.3g} | {entry['pairs']} |")
    return "\n".join(lines)


def read_scores(path: str, names: Sequence[str] = tasks.NAMES) -> Mapping[str, Any]:
    """The table in a scores.json of launch.demo; another file is a `RequestError`."""
    require(Path(path).is_file(), f"--scores={path}: no such file; give scores.json of launch.demo, or leave it out")
    try:
        scores = json.loads(Path(path).read_text())
        require(set(scores) <= set(names), f"--scores={path}: {', '.join(set(scores) - set(names))}: no tasks")
        evaluation(scores)
    except RequestError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"--scores={path}: no table of scores ({type(error).__name__}); give scores.json of launch.demo") from None
    return scores


def _start(task: tasks.Task) -> str:
    return "a first frame" if task.family == "temporal" else "a prompt"


def _place(config: Config, task: tasks.Task) -> str:
    return "right of the target's" if task.family == "temporal" and config.dit.offsets == "task" else "behind the target's, in time"


def _without_paths(run: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the folders of the machine that trained."""
    content = {**run, "train": {**run["train"], "init_from": ""}}
    return content | {"data": {**run["data"], "path": ""}}
