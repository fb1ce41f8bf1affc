"""Hosts of a run from a cluster's environment, as read by JAX: SLURM, TPU pods and VMs, Kubernetes."""
import glob
import importlib.util
import os
import re
import socket
import urllib.request
from pathlib import Path

# Mounted by Kubernetes in every pod.
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def whole(*names: str) -> int | None:
    """Integer value of the first of these variables that is set, or None. ValueError if it is no integer."""
    for name in names:
        if text := os.environ.get(name):
            if not text.isdigit():
                raise ValueError(f"{name}='{text}' in the environment is not a whole number.")
            return int(text)
    return None


def kind() -> str:
    """Kind of cluster around this process, or ""."""
    if (whole("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return "SLURM"
    if len(_tpu_workers()) > 1 or (whole("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "TPU pod"
    # Several workers by the metadata server, or several slices.
    if has_tpu() and (
        "," in _metadata("worker-network-endpoints") or _tpu_variable("MEGASCALE_NUM_SLICES") not in ("", "0", "1")
    ):
        return "TPU pod"
    in_a_job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
    return "Kubernetes" if in_a_job and importlib.util.find_spec("kubernetes") else ""


def has_tpu() -> bool:
    """Whether this machine has TPU chips that JAX may use."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in platforms and bool(chips) and "TPU_SKIP_MDS_QUERY" not in os.environ


def _metadata(key: str) -> str:
    """Attribute of this VM from Google's metadata server, or ""."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    # No proxy: the server is link-local.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=3) as reply:
            return reply.read().decode(errors="replace")
    except OSError:
        return ""


def _slurm() -> tuple:
    """(first host, port, processes, process, local devices) of a SLURM step."""
    nodes, env = os.environ["SLURM_STEP_NODELIST"], os.environ
    # node001 | node001,node7 | node[001-004],other7 | node[001,007-015]
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST='{nodes}' names no host")
    # One of the 4,096 highest ports, equal on all hosts of a job and rarely that of another.
    port = 61440 + int(env["SLURM_JOB_ID"]) % 4096
    # One process per TPU host.
    local = None if has_tpu() else (int(env["SLURM_LOCALID"]),)
    return first[1] + (first[2] or ""), port, int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"]), local


def _tpu_pod() -> tuple:
    """As `_slurm`, from GKE's variables or the metadata server."""
    if workers := _tpu_workers():
        index = int(os.environ["TPU_WORKER_ID"])
    else:
        # each is host or name:id:host
        workers = [worker.split(":")[-1] for worker in _metadata("worker-network-endpoints").split(",")]
        index = int(_metadata("agent-worker-number"))
    slices = int(_tpu_variable("MEGASCALE_NUM_SLICES") or 1)
    process = int(_tpu_variable("MEGASCALE_SLICE_ID") or 0) * len(workers) + index
    first = _tpu_variable("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    return first.split(":")[0], 8482, slices * len(workers), process, None


def _tpu_workers() -> list[str]:
    """Hosts of this slice from GKE's variables, or []."""
    env = os.environ
    if path := env.get("TPU_PROCESS_ADDRESSES_PATH"):
        return Path(path).read_text("utf-8").strip().split(",")
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    return workers.split(",") if workers else []


def _tpu_variable(name: str) -> str:
    if name in os.environ or _tpu_workers():
        return os.environ.get(name, "")
    lines = (line.partition(":") for line in _metadata("tpu-env").splitlines())
    return next((value.strip(" '\"") for key, _, value in lines if key.strip() == name), "")


def _kubernetes() -> tuple:
    """As `_slurm`, for an indexed Job or JobSet, whose pods are named by it and their index."""
    import kubernetes

    kubernetes.config.load_incluster_config()
    job, _, index = socket.gethostname().rpartition("-")
    namespace = NAMESPACE.read_text("utf-8").strip()
    try:
        spec = kubernetes.client.BatchV1Api().read_namespaced_job(job, namespace).spec
    except kubernetes.client.exceptions.ApiException as error:
        raise RuntimeError(f"Kubernetes does not show the Job {job}: {error.reason}") from error
    subdomain = spec.template.spec.subdomain
    if not subdomain:
        raise ValueError(f"the Job {job} has no subdomain, the name of a headless service")
    return f"{job}-0.{subdomain}", 55527, spec.parallelism, int(index), None


READERS = {"SLURM": _slurm, "TPU pod": _tpu_pod, "Kubernetes": _kubernetes}
