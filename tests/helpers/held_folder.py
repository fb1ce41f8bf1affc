"""A run's folder that another process holds."""
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator

HOLD = """
import sys, time
from softmask_jax.io.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def held(path) -> Iterator[subprocess.Popen]:
    """The process that holds `path`; killed at the end."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().strip() == "held"
        yield child
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
