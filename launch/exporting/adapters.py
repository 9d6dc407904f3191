"""Adapters of the transformer as files that other tools load: those of Follow-Your-Motion, and of stage 1.

    diffusers   pytorch_lora_weights.safetensors, for load_lora_weights; of stage 1 also PEFT's adapter_model.safetensors
    comfyui     loras/NAME.safetensors, for ComfyUI's LoRA loader; diffusers reads it too

Factors (alpha / rank, and head masks) are in `lora_B`, so the files have no alpha; PEFT's has it in adapter_config.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from configs.errors import require
from configs.follow_your_motion import FollowYourMotion
from configs.run import Config
from configs.stage1 import TransferLoRA
from launch.exporting import transfer
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import atomic, run_folder
from omnitransfer_jax.methods import follow_your_motion
from omnitransfer_jax.weights import lora, wan_dit

FILES = {
    "diffusers": ("pytorch_lora_weights.safetensors", "transformer."),
    "comfyui": ("loras/{name}.safetensors", "diffusion_model."),
}
BASE_NAMES = {"text-to-video": "Wan2.1 text-to-video, width {dim}", "image-to-video": "Wan2.1 image-to-video, width {dim}"}
NEEDS = (
    "the reference branch: a reference's keys and values, with the offset and the flag of its task, are read by the target. Plain Wan "
    "pipelines load this LoRA and make videos that know nothing of a reference; take omnitransfer_torch or comfyui_omnitransfer."
)
README = """# Adapters of Wan2.1's transformer for OmniTransfer

`{file}` has rank {rank}, from {steps} steps of `{name}`. Base: {base}. It needs {needs}

```python
from omnitransfer_torch import OmniTransferPipeline  # pip install '.[torch]' in the project that made this folder
pipe = OmniTransferPipeline.from_pretrained("BASE")  # launch.export --config=stage1 of the imported base weights
pipe.load_lora_weights("{file}")
frames = pipe(task="motion", reference="ref.mp4", first_frame="image.png").frames[0]
```

`__metadata__` of the file holds the tasks, flags and offsets that it was trained with.
"""


def write(config: FollowYourMotion | TransferLoRA, checkpoint: str, layout: str, out: Path, name: str) -> None:
    """Writes the adapters of a run into the new folder `out`; `name` is that of the configuration."""
    require(run_folder.is_run(checkpoint), f"--checkpoint={checkpoint}: no run of {name}, whose adapters are written; give one")
    require(layout != "original", f"--layout={layout}: a LoRA has none of that; take diffusers or comfyui")
    with atomic.new_folder(out) as folder:
        path = folder / FILES[layout][0].format(name=name.replace(":", "_"))
        path.parent.mkdir(exist_ok=True)
        count = (
            motion(config, checkpoint, layout, path) if isinstance(config, FollowYourMotion) else stage1(config, checkpoint, layout, path)
        )
        if isinstance(config, TransferLoRA):
            file, steps = path.relative_to(folder).as_posix(), run_folder.steps_done(checkpoint)
            content = README.format(file=file, rank=config.adapter.rank, steps=steps, name=name, base=base_name(config), needs=NEEDS)
            (folder / "README.md").write_text(content)
    print(f"wrote {out / path.relative_to(folder)}: {count} tensors")


def motion(config: FollowYourMotion, checkpoint: str, layout: str, path: Path) -> int:
    """Both adapters of Follow-Your-Motion as one LoRA of twice their rank; returns the number of tensors."""
    params = follow_your_motion.one_adapter(load_models.load_adapters(checkpoint, config), config)
    about = {"method": "Follow-Your-Motion", "rank": str(2 * config.motion.lora.rank)}
    return save(params, config, layout, FILES[layout][1], path, about | {"steps": str(run_folder.steps_done(checkpoint))})


def stage1(config: TransferLoRA, checkpoint: str, layout: str, path: Path) -> int:
    """The adapters of stage 1; with `diffusers` also in PEFT's form, beside `path`. Returns the number of tensors."""
    params = {at: np.asarray(x) for at, x in load_models.load_transfer_adapters(checkpoint, config).items()}
    learnt = any(x.any() for at, x in params.items() if at.endswith(".up"))
    require(learnt, f"{checkpoint}: all adapters are zero, so they have learnt nothing; train for a step or more")
    folded = {at: x * np.float32(config.adapter.scale) if at.endswith(".up") else x for at, x in params.items()}
    about = {
        "method": "OmniTransfer",
        "needs": NEEDS,
        "rank": str(config.adapter.rank),
        "steps": str(run_folder.steps_done(checkpoint)),
        "omnitransfer": json.dumps(transfer.describe(config)),
    }
    count = save(folded, config, layout, FILES[layout][1], path, about)
    if layout == "diffusers":
        save(params, config, layout, lora.PEFT_PREFIX, path.with_name("adapter_model.safetensors"), about)
        table = lora.entries(wan_dit.entries(config.dit, "diffusers"), params, lora.PEFT_PREFIX)
        path.with_name("adapter_config.json").write_text(json.dumps(lora.adapter_config(config.adapter, table), indent=2) + "\n")
    return count


def save(params: Mapping[str, Any], config: Config, layout: str, prefix: str, path: Path, about: Mapping[str, str]) -> int:
    """Writes adapters under the names of a layout behind `prefix`, with what the file is about; returns the number of tensors."""
    table = lora.entries(wan_dit.entries(config.dit, "diffusers" if layout == "diffusers" else "original"), params, prefix)
    leaves = {at: np.asarray(x) for at, x in params.items()}
    pieces = {entry.theirs: np.ascontiguousarray(entry.layout.to_theirs(lora.leaf_of(entry, leaves))) for entry in table}
    save_file(pieces, path, {"format": "pt", "base_model": base_name(config), **about})
    return len(pieces)


def base_name(config: Config) -> str:
    """The network that the adapters stand on."""
    return BASE_NAMES["image-to-video" if config.dit.image_to_video else "text-to-video"].format(dim=config.dit.dim)
