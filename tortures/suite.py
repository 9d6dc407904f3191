"""All tortures, and how many cases of each there are."""

from tortures import clips, damage, disk, kills, not_finite, signals, texts, topology, weights
from tortures.outcome import Torture

TORTURES: dict[str, Torture] = {
    "random_kills": kills.random_kills,
    "kills_inside_a_save": kills.kills_inside_a_save,
    "every_step": kills.every_step,
    "damaged_checkpoints": damage.checkpoints,
    "damaged_records": damage.damaged_records,
    "signals": signals.signals,
    "not_finite": not_finite.not_finite,
    "disk_faults": disk.disk_faults,
    "topologies": topology.topologies,
    "bad_clips": clips.bad_clips,
    "encoder_kills": clips.encoder_kills,
    "texts": texts.texts,
    "hostile_weights": weights.hostile_weights,
}
FULL = {
    "random_kills": 500,
    "kills_inside_a_save": 95,
    "every_step": 60,
    "damaged_checkpoints": 1000,
    "damaged_records": 500,
    "signals": 60,
    "not_finite": 400,
    "disk_faults": 30,
    "topologies": 16,
    "bad_clips": 1200,
    "encoder_kills": 20,
    "texts": 10_000,
    "hostile_weights": 40,
}
SHORT = {"damaged_checkpoints": 4, "damaged_records": 40, "bad_clips": 40, "texts": 200}
