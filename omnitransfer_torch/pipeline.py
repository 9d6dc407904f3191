"""From a first frame, a prompt and references to a video: the steps of `launch.sample` as a diffusers pipeline.

prompt -> UMT5, or from stage 2 on [first frame, reference, prompt] -> Qwen2.5-VL -> context
first frame -> CLIP;   first frame, then grey -> VAE;   references -> VAE, their flag in the mask's channels
each reference -> transformer once -> keys and values of every layer      (references.py)
noise -> transformer at every step, in both passes of guidance on these -> VAE -> video
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedTokenizerFast, Qwen2_5_VLModel, UMT5EncoderModel

from configs.errors import require
from data_pipelines import clips
from omnitransfer_jax.tokenizer import clean_prompt
from omnitransfer_torch import alignment as aligned
from omnitransfer_torch import exported
from omnitransfer_torch.alignment import Alignment
from omnitransfer_torch.exported import Transfer
from omnitransfer_torch.references import Offset, ReferenceCache, Storage, install

MASK_CHANNELS = 4  # one for each video frame of a latent frame (Wan2.1 image2video.py)
FIRST_TIME = 0.999  # of the original's grid (Wan2.1 fm_solvers_unipc.py)

Pixels = np.ndarray
"""uint8 "T H W 3", of a picture "H W 3"."""


class Output(NamedTuple):
    """What a call returns."""

    frames: Any
    """"1 T H W 3" in [0, 1] for `np` and "1 T 3 H W" for `pt`, a list of lists of pictures for `pil`, latents "1 C F H W" for `latent`."""


class Size(NamedTuple):
    """The video to make, in frames and pixels."""

    frames: int
    height: int
    width: int


class OmniTransferPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Transfers what each task takes from its reference to a new video."""

    # diffusers' and transformers' types do not know the fields of their configurations.
    transformer: Any
    vae: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    image_encoder: Any
    mllm: Any
    mllm_tokenizer: Any
    alignment: Any

    model_cpu_offload_seq = "mllm->alignment->text_encoder->image_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer", "image_encoder", "mllm", "mllm_tokenizer", "alignment"]

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        text_encoder: UMT5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        image_encoder: CLIPVisionModel | None = None,
        mllm: Qwen2_5_VLModel | None = None,
        mllm_tokenizer: PreTrainedTokenizerFast | None = None,
        alignment: Alignment | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer,
            image_encoder=image_encoder, mllm=mllm, mllm_tokenizer=mllm_tokenizer, alignment=alignment,
        )  # fmt: skip

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, merge_adapters: bool = False, **components: Any
    ) -> "OmniTransferPipeline":
        """The pipeline of an export; the autoencoder, queries and connector are float32 in any case.

        With `merge_adapters` the language model's LoRA is added to its weights, else PEFT runs it. `components`, such as a quantised
        `transformer=`, take the place of those in the folder. A folder that is no whole export is a `RequestError`.
        """
        folder, transfer = Path(folder), exported.read(folder)
        dtypes: Any = {"vae": torch.float32, "default": torch_dtype}
        if transfer.alignment is not None and "alignment" not in components:
            components["alignment"] = aligned.read_alignment(folder)
        pipe: Any = super().from_pretrained(folder, dtype=dtypes, **components)
        if pipe.mllm is not None:
            aligned.add_adapters(pipe.mllm, folder, merge_adapters)
        pipe.prepare(transfer)
        return pipe

    def prepare(self, transfer: Transfer) -> None:
        """Makes the networks those of `transfer`."""
        self.transfer = transfer
        self.streams = install(self.transformer, transfer.rope_base, transfer.rope_top)
        if transfer.alignment is not None and transfer.alignment.into == "blocks":
            self.transformer.condition_embedder.text_embedder = torch.nn.Identity()

    @torch.no_grad()
    def __call__(
        self,
        task: str | Sequence[str] = (),
        reference: Any = (),
        first_frame: Any = None,
        prompt: str = "",
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        reference_cache: Storage = "full",
        output_type: str = "np",
        callback_on_step_end: Callable[["OmniTransferPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> Output:
        """One video.

        Args:
            task: `id`, `style`, `motion`, `camera` or `effect`, or one for each reference.
            reference: a clip, or one for each task: the path of a video, or uint8 "T H W 3" (numpy, torch, or a list of pictures).
            first_frame: a picture that the video starts from: a path, a PIL image or uint8 "H W 3". Temporal tasks need it.
            negative_prompt: None takes that of the export. With a language model there is none: the unconditional context is zeros.
            num_inference_steps, guidance_scale: None takes that of the export; guidance 1 runs no unconditional pass.
            latents: the noise "1 C F H W"; else `generator` draws it.
            reference_cache: where keys and values of the references are kept: on the device, in CPU memory, or as int8.
            output_type: `np`, `pt`, `pil` or `latent`.
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": ...}) as in diffusers' pipelines.
        """
        tasks, references = self._checked(task, reference, first_frame)
        size, frame = self._size(first_frame)
        steps = self.transfer.sampler.steps if num_inference_steps is None else num_inference_steps
        guidance = self.transfer.sampler.guidance if guidance_scale is None else guidance_scale
        context, negative = self._contexts(tasks, references, frame, size, prompt, negative_prompt)
        image = self._image(frame)
        condition, shape = self._condition(frame, size), (1, self.vae.config.z_dim, *self._latent_size(size))
        caches = self._caches(tasks, references, shape, reference_cache)
        x: Any = randn_tensor(shape, generator, self._execution_device, torch.float32) if latents is None else latents.float()
        require(tuple(x.shape) == shape, f"latents of shape {tuple(x.shape)}: this video has {shape}")
        x = x.to(self._execution_device)
        texts = [context] if guidance == 1 else [context, negative]
        self.scheduler.set_timesteps(sigmas=np.linspace(FIRST_TIME, 0, steps + 1)[:-1], device=self._execution_device)
        bar: Any = self.progress_bar  # its type has no arguments
        for i, timestep in enumerate(bar(self.scheduler.timesteps)):
            v = [self.velocity(x, condition, timestep, text, image, caches) for text in texts]
            velocity = v[0] if guidance == 1 else v[1] + guidance * (v[0] - v[1])
            x = self.scheduler.step(velocity, timestep, x).prev_sample
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, i, timestep, {"latents": x}).get("latents", x)
        frames = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return Output(frames)

    def _checked(self, task: str | Sequence[str], reference: Any, first_frame: Any) -> tuple[list[int], list[Pixels]]:
        """Task indices and clips; a `RequestError` for a request that does not fit together."""
        names = [task] if isinstance(task, str) else list(task)
        given = list(reference) if isinstance(reference, list | tuple) and not isinstance(task, str) else [reference]
        require(len(names) == len(given), f"{len(names)} task and {len(given)} reference: each reference needs its task, in the same order")
        tasks = [self.transfer.task_index(name) for name in names]
        require(bool(tasks) or self.transfer.alignment is None, "no task: the context of this model is made from references; give one")
        families = [self.transfer.tasks[i].family for i in tasks]
        require(
            first_frame is not None or "appearance" in families or not families,
            f"task={','.join(names)}: a temporal transfer starts from a picture; give first_frame",
        )
        return tasks, [self._read_clip(each) for each in given]

    def _read_clip(self, given: Any) -> Pixels:
        """A clip as uint8 "T H W 3"; a file is read in the size that training had."""
        size = self.transfer.reference
        if isinstance(given, str | Path):
            return clips.read_clip(given, frames=size.frames, fps=size.fps, height=size.height, width=size.width)
        pixels = np.stack([np.asarray(x) for x in given]) if isinstance(given, list | tuple) else np.asarray(given)
        require(
            pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[-1] == 3,
            f"reference {pixels.dtype} {pixels.shape}: a clip is uint8 (frames, height, width, 3)",
        )
        self._require_size(Size(*pixels.shape[:3]), "reference")
        return pixels

    def _size(self, first_frame: Any) -> tuple[Size, Pixels | None]:
        """The size of the video, at the first frame's proportions if there is one, and that frame."""
        video = self.transfer.video
        if first_frame is None:
            return Size(video.frames, video.height, video.width), None
        picture = clips.read_image(first_frame) if isinstance(first_frame, str | Path) else np.asarray(first_frame)
        require(
            picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] == 3,
            f"first_frame {picture.dtype} {picture.shape}: a picture is uint8 (height, width, 3), as PIL's convert('RGB') gives",
        )
        aspect, area, unit = picture.shape[0] / picture.shape[1], video.height * video.width, self._unit()[1]
        height, width = (max(unit, int(side**0.5 // unit * unit)) for side in (area * aspect, area / aspect))
        return Size(video.frames, height, width), picture

    def _unit(self) -> tuple[int, int]:
        """Frames of a latent frame, and pixels of a side of a patch."""
        config = self.vae.config
        return 2 ** sum(config.temperal_downsample), 2 ** len(config.temperal_downsample) * self.transformer.config.patch_size[1]

    def _require_size(self, size: Size, name: str) -> None:
        time, space = self._unit()
        require((size.frames - 1) % time == 0, f"{name}: {size.frames} frames; the causal autoencoder needs {time}n+1")
        for side in (size.height, size.width):
            require(side % space == 0, f"{name}: {side} pixels; a multiple of {space} is needed, the pixels of a patch")

    def _latent_size(self, size: Size) -> tuple[int, int, int]:
        stride = 2 ** len(self.vae.config.temperal_downsample)
        return (size.frames - 1) // self._unit()[0] + 1, size.height // stride, size.width // stride

    def _contexts(
        self,
        tasks: Sequence[int],
        references: Sequence[Pixels],
        frame: Pixels | None,
        size: Size,
        prompt: str,
        negative_prompt: str | None,
    ) -> tuple[Tensor, Tensor]:
        """What the two passes of guidance read: encoded prompts, or the language model's context and zeros."""
        if self.transfer.alignment is None:
            negative = self.transfer.sampler.negative_prompt if negative_prompt is None else negative_prompt
            return self._encode_text(prompt), self._encode_text(negative)
        require(not negative_prompt, "negative_prompt: this model has none, its unconditional context is zeros; leave it out")
        first = None if frame is None else torch.from_numpy(clips.to_unit(clips.fit(frame, size.height, size.width)))[None]
        found = []
        for task, clip in zip(tasks, references, strict=True):
            pixels = torch.from_numpy(clips.to_unit(clip))
            read = aligned.make_prompt(self.mllm, self.mllm_tokenizer, self.transfer, task, prompt, first, pixels)
            found.append(aligned.context(self.mllm, self.alignment, read, self.transfer, task, self._execution_device))
        context = torch.cat(found, 1)
        return context, torch.zeros_like(context)

    def _encode_text(self, prompt: str) -> Tensor:
        """UMT5's features "1 S E", zero rows beyond the prompt's end."""
        batch = self.tokenizer(
            [clean_prompt(prompt)], padding="max_length", padding_side="right", truncation=True, max_length=self.transfer.text_len,
            return_tensors="pt",
        ).to(self._execution_device)  # fmt: skip
        rows = self.text_encoder(batch.input_ids, batch.attention_mask).last_hidden_state
        return rows * batch.attention_mask[..., None].to(rows.dtype)

    def _image(self, frame: Pixels | None) -> Tensor | None:
        """CLIP's features of the first frame, squashed whole by bicubic interpolation without antialiasing, as Wan2.1 does."""
        if frame is None or self.image_encoder is None:
            return None
        size = self.image_encoder.config.image_size
        pixels = _resized(frame, size, size) * 0.5 + 0.5
        pixels = (pixels - torch.tensor(aligned.MEAN)[:, None, None]) / torch.tensor(aligned.STD)[:, None, None]
        pixels = pixels.to(self._execution_device, self.image_encoder.dtype)
        return self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]

    def _condition(self, frame: Pixels | None, size: Size) -> Tensor:
        """Mask and latents "1 C F H W" of the first frame followed by grey; without one all is grey and the mask is 0."""
        video = torch.zeros(1, 3, *size)
        if frame is not None:
            video[:, :, 0] = _resized(frame, size.height, size.width)
        latents = self._encode(video)
        mask = latents.new_zeros(1, MASK_CHANNELS, *latents.shape[2:])
        if frame is not None:
            mask[:, :, 0] = 1
        return torch.cat([mask, latents], 1)

    def _encode(self, video: Tensor) -> Tensor:
        """Latents "1 C F H W" of "1 3 T H W" in [-1, 1]."""
        latents = self.vae.encode(video.to(self._execution_device, self.vae.dtype)).latent_dist.mode().float()
        mean, std = self._statistics()
        return (latents - mean) / std

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        mean, std = self._statistics()
        video = self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0]
        video = (video.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4)
        if output_type == "pt":
            return video
        frames = video.permute(0, 1, 3, 4, 2).cpu().numpy()
        return [self.numpy_to_pil(each) for each in frames] if output_type == "pil" else frames

    def _statistics(self) -> tuple[Tensor, Tensor]:
        config, device = self.vae.config, self._execution_device
        mean, std = (torch.tensor(x, device=device)[None, :, None, None, None] for x in (config.latents_mean, config.latents_std))
        return mean, std

    def _caches(self, tasks: Sequence[int], references: Sequence[Pixels], shape: Sequence[int], storage: Storage) -> list[ReferenceCache]:
        """The keys and values of every reference, for a target whose latents have this shape."""
        found = []
        for task, offset, clip in zip(tasks, self.offsets(tasks, shape), references, strict=True):
            latents = self._encode(torch.from_numpy(clips.to_unit(clip)).permute(3, 0, 1, 2)[None])
            found.append(self.cache_of(latents, task, offset, storage))
        return found

    def cache_of(self, latents: Tensor, task: int, offset: Offset, storage: Storage) -> ReferenceCache:
        """The keys and values of a reference's latents "1 C F H W" whose first token stands at `offset`."""
        dtype, device = self.transformer.dtype, latents.device
        time = torch.full((1,), self.transfer.references.time, device=device)
        ignored = torch.zeros(1, 1, self.transformer.config.text_dim, dtype=dtype, device=device)
        with self.streams.recording(offset, storage) as cache:
            self.transformer(self._reference_latents(latents, task).to(dtype), time, ignored, return_dict=False)
        return cache

    def _reference_latents(self, latents: Tensor, task: int) -> Tensor:
        """The reference's channels: its latents without noise, the task's flag in those of the mask, its latents again."""
        flag = self.transfer.tasks[task].flag if self.transfer.references.flag is None else self.transfer.references.flag
        return torch.cat([latents, torch.full_like(latents[:, :1], flag).expand(-1, MASK_CHANNELS, -1, -1, -1), latents], 1)

    def offsets(self, tasks: Sequence[int], shape: Sequence[int]) -> list[Offset]:
        """Where the first token of each reference stands (time, row, column), in patches of a target whose latents have this shape."""
        frames, _, columns = (size // p for size, p in zip(shape[2:], self.transformer.config.patch_size, strict=True))
        after = self.transfer.references.offsets == "frames"
        families = ["appearance" if after else self.transfer.tasks[task].family for task in tasks]
        ranks = [families[: k + 1].count(family) if self.transfer.references.stack else 1 for k, family in enumerate(families)]
        return [
            (rank * frames, 0, 0) if family == "appearance" else (0, 0, rank * columns)
            for rank, family in zip(ranks, families, strict=True)
        ]

    def velocity(
        self, x: Tensor, condition: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None, caches: Sequence[ReferenceCache]
    ) -> Tensor:
        """The velocity of noisy latents "1 C F H W", float32."""
        dtype = self.transformer.dtype
        with self.streams.reading(caches, 0 if image is None else image.shape[1]):
            return self.transformer(
                torch.cat([x, condition], 1).to(dtype),
                timestep.expand(1),
                text.to(dtype),
                None if image is None else image.to(dtype),
                return_dict=False,
            )[0].float()


def _resized(picture: Pixels, height: int, width: int) -> Tensor:
    """A picture "H W 3" as "1 3 height width" in [-1, 1], by bicubic interpolation as in Wan2.1."""
    x = torch.from_numpy(clips.to_unit(picture)).permute(2, 0, 1)[None]
    return F.interpolate(x, (height, width), mode="bicubic", align_corners=False)
