"""Stage 1 -> 2 -> 3 by their commands: which parameters each changes, and what can be done with the result.

With real clips: python -m pytest -n 0 -m slow tests/launch/test_stages.py
"""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from configs import stage1, stage2, stage3
from data_pipelines import clips, example
from launch import command, encode, export, sample, train
from omnitransfer_jax import tasks
from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.weights import qwen2_5_vl
from tests.launch.test_road import SMOKE as ROAD
from tests.launch.test_road import example_pairs, real_manifest

SMALL = [*ROAD[1:], "--mllm.num_layers=1", "--optimizer.learning_rate=0.01"]


def run(module, stage, *args):
    assert command.execute(module.main, module.FLAGS, [f"--config={stage}:smoke", *SMALL, *args]) == 0


def weights(workdir, config):
    """Everything a run holds, not averaged."""
    config = command.override(config, SMALL, train.FLAGS)  # the configuration the commands were given
    return run_folder.load_params(workdir, omnitransfer.objective(config).params)


SAMPLED = ["id"], ["motion"], ["style", "motion"]  # one task of each family, and both together
EVERY_TASK = tuple([name] for name in tasks.NAMES)


def travel(tmp_path, manifest, pairs, sampled=SAMPLED):
    records = tmp_path / "records"
    run(encode, "stage3", f"--manifest={manifest}", f"--out={records}", "--allow_outside")
    origin = ""
    for stage in ("stage1", "stage2", "stage3"):
        workdir = tmp_path / stage
        run(
            train,
            stage,
            f"--data.path={records}",
            f"--workdir={workdir}",
            f"--train.init_from={origin}",
            "--train.steps=12",
            "--train.ema=0",
        )
        origin = workdir
    runs = {"stage1": stage1, "stage2": stage2, "stage3": stage3}
    first, second, third = (weights(tmp_path / name, stage.get_config("smoke")) for name, stage in runs.items())

    assert all((second[path] == leaf).all() for path, leaf in first.items())  # stage 2 leaves the transformer as it was, bit for bit
    moved = {path for path in third if (third[path] != second[path]).any()}
    frozen = {path for path in third if path.startswith("alignment.mllm.") and ".lora." not in path}
    assert not moved & frozen
    dead = {path for path in third if path.endswith("key.bias")}  # they cancel in the softmax: their gradient is rounding
    assert not set(third) - frozen - dead - moved

    for chosen in sampled:
        out = tmp_path / f"{'_'.join(chosen)}.mp4"
        request = [arg for task in chosen for arg in (f"--task={task}", f"--reference={pairs[task][0]}")]
        frame = next((pairs[task][1] for task in chosen if pairs[task][1]), None)
        request += [f"--first_frame={frame}"] if frame else ["--prompt=a person walks on the beach"]
        run(sample, "stage3", *request, f"--checkpoint={tmp_path / 'stage3'}", f"--out={out}", "--sampler.steps=2")
        assert clips.read_clip(out, frames=9, fps=8, height=16, width=16).std() > 0
    return third


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers
def test_on_clips_the_project_makes(tmp_path):
    torch, diffusers, peft = (pytest.importorskip(name) for name in ("torch", "diffusers", "peft"))
    manifest = example.write_example(tmp_path / "clips")
    trained = travel(tmp_path, manifest, example_pairs(manifest, tmp_path))

    for layout in ("diffusers", "original"):
        run(export, "stage3", f"--checkpoint={tmp_path / 'stage3'}", f"--layout={layout}", f"--out={tmp_path / layout}")
    model, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "diffusers" / "transformer", output_loading_info=True)
    assert not any(info.values())
    assert (trained["dit.head.kernel"] == model.proj_out.weight.detach().numpy().T).all()
    original = load_file(tmp_path / "original" / "diffusion_pytorch_model.safetensors")
    assert (trained["dit.head.kernel"] == original["head.head.weight"].T).all()

    folder = tmp_path / "diffusers" / "alignment"
    added = load_file(folder / "alignment.safetensors")
    assert (added["queries"] == trained["alignment.queries"]).all()
    assert (trained["alignment.connector.first.kernel"] == added["connector.first.weight"].T).all()
    readme = (folder / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in added)

    config = command.override(stage3.get_config("smoke"), SMALL, train.FLAGS)
    settings = {k: v for k, v in qwen2_5_vl.config_json(config.mllm).items() if k not in ("architectures", "model_type")}
    base = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings))
    adapted = peft.PeftModel.from_pretrained(base, folder / "mllm_lora")
    theirs = {name: value for name, value in adapted.state_dict().items() if ".lora_" in name}
    stored = load_file(folder / "mllm_lora" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in theirs} == set(stored)
    for name, value in theirs.items():
        assert torch.equal(value, torch.tensor(stored[name.replace(".default", "")]))
    assert max(np.abs(x).max() for name, x in stored.items() if "lora_B" in name) > 0
    assert jnp.isfinite(trained["alignment.queries"]).all()


@pytest.mark.slow  # two minutes: the same as on clips the project makes, and samples of every task
def test_on_real_clips(shared, tmp_path):
    travel(tmp_path, *real_manifest(shared, tmp_path), EVERY_TASK)
