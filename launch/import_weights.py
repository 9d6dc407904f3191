"""Wan2.1 weights into a checkpoint of ours: --source=DIR --out=DIR [--dtype=keep|float32|bfloat16] [--variant=fp16].

The source is a diffusers folder (transformer/, vae/, text_encoder/, image_encoder/, tokenizer/), the original's folder (its pickles
converted to safetensors), or a single .safetensors or .gguf file of the diffusion transformer, such as ComfyUI's. All parts that the
source has are imported one after the other, so memory holds a few leaves of one part. Nothing is written unless all of them are complete
and all their numbers finite. Weights of float8, with or without scales, and GGUF's Q8_0, Q4_K, Q5_K and Q6_K are stored as the numbers
they stand for, in bfloat16 or --dtype.
Wan2.2's second transformer is in transformer_2/, in low_noise_model/, or in a file with `low_noise` in its name. Nothing but these names
tells its two experts apart.
The language model of stages 2 and 3 is a published Qwen2.5-VL folder. It is imported by a second call with the same --out, or it is
the folder mllm/ in the source.

python -m launch.import_weights --source=Wan2.1-I2V-14B-480P-Diffusers --out=checkpoints/wan_i2v
python -m launch.import_weights --source=Qwen2.5-VL-3B-Instruct --out=checkpoints/wan_i2v
"""

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from etils import epath
from tqdm import tqdm

from configs import wan, wan_animate_2
from configs.errors import RequestError, require
from configs.kinds import differences
from configs.wan_animate_2 import WanAnimate2
from launch import command
from omnitransfer_jax.folders import atomic, checksums, fingerprint, inputs, model_folder, outputs
from omnitransfer_jax.weights import convert, files, foreign, quantised, wan_dit
from omnitransfer_jax.weights.files import DTYPES, Tensor
from omnitransfer_jax.weights.parts import (
    EXPERT_FOLDERS,
    LOW_NOISE,
    MLLM,
    MLLM_TOKENIZER,
    MLLM_TOKENIZER_FILES,
    PARTS,
    TOKENIZERS,
    Layout,
    Part,
)

FLAGS = flags.FlagValues()
SOURCE = flags.DEFINE_string("source", None, "folder or .safetensors file to read", required=True, flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "folder of the checkpoint to write", required=True, flag_values=FLAGS)
DTYPE = flags.DEFINE_enum(
    "dtype", "keep", ["keep", "float32", "bfloat16"], "type of the stored weights; keep is the source's", flag_values=FLAGS
)
VARIANT = flags.DEFINE_string("variant", "", "which files of a part are read if there are several, as fp16", flag_values=FLAGS)

UNFINISHED = ".unfinished"  # the folder in --out of what is not whole yet
LOW_NOISE_FILE = re.compile(r"low.?noise|[-_.]low[-_.]", re.IGNORECASE)  # in the name of a published file of Wan2.2's low-noise expert
PRESETS = {
    f"{name}:{variant}".removesuffix(":"): config
    for name, module in (("wan", wan), ("wan_animate_2", wan_animate_2))
    for variant, config in module.VARIANTS.items()
}


class Found(NamedTuple):
    """One part of the source, known from the headers of its files."""

    part: Part
    config: Any
    layout: Layout
    tensors: Mapping[str, Tensor]
    """The tensors by the names that the table has for them."""
    problems: list[str]


def main() -> None:
    source, out = Path(SOURCE.value), epath.Path(OUT.value)
    dtype = None if DTYPE.value == "keep" else next(d for d in DTYPES.values() if d.name == DTYPE.value)
    inputs.require_source("--source", SOURCE.value)
    outputs.require_folder("--out", OUT.value, [SOURCE.value], holds="model", owns=[UNFINISHED])
    unread = unread_folders(source)
    found = [examine(part, paths, layout, dtype) for part, paths, layout in locate(source)]
    problems = [f"{each.part.name}: {problem}" for each in found for problem in each.problems]
    problems += [f"{out / each.part.name} exists already, so give another --out" for each in found if (out / each.part.name).exists()]
    if problems:
        raise RequestError(f"nothing imported: {'; '.join(problems)}")
    for note in notes(source, found):
        print(note, flush=True)
    import_parts(found, out, dtype)
    import_tokenizer(source, out)
    for name in unread:
        print(f"{name}: not imported; this project has no such network")
    report(out)


