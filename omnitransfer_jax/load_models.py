"""Loads the networks one at a time: from imported weights, from a run, or with random weights.

`folder` is a folder of launch.import_weights, a workdir of launch.train, or `model_folder.EMBEDDED`, the model inside the package; with
an empty `folder` the weights are random.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from configs.errors import require
from configs.follow_your_motion import FollowYourMotion
from configs.run import Config
from configs.stage1 import TransferLoRA
from omnitransfer_jax.folders import inputs, model_folder, run_folder
from omnitransfer_jax.mesh import placed, replicated, specs
from omnitransfer_jax.methods import follow_your_motion
from omnitransfer_jax.models import lora, transfer_adapters
from omnitransfer_jax.models.alignment import Alignment
from omnitransfer_jax.models.clip_vision import CLIPVision
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import OmniTransfer
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_dit import SHARDING, WanDiT
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.tokenizer import byte_tokenizer, load_tokenizer, require_tokenizer
from omnitransfer_jax.weights import wan_dit
from omnitransfer_jax.weights.lora import read_adapters
from omnitransfer_jax.weights.parts import MLLM, MLLM_TOKENIZER, PARTS, TOKENIZERS

RANDOM_LIMIT = 200_000_000  # parameters; the random weights of a larger network are of no use, so the absence of others is a mistake
INIT_FROM = "--train.init_from"
WITHOUT_ALIGNMENT = "imported weights have no queries and no connector; give the workdir of a stage 2 or 3 training"
EXPERTS = {"high_noise": "dit", "low_noise": model_folder.LOW_NOISE}  # `train.expert` -> its part of a model folder
Model = TypeVar("Model", bound=nnx.Module)


def require_weights(folder: str, config: Config, names: Collection[str], flag: str = INIT_FROM) -> None:
    """A `RequestError`, before anything is read, unless `folder`, the value of `flag`, has the networks `names` of this configuration.

    They may be random if they are small and there is no folder. `dit` stands for everything that a run trains.
    """
    inputs.require_checkpoint(flag, folder)
    is_run, source = run_folder.is_run(folder), run_folder.imported_weights(folder)
    parts = [part for part in (*PARTS, MLLM) if part.name in names and not (is_run and part.name == "dit")]
    if "dit" in names:
        run_folder.require_same_function(folder, config)
        aligned = is_run or not folder or not config.alignment.enabled
        require(aligned, f"{flag}={folder}: {WITHOUT_ALIGNMENT}")
    if is_run and "dit" in names:
        inputs.require_trained(flag, folder)
    if not source:
        require_small({part.name: _size(part.shapes(getattr(config, part.name))) for part in parts}, folder, flag)
        return
    stored = model_folder.require_model(source, config)
    absent = [f"{part.name} ({part.absent})" for part in parts if part.name not in stored]
    require(not absent, f"{flag}={folder}: {source} has no {' and no '.join(absent)}; import it: {model_folder.IMPORT}")
    if "text" in names:
        require_tokenizer(source)
    if "mllm" in names:
        _mllm_vocabulary(source)


def require_expert(config: Config) -> None:
    """A `RequestError` unless `train.expert` names one of the two experts in `train.init_from`, or is None where there is one network."""
    folder, expert = config.train.init_from, config.train.expert
    imported = folder and not run_folder.is_run(folder)
    parts = set(model_folder.read_model(model_folder.resolve(folder))) if imported else set()
    if model_folder.LOW_NOISE not in parts:
        remedy = "a folder with the two experts of Wan2.2 as train.init_from, or leave it out"
        require(expert is None, f"train.expert={expert}: train.init_from={folder!r} has no experts to choose from; give {remedy}")
        return
    there = [name for name, part in EXPERTS.items() if part in parts]
    require(
        expert in there,
        f"train.init_from={folder!r} holds the {' and the '.join(there)} expert of Wan2.2, and a training has one network: "
        f"give --train.expert={' or '.join(there)}",
    )


def require_small(sizes: Mapping[str, int], folder: str = "", flag: str = INIT_FROM) -> None:
    """A `RequestError` if one of the networks of so many parameters is too large for random weights, the only ones that there are."""
    large = [f"{name} ({size / 1e9:.1f} billion parameters)" for name, size in sizes.items() if size > RANDOM_LIMIT]
    require(
        not large,
        f"{flag}={folder!r} has no weights for {' and '.join(large)}, too large for random ones: give {flag}=DIR, "
        f"made with {model_folder.IMPORT}",
    )


def load_dit(folder: str, config: Config, mesh: Mesh, part: str = "dit") -> WanDiT:
    """The diffusion transformer, its weights in the dtype it computes in, as in the original, each where it lives on the mesh.

    Where there are two experts, `part` names one of them (`samplers.Expert.part`).
    """
    run_folder.require_same_function(folder, config)

    def make(rngs: nnx.Rngs) -> WanDiT:
        return WanDiT(config.dit, rngs=rngs)

    params = flat_params(abstract(make))
    leaves = placed(mesh, params, specs(params, SHARDING, config.mesh))
    sharding = {path: leaf.sharding for path, leaf in leaves.items()}
    if run_folder.is_run(folder) and isinstance(config, FollowYourMotion):
        base = _load(folder, part, make, config.dit.dtype, sharding)
        adapters = jax.device_put(load_adapters(folder, config), replicated(mesh))
        return with_params(base, lora.merge_lora(flat_params(base) | adapters, config.motion.lora.scale))
    if isinstance(config, TransferLoRA) and (run_folder.is_run(folder) or config.adapter_from):
        base, learnt = _load(folder, part, make, config.dit.dtype, sharding), load_transfer_adapters(folder, config)
        return with_params(base, lora.merge_lora(flat_params(base) | jax.device_put(learnt, replicated(mesh)), config.adapter.scale))
    if run_folder.is_run(folder):
        return _load_trained(folder, config, "dit", config.dit.dtype, sharding)
    return _load(folder, part, make, config.dit.dtype, sharding)


def load_transfer_adapters(folder: str, config: TransferLoRA) -> dict[str, Any]:
    """The transformer's adapters by their paths in it, float32: those that a run trained, or of `adapter_from`."""
    if not run_folder.is_run(folder):
        return given_adapters(config)
    run_folder.require_same_function(folder, config)
    params = transfer_adapters.adapters(abstract(partial(transfer_adapters.make_model, config)))
    found = run_folder.load_params(folder, params, dtype="float32")
    return {path.removeprefix("dit."): leaf for path, leaf in found.items()}


