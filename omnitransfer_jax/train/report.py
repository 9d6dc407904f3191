"""WORKDIR/report.html: how a run goes, in one file that a browser opens without a network: curves, samples, incidents, the configuration.

It is written anew every so often and replaced as a whole, so that it can be open while the run goes on. All texts are escaped (jinja2).
"""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from omnitransfer_jax.folders.atomic import write_whole
from omnitransfer_jax.train.incidents import INCIDENTS_FILE
from omnitransfer_jax.train.log import EVALUATION, LOSS, read_lines

REPORT_FILE, SAMPLES = "report.html", "samples"
POINTS, WIDTH, HEIGHT = 600, 560, 180  # of a curve, most; pixels of a plot
SHOWN = 4  # grids of samples, the newest
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
PAGE = Path(__file__).with_name("page.html")


def write(workdir: Path, steps: int) -> None:
    """Writes the report of a run that is to do so many `steps`; without a line of the log there is none."""
    lines = read_lines(workdir)
    if not lines:
        return
    names = {name for line in lines for name in line}
    tasks = sorted(name for name in names if name.startswith(LOSS) and not name.startswith(f"{LOSS}t0"))
    times = sorted(name for name in names if name.startswith(f"{LOSS}t0"))
    wanted = [("loss", ["loss"]), ("loss of each task", tasks), ("loss by time", times), ("norm of the gradients", ["grad_norm"])]
    wanted += [
        ("learning rate", ["learning_rate"]),
        ("seconds a step", ["seconds"]),
        ("share of a step that waits for data", ["data_wait"]),
    ]
    measured = sorted(name for name in names if name.startswith(EVALUATION))
    for metric in dict.fromkeys(name.rpartition("/")[0] for name in measured):
        wanted.append((metric.removeprefix(EVALUATION), [name for name in measured if name.rpartition("/")[0] == metric]))
    last = lines[-1]
    parts = [f"step {last['step']} of {steps}", f"{last.get('seconds', 0):.3g} s a step", f"{last.get('skipped', 0)} updates left out"]
    parts += [f"MFU {last['mfu']:.1%}"] if last.get("mfu") else []
    page = Environment(autoescape=True).from_string(PAGE.read_text())
    samples = sorted((workdir / SAMPLES).glob("step_*.webp"))[-SHOWN:][::-1] if (workdir / SAMPLES).is_dir() else []
    content = page.render(
        name=workdir.name,
        summary="; ".join(parts),
        plots=[plot for title, each in wanted if (plot := plotted(title, each, lines))],
        grids=[{"name": path.stem.replace("_", " "), "content": base64.b64encode(path.read_bytes()).decode()} for path in samples],
        columns="From left to right: reference, first frame, the weights before the training, the weights at this step.",
        incidents=read_lines(workdir, INCIDENTS_FILE)[-100:],
        config=(workdir / "config.json").read_text() if (workdir / "config.json").exists() else "",
        width=WIDTH,
        height=HEIGHT,
    )
    write_whole(workdir / REPORT_FILE, content)


def plotted(title: str, names: Sequence[str], lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Curves over the steps, in one frame; None if there is nothing to draw. Long ones are thinned to means."""
    curves = {name: thinned([(line["step"], line[name]) for line in lines if line.get(name) is not None]) for name in names}
    values = [value for curve in curves.values() for _, value in curve]
    if not values:
        return None
    low, high = min(values), max(values)
    first, last = lines[0]["step"], lines[-1]["step"]

    def points(curve: Sequence[tuple[float, float]]) -> str:
        across, up = max(last - first, 1), high - low or 1
        return " ".join(f"{(x - first) / across * WIDTH:.1f},{HEIGHT - 6 - (y - low) / up * (HEIGHT - 24):.1f}" for x, y in curve)

    drawn = [
        {
            "name": label(name),
            "colour": COLOURS[number % len(COLOURS)],
            "points": points(curve),
            "last": f"{curve[-1][1]:.3g}",
        }
        for number, (name, curve) in enumerate(curves.items())
        if curve
    ]
    return {"title": title, "curves": drawn, "top": f"{high:.3g}", "bottom": f"{low:.3g}  steps {first} to {last}"}


def label(name: str) -> str:
    """What a curve is called beside the others of its plot."""
    return name.rpartition("/")[2] if name.startswith(EVALUATION) else name.removeprefix(LOSS)


def thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` of a curve's points, each the mean of those it stands for."""
    size = math.ceil(len(curve) / POINTS) or 1
    pieces = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)) for piece in pieces]
