"""A transfer in PyTorch from an export: python -m omnitransfer_torch --model=DIR --task=TASK --reference=ref.mp4 --out=out.mp4

    python -m omnitransfer_torch --model=DIR --task=style --reference=a.mp4 --task=motion --reference=b.mp4 --first_frame=image.png \\
        --prompt="..." --out=out.mp4

`--task` and `--reference` repeat for combined transfer. `--offload` says what leaves the GPU while it is not needed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from configs.errors import RequestError, require
from data_pipelines import clips
from omnitransfer_torch import OmniTransferPipeline

OFFLOADS = ("none", "model", "group")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m omnitransfer_torch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder that launch.export wrote")
    parser.add_argument("--task", action="append", default=[], help="what to take from the reference")
    parser.add_argument("--reference", action="append", default=[], help="clip to transfer from")
    parser.add_argument("--first_frame", help="image the video starts from")
    parser.add_argument("--prompt", default="", help="what the video shows")
    parser.add_argument("--out", default="out.mp4", help="the mp4 to write")
    parser.add_argument("--lora", help="file of adapters of the transformer (launch.export --config=stage1:lora)")
    parser.add_argument("--steps", type=int, help="denoising steps; that of the export if not given")
    parser.add_argument("--guidance", type=float, help="scale of guidance; that of the export if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="bfloat16 on a GPU, else float32, if not given")
    parser.add_argument("--offload", choices=OFFLOADS, default="none", help="diffusers' memory tools: whole models or groups of layers")
    parser.add_argument("--cache", choices=("full", "cpu", "int8"), default="full", help="where keys and values of references are kept")
    parser.add_argument("--vae_tiling", action="store_true", help="decode in tiles")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code: 0, or 2 for a wrong request."""
    args = parse(argv)
    try:
        require(args.out.lower().endswith(".mp4"), f"--out={args.out}: an mp4 is written; end the name in .mp4")
        require(Path(args.out).absolute().parent.is_dir(), f"--out={args.out}: no folder {Path(args.out).parent}; make it first")
        pipe = load(args)
        noise = torch.Generator().manual_seed(args.seed)
        frames = pipe(
            args.task, args.reference, args.first_frame, args.prompt, num_inference_steps=args.steps, guidance_scale=args.guidance,
            generator=noise, reference_cache=args.cache,
        ).frames[0]  # fmt: skip
        fps = pipe.transfer.video.fps
        clips.write_clip(args.out, np.rint(frames * 255).astype(np.uint8), fps)
    except RequestError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {len(frames)} frames, {frames.shape[2]} x {frames.shape[1]}, {fps:g} fps")
    return 0


def load(args: argparse.Namespace) -> OmniTransferPipeline:
    """The pipeline with its memory tools."""
    on_gpu = torch.cuda.is_available()
    dtype = DTYPES[args.dtype] if args.dtype else torch.bfloat16 if on_gpu else torch.float32
    pipe = OmniTransferPipeline.from_pretrained(args.model, torch_dtype=dtype)
    if args.lora:
        require(Path(args.lora).is_file(), f"--lora={args.lora}: no such file")
        pipe.load_lora_weights(args.lora)
    if args.vae_tiling:
        pipe.vae.enable_tiling()
    require(on_gpu or args.offload == "none", f"--offload={args.offload}: there is no GPU here; leave it out")
    if args.offload == "model":
        pipe.enable_model_cpu_offload()
    elif args.offload == "group":
        pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    elif on_gpu:
        pipe.to("cuda")
    return pipe


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
