"""What a folder is that a command was given for weights, and what to give in its place; found before anything is read.

Weights are a model folder (model.json) or the workdir of a run (config.json, checkpoints/). Given by mistake are folders inside of these,
records, and published weights that are not imported yet, which may have a config.json too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from etils import epath

from configs.errors import RequestError, require
from configs.run import Config, RunConfig
from omnitransfer_jax.folders import atomic, model_folder, run_folder
from omnitransfer_jax.weights.files import PICKLES
from omnitransfer_jax.weights.parts import MLLM, MLLM_TOKENIZER, PARTS, TOKENIZERS

RECORDS_FILE, BUCKETS_FILE = "records.json", "buckets.json"
INNER = (*(part.name for part in (*PARTS, MLLM)), MLLM_TOKENIZER, TOKENIZERS["diffusers"])  # the folders inside of a model folder
WEIGHTS = (".safetensors", ".gguf", *PICKLES)
PUBLISHED = {"_class_name", "model_type", "architectures"}  # keys of a config.json that came with weights
Kind = Literal["run", "model", "records", ""]
NAMES = {"run": "the workdir of a run", "model": "a folder of imported weights", "records": "a folder of records"}


def kind_of(folder: epath.PathLike) -> Kind:
    """What this project wrote into `folder`; empty if nothing."""
    path = epath.Path(folder)
    if (path / model_folder.MODEL_FILE).exists():
        return "model"
    if (path / RECORDS_FILE).exists() or (path / BUCKETS_FILE).exists():
        return "records"
    config = path / run_folder.CONFIG_FILE
    if not config.exists():
        return ""
    keys = _keys(config)
    is_run = {"training", "optimizer"} & keys if keys else (path / run_folder.CHECKPOINTS).exists()  # without keys: damaged
    return "run" if is_run else ""


def owner(path: epath.PathLike) -> epath.Path | None:
    """The run or the model folder to which `path` belongs as one of its checkpoints or parts."""
    at = epath.Path(path)
    for child, parent in zip((at, *at.parents), at.parents, strict=False):
        if child.name == run_folder.CHECKPOINTS and kind_of(parent) == "run":
            return parent
        if child.name in INNER and kind_of(parent) == "model":
            return parent
    return None


def require_checkpoint(flag: str, folder: str, of: type[RunConfig] = Config) -> None:
    """A `RequestError` unless `folder`, the value of `flag`, holds weights: a model folder, or a run of `of` or of the transformer.

    Of a run the model folder that it started from must be there too. An empty `folder` stands for random weights.
    """
    if not folder:
        return
    with _readable(flag, folder):
        wrong = _wrong(flag, model_folder.resolve(folder))
    require(not wrong, f"{flag}={folder}: {wrong}")
    origin = run_folder.imported_weights(folder, of)
    require(
        not origin or kind_of(origin) == "model",
        f"{flag}={folder}: the run started from {origin}, where its encoders are, and no imported weights are there now; put them back",
    )


def require_trained(flag: str, run: epath.PathLike) -> None:
    """A `RequestError` if the run has no checkpoint; whether those that it has are whole is found when one is read."""
    folder = epath.Path(run) / run_folder.CHECKPOINTS
    found = folder.exists() and any(path.name.isdigit() for path in folder.iterdir())
    require(found, f"{flag}={run}: this run has no checkpoint yet; wait for its first, or give what it started from")


def require_source(flag: str, source: str) -> None:
    """A `RequestError` if `source` cannot be published weights because it is absent, empty, or a folder of this project."""
    path, published = Path(source), "give the folder or the .safetensors file that was downloaded"
    with _readable(flag, source):
        require(bool(source) and path.exists(), f"{flag}={source}: no such file or folder; {published}")
        require(path.is_file() or any(path.iterdir()), f"{flag}={source}: an empty folder; {published}")
        home = owner(path.absolute())
        found = NAMES.get(kind_of(path)) or (home and f"inside of {home}, {NAMES[kind_of(home)]}")
    require(not found, f"{flag}={source}: {found}, no published weights; {published}")


def _wrong(flag: str, folder: str) -> str:
    """What `folder` is and what to give instead, if it holds no weights of this project; empty if it does."""
    path, give = epath.Path(folder).absolute(), f"give {flag}=DIR, a folder of launch.import_weights or the workdir of a training"
    import_it = f"import it: python -m launch.import_weights --source={folder} --out=DIR"
    if not path.exists():
        return f"no such folder; {give}"
    if not path.is_dir():
        return f"a file of weights; {import_it}" if path.suffix in WEIGHTS else f"a file; {give}"
    kind, home, inside = kind_of(path), owner(path), [child.name for child in path.iterdir()]
    if kind in ("run", "model"):
        return ""
    if home is not None:
        return f"inside of {NAMES[kind_of(home)]}; give {flag}={home}"
    if kind == "records":
        return f"{NAMES[kind]}, for --data.path; {give}"
    if any(name.endswith((*WEIGHTS, "model_index.json")) for name in inside) or PUBLISHED & _keys(path / run_folder.CONFIG_FILE):
        return f"published weights that are not imported; {import_it}"
    return f"neither imported weights nor a run, {model_folder.MODEL_FILE} is absent; {give}" if inside else f"an empty folder; {give}"


def _keys(file: epath.Path) -> set[Any]:
    """The keys of a JSON file; none if it is absent or damaged."""
    try:
        return set(atomic.read_json(file, ""))
    except (OSError, RequestError):
        return set()


@contextmanager
def _readable(flag: str, folder: str) -> Iterator[None]:
    """Makes one line of what the operating system raises: no permission, a name too long."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{flag}={folder[:300]}: cannot be read ({error.strerror or error}); give another folder") from None
