"""Stage 1: the diffusion transformer learns to attend to references in context (paper section 5.1).

Goal    Wan2.1 I2V 14B becomes a transfer model for all five tasks; text still comes from UMT5.
Trains  every parameter of the transformer; autoencoder, UMT5 and CLIP are frozen and run once, in launch.encode. The variants `lora`,
        for one GPU, train adapters of the transformer alone (docs/pytorch.md).
Cost    10,000 steps of 16 samples, 480p x 81 frames, reference of the same size: 12.25 PFLOP a sample and step (docs/references.md).
Result  not run at full size. `tiny` starts from the base model inside the package; `smoke` has random weights, for tests.

    python -m launch.train --config=stage1 --workdir=DIR --data.path=RECORDS --train.init_from=IMPORTED
    python -m launch.train --config=stage1:lora --workdir=DIR --data.path=RECORDS --train.init_from=IMPORTED
    python -m launch.export --config=stage1:lora --checkpoint=DIR --layout=comfyui --out=LORA
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from configs import stage0, wan
from configs.base import LoRAConfig
from configs.errors import require
from configs.kinds import RUN, TRAINING
from configs.run import CheckpointConfig, Config, DataConfig, OptimizerConfig, TransferTrainConfig, VideoConfig, variant_of

TARGETS = (r"blocks\.(self|cross)_attention\..*", r"blocks\.ffn\..*")

FULL = wan.get_config()
SMOKE_VIDEO = VideoConfig(frames=9, height=32, width=48, fps=8)


@dataclass(frozen=True, kw_only=True)
class TransferLoRA(Config):
    """Stage 1 as adapters of the transformer, whose own weights are those of train.init_from and stay as they are."""

    training: ClassVar[str] = "transfer_lora"

    adapter: LoRAConfig = field(default_factory=lambda: LoRAConfig(rank=32, alpha=32.0, targets=TARGETS))
    """Rank, and by their paths the projections of the transformer that get an adapter."""
    adapter_from: str = field(default="", metadata=RUN)
    """Adapters to start from, or to sample with: a folder of PEFT's, or a file for ComfyUI or diffusers; empty: fresh ones."""
    base: Literal["dtype", "int8"] = field(default="dtype", metadata=TRAINING)
    """What the matrices of the blocks are kept in while adapters train: `dit.dtype`, or int8 with a factor for each output."""

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work."""
        super().validate()
        self.adapter.validate()
        require(not self.alignment.enabled, "alignment.enabled=True: adapters of stage 1 read UMT5; give --alignment.enabled=False")
        require(self.train.expert is None, f"train.expert={self.train.expert}: adapters are of Wan2.1's one network; leave it out")


def lora(config: Config, adapter: LoRAConfig, train: TransferTrainConfig, learning_rate: float) -> TransferLoRA:
    """Stage 1 of `config` as adapters."""
    values: dict[str, Any] = vars(config) | {
        "adapter": adapter,
        "train": replace(train, trainable=(r"dit/.*\.lora\..*",)),
        "optimizer": OptimizerConfig(learning_rate=learning_rate, weight_decay=0.0, warmup_steps=min(100, train.steps // 4)),
    }
    return TransferLoRA(**values)


VARIANTS: dict[str, Config] = {
    "": FULL,
    "tiny": replace(wan.get_config("tiny"), train=replace(stage0.TINY_TRAIN, steps=560), optimizer=stage0.TINY_OPTIMIZER),
    "smoke": replace(
        wan.get_config("smoke"),
        video=SMOKE_VIDEO,
        data=DataConfig(reference=SMOKE_VIDEO, threads=1),
        train=TransferTrainConfig(steps=60, batch_size=4, ema=0.9),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        checkpoint=CheckpointConfig(every=30),
    ),
}
# `remat=full` keeps of a block its input alone, which one GPU needs.
VARIANTS["lora"] = lora(
    replace(FULL, dit=replace(FULL.dit, remat="full")),
    LoRAConfig(rank=32, alpha=32.0, targets=TARGETS),
    replace(FULL.train, steps=3_000, batch_size=1),
    learning_rate=1e-4,
)
VARIANTS["lora_tiny"] = lora(
    VARIANTS["tiny"], LoRAConfig(rank=8, alpha=8.0, targets=TARGETS), replace(stage0.TINY_TRAIN, steps=560, ema=0.0), learning_rate=3e-3
)
VARIANTS["lora_smoke"] = lora(
    VARIANTS["smoke"],
    LoRAConfig(rank=4, alpha=8.0, targets=TARGETS),
    replace(VARIANTS["smoke"].train, steps=20, ema=0.0),
    learning_rate=3e-3,
)


def get_config(variant: str = "") -> Config:
    """The configuration named `stage1[:variant]`."""
    return variant_of(VARIANTS, variant)
