"""The pipeline of a transfer model: model_index.json for diffusers, and omnitransfer.json with what diffusers has no place for.

omnitransfer_torch/exported.py reads omnitransfer.json. It is written last and lists the files with their sizes, so a folder without it, or
with other files, is refused there.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.run import Config, SamplerConfig
from omnitransfer_jax import tasks

FILE, FORMAT = "omnitransfer.json", 1
STAGES = ("stage1", "stage2", "stage3")
"""The configurations whose networks transfer; under any other name weights are exported as plain Wan."""
OF_WAN = {  # the name of each part in model_index.json, its library and its class
    "dit": ("transformer", "diffusers", "WanTransformer3DModel"),
    "vae": ("vae", "diffusers", "AutoencoderKLWan"),
    "text": ("text_encoder", "transformers", "UMT5EncoderModel"),
    "image": ("image_encoder", "transformers", "CLIPVisionModel"),
}
COMPONENTS = OF_WAN | {"mllm": ("mllm", "transformers", "Qwen2_5_VLModel")}
TOKENIZERS = ("tokenizer", "mllm_tokenizer")


def is_transfer(config: Config, name: str) -> bool:
    """Whether the configuration NAME[:VARIANT] is that of a network that reads references."""
    return type(config) is Config and config.dit.image_to_video and name.partition(":")[0] in STAGES


def index(parts: Sequence[str], out: Path, version: str) -> dict[str, Any]:
    """The content of model_index.json for the `parts`, and for the vocabularies that lie in `out`."""
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    content: dict[str, Any] = {"_class_name": "OmniTransferPipeline", "_diffusers_version": version, "scheduler": ["diffusers", scheduler]}
    for name, (component, *kind) in COMPONENTS.items():
        content[component] = kind if name in parts else [None, None]
    for place in TOKENIZERS:
        content[place] = ["transformers", "PreTrainedTokenizerFast"] if (out / place).is_dir() else [None, None]
    return content


def euler_json(sampler: SamplerConfig, version: str) -> dict[str, Any]:
    """diffusers' Euler scheduler; given the original's grid, as OmniTransferPipeline does, it takes our steps."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": version, "num_train_timesteps": 1000,
        "shift": sampler.shift, "use_dynamic_shifting": False,
    }  # fmt: skip


def describe(config: Config) -> dict[str, Any]:
    """What the networks' own files do not say, as omnitransfer_torch.exported.Transfer has it."""
    dit, sampler, alignment = config.dit, config.sampler, config.alignment
    inputs = {name: getattr(alignment, name) for name in ("queries", "frames", "frame_pixels", "prompt_tokens", "into")}
    return {
        "tasks": [task._asdict() for task in tasks.TASKS],
        "video": asdict(config.video),
        "reference": asdict(config.data.reference),
        "text_len": dit.text_len,
        "rope_base": dit.rope_base,
        "rope_top": dit.rope_top,
        "references": {
            "attention": dit.references,
            "reach": dit.reach,
            "offsets": dit.offsets,
            "flag": dit.reference_flag,
            "time": dit.reference_time,
            "stack": sampler.stack_references,
        },
        "sampler": {"steps": sampler.steps, "guidance": sampler.guidance, "negative_prompt": sampler.negative_prompt},
        "alignment": inputs if alignment.enabled else None,
    }


def write(config: Config, name: str, out: Path) -> None:
    """Writes omnitransfer.json into the finished folder of an export."""
    sizes = {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    content = {"format": FORMAT, "config": name, "transfer": describe(config), "files": sizes}
    (out / FILE).write_text(json.dumps(content, indent=2) + "\n")
