"""Simulated devices: they need a process of their own, for their number is fixed when JAX starts."""

import os

import jax


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many devices."""
    # Halves the time such a process compiles; XLA of jax 0.12 has no such flag and refuses to start with it.
    fast = " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 12) else ""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}{fast}"
