"""A checkpoint of ours as PyTorch weights: --config=NAME --checkpoint=DIR --layout=diffusers|original|comfyui --out=DIR.

    diffusers   a folder that WanImageToVideoPipeline or WanPipeline loads
    original    the transformer in shards with its config.json, the other parts as one safetensors file each
    comfyui     diffusion_models/NAME.safetensors, the transformer alone in one file, of Wan2.2 one file for each expert

python -m launch.export --config=wan --checkpoint=checkpoints/wan_i2v --layout=diffusers --out=wan_i2v_diffusers

A run of Follow-Your-Motion becomes one LoRA file, both adapters in it:

    diffusers   pytorch_lora_weights.safetensors, for WanPipeline.load_lora_weights
    comfyui     loras/NAME.safetensors, for ComfyUI's LoRA loader; diffusers reads it too

python -m launch.export --config=follow_your_motion --checkpoint=W --layout=comfyui --out=motion_lora

So do the adapters of stage1:lora, and `diffusers` has them in PEFT's form as well.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from safetensors.numpy import save_file

from configs.errors import require
from configs.follow_your_motion import FollowYourMotion
from configs.motion_inversion import MotionInversion
from configs.run import Config, SamplerConfig
from configs.stage1 import TransferLoRA
from configs.wan_animate_2 import WanAnimate2
from data_pipelines.motion_inversion import load_tokens
from launch import command
from launch.exporting import adapters, card, transfer, verify
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import atomic, checksums, inputs, model_folder, outputs, run_folder
from omnitransfer_jax.models.alignment import Alignment
from omnitransfer_jax.models.flat_params import abstract, flat_params
from omnitransfer_jax.weights import convert, lora, qwen2_5_vl, wan_dit
from omnitransfer_jax.weights.files import SHARD_BYTES
from omnitransfer_jax.weights.parts import EXPERT_FOLDERS, LOW_NOISE, MLLM, MLLM_TOKENIZER, PARTS, TOKENIZERS, Part

FLAGS = flags.FlagValues()
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder of the checkpoint to read", required=True, flag_values=FLAGS)
LAYOUT = flags.DEFINE_enum(
    "layout", "diffusers", ["diffusers", "original", "comfyui"], "whose names and folders to write", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "folder to write; new or empty", required=True, flag_values=FLAGS)
VERIFY = flags.DEFINE_bool("verify", False, "of a transfer model: compare a velocity in PyTorch with ours", flag_values=FLAGS)
SCORES = flags.DEFINE_string("scores", None, "scores.json of launch.demo, for the table of the model card", flag_values=FLAGS)

GROUP_BYTES = 2**28  # of leaves that are read at once
DIFFUSERS_VERSION = "0.42.1"  # the version whose classes read what is written here
COMPONENTS = transfer.OF_WAN | {"dit_low_noise": ("transformer_2", "diffusers", "WanTransformer3DModel")}

ALIGNMENT_README = """# What OmniTransfer adds to Wan2.1 from stage 2 on

`mllm_lora/` is a PEFT adapter of Qwen2.5-VL's language model. `alignment.safetensors` holds, in PyTorch's layout:

| tensor | shape |
|---|---|
{shapes}

`queries` are the MetaQueries, one set a task, in the order {tasks}. A task's set is appended to the embedded prompt
[first frame, reference video, template, prompt]; the last hidden states at their places, after the final norm, go through
`connector.first`, GELU (tanh), `connector.second`, GELU (tanh), `connector.third`. The result takes the place of the UMT5 features
in the cross-attention of the target (into: {into}); results of several tasks are concatenated. References do not read it.
"""

TOKENS_README = """# The motion of one clip, as tokens for the cross-attention of Wan2.1

`tokens.safetensors` holds, in float32, what Motion-Textual Inversion (arXiv 2408.00458) learnt, by the branch that reads it:

| branch | sets x rows x width |
|---|---|
{shapes}

Set f belongs to latent frame f of {latent_frames} ({frames} video frames at {fps} fps); the last set is read by all frames. In every
block, a query of latent frame f attends under one softmax to the keys and values of set f and of the last set, and in the text branch
also to {kept}. The rows are {space}.

In the unconditional pass of guidance all frames read the negative prompt instead, padded to as many rows. `config.json` holds the
fields of the method (`inversion`) and of the transformer (`dit`). From the workdir of the training a video is made by

    python -m launch.sample --config=motion_inversion --checkpoint=WORKDIR --first_frame=image.png --out=out.mp4
