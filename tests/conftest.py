"""What holds in every test: strict dtypes and ranks, exact float32 products, shapes checked by jaxtyping (pyproject.toml)."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Most of the time here goes into compiling.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# A program that several tests compile is compiled once, whichever worker or process of a command comes first. A limit makes jax lock the
# folder; without a lock a process reads what another has half written.
if "PYTEST_XDIST_WORKER" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="omnitransfer_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(20 * 2**30)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """Real clips and latents that are not part of the project; a test that reads them has a twin on generated ones."""
    if not SHARED.is_dir():
        pytest.skip(f"real clips are not part of a clone: {SHARED.name}/ is absent beside the project")
    return SHARED