def locate(source: Path) -> Iterator[tuple[Part, list[Path], Layout | None]]:
    """The parts in `source`, with their files, and their layout if it follows from the folder."""
    if source.is_file():
        yield (LOW_NOISE if LOW_NOISE_FILE.search(source.name) else PARTS[0]), files.find(source), None
        return
    if is_mllm(source):
        yield MLLM, files.find(source, pattern_of(MLLM), VARIANT.value), "diffusers"
        return
    in_folders = [part for part in (*PARTS, LOW_NOISE, MLLM) if (source / part.diffusers[0]).is_dir()]
    if in_folders:
        for part in in_folders:
            yield part, files.find(source / part.diffusers[0], pattern_of(part), VARIANT.value), "diffusers"
        return
    files.refuse_pickles(sorted(source.glob("*.pth")))
    patterns = [(part, f"{part.original.split('-')[0]}*.safetensors") for part in PARTS]
    present = [(part, pattern) for part, pattern in patterns if any(source.glob(pattern))]
    experts = [part for part in (PARTS[0], LOW_NOISE) if (source / EXPERT_FOLDERS[part.name]).is_dir()]
    if not present and not experts:
        foreign.refuse_adapters(quantised.inspect(sorted(source.glob("*.safetensors"))) if source.is_dir() else {})
        gguf = next(source.glob("*.gguf"), None)
        require(gguf is None, f"{source}: give the GGUF file itself, as --source={gguf}")
        raise RequestError(
            f"{source}: neither a diffusers folder ({', '.join(part.diffusers[0] + '/' for part in PARTS)}) nor the original's "
            f"({', '.join(pattern for _, pattern in patterns)}), and no Qwen2.5-VL folder; give the folder that holds one of them"
        )
    if experts and (PARTS[0], patterns[0][1]) in present:
        raise RequestError(
            f"{source}: {patterns[0][1]} beside {EXPERT_FOLDERS[experts[0].name]}/, two models in one folder; give one alone"
        )
    for part in experts:
        yield part, files.find(source / EXPERT_FOLDERS[part.name], f"{part.original}*.safetensors"), "original"
    for part, pattern in present:
        yield part, files.find(source, pattern), "original"


def unread_folders(source: Path) -> list[str]:
    """The folders of a diffusers source that hold weights and are no part of the model."""
    known = {part.diffusers[0] for part in (*PARTS, LOW_NOISE, MLLM)} | set(EXPERT_FOLDERS.values())
    return sorted({path.parent.name for path in source.glob("*/*.safetensors")} - known) if source.is_dir() else []


def pattern_of(part: Part) -> str:
    """The files of a part in the diffusers layout."""
    return f"{part.diffusers[1]}*.safetensors"


def is_mllm(folder: Path) -> bool:
    """Whether `folder` holds Qwen2.5-VL, according to its config.json."""
    try:
        return atomic.read_json(folder / "config.json", "").get("model_type") == "qwen2_5_vl"
    except (OSError, RequestError):
        return False


def examine(part: Part, paths: list[Path], layout: Layout | None, dtype: np.dtype | None) -> Found:
    """The part that the headers describe: of the configuration beside the files, or else of the published size that fits best."""
    config_file, tensors = paths[0].with_name("config.json"), quantised.inspect(paths)
    foreign.refuse_adapters(tensors)
    if part.table is wan_dit:
        foreign.refuse_networks([convert.bare(name, part.prefixes) for name in tensors], paths[0])
    sizes, attempts = candidates(part, config_file, layout, tensors), []
    for config, name in sizes:
        table, shapes = part.entries(config, name), part.shapes(config)
        selected = convert.select(tensors, table, part.prefixes, part.ignored, part.copies)
        expected = convert.specs(table, shapes)
        misshaped = [key for key, spec in expected.items() if key in selected and selected[key].shape != spec.shape]
        distance = len(set(selected) ^ set(expected)) + len(misshaped)
        attempts.append((distance, Found(part, config, name, selected, convert.problems(selected, table, shapes, dtype))))
    _, best = min(attempts, key=lambda attempt: attempt[0])
    if best.problems and not config_file.exists():
        best.problems.append("there is no config.json, and this is the published size that comes closest")
    return best


