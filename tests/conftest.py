"""What holds in every test: strict dtypes and ranks, exact float32 products, shapes checked by jaxtyping (pyproject.toml)."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time here goes into compiling.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# A program that several tests compile is compiled once.
CACHE = tempfile.TemporaryDirectory(prefix="omnitransfer_programs_")
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """Real clips and latents that are not part of the project; a test that reads them has a twin on generated ones."""
    if not SHARED.is_dir():
        pytest.skip(f"real clips are not part of a clone: {SHARED.name}/ is absent beside the project")
    return SHARED