def given_adapters(config: TransferLoRA) -> dict[str, np.ndarray]:
    """The adapters of `adapter_from` by their paths in the transformer."""
    model = abstract(partial(transfer_adapters.make_model, config))
    params = {path.removeprefix("dit."): x for path, x in transfer_adapters.adapters(model).items()}
    tables = [wan_dit.entries(config.dit, "diffusers"), wan_dit.entries(config.dit, "original")]
    return read_adapters(config.adapter_from, params, config.adapter, tables)


def load_adapters(folder: str, config: FollowYourMotion) -> dict[str, jax.Array]:
    """The parameters of the two adapters that a run of Follow-Your-Motion trained, by their paths in the transformer, float32."""
    run_folder.require_same_function(folder, config)
    params = follow_your_motion.adapters(abstract(partial(follow_your_motion.make_model, config)))
    found = run_folder.load_params(folder, params, dtype="float32")
    return {path.removeprefix("dit."): leaf for path, leaf in found.items()}


def load_alignment(folder: str, config: Config) -> Alignment:
    """The language model with its adapters, the queries and the connector, from a run of stage 2 or 3."""
    run_folder.require_same_function(folder, config)
    if run_folder.is_run(folder):
        return _load_trained(folder, config, "alignment", None)
    require(not folder, f"{folder}: {WITHOUT_ALIGNMENT}")
    return _load("", "alignment", lambda rngs: Alignment(config, rngs=rngs))


def load_vae(folder: str, config: Config) -> WanVAE:
    """The video autoencoder."""
    return _load(folder, "vae", lambda rngs: WanVAE(config.vae, rngs=rngs))


def load_text_encoder(folder: str, config: Config) -> UMT5Encoder:
    """The text encoder."""
    return _load(folder, "text", lambda rngs: UMT5Encoder(config.text, rngs=rngs))


def load_image_encoder(folder: str, config: Config) -> CLIPVision:
    """The image encoder."""
    return _load(folder, "image", lambda rngs: CLIPVision(config.image, rngs=rngs))


def load_mllm(folder: str, config: Config) -> Qwen2_5VL:
    """The multimodal language model, its vision tower included."""
    return _load(folder, "mllm", lambda rngs: Qwen2_5VL(config.mllm, rngs=rngs))


def load_vocabulary(folder: str) -> PreTrainedTokenizerFast:
    """The text encoder's tokenizer; that of bytes if the weights are random."""
    source = run_folder.imported_weights(folder)
    if source:
        model_folder.require_whole(source, TOKENIZERS["diffusers"])
    return load_tokenizer(source) if source else byte_tokenizer()


def load_mllm_vocabulary(folder: str) -> PreTrainedTokenizerFast:
    """The language model's tokenizer; that of bytes and Qwen's special tokens if the weights are random."""
    source = run_folder.imported_weights(folder)
    if not source:
        return byte_tokenizer()
    return load_tokenizer(_mllm_vocabulary(source))


def _mllm_vocabulary(source: str) -> Path:
    """Where the language model's vocabulary lies; a `RequestError` if it is absent."""
    place = Path(source, MLLM_TOKENIZER)
    model_folder.require_whole(source, MLLM_TOKENIZER)
    require(
        (place / "tokenizer.json").is_file(), f"{place}: no tokenizer.json; import the Qwen2.5-VL folder it came in: {model_folder.IMPORT}"
    )
    return place


def _load_trained(
    folder: str, config: Config, part: str, dtype: str | None, sharding: Mapping[str, jax.sharding.Sharding] | None = None
) -> Any:
    """The part `dit` or `alignment` of the model that the run in `folder` trains."""
    model = getattr(abstract(lambda rngs: OmniTransfer(config, rngs=rngs)), part)
    params = {f"{part}.{path}": leaf for path, leaf in flat_params(model).items()}
    places = None if sharding is None else {f"{part}.{path}": place for path, place in sharding.items()}
    loaded = run_folder.load_params(folder, params, places, dtype)
    require(len(loaded) == len(params), f"{folder}: this run has no {part}; give one of a later stage, or --config of its own")
    return with_params(model, {path.removeprefix(f"{part}."): x for path, x in loaded.items()})


def _load(
    folder: str,
    name: str,
    make: Callable[[nnx.Rngs], Model],
    dtype: str | None = None,
    sharding: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Model:
    """The part `name` of the weights in `folder`, or of those that the run in `folder` started from; else random ones of a fixed seed."""
    source, model = run_folder.imported_weights(folder), abstract(make)
    if not source:
        require_small({name: _size(flat_params(model))}, folder)
        # unsafe_rbg compiles several times as fast; its numbers differ between backends, which does not matter here
        return jax.jit(lambda: make(nnx.Rngs(jax.random.key(0, impl="unsafe_rbg"))))()
    return with_params(model, model_folder.load_part(source, name, flat_params(model), sharding, dtype))


def _size(params: Mapping[str, Any]) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in params.values())
