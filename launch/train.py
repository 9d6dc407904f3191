"""Trains: --config=stage1|stage2|stage3 --workdir=DIR. Started again on the same workdir it goes on where it stopped.

    python -m launch.train --config=stage1 --workdir=runs/stage1 --data.path=records --train.init_from=checkpoints/wan_i2v
    python -m launch.train --config=motion_inversion --workdir=W --reference=ref.mp4 --train.init_from=checkpoints/wan_i2v
    python -m launch.train --config=follow_your_motion --workdir=W --reference=ref.mp4 --prompt="its caption" --train.init_from=wan_t2v
    python -m launch.train --config=stage1 --dry_run

`vae:tiny` and `mllm:tiny` train the autoencoder and the language model of the procedural world (docs/world.md). The workdir holds the
configuration, metrics.jsonl, TensorBoard events and checkpoints (docs/training.md). SIGTERM or Ctrl-C saves after the current step and
ends.
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags

from configs.buckets import bucket_configs, written
from configs.ditflow import DiTFlow
from configs.errors import require
from configs.follow_your_motion import FollowYourMotion
from configs.mllm import MLLMTraining
from configs.motion_inversion import MotionInversion
from configs.run import Config
from configs.stage1 import TransferLoRA
from configs.vae import VAETraining
from configs.wan_animate_2 import WanAnimate2
from data_pipelines import clips, motion_inversion, motion_training
from data_pipelines.batches import batches, data_digest, empty_text, identify
from data_pipelines.prompts import read_pictures, require_prompts
from launch import command
from launch.sampling import evaluation
from launch.sampling.evaluation import TrainingEvaluation, require_suite
from launch.sampling.training import TrainingSamples
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import inputs, model_folder, outputs, run_folder
from omnitransfer_jax.mesh import data_share, make_mesh, with_found_mesh
from omnitransfer_jax.methods import follow_your_motion, omnitransfer, transfer_lora
from omnitransfer_jax.quarantine import Quarantine
from omnitransfer_jax.train import flops, loop
from omnitransfer_jax.train.objective import Objective
from omnitransfer_jax.train.plan import describe
from world import mllm_training, vae_training

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=FLAGS)
REFERENCE = flags.DEFINE_string("reference", "", "Clip to learn from (follow_your_motion, motion_inversion).", flag_values=FLAGS)
PROMPT = flags.DEFINE_string("prompt", "", "Caption of that clip.", flag_values=FLAGS)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes that a cluster started (TPU pod, Slurm, ...): join the others.", flag_values=FLAGS
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print configuration, parameters, memory and FLOPs, and stop.", flag_values=FLAGS)

ONE_CLIP = (FollowYourMotion, MotionInversion)  # configurations of trainings on one clip


def main(config: Config | VAETraining | MLLMTraining) -> None:
    require(not isinstance(config, DiTFlow), "--config=ditflow: it trains nothing; give it to launch.sample, with --reference=CLIP")
    prompts = require_prompts(config) if isinstance(config, Config) else []
    cases = require_suite(config) if isinstance(config, Config) else []
    if DRY_RUN.value:
        config = with_found_mesh(config)
        print(describe(objective(config), config))
        if isinstance(config, Config) and config.data.buckets:
            print(sizes(config))
        if isinstance(config, Config) and config.train.references:
            print(f"in sampling, {flops.note_of(config)}")
        return
    require(
        not isinstance(config, WanAnimate2),
        "--config=wan_animate_2: it is sampled here, not trained; give its weights to stage 1: --config=stage1 --train.init_from=DIR",
    )
    one_clip = isinstance(config, ONE_CLIP)
    require(one_clip or not (REFERENCE.value or PROMPT.value), "--reference, --prompt: this training reads records; leave them out")
    beside = "this training makes no samples; launch.sample does, from its checkpoints"
    require(not (one_clip and (prompts or cases)), f"train.{'sample_prompts' if prompts else 'evaluate_suite'}: {beside}")
    require(bool(WORKDIR.value), "--workdir: not given, and a training needs it; name the folder of the run")
    data = config.data.path if isinstance(config, Config) else ""
    outputs.require_folder("--workdir", WORKDIR.value, [config.train.init_from, data], holds="run", owns=[run_folder.CHECKPOINTS])
    if run_folder.is_run(WORKDIR.value):  # a run that goes on needs no weights but its own
        run_folder.read_config(WORKDIR.value, type(config))
    else:
        loop.require_weights(objective(config), config)
    asked = [(prompt, read_pictures(prompt, config)) for prompt in prompts] if isinstance(config, Config) else []
    asked += [evaluation.asked(case, config) for case in cases] if isinstance(config, Config) else []
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    config = with_found_mesh(config)
    mesh, workdir = make_mesh(config.mesh), Path(WORKDIR.value)
    match config:
        case VAETraining():
            vae_training.train(config, workdir, mesh)
        case MLLMTraining():
            mllm_training.train(config, workdir, mesh)
        case MotionInversion():
            motion_inversion.train(config, workdir, mesh, read_reference(config), PROMPT.value)
        case FollowYourMotion():
            motion_training.train(config, workdir, mesh, read_reference(config), PROMPT.value)
        case Config():
            load_models.require_expert(config)
            index, count = data_share(mesh)
            aside = Quarantine(config.data.quarantine)
            data = batches(config, seed=config.seed, process_index=index, process_count=count, quarantine=aside)
            base = None
            if isinstance(config, TransferLoRA):
                transfer_lora.require_imported(config)
                trained = transfer_lora.objective(config, empty_text(config))
                base = transfer_lora.load_base(config, trained, mesh)
            else:
                trained = omnitransfer.objective(config, empty_text(config))
            samples = TrainingSamples(config, asked, mesh, workdir, base, len(prompts)) if asked else None
            evaluate = TrainingEvaluation(samples, cases, workdir) if samples and cases else None
            shown, known = samples if prompts else None, data_digest(config, run_folder.is_run(WORKDIR.value))
            beside = {"evaluate": evaluate, "identify": identify(config, aside), "sample": shown, "quarantine": aside}
            loop.train(trained, config, workdir, mesh, data, data_digest=known, base=base, **beside)


def sizes(config: Config) -> str:
    """A line for each size that a batch may have."""
    lines = [f"{'target':>16} {'reference':>16} {'tokens of a step':>18} {'FLOPs of a step':>18}"]
    for each, form in zip(bucket_configs(config).values(), objective(config).forms, strict=True):
        work = f"{form.tokens:>18,} {form.flops:>18.4g}"
        lines.append(f"{written(each.video):>16} {written(each.data.reference):>16} {work}")
    return "\n".join([*lines, f"{len(lines) - 1} programs are compiled before the first step; the memory above is of the parameters"])


def objective(config: Config | VAETraining | MLLMTraining) -> Objective:
    """What the configuration trains."""
    match config:
        case VAETraining():
            return vae_training.objective(config)
        case MLLMTraining():
            inputs.require_checkpoint(load_models.INIT_FROM, config.train.init_from)
            if source := run_folder.imported_weights(config.train.init_from):
                model_folder.require_model(source, config.model)
            return mllm_training.objective(config, load_models.load_mllm_vocabulary(config.train.init_from))
        case MotionInversion():
            return motion_inversion.objective(config)
        case FollowYourMotion():
            return follow_your_motion.objective(follow_your_motion.stage(config, "temporal", config.train.init_from))
        case TransferLoRA():
            return transfer_lora.objective(config)
        case Config():
            return omnitransfer.objective(config)


def read_reference(config: Config) -> np.ndarray:
    """The clip of --reference in the size of the configuration, uint8 "T H W 3"."""
    require(bool(REFERENCE.value), "--reference: not given, and this training learns from one clip; give --reference=CLIP.mp4")
    size = config.video
    return clips.read_clip(REFERENCE.value, frames=size.frames, fps=size.fps, height=size.height, width=size.width)


if __name__ == "__main__":
    command.run(main, FLAGS)