"""
SPACES = {
    "blocks": "as wide as the blocks: they go to them as they are, behind Wan's text and image projections",
    "encoder": "as wide as the encoder's output: Wan's text or image projection comes first",
}


def main(config: Config) -> None:
    checkpoint, layout = CHECKPOINT.value, LAYOUT.value
    require(bool(checkpoint), "--checkpoint='': empty; give the folder of a checkpoint")
    inputs.require_checkpoint("--checkpoint", checkpoint, type(config))
    outputs.require_new_folder("--out", OUT.value, [checkpoint])
    scores = None if SCORES.value is None else card.read_scores(SCORES.value)
    if VERIFY.value:
        name = FLAGS["config"].value
        require(runs_in_pytorch(config), f"--verify with --config={name} --layout={layout}: no transfer model for PyTorch; leave it out")
        verify.require_pytorch()
    if isinstance(config, MotionInversion):
        tokens = load_tokens(checkpoint, config)
        with atomic.new_folder(Path(OUT.value)) as out:
            export_tokens(config, tokens, out)
        return
    run = epath.Path(checkpoint) if run_folder.is_run(checkpoint) else None
    run_folder.require_same_function(checkpoint, config)
    if run:
        inputs.require_trained("--checkpoint", run)
        if config.alignment.enabled:
            require_learnt(config, run)
    if isinstance(config, FollowYourMotion | TransferLoRA):
        return adapters.write(config, checkpoint, layout, Path(OUT.value), str(FLAGS["config"].value))
    imported = run_folder.imported_weights(checkpoint)
    stored = {*(model_folder.read_model(imported) if imported else ()), *(["dit"] if run else [])}
    if run:
        stored -= {LOW_NOISE.name}  # a training has one network, whichever expert it started from
    aligned = [MLLM] if config.alignment.enabled and runs_in_pytorch(config) else []
    parts = [part for part in (*PARTS, LOW_NOISE, *aligned) if part.name in stored and (layout != "comfyui" or part.table is wan_dit)]
    require(
        bool(parts) or layout != "comfyui",
        f"{checkpoint}: this checkpoint has no dit, which is what ComfyUI's layout holds; take --layout=diffusers",
    )
    with atomic.new_folder(Path(OUT.value)) as out:
        for part in parts:
            export_part(part, config, imported, run if part.name == "dit" else None, out)
        if layout != "comfyui":
            export_rest(config, [part.name for part in parts], imported, run, out)
        if runs_in_pytorch(config):
            trained = run_folder.about(run) if run else None
            card.write(config, str(FLAGS["config"].value), Path(OUT.value), trained, scores, out)
            transfer.write(config, str(FLAGS["config"].value), out)
    if VERIFY.value:
        print(f"verified: a velocity in PyTorch differs by {verify.verify(config, checkpoint, Path(OUT.value)):.1e} from ours")


def export_rest(config: Config, parts: Sequence[str], imported: str, run: epath.Path | None, out: Path) -> None:
    """Writes what stands beside the `parts`: the alignment, the vocabulary, and what a diffusers pipeline needs."""
    if run and config.alignment.enabled:
        export_alignment(config, run, out / "alignment")
    vocabularies = {TOKENIZERS["diffusers"]: TOKENIZERS["original" if LAYOUT.value == "original" else "diffusers"]}
    vocabularies |= {MLLM_TOKENIZER: MLLM_TOKENIZER} if MLLM.name in parts else {}
    for source, place in vocabularies.items():
        if imported and (epath.Path(imported) / source).exists():
            model_folder.require_whole(imported, source)
            copy_folder(epath.Path(imported) / source, out / place)
    if runs_in_pytorch(config):
        write_transfer(config, parts, out)
    elif LAYOUT.value == "diffusers":
        write_pipeline(config, parts, (out / TOKENIZERS["diffusers"]).is_dir(), out)


def export_tokens(config: MotionInversion, tokens: Mapping[str, np.ndarray], out: Path) -> None:
    """Writes the tokens of a motion as one safetensors file, the fields that they depend on as config.json, and a README."""
    rows = {name: np.ascontiguousarray(x[0]) for name, x in tokens.items()}
    save_file(rows, out / "tokens.safetensors", {"format": "pt"})
    size = config.video
    video = {"frames": size.frames, "latent_frames": size.latent_shape(config.vae)[0], "fps": size.fps}
    write_json(out / "config.json", {"inversion": asdict(config.inversion), "video": video, "dit": asdict(config.dit)})
    kept = "the encoded prompt" if config.keeps_prompt else "the encoded empty prompt" if config.inversion.sink else "nothing else"
    shapes = "\n".join(f"| `{name}` | {' x '.join(map(str, x.shape))} |" for name, x in rows.items())
    (out / "README.md").write_text(TOKENS_README.format(shapes=shapes, kept=kept, space=SPACES[config.inversion.space], **video))
    print(f"tokens: {sum(x.size for x in rows.values()):,} numbers of the {' and '.join(rows)} branch", flush=True)


def export_part(part: Part, config: Config, imported: str, run: epath.Path | None, out: Path) -> None:
    """Writes one part leaf by leaf, from the run that trained it or else from the imported weights; and its config.json, if any."""
    start, model, layout = time.monotonic(), getattr(config, part.name), LAYOUT.value
    table, prefix, shard_bytes = part.entries(model, "diffusers" if layout == "diffusers" else "original"), "", SHARD_BYTES
    expert = EXPERT_FOLDERS.get(part.name, "") if config.sampler.boundary > 0 else ""
    if layout == "diffusers":
        folder, stem = out / part.diffusers[0], part.diffusers[1]
    elif layout == "original":
        folder, stem, shard_bytes = out / expert, part.original, SHARD_BYTES if part.table is wan_dit else math.inf
    else:
        name = str(FLAGS["config"].value).replace(":", "_")
        folder, stem = out / "diffusion_models", "_".join(filter(None, (name, expert.removesuffix("_model"))))
        prefix, shard_bytes = part.prefixes[0], math.inf
    shapes = part.shapes(model) if run else model_folder.part_leaves(imported, part.name)
    leaves = trained_leaves(run, part.name, shapes) if run else model_folder.read_part(imported, part.name)
    written = convert.save(leaves, shapes, table, folder, stem, prefix=prefix, shard_bytes=shard_bytes)
    if layout == "diffusers":
        write_json(folder / "config.json", part.table.config_json(model))
    elif layout == "original" and part.table is wan_dit:
        write_json(folder / "config.json", part.table.config_json(model, "original"))
    size = sum(path.stat().st_size for path in written)
    print(f"{part.name}: {len(written)} files, {size / 1e9:.3g} GB, {time.monotonic() - start:.1f} s", flush=True)


def trained_leaves(run: epath.Path, part: str, shapes: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of a part in the run's latest checkpoint, read in groups of at most `GROUP_BYTES`, or one alone that is larger."""
    params = {f"{part}.{path}": leaf for path, leaf in shapes.items()}
    group, size = [], 0
    for path, leaf in shapes.items():
        if group and size + leaf.size * leaf.dtype.itemsize > GROUP_BYTES:
            yield from read_leaves(run, part, params, group)
            group, size = [], 0
        group.append(path)
        size += leaf.size * leaf.dtype.itemsize
    yield from read_leaves(run, part, params, group)


