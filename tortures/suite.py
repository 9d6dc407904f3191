"""All tortures, and how many cases of each there are."""

from tortures import kills
from tortures.outcome import Torture

TORTURES: dict[str, Torture] = {
    "random_kills": kills.random_kills,
    "kills_inside_a_save": kills.kills_inside_a_save,
    "every_step": kills.every_step,
}
FULL = {"random_kills": 500, "kills_inside_a_save": 95, "every_step": 60}
SHORT = {"kills_inside_a_save": 1}
