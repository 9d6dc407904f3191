"""Writes the small model that is part of the package: --config=stage0:tiny --out=DIR [--vae=DIR] [--mllm=DIR] [--base=WORKDIR].

    python -m launch.embed --config=stage0:tiny --vae=out/vae --out=out/encoders
    python -m launch.embed --config=stage0:tiny --base=out/stage0 --mllm=out/mllm --out=omnitransfer_jax/embedded

--vae and --mllm are workdirs of launch.train with --config=vae:tiny and --config=mllm:tiny. --base is the workdir of a run of stage 0: the
transformer is its average, or its weights if it keeps no average, and the other parts are those that it started from. All parts that no
flag gives have random weights, drawn from the seed. Text and image encoder can stay random: they are frozen, and the transformer learns to
read their features. Without --base the folder has no transformer; stage 0 and mllm:tiny start from such a folder.

DIR is a model folder (omnitransfer_jax/folders/model_folder.py) with one safetensors file a part. DIR/made.json records the source of
every part.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx
from transformers import PreTrainedTokenizerFast

from configs.base import VAEConfig
from configs.errors import require
from configs.kinds import differences
from configs.mllm import MLLMTraining
from configs.run import Config
from launch import command
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import checksums, inputs, model_folder, outputs, run_folder
from omnitransfer_jax.folders.atomic import new_folder, read_json
from omnitransfer_jax.models.alignment import ASSISTANT, USER
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.tokenizer import word_tokenizer
from omnitransfer_jax.weights.parts import MLLM, MLLM_TOKENIZER, PARTS, TOKENIZERS, Part
from world import scenes, screens

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string("out", None, "folder to write; new or empty", required=True, flag_values=FLAGS)
VAE = flags.DEFINE_string("vae", "", "workdir of launch.train --config=vae:tiny", flag_values=FLAGS)
BASE = flags.DEFINE_string("base", "", "workdir of a training of stage 0", flag_values=FLAGS)
MLLM_RUN = flags.DEFINE_string("mllm", "", "workdir of launch.train --config=mllm:tiny", flag_values=FLAGS)

LIMIT = 24_000_000  # bytes; the folder is part of the package, and of its history
MADE_FILE = "made.json"
VOCABULARIES = (TOKENIZERS["diffusers"], MLLM_TOKENIZER)

Leaves = Mapping[str, np.ndarray]


class Made(NamedTuple):
    """The parameters of a part by path, float32, and their source as JSON values."""

    leaves: Leaves
    source: Any


def main(config: Config) -> None:
    outputs.require_new_folder("--out", OUT.value, [VAE.value, BASE.value, MLLM_RUN.value])
    require_given(config)
    with new_folder(Path(OUT.value)) as out:
        shapes = write(config, out)
    print(f"wrote {OUT.value}" + ("" if "dit" in shapes else "; it has no transformer: give --base for one"))


def write(config: Config, out: Path) -> Mapping[str, Mapping[str, Any]]:
    """Writes the model folder and prints its parts; returns their shapes."""
    origin = run_folder.imported_weights(BASE.value)
    shapes = {part.name: part.shapes(getattr(config, part.name)) for part in (*PARTS, MLLM) if part.name != "dit" or BASE.value}
    require_small(shapes)
    vocabulary = world_vocabulary(config)
    parts = given(config, shapes, origin)
    root = jax.random.key(config.seed, impl="unsafe_rbg")  # compiles several times as fast, and the file is what counts
    for number, part in enumerate((*PARTS, MLLM)):
        if part.name in shapes and part.name not in parts:
            leaves = random_part(part, config, jax.random.fold_in(root, number))
            parts[part.name] = Made(leaves, f"random, seed {config.seed}")
    sizes = {name: model_folder.save_file(out, name, parts[name].leaves).stat().st_size for name in shapes}
    write_vocabularies(out, vocabulary, origin)
    made = {
        name: {"parameters": sum(x.size for x in parts[name].leaves.values()), "bytes": size, "from": parts[name].source}
        for name, size in sizes.items()
    }
    commands = [*read_made(origin)["commands"], command_line()]
    (out / MADE_FILE).write_text(json.dumps({"commands": commands, "parts": made}, indent=2) + "\n")
    model_folder.write_model(out, {name: getattr(config, name) for name in shapes})  # last: a folder is complete if it has this file
    checksums.write(out)
    for name, entry in made.items():
        print(f"{name:5} {entry['parameters']:>10,} parameters {entry['bytes'] / 1e6:>6.2f} MB  {json.dumps(entry['from'])}")
    return shapes


def require_given(config: Config) -> None:
    """A `RequestError` unless the folders that the flags name hold what they should, of the configuration's models; nothing is loaded."""
    if BASE.value:
        run_folder.read_config(BASE.value)  # weights that no run trained are no base
        inputs.require_checkpoint("--base", BASE.value)
        run_folder.require_same_function(BASE.value, config)
        inputs.require_trained("--base", BASE.value)
    if VAE.value:
        vae_result(config)
    if MLLM_RUN.value:
        read_result("mllm", MLLM_RUN.value)
    if run_folder.is_run(MLLM_RUN.value):
        trained = run_folder.read_config(MLLM_RUN.value, MLLMTraining).model.mllm
        wrong = [f"{name} is {value}, not {now}" for name, value, now in differences(trained, config.mllm, ("model",), "mllm.")]
        require(
            not wrong, f"--mllm={MLLM_RUN.value}: another language model than the configuration's: {'; '.join(wrong)}; give its --config"
        )