def read_leaves(run: epath.Path, part: str, params: Mapping[str, Any], group: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of a group, read at once."""
    found = run_folder.load_params(run, params, only={f"{part}.{path}" for path in group})
    for path in group:
        yield path, np.asarray(found.pop(f"{part}.{path}"))


def export_alignment(config: Config, run: epath.Path, out: Path) -> None:
    """Writes what stages 2 and 3 add to the transformer: the language model's adapters for PEFT, queries and connector, and a README."""
    model = flat_params(abstract(lambda rngs: Alignment(config, rngs=rngs)))
    params = {f"alignment.{path}": leaf for path, leaf in model.items()}
    added = {f"alignment.{path}" for path in model if not path.startswith("mllm.") or ".lora." in path}
    loaded = {path.removeprefix("alignment."): np.asarray(x) for path, x in run_folder.load_params(run, params, only=added).items()}
    written = export_adapters(config, {path: x for path, x in loaded.items() if ".lora." in path}, out / "mllm_lora")
    rest = {
        path.replace(".kernel", ".weight"): np.ascontiguousarray(x.T if path.endswith(".kernel") else x)
        for path, x in sorted(loaded.items())
        if ".lora." not in path
    }
    save_file(rest, out / "alignment.safetensors", {"format": "pt"})
    shapes = "\n".join(f"| `{name}` | {' x '.join(map(str, x.shape))} |" for name, x in rest.items())
    (out / "README.md").write_text(ALIGNMENT_README.format(shapes=shapes, tasks=", ".join(tasks.NAMES), into=config.alignment.into))
    print(f"alignment: {written} adapter tensors, {len(rest)} of queries and connector", flush=True)


def require_learnt(config: Config, run: epath.Path) -> None:
    """A `RequestError` if adapters that were to learn have learnt nothing: what they add is zero, as before the first step."""
    model = flat_params(abstract(lambda rngs: Alignment(config, rngs=rngs)))
    params = {f"alignment.{path}": leaf for path, leaf in model.items()}
    names = {path: path.replace(".", "/", 1) for path in params if ".lora." in path and path.endswith(".up")}
    trained = {path for path, name in names.items() if any(re.fullmatch(pattern, name) for pattern in config.train.trainable)}
    require(
        not trained or any(np.asarray(x).any() for x in run_folder.load_params(run, params, only=trained).values()),
        f"{run}: all {len(trained)} adapters of the language model are zero, so they have learnt nothing; train for a step or more",
    )


def export_adapters(config: Config, loaded: Mapping[str, np.ndarray], out: Path) -> int:
    """Writes the language model's adapters as a PEFT folder; returns the number of tensors."""
    leaves = {path.removeprefix("mllm."): x for path, x in loaded.items()}
    table = lora.entries(qwen2_5_vl.entries(config.mllm, "original"), leaves, lora.PEFT_PREFIX)
    pieces = {entry.theirs: entry.layout.to_theirs(lora.leaf_of(entry, leaves)) for entry in table}
    out.mkdir(parents=True)
    save_file({name: np.ascontiguousarray(x) for name, x in pieces.items()}, out / "adapter_model.safetensors", {"format": "pt"})
    write_json(out / "adapter_config.json", dict(lora.adapter_config(config.lora, table)))
    return len(table)


def runs_in_pytorch(config: Config) -> bool:
    """Whether what is written is a folder for omnitransfer_torch."""
    return LAYOUT.value == "diffusers" and transfer.is_transfer(config, str(FLAGS["config"].value))


def write_transfer(config: Config, parts: Sequence[str], out: Path) -> None:
    """Writes model_index.json and the scheduler of omnitransfer_torch's pipeline."""
    sampler = config.sampler
    scheduler = transfer.euler_json(sampler, DIFFUSERS_VERSION) if sampler.solver == "euler" else scheduler_json(sampler)
    write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    write_json(out / "model_index.json", transfer.index(parts, out, DIFFUSERS_VERSION))


def write_pipeline(config: Config, parts: Sequence[str], has_vocabulary: bool, out: Path) -> None:
    """Writes what a diffusers pipeline needs beside its parts: model_index.json, the scheduler, and the image preprocessing."""
    write_json(out / "scheduler" / "scheduler_config.json", scheduler_json(config.sampler))
    if isinstance(config, WanAnimate2):
        write_json(out / "modular_model_index.json", modular_json(config, parts, has_vocabulary))
        return
    is_i2v, has_image_branch = config.dit.image_to_video, config.dit.image_dim is not None
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if is_i2v else "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "boundary_ratio": config.sampler.boundary or None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "tokenizer": ["transformers", "T5TokenizerFast"] if has_vocabulary else [None, None],
    }
    for name, (component, *kind) in COMPONENTS.items():
        if name != "image" or is_i2v:
            index[component] = kind if name in parts else [None, None]
    if is_i2v:
        index["image_processor"] = ["transformers", "CLIPImageProcessor"] if has_image_branch else [None, None]
    if has_image_branch:
        write_json(out / "image_processor" / "preprocessor_config.json", preprocessor_json(config.image.image_size))
    write_json(out / "model_index.json", index)


