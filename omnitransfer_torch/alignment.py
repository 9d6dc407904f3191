"""The context from stage 2 on: first frame, reference, template and prompt through Qwen2.5-VL, the task's MetaQueries behind them.

<|im_start|>user
<|vision_start|> image_pad x n <|vision_end|> <|vision_start|> video_pad x m <|vision_end|> TEMPLATE PROMPT <|im_end|>
<|im_start|>assistant
queries                                                                  -> last states -> connector -> context
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from configs.errors import require
from omnitransfer_jax.tokenizer import clean_prompt
from omnitransfer_torch.exported import AGAIN, Inputs, Transfer, Video

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images (OpenAI CLIP)
START, END, VISION_START, VISION_END = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
USER, BREAK, ASSISTANT = "user\n", "\n", "assistant\n"
PEFT_PREFIX = "base_model.model.model."  # of the adapters' names, which are those of Qwen2_5_VLForConditionalGeneration


class Connector(nn.Module):
    """Three linear layers with GELU, in its tanh form, between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        self.first = nn.Linear(in_dim, hidden_dim)
        self.second = nn.Linear(hidden_dim, hidden_dim)
        self.third = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = F.gelu(layer(x), approximate="tanh")
        return self.third(x)


class Alignment(ModelMixin, ConfigMixin):
    """The MetaQueries of every task "T Q D", and the connector; a model of diffusers, so that its memory tools know it."""

    @register_to_config
    def __init__(self, shape: tuple[int, int, int], hidden_dim: int, out_dim: int):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(shape))
        self.connector = Connector(shape[-1], hidden_dim, out_dim)

    def forward(self, states: Tensor) -> Tensor:
        """The context "B Q E" from the last states of the queries, float32."""
        return self.connector(states.to(self.queries.dtype))


class Prompt(NamedTuple):
    """What the language model reads of one reference."""

    tokens: Tensor
    """Ids "1 S"; a placeholder in the place of each vision feature."""
    clips: dict[str, Tensor]
    """Patches and grids by the names of `Qwen2_5_VLModel.forward`."""


def read_alignment(folder: Path) -> Alignment:
    """The queries and the connector of an export, float32."""
    path = folder / "alignment" / "alignment.safetensors"
    require(path.is_file(), f"{path}: absent; {AGAIN}")
    tensors = load_file(path)
    hidden, _ = tensors["connector.first.weight"].shape
    shape: Any = tuple(tensors["queries"].shape)
    model = Alignment(shape, hidden, tensors["connector.third.weight"].shape[0])
    model.load_state_dict(tensors)
    return model.requires_grad_(False)


def add_adapters(mllm: Any, folder: Path, merge: bool) -> None:
    """Gives the language model the adapters of an export through PEFT, or adds them to its weights with `merge`."""
    place = folder / "alignment" / "mllm_lora"
    config = json.loads((place / "adapter_config.json").read_text())
    targets = [name.removeprefix("model.") for name in config["target_modules"]]
    tensors = {name.removeprefix(PEFT_PREFIX): x for name, x in load_file(place / "adapter_model.safetensors").items()}
    if merge:
        for name in (each.removesuffix(".lora_A.weight") for each in tensors if each.endswith(".lora_A.weight")):
            weight, scale = mllm.get_submodule(name).weight, config["lora_alpha"] / config["r"]
            delta = scale * tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float()
            weight.data = (weight.float() + delta.to(weight.device)).to(weight.dtype)
        return
    lora = LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], target_modules=targets)
    mllm.load_adapter(peft_config=lora, adapter_state_dict=tensors, adapter_name="omnitransfer")


@torch.no_grad()
def context(
    mllm: Any,
    alignment: Alignment,
    prompt: Prompt,
    transfer: Transfer,
    task: int,
    device: torch.device,
) -> Tensor:
    """The context "1 Q E" of one reference, by the queries of its task."""
    assert transfer.alignment is not None
    ids, queries = prompt.tokens.to(device), alignment.queries[task][None]
    embedding = mllm.get_input_embeddings()
    embedded = embedding(prompt.tokens.to(embedding.weight.device)).to(device)
    inputs = torch.cat([embedded, queries.to(device, embedded.dtype)], 1)
    # A query counts as text: its id is that of padding, which is no placeholder.
    padded = torch.cat([ids, ids.new_zeros(queries.shape[:2])], 1)
    kinds = (padded == mllm.config.image_token_id) + 2 * (padded == mllm.config.video_token_id).int()
    clips = {name: x.to(device, inputs.dtype if x.is_floating_point() else None) for name, x in prompt.clips.items()}
    states = mllm(
        input_ids=padded,
        inputs_embeds=inputs,
        attention_mask=torch.ones_like(padded),
        mm_token_type_ids=kinds,
        second_per_grid_ts=torch.tensor([_seconds_per_step(mllm, transfer)], device=device),
        use_cache=False,
        **clips,
    ).last_hidden_state
    return alignment(states[:, -queries.shape[1] :])