def require_small(shapes: Mapping[str, Mapping[str, Any]]) -> None:
    """A `RequestError` if the parts, in float32, are more than the package holds."""
    sizes = {name: 4 * sum(leaf.size for leaf in leaves.values()) for name, leaves in shapes.items()}
    require(
        sum(sizes.values()) <= LIMIT,
        f"{sum(sizes.values()) / 1e6:.1f} MB of weights: the package holds {LIMIT / 1e6:.0f} MB at most; take a smaller configuration, "
        f"the largest part is {max(sizes, key=lambda name: sizes[name])}",
    )


def given(config: Config, shapes: Mapping[str, Mapping[str, Any]], origin: str) -> dict[str, Made]:
    """The parts that the flags give; `origin` is the model folder that --base started from."""
    parts, before = {}, read_made(origin)["parts"]
    if origin:
        for name in model_folder.require_model(origin, config):
            if name in shapes:
                parts[name] = load(origin, name, shapes[name]), before.get(name, {}).get("from", "imported")
    if VAE.value:
        parts["vae"] = load(VAE.value, "vae", shapes["vae"]), vae_result(config)
    if MLLM_RUN.value:
        result = read_result("mllm", MLLM_RUN.value)
        parts["mllm"] = load(MLLM_RUN.value, "mllm", shapes["mllm"]), result
    if BASE.value:
        parts["dit"] = trained_dit(shapes["dit"])
    return {name: Made(*part) for name, part in parts.items()}


def random_part(part: Part, config: Config, key: jax.Array) -> Leaves:
    return to_host(flat_params(jax.jit(lambda: part.model(getattr(config, part.name), rngs=nnx.Rngs(key)))()))


def trained_dit(shapes: Mapping[str, Any]) -> tuple[Leaves, Any]:
    """The transformer of --base, and how it was trained."""
    run, step = run_folder.read_config(BASE.value), int(run_folder.latest(BASE.value).name)
    found = run_folder.load_params(BASE.value, {f"dit.{path}": leaf for path, leaf in shapes.items()}, dtype="float32")
    train = {name: getattr(run.train, name) for name in ("batch_size", "ema", "shift", "weighting")}
    source = {"steps": step, **train, "optimizer": asdict(run.optimizer)}
    return to_host({path.removeprefix("dit."): leaf for path, leaf in found.items()}), source


def vae_result(config: Config) -> dict[str, Any]:
    """The result of --vae. The configuration must have its latents' statistics: they are part of the model."""
    made = read_result("vae", VAE.value)
    trained = model_folder.configuration(VAEConfig, made.pop("vae"), VAE.value)
    wrong = [f"{name} is {value}" for name, value, _ in differences(trained, config.vae, ("model",))]
    require(not wrong, f"--vae={VAE.value}: another autoencoder than the configuration's: {'; '.join(wrong)}; put that in configs/wan.py")
    return made


def read_result(name: str, workdir: str) -> dict[str, Any]:
    """The file that the training of a part wrote at its end."""
    file, command = Path(workdir, f"{name}.json"), f"python -m launch.train --config={name}:tiny --workdir=DIR"
    require(file.is_file(), f"--{name}={workdir}: no {file.name}; train one to its end: {command}")
    return read_json(file, f"train again: {command}")


def load(folder: str | Path, name: str, shapes: Mapping[str, Any]) -> Leaves:
    """A part of a checkpoint folder in float32."""
    return to_host(model_folder.load_part(folder, name, shapes, dtype="float32"))


def to_host(leaves: Mapping[str, jax.Array]) -> Leaves:
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def write_vocabularies(out: Path, vocabulary: PreTrainedTokenizerFast, origin: str) -> None:
    """Writes the vocabularies that the base was trained with, or else `vocabulary` for both text encoder and language model."""
    for name in VOCABULARIES:
        if origin and Path(origin, name).is_dir():
            shutil.copytree(Path(origin, name), out / name)
        else:
            vocabulary.save_pretrained(out / name)


def world_vocabulary(config: Config) -> PreTrainedTokenizerFast:
    """A vocabulary of all words in captions, task templates and the marks of the language model's turns."""
    vocabulary = word_tokenizer([*scenes.WORDS, *screens.WORDS, *(task.template for task in tasks.TASKS), USER, ASSISTANT])
    room = min(config.text.vocab_size, config.mllm.vocab_size)
    require(len(vocabulary) <= room, f"{len(vocabulary)} words: the configuration's vocab_size has room for {room}; raise it")
    return vocabulary


def read_made(folder: str) -> dict[str, Any]:
    """The content of made.json in `folder`, empty if there is none."""
    file = Path(folder, MADE_FILE)
    return read_json(file, "restore it from a copy", "parts") if folder and file.is_file() else {"commands": [], "parts": {}}


def command_line() -> str:
    given = [f"--{name}={FLAGS[name].value}" for name in ("config", "vae", "base", "mllm", "out") if FLAGS[name].value]
    return " ".join(["python -m launch.embed", *given])


if __name__ == "__main__":
    command.run(main, FLAGS)