def modular_json(config: WanAnimate2, parts: Sequence[str], has_vocabulary: bool) -> dict[str, Any]:
    """What diffusers' modular pipeline of Wan-Animate-2 reads: where its components lie; null is this folder."""
    distilled = "" if config.sampler.guidance > 1 else "Distilled"
    components = {component: kind for name, (component, *kind) in COMPONENTS.items() if name in parts}
    components |= {"transformer": ["diffusers", "WanAnimate2Transformer3DModel"], "scheduler": ["diffusers", scheduler_of(config.sampler)]}
    components |= {"tokenizer": ["transformers", "T5TokenizerFast"]} if has_vocabulary else {}
    place: dict[str, Any] = {"pretrained_model_name_or_path": None, "variant": None, "revision": None}
    return {
        "_class_name": f"WanAnimate2{distilled}ModularPipeline",
        "_blocks_class_name": f"WanAnimate2{distilled}Blocks",
        "_diffusers_version": DIFFUSERS_VERSION,
    } | {name: [*kind, place | {"type_hint": kind, "subfolder": name}] for name, kind in components.items()}


def scheduler_of(sampler: SamplerConfig) -> str:
    """The diffusers scheduler that takes the steps of `sampler.solver`; of Euler there is none on these times."""
    return "DPMSolverMultistepScheduler" if sampler.solver == "dpm++" else "UniPCMultistepScheduler"


def scheduler_json(sampler: SamplerConfig) -> dict[str, Any]:
    """The scheduler with the settings of Wan."""
    name = scheduler_of(sampler)
    return {
        "_class_name": name, "_diffusers_version": DIFFUSERS_VERSION, "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
        "use_flow_sigmas": True, "flow_shift": sampler.shift, "solver_order": 2,
        "solver_type": "midpoint" if name.startswith("DPM") else "bh2", "lower_order_final": True,
    }  # fmt: skip


def preprocessor_json(size: int) -> dict[str, Any]:
    """CLIP's preprocessing as transformers stores it, with mean and deviation of CLIP's training images."""
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": size},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip


def copy_folder(source: epath.Path, target: Path) -> None:
    """Copies the files of `source`, but its checksums, into the new folder `target`."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if not checksums.NAME.fullmatch(file.name):
            file.copy(target / file.name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    command.run(main, FLAGS)