def make_prompt(
    mllm: Any,
    vocabulary: PreTrainedTokenizerFast,
    transfer: Transfer,
    task: int,
    text: str,
    first_frame: Tensor | None,
    reference: Tensor,
) -> Prompt:
    """The tokens and patches of one reference; pixels are "T H W 3" in [-1, 1], of the first frame one frame."""
    inputs = transfer.alignment
    assert inputs is not None
    clips = [("pixel_values", "image_grid_thw", IMAGE, transfer.video, first_frame)] if first_frame is not None else []
    picked = torch.from_numpy(np.rint(np.linspace(0, len(reference) - 1, inputs.frames)).astype(int))
    clips.append(("pixel_values_videos", "video_grid_thw", VIDEO, transfer.reference, reference[picked]))
    tokens, fields = [*_special(vocabulary, START), *_text(vocabulary, USER)], {}
    for pixels, grids, pad, size, clip in clips:
        patches, grid = _patchify(mllm, clip, _fit(mllm, size, inputs))
        fields |= {pixels: patches, grids: torch.tensor([grid])}
        count = grid[0] * grid[1] * grid[2] // mllm.config.vision_config.spatial_merge_size**2
        tokens += _special(vocabulary, VISION_START) + _special(vocabulary, pad) * count + _special(vocabulary, VISION_END)
    tokens += [*_instruction(vocabulary, transfer, task, text), *_special(vocabulary, END), *_text(vocabulary, BREAK)]
    tokens += [*_special(vocabulary, START), *_text(vocabulary, ASSISTANT)]
    return Prompt(torch.tensor([tokens]), fields)


def _instruction(vocabulary: PreTrainedTokenizerFast, transfer: Transfer, task: int, text: str) -> list[int]:
    """The tokens of template and prompt, as many as training had room for."""
    assert transfer.alignment is not None
    template, text = transfer.tasks[task].template, clean_prompt(text)
    return _text(vocabulary, f"{template} {text}" if text else template)[: transfer.alignment.prompt_tokens]


def _fit(mllm: Any, video: Video, inputs: Inputs) -> tuple[int, int]:
    """Height and width at which the vision tower reads clips of this size."""
    vision = mllm.config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    return smart_resize(video.height, video.width, unit, unit**2, inputs.frame_pixels)


def _patchify(mllm: Any, clip: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches "P X" of a clip, square by square, and their number in time, height and width; the last frame fills up the last patch."""
    vision = mllm.config.vision_config
    p, m, f = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    x = F.interpolate(clip.permute(0, 3, 1, 2).float(), size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
    x = (x * 0.5 + 0.5 - torch.tensor(MEAN, device=x.device)[:, None, None]) / torch.tensor(STD, device=x.device)[:, None, None]
    x = torch.cat([x, x[-1:].expand(-len(x) % f, -1, -1, -1)])
    t, h, w = len(x) // f, size[0] // p, size[1] // p
    x = x.reshape(t, f, 3, h // m, m, p, w // m, m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, -1), (t, h, w)


def _seconds_per_step(mllm: Any, transfer: Transfer) -> float:
    """Seconds of the reference from one temporal step of its features to the next; as Qwen counts: duration / encoded frames."""
    assert transfer.alignment is not None
    video = transfer.reference
    return video.frames / video.fps / transfer.alignment.frames * mllm.config.vision_config.temporal_patch_size


def _special(vocabulary: PreTrainedTokenizerFast, name: str) -> list[int]:
    token: Any = vocabulary.convert_tokens_to_ids(name)
    return [token]


def _text(vocabulary: PreTrainedTokenizerFast, text: str) -> list[int]:
    return vocabulary(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
