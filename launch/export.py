"""A checkpoint of ours as PyTorch weights: --config=NAME --checkpoint=DIR --layout=diffusers|original|comfyui --out=DIR.

    diffusers   a folder that WanImageToVideoPipeline or WanPipeline loads
    original    the transformer in shards with its config.json, the other parts as one safetensors file each
    comfyui     diffusion_models/NAME.safetensors, the transformer alone in one file

python -m launch.export --config=wan --checkpoint=checkpoints/wan_i2v --layout=diffusers --out=wan_i2v_diffusers
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from safetensors.numpy import save_file

from configs.errors import RequestError
from configs.run import Config
from launch import command
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import model_folder, run_folder
from omnitransfer_jax.models.alignment import Alignment
from omnitransfer_jax.models.flat_params import abstract, flat_params
from omnitransfer_jax.weights import convert, lora, qwen2_5_vl
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

ALIGNMENT_README = """# What OmniTransfer adds to Wan2.1 from stage 2 on

`mllm_lora/` is a PEFT adapter of Qwen2.5-VL's language model. `alignment.safetensors` holds, in PyTorch's layout:

| tensor | shape |
|---|---|
{shapes}

`queries` are the MetaQueries, one set a task, in the order {tasks}. A task's set is appended to the embedded prompt
[first frame, reference video, template, prompt]; the last hidden states at their places, after the final norm, go through
`connector.first`, GELU (tanh), `connector.second`, GELU (tanh), `connector.third`. The result takes the place of the UMT5 features
in the cross-attention of the target (into: {into}); several tasks' results lie behind one another. References do not read it.
"""


def main(config: Config) -> None:
    trained, out = epath.Path(CHECKPOINT.value), Path(OUT.value)
    if is_run := run_folder.is_run(CHECKPOINT.value):
        run_folder.require_same_model(trained, config)
    source = epath.Path(run_folder.imported_weights(CHECKPOINT.value))
    stored = (*(model_folder.require_model(source, config) if str(source) != "." else ()), *(["dit"] if is_run else []))
    if out.exists() and any(out.iterdir()):
        raise RequestError(f"{out}: not empty; give a new folder with --out, or empty this one")
    parts = [part for part in PARTS if part.name in stored and (LAYOUT.value != "comfyui" or part.name == "dit")]
    if LAYOUT.value == "comfyui" and not parts:
        raise RequestError(f"{source}: this checkpoint has no dit, which is what ComfyUI's layout holds; take --layout=diffusers")
    for part in parts:
        export_part(part, config, source, trained if is_run and part.name == "dit" else None, out)
    if is_run and config.alignment.enabled and LAYOUT.value != "comfyui":
        export_alignment(config, trained, out / "alignment")
    if LAYOUT.value == "diffusers":
        write_pipeline(config, [part.name for part in parts], source, out)
        copy_tokenizer(source, out / TOKENIZERS["diffusers"])
    elif LAYOUT.value == "original":
        copy_tokenizer(source, out / TOKENIZERS["original"])


def export_part(part: Part, config: Config, source: epath.Path, run: epath.Path | None, out: Path) -> None:
    """Writes one part of the imported weights, or as a `run` trained it, leaf by leaf, and its config.json where the layout has one."""
    start, model, layout = time.monotonic(), getattr(config, part.name), LAYOUT.value
    if layout == "diffusers":
        folder, stem, prefix, shard_bytes = out / part.diffusers[0], part.diffusers[1], "", SHARD_BYTES
    elif layout == "original":
        folder, stem, prefix, shard_bytes = out, part.original, "", SHARD_BYTES if part.name == "dit" else math.inf
    else:
        name = str(FLAGS["config"].value).replace(":", "_")
        folder, stem, prefix, shard_bytes = out / "diffusion_models", name, part.prefixes[0], math.inf
    table = part.entries(model, "diffusers" if layout == "diffusers" else "original")
    leaves = part.shapes(model) if run else model_folder.part_leaves(source, part.name)
    arrays = trained_leaves(run, part.name, leaves) if run else model_folder.read_part(source, part.name)
    written = convert.save(arrays, leaves, table, folder, stem, prefix=prefix, shard_bytes=shard_bytes)
    if layout == "diffusers":
        write_json(folder / "config.json", part.table.config_json(model))
    elif layout == "original" and part.name == "dit":
        write_json(folder / "config.json", part.table.config_json(model, "original"))
    size = sum(path.stat().st_size for path in written)
    print(f"{part.name}: {len(written)} files, {size / 1e9:.3g} GB, {time.monotonic() - start:.1f} s", flush=True)


def trained_leaves(run: epath.Path, part: str, leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of a part as the run's latest checkpoint has them, one at a time."""
    params = {f"{part}.{path}": leaf for path, leaf in leaves.items()}
    for path in leaves:
        yield path, np.asarray(run_folder.load_params(run, params, only={f"{part}.{path}"})[f"{part}.{path}"])


def export_alignment(config: Config, run: epath.Path, out: Path) -> None:
    """What stages 2 and 3 add to the transformer: the language model's adapters as PEFT reads them, queries and connector, and a README."""
    model = flat_params(abstract(lambda rngs: Alignment(config, rngs=rngs)))
    added = {path: leaf for path, leaf in model.items() if not path.startswith("mllm.") or ".lora." in path}
    params = {f"alignment.{path}": leaf for path, leaf in model.items()}
    loaded = run_folder.load_params(run, params, only={f"alignment.{path}" for path in added})
    arrays = {path.removeprefix("alignment."): np.asarray(x) for path, x in loaded.items()}
    adapters = {path.removeprefix("mllm."): x for path, x in arrays.items() if ".lora." in path}
    table = lora.entries(qwen2_5_vl.entries(config.mllm, "original"), adapters, lora.PEFT_PREFIX)
    (out / "mllm_lora").mkdir(parents=True)
    tensors = {e.theirs: e.layout.to_theirs(adapters[e.ours] if e.layer is None else adapters[e.ours][e.layer]) for e in table}
    save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()}, out / "mllm_lora" / "adapter_model.safetensors", {"format": "pt"}
    )
    write_json(out / "mllm_lora" / "adapter_config.json", dict(lora.adapter_config(config.lora, table)))
    rest = {path: x for path, x in arrays.items() if ".lora." not in path}
    names = {path: path.replace(".kernel", ".weight") for path in rest}
    save_file(
        {names[p]: np.ascontiguousarray(x.T if p.endswith(".kernel") else x) for p, x in rest.items()},
        out / "alignment.safetensors",
        {"format": "pt"},
    )
    shapes = "\n".join(
        f"| `{names[p]}` | {' x '.join(map(str, (x.T if p.endswith('.kernel') else x).shape))} |" for p, x in sorted(rest.items())
    )
    (out / "README.md").write_text(ALIGNMENT_README.format(shapes=shapes, tasks=", ".join(tasks.NAMES), into=config.alignment.into))
    print(f"alignment: {len(tensors)} adapter tensors, {len(rest)} of queries and connector", flush=True)


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
