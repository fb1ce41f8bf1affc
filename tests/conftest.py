"""Eight fake CPU devices for every test, set before JAX is imported; the longest first; and compiled programs that do not
pile up."""
import os

from tests.helpers.xla_flags import EIGHT_DEVICES

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES}".strip()

# libtpu reads these when a process first loads it, and some tests want to hear what its partitioner has to say.
for name in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):
    os.environ.setdefault(name, "1")

import gc  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes many small objects and few cycles.
gc.set_threshold(100_000, 20, 100)

# Linux gives a process 65,530 by default, and every compiled program takes some: one too many is a segmentation fault.
MOST_MAPS = 20_000


# What takes longest, in this order, comes first, so that no process is left alone with it at the end.
LONGEST = (
    "test_several_hosts", "test_bucket_run", "test_shared_rows", "test_compile_sweep", "test_dream_memory", "test_readme",
    "test_kills", "test_dream_run",
    "test_notebooks", "test_hosts_mishaps", "test_evaluate", "test_generate_models", "test_tpu_compile", "test_compile",
    "test_dream_whole", "test_llada_run", "test_reproduce", "test_package", "test_ssh", "test_train", "test_blocks", "test_blocks_cache", "test_dora", "test_mdlm", "test_int8",
    "test_configs", "test_hostile", "test_models", "test_prepare", "test_scorer_tpu", "test_train_mishaps",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module", autouse=True)
def quick(request):
    """Quick compiles everywhere, but where programs themselves are looked at."""
    if request.path.parent.name == "compile":
        yield
        return
    from tests.helpers.quick import quick_compiles

    with quick_compiles():
        yield


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Programs that a module compiled are forgotten after it, once they are many; shared ones are compiled again."""
    yield
    if "jax" not in sys.modules or not Path("/proc/self/maps").exists():
        return
    if Path("/proc/self/maps").read_bytes().count(b"\n") > MOST_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def emulator():
    """A bucket `runs` in memory, which this process and its children reach by gs://runs."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    from softmask_jax.benchmarks.emulator import Emulator

    with Emulator("runs") as server:
        os.environ.update(server.environment)
        yield server


@pytest.fixture
def bucket(emulator, request):
    """An empty folder of that bucket, `gs://runs/<test>`; without faults before and after the test."""
    from softmask_jax.io.paths import to_path

    yield to_path(f"gs://runs/{request.node.originalname or request.node.name}")
    emulator.faults = lambda method, path: None