def candidates(part: Part, config_file: Path, layout: Layout | None, tensors: Mapping[str, Tensor]) -> list[tuple[Any, Layout]]:
    """The configurations and layouts that `part` may have: those of its config.json, or all in configs/wan.py."""
    if layout is not None and config_file.exists() and (layout == "diffusers" or part.table is wan_dit):
        remedy = "take the file that came with the weights"
        content = atomic.read_json(config_file, remedy)
        if part.table is wan_dit:
            foreign.refuse_config(content, config_file)
        try:
            config = part.table.config_from_json(content)
            config.validate()
            require_size(config, tensors)
            if layout == "original" and config.image_dim is not None:  # the file does not say whether there is an image branch
                return [(config, layout), (replace(config, image_dim=None), layout)]
            return [(config, layout)]
        except RequestError as error:
            raise RequestError(f"{config_file}: {str(error).removeprefix('config.json').lstrip(': ')}; {remedy}") from None
    sizes = dict.fromkeys(getattr(config, part.name) for config in PRESETS.values())
    layouts: list[Layout] = [layout] if layout else ["diffusers", "original"]
    return [(size, name) for size in sizes for name in layouts]


def require_size(config: Any, tensors: Mapping[str, Tensor]) -> None:
    """A `RequestError` if a field of `config` is so large that its model cannot be that of `tensors`, and would take long to describe."""
    limits = {name: len(tensors) for name in ("num_layers", "num_res_blocks")}
    numbers = max(sum(math.prod(tensor.shape) for tensor in tensors.values()), 2**20)  # token numbers are not sizes
    for field in fields(config):
        value, limit = getattr(config, field.name), limits.get(field.name, numbers)
        if is_dataclass(value):
            require_size(value, tensors)
        elif isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(number, int) for number in value)):
            size = value if isinstance(value, int) else math.prod(value)
            require(
                size <= limit, f"{field.name}={value}: the files have {len(tensors)} tensors and {numbers} numbers, which is too few for it"
            )


def notes(source: Path, found: Sequence[Found]) -> Iterator[str]:
    """What the user would not expect: other files than asked for, and tensors that are not stored as they are."""
    wanted, variants = VARIANT.value, {}
    for each in found if source.is_dir() else ():
        variants[each.part.name] = files.variant_of(next(iter(each.tensors.values())).file, pattern_of(each.part))
    require(not wanted or wanted in variants.values(), f"--variant={wanted}: no part has such files; leave it out")
    for name, variant in variants.items():
        if variant != wanted:
            reason = f"there are none of {wanted}" if wanted else "those without a variant are not complete"
            yield f"{name}: the files {f'of variant {variant}' if variant else 'without a variant'} are read, {reason}"
    for each in found:
        if note := quantised.note(each.tensors):
            yield f"{each.part.name}: {note}, stored as the numbers they stand for"


def import_parts(found: list[Found], out: epath.Path, dtype: np.dtype | None) -> None:
    """Writes all parts beside their places and then gives them their names, so that an interrupted import can be run again."""
    unfinished = out / UNFINISHED
    if unfinished.exists():
        unfinished.rmtree()
    try:
        digests = [import_part(each, unfinished, dtype) for each in found]
        for each, digest in zip(found, digests, strict=True):
            (unfinished / each.part.name).rename(out / each.part.name)
            fingerprint.keep(out, each.part.name, digest)
    finally:
        if unfinished.exists():
            unfinished.rmtree()
    model_folder.write_model(out, {each.part.name: each.config for each in found})


