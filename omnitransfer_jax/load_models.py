"""Loads the networks one at a time: from imported weights, from a run, or with random weights.

`folder` is a folder of launch.import_weights, a workdir of launch.train, or `model_folder.EMBEDDED`, the model inside the package; with
an empty `folder` the weights are random.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from configs.errors import require
from configs.follow_your_motion import FollowYourMotion
from configs.run import Config
from omnitransfer_jax.folders import model_folder, run_folder
from omnitransfer_jax.mesh import placed, replicated, specs
from omnitransfer_jax.methods import follow_your_motion
from omnitransfer_jax.models import lora
from omnitransfer_jax.models.alignment import Alignment
from omnitransfer_jax.models.clip_vision import CLIPVision
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import OmniTransfer
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_dit import SHARDING, WanDiT
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.tokenizer import byte_tokenizer, load_tokenizer
from omnitransfer_jax.weights.parts import MLLM, MLLM_TOKENIZER, PARTS

RANDOM_LIMIT = 200_000_000  # parameters; the random weights of a larger network are of no use, so the absence of others is a mistake
INIT_FROM = "--train.init_from"
Model = TypeVar("Model", bound=nnx.Module)


def require_weights(folder: str, config: Config, names: Collection[str], flag: str = INIT_FROM) -> None:
    """A `RequestError`, before anything is read, if one of the networks `names` would be random and is too large; `flag` gives `folder`."""
    if not run_folder.imported_weights(folder):
        trained = ("dit",) if run_folder.is_run(folder) else ()
        parts = [part for part in (*PARTS, MLLM) if part.name in names and part.name not in trained]
        require_small({part.name: _size(part.shapes(getattr(config, part.name))) for part in parts}, folder, flag)


def require_small(sizes: Mapping[str, int], folder: str = "", flag: str = INIT_FROM) -> None:
    """A `RequestError` if one of the networks of so many parameters is too large for random weights, the only ones that there are."""
    large = [f"{name} ({size / 1e9:.1f} billion parameters)" for name, size in sizes.items() if size > RANDOM_LIMIT]
    require(
        not large,
        f"{flag}={folder!r} has no weights for {' and '.join(large)}, too large for random ones: give {flag}=DIR, "
        f"made with {model_folder.IMPORT}",
    )


def load_dit(folder: str, config: Config, mesh: Mesh) -> WanDiT:
    """The diffusion transformer, its weights in the dtype it computes in, as in the original, each where it lives on the mesh."""
    run_folder.require_same_function(folder, config)

    def make(rngs: nnx.Rngs) -> WanDiT:
        return WanDiT(config.dit, rngs=rngs)

    params = flat_params(abstract(make))
    leaves = placed(mesh, params, specs(params, SHARDING, config.mesh))
    sharding = {path: leaf.sharding for path, leaf in leaves.items()}
    if run_folder.is_run(folder) and isinstance(config, FollowYourMotion):
        return _load_adapted(folder, config, mesh, sharding)
    if run_folder.is_run(folder):
        return _load_trained(folder, config, "dit", config.dit.dtype, sharding)
    return _load(folder, "dit", make, config.dit.dtype, sharding)


def load_adapters(folder: str, config: FollowYourMotion) -> dict[str, jax.Array]:
    """The parameters of the two adapters that a run of Follow-Your-Motion trained, by their paths in the transformer, float32."""
    run_folder.require_same_function(folder, config)
    params = flat_params(abstract(partial(follow_your_motion.make_model, config)))
    adapters = [path for path in params if lora.PATH.fullmatch(path)]
    found = run_folder.load_params(folder, params, dtype="float32", only=adapters)
    return {path.removeprefix("dit."): leaf for path, leaf in found.items()}


def load_alignment(folder: str, config: Config) -> Alignment:
    """The language model with its adapters, the queries and the connector, from a run of stage 2 or 3."""
    run_folder.require_same_function(folder, config)
    if run_folder.is_run(folder):
        return _load_trained(folder, config, "alignment", None)
    require(not folder, f"{folder}: imported weights have no queries and no connector; give the workdir of a stage 2 or 3 training")
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
    return load_tokenizer(source) if source else byte_tokenizer()


def load_mllm_vocabulary(folder: str) -> PreTrainedTokenizerFast:
    """The language model's tokenizer; that of bytes and Qwen's special tokens if the weights are random."""
    source = run_folder.imported_weights(folder)
    if not source:
        return byte_tokenizer()
    place = Path(source, MLLM_TOKENIZER)
    require(
        (place / "tokenizer.json").is_file(), f"{place}: no tokenizer.json; import the Qwen2.5-VL folder it came in: {model_folder.IMPORT}"
    )
    return load_tokenizer(place)


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


def _load_adapted(folder: str, config: FollowYourMotion, mesh: Mesh, sharding: Mapping[str, jax.sharding.Sharding]) -> WanDiT:
    """The transformer with the adapters of a run added to its kernels."""
    model, dtype = abstract(lambda rngs: WanDiT(config.dit, rngs=rngs)), config.dit.dtype
    params = flat_params(abstract(partial(follow_your_motion.make_model, config)))
    bare = {f"dit.{path}": place for path, place in sharding.items()}
    loaded = run_folder.load_params(folder, params, bare, dtype, only=bare)
    base = {path.removeprefix("dit."): leaf for path, leaf in loaded.items()}
    if not base:  # the run keeps no copy of imported weights
        base = model_folder.load_part(run_folder.imported_weights(folder), "dit", flat_params(model), sharding, dtype)
    adapters = jax.device_put(load_adapters(folder, config), replicated(mesh))
    return with_params(model, lora.merge_lora(base | adapters, config.motion.lora.scale))


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
