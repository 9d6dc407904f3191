"""A checkpoint of ours as PyTorch weights: --config=NAME --checkpoint=DIR --layout=diffusers|original|comfyui --out=DIR.

    diffusers   a folder that WanImageToVideoPipeline or WanPipeline loads
    original    the transformer in shards with its config.json, the other parts as one safetensors file each
    comfyui     diffusion_models/NAME.safetensors, the transformer alone in one file

python -m launch.export --config=wan --checkpoint=checkpoints/wan_i2v --layout=diffusers --out=wan_i2v_diffusers
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath

from configs.base import Config
from launch import command
from omnitransfer_jax import checkpoint
from omnitransfer_jax.errors import RequestError
from omnitransfer_jax.weights import convert
from omnitransfer_jax.weights.files import SHARD_BYTES
from omnitransfer_jax.weights.parts import PARTS, TOKENIZERS, Part

FLAGS = flags.FlagValues()
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder of the checkpoint to read", required=True, flag_values=FLAGS)
LAYOUT = flags.DEFINE_enum(
    "layout", "diffusers", ["diffusers", "original", "comfyui"], "whose names and folders to write", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "folder to write; new or empty", required=True, flag_values=FLAGS)

DIFFUSERS_VERSION = "0.42.1"  # whose classes read what is written here
COMPONENTS = {  # what model_index.json calls each part
    "dit": ("transformer", "diffusers", "WanTransformer3DModel"),
    "vae": ("vae", "diffusers", "AutoencoderKLWan"),
    "text": ("text_encoder", "transformers", "UMT5EncoderModel"),
    "image": ("image_encoder", "transformers", "CLIPVisionModel"),
}


def main(config: Config) -> None:
    source, out = epath.Path(CHECKPOINT.value), Path(OUT.value)
    stored = checkpoint.require_model(source, config)
    if out.exists() and any(out.iterdir()):
        raise RequestError(f"{out}: not empty; give a new folder with --out, or empty this one")
    parts = [part for part in PARTS if part.name in stored and (LAYOUT.value != "comfyui" or part.name == "dit")]
    if LAYOUT.value == "comfyui" and not parts:
        raise RequestError(f"{source}: this checkpoint has no dit, which is what ComfyUI's layout holds; take --layout=diffusers")
    for part in parts:
        export_part(part, config, source, out)
    if LAYOUT.value == "diffusers":
        write_pipeline(config, [part.name for part in parts], source, out)
        copy_tokenizer(source, out / TOKENIZERS["diffusers"])
    elif LAYOUT.value == "original":
        copy_tokenizer(source, out / TOKENIZERS["original"])


def export_part(part: Part, config: Config, source: epath.Path, out: Path) -> None:
    """Writes one part, leaf by leaf, and its config.json where the layout has one."""
    start, model, layout = time.monotonic(), getattr(config, part.name), LAYOUT.value
    if layout == "diffusers":
        folder, stem, prefix, shard_bytes = out / part.diffusers[0], part.diffusers[1], "", SHARD_BYTES
    elif layout == "original":
        folder, stem, prefix, shard_bytes = out, part.original, "", SHARD_BYTES if part.name == "dit" else math.inf
    else:
        name = str(FLAGS["config"].value).replace(":", "_")
        folder, stem, prefix, shard_bytes = out / "diffusion_models", name, part.prefixes[0], math.inf
    table = part.entries(model, "diffusers" if layout == "diffusers" else "original")
    leaves = checkpoint.part_leaves(source, part.name)
    written = convert.save(checkpoint.read_part(source, part.name), leaves, table, folder, stem, prefix=prefix, shard_bytes=shard_bytes)
    if layout == "diffusers":
        write_json(folder / "config.json", part.table.config_json(model))
    elif layout == "original" and part.name == "dit":
        write_json(folder / "config.json", part.table.config_json(model, "original"))
    size = sum(path.stat().st_size for path in written)
    print(f"{part.name}: {len(written)} files, {size / 1e9:.3g} GB, {time.monotonic() - start:.1f} s", flush=True)


def write_pipeline(config: Config, parts: list[str], source: epath.Path, out: Path) -> None:
    """What makes a pipeline of the parts: model_index.json, the scheduler, and the image encoder's preprocessing."""
    is_i2v = config.dit.image_dim is not None
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if is_i2v else "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "tokenizer": ["transformers", "T5TokenizerFast"] if (source / "tokenizer").exists() else [None, None],
        "transformer_2": [None, None],
    }
    for name, (component, *kind) in COMPONENTS.items():
        if name != "image" or is_i2v:
            index[component] = kind if name in parts else [None, None]
    if is_i2v:
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
        write_json(out / "image_processor" / "preprocessor_config.json", preprocessor_json(config.image.image_size))
    write_json(out / "scheduler" / "scheduler_config.json", scheduler_json(config.sampler.shift))
    write_json(out / "model_index.json", index)


def scheduler_json(shift: float) -> dict[str, Any]:
    """UniPC as Wan2.1 sets it."""
    return {
        "_class_name": "UniPCMultistepScheduler", "_diffusers_version": DIFFUSERS_VERSION, "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "solver_order": 2, "solver_type": "bh2",
        "lower_order_final": True,
    }  # fmt: skip


def preprocessor_json(size: int) -> dict[str, Any]:
    """CLIP's preprocessing as transformers has it, mean and deviation of CLIP's training images included."""
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": size},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip


def copy_tokenizer(source: epath.Path, target: Path) -> None:
    if not (source / "tokenizer").exists():
        return
    target.mkdir(parents=True)
    for file in (source / "tokenizer").iterdir():
        file.copy(target / file.name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    command.run(main, FLAGS)