def import_part(found: Found, out: epath.Path, dtype: np.dtype | None) -> fingerprint.Digest:
    """Reads, converts and writes one part, a few leaves at a time; returns the digest of its values."""
    start, table, shapes = time.monotonic(), found.part.entries(found.config, found.layout), found.part.shapes(found.config)
    digest = fingerprint.Digest()
    total = sum(math.prod(leaf.shape) for leaf in shapes.values())
    with tqdm(total=total, unit=" parameters", unit_scale=True, desc=found.part.name, disable=None) as bar:

        def count(item: tuple[str, np.ndarray]) -> tuple[str, np.ndarray]:
            bar.update(item[1].size)
            return item

        # map keeps no reference to a leaf that it has yielded; a generator expression would
        leaves = map(digest.add, convert.leaves(found.tensors, table, shapes, dtype=dtype))
        model_folder.save_part(out, found.part.name, map(count, leaves))
    size = sum(tensor.nbytes for tensor in found.tensors.values())
    print(f"{found.part.name}: {len(found.tensors)} tensors, {size / 1e9:.3g} GB, {time.monotonic() - start:.1f} s", flush=True)
    return digest


def import_tokenizer(source: Path, out: epath.Path) -> None:
    """Copies each vocabulary that the source has and the checkpoint does not."""
    for place in TOKENIZERS.values():
        if (source / place).is_dir() and not (out / "tokenizer").exists():
            (out / "tokenizer").mkdir(parents=True)
            for file in sorted(path for path in (source / place).iterdir() if path.is_file()):
                epath.Path(file).copy(out / "tokenizer" / file.name)
            checksums.write(out / "tokenizer")
            print("tokenizer: copied")
    place = source if is_mllm(source) else source / MLLM.diffusers[0]
    found = [place / name for name in MLLM_TOKENIZER_FILES if is_mllm(place) and (place / name).is_file()]
    if found and not (out / MLLM_TOKENIZER).exists():
        (out / MLLM_TOKENIZER).mkdir(parents=True)
        for file in found:
            epath.Path(file).copy(out / MLLM_TOKENIZER / file.name)
        checksums.write(out / MLLM_TOKENIZER)
        print(f"{MLLM_TOKENIZER}: copied")


def report(out: epath.Path) -> None:
    """Prints which parts the checkpoint lacks, and the next command."""
    stored = model_folder.read_model(out)
    for part in needed_parts(stored):
        if part.name not in stored:
            print(f"{part.name}: not there; {part.absent}")
    if not (out / "tokenizer").exists():
        print("tokenizer: not there; no prompt can be read")
    if MLLM.name in stored and not (out / MLLM_TOKENIZER).exists():
        print(f"{MLLM_TOKENIZER}: not there; the language model can read no prompt")
    fits = [
        name
        for name, config in PRESETS.items()
        if not any(any(differences(model, getattr(config, part), ("model", "method"))) for part, model in stored.items())
        and (config.sampler.boundary > 0) == (LOW_NOISE in needed_parts(stored))
    ]
    if not fits:
        print(f"No variant of configs/wan.py has these sizes; {out / model_folder.MODEL_FILE} lists them, for a variant of your own")
        return
    dit = stored.get("dit") or stored.get(LOW_NOISE.name)
    first_frame = "" if dit is not None and not dit.image_to_video else "--first_frame=IMAGE "
    reference = "--reference=CLIP " if isinstance(PRESETS[fits[0]], WanAnimate2) else ""
    print(f'Next: python -m launch.sample --config={fits[0]} --checkpoint={out} {reference}{first_frame}--prompt="..." --out=out.mp4')


def needed_parts(stored: Mapping[str, Any]) -> list[Part]:
    """The parts that a model needs of which these are there."""
    dit = stored.get("dit") or stored.get(LOW_NOISE.name)
    has_image_branch = dit is None or not dit.image_to_video or dit.image_dim is not None
    two_experts = LOW_NOISE.name in stored or not has_image_branch
    return [part for part in PARTS if part.name != "image" or has_image_branch] + ([LOW_NOISE] if two_experts else [])


if __name__ == "__main__":
    command.run(main, FLAGS)
