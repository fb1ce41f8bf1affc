"""XLA_FLAGS of the processes of the tests, set before JAX is imported."""
from importlib.metadata import version

JAXLIB = tuple(map(int, version("jaxlib").split(".")[:2]))
# Without the newer emitters of fusions a program compiles in a third of the time; later versions have no other.
ONE_DEVICE = "--xla_cpu_use_fusion_emitters=false" if JAXLIB < (0, 11) else ""
EIGHT_DEVICES = f"--xla_force_host_platform_device_count=8 {ONE_DEVICE}".strip()
