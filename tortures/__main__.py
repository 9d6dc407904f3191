"""What may befall a training, done to it: python -m tortures [--only=NAME ...] [--short] [--out=FOLDER]

Prints one table: cases, failures, seconds. `--short` is what `make test` runs. All cases take hours on two cores. The devices are
simulated and the disk is a local one; what a TPU or a bucket adds is not seen here.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="of the tortures; all if not given")
    parser.add_argument("--short", action="store_true", help="a few cases of each, half a minute")
    parser.add_argument("--cases", type=int, default=0, help="so many of each instead of the full number")
    parser.add_argument("--out", help="a folder to work in, kept if anything fails; a temporary one if not given")
    given = parser.parse_args()
    prepare()
    from tortures.suite import FULL, SHORT, TORTURES

    if unknown := [name for name in given.only if name not in TORTURES]:
        parser.error(f"--only={unknown[0]}: there are {', '.join(TORTURES)}")
    names = given.only or (SHORT if given.short else TORTURES)
    sizes = {name: given.cases or (SHORT if given.short else FULL)[name] for name in names}
    with tempfile.TemporaryDirectory(prefix="tortures_") as temporary:
        return run(sizes, Path(given.out or temporary))


def run(sizes: dict[str, int], out: Path) -> int:
    """Runs so many cases of each torture and prints the table; 1 if a case failed."""
    from tortures.suite import TORTURES

    rows, all_failures = [], []
    for name, count in sizes.items():
        folder, started = out / name, time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        outcome = TORTURES[name](folder, count)
        rows.append((name, outcome.cases, len(outcome.failures), f"{time.monotonic() - started:.0f}", outcome.note))
        all_failures += [f"{name}: {' '.join(failure.split())}" for failure in outcome.failures]
        print(table([rows[-1]]), file=sys.stderr, flush=True)
        if not outcome.failures:
            shutil.rmtree(folder)
    print(table([("torture", "cases", "failures", "seconds", ""), *rows]))
    print("\n".join(all_failures[:100]), flush=True)
    return bool(all_failures)


def table(rows: Iterable[tuple[object, ...]]) -> str:
    return "\n".join(
        f"{name:<24} {cases!s:>7} {failures!s:>9} {seconds!s:>8}  {note}".rstrip() for name, cases, failures, seconds, note in rows
    )


def prepare() -> None:
    """What all processes have: the CPU, programs that are compiled once, exact float32."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"tortures_programs_{os.getuid()}")
        os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(20 * 2**30)  # a limit makes JAX lock the folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


if __name__ == "__main__":
    sys.exit(main())
