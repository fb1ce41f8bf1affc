"""Flags and environments say where a process stands; hosts that do not fit together are told so before JAX starts."""
import argparse
import http.server
import importlib.machinery
import socket
import sys
import threading
import types
from pathlib import Path

import pytest

import softmask_jax
from softmask_jax.distributed import clusters, hosts
from softmask_jax.distributed.hosts import Member

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS", "JOB_COMPLETION_INDEX",
    "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID",
    "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID",
    "MEGASCALE_COORDINATOR_ADDRESS", "TPU_PROCESS_ADDRESSES_PATH", "KUBERNETES_SERVICE_HOST", "JAX_PLATFORMS", "GCE_METADATA_IP",
    "OMPI_MCA_orte_hnp_uri", "JAX_COORDINATOR_PORT",
)  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[007,010-012]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
}  # fmt: skip
ADDRESSES = {"JAX_COORDINATOR_ADDRESS": "a:81", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables of an environment that says nothing else."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(clusters, "has_tpu", lambda: False)
    return lambda values: [monkeypatch.setenv(*item) for item in values.items()]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"SLURM_NTASKS": "4"},  # salloc without srun: one process
        {"SLURM_STEP_NUM_TASKS": "4", **SLURM, "JAX_NUM_PROCESSES": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"JOB_COMPLETION_INDEX": "3"},
        ADDRESSES | {"JAX_NUM_PROCESSES": "1"},
    ],
)
def test_without_a_sign_of_other_hosts_or_when_told_so_a_process_is_alone(environment, values):
    environment(values)
    assert hosts.detect() == Member()


def test_a_slurm_step_of_several_tasks_is_read_as_jax_reads_it(environment):
    environment({"SLURM_STEP_NUM_TASKS": "4", **SLURM})
    assert hosts.detect(join_seconds=7) == Member("SLURM", "node007:61441", 4, 2, (1,), join_seconds=7)


def test_a_slurm_step_leaves_the_choice_of_devices_to_the_user(environment):
    environment({"SLURM_STEP_NUM_TASKS": "4", **SLURM, "JAX_LOCAL_DEVICE_IDS": "0,1"})
    assert hosts.detect().local_device_ids is None


def test_a_tpu_pod_of_gke_is_read_from_its_environment(environment):
    environment({"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc", "TPU_WORKER_ID": "1"})
    assert hosts.detect() == Member("TPU pod", "job-0.svc:8482", 2, 1)


def test_addresses_of_a_tpu_pod_may_be_in_a_file(environment, tmp_path):
    (tmp_path / "addresses").write_text("job-0.svc:8471,job-1.svc:8471\n")
    environment({"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "addresses"), "TPU_WORKER_ID": "1"})
    assert hosts.detect() == Member("TPU pod", "job-0.svc:8482", 2, 1)


@pytest.mark.parametrize(
    "nodes, first",
    [("node7", "node7"), ("node001,other2", "node001"), ("node[001-015],x", "node001"), ("a-b[3,7-15]", "a-b3")],
)
def test_the_first_host_of_a_slurm_list_is_the_coordinator(environment, nodes, first):
    environment({"SLURM_STEP_NUM_TASKS": "4", **SLURM, "SLURM_STEP_NODELIST": nodes, "JAX_COORDINATOR_PORT": "99"})
    assert hosts.detect().coordinator == f"{first}:99"


@pytest.fixture
def kubernetes(environment, monkeypatch, tmp_path):
    """The package, in a pod of an indexed Job; returns the Job's template, whose subdomain the test sets."""
    template = types.SimpleNamespace(subdomain=None)
    job = types.SimpleNamespace(spec=types.SimpleNamespace(parallelism=4, template=types.SimpleNamespace(spec=template)))
    package = types.ModuleType("kubernetes")
    package.__spec__ = importlib.machinery.ModuleSpec("kubernetes", None)
    package.config = types.SimpleNamespace(load_incluster_config=lambda: None)
    api = types.SimpleNamespace(read_namespaced_job=lambda *name: {("train-x", "research"): job}[name])
    package.client = types.SimpleNamespace(
        BatchV1Api=lambda: api, exceptions=types.SimpleNamespace(ApiException=type("ApiException", (Exception,), {}))
    )
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    monkeypatch.setattr(clusters, "NAMESPACE", tmp_path / "namespace")
    clusters.NAMESPACE.write_text("research\n")
    monkeypatch.setattr(socket, "gethostname", lambda: "train-x-2")
    environment({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"})
    return template


def test_an_indexed_job_of_kubernetes_says_how_many_pods_it_has(kubernetes):
    kubernetes.subdomain = "pods"
    assert hosts.detect() == Member("Kubernetes", "train-x-0.pods:55527", 4, 2)


def test_a_job_of_kubernetes_whose_pods_cannot_reach_each_other_is_refused(kubernetes):
    with pytest.raises(RuntimeError, match="the Job train-x has no subdomain, the name of a headless service"):
        hosts.detect()


def test_slices_of_gke_are_counted_together(environment):
    environment(
        {
            "TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080",
        }
    )  # fmt: skip
    assert hosts.detect() == Member("TPU pod", "first.svc:8482", 4, 3)


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server that answers from the dict that is returned."""
    attributes = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = attributes.get(self.path.rpartition("/")[2])
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_): ...

    server = http.server.HTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(clusters, "has_tpu", lambda: True)
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    yield attributes
    server.shutdown()
    server.server_close()


def test_a_tpu_pod_of_several_vms_is_asked_of_the_metadata_server(environment, metadata):
    metadata |= {"worker-network-endpoints": "x:y:10.0.0.7,x:y:10.0.0.8", "agent-worker-number": "1"}
    assert hosts.detect() == Member("TPU pod", "10.0.0.7:8482", 2, 1)


@pytest.mark.parametrize("attributes", [{}, {"worker-network-endpoints": "x:y:10.0.0.7", "tpu-env": "ZONE: 'a'\n"}])
def test_a_tpu_of_one_vm_and_one_without_such_a_server_are_alone(environment, metadata, attributes):
    metadata |= attributes
    assert hosts.detect() == Member()


def test_slices_of_one_vm_each_are_several_hosts(environment, metadata):
    metadata |= {"worker-network-endpoints": "x:y:10.0.0.7", "tpu-env": "ZONE: 'a'\nMEGASCALE_NUM_SLICES: '2'\n"}
    assert clusters.kind() == "TPU pod"


def test_plain_addresses_come_from_the_environment_and_flags_win(environment):
    environment(ADDRESSES)
    assert hosts.detect() == Member("addresses", "a:81", 2, 1)
    parser = argparse.ArgumentParser()
    hosts.add_flags(parser)
    words = "--coordinator=[::1]:82 --processes=4 --process=3 --join_seconds=9 --heartbeat_seconds=8".split()
    expected = Member("addresses", "[::1]:82", 4, 3, join_seconds=9, heartbeat_seconds=8)
    assert hosts.from_flags(parser.parse_args(words)) == expected
    assert hosts.from_flags(parser.parse_args(["--processes=1"])) == Member()


def test_the_index_of_a_job_of_kubernetes_is_the_process(environment):
    environment({"JAX_COORDINATOR_ADDRESS": "a:81", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"})
    assert hosts.detect().process == 3


@pytest.mark.parametrize(
    "values, given, words",
    [
        (ADDRESSES | {"JAX_PROCESS_ID": ""}, (), r"given \(a:81\), so --process \(or JAX_PROCESS_ID\) must be too"),
        (ADDRESSES | {"JAX_PROCESS_ID": "2"}, (), "--process=2 is out of range: of 2 processes they are 0 to 1"),
        (ADDRESSES | {"JAX_NUM_PROCESSES": "two"}, (), "JAX_NUM_PROCESSES='two' in the environment is not a whole"),
        ({}, ("a:81", 0, 0), "is 0; it must be 1 or more"),
        ({}, ("a", 2, 0), "address 'a' is not of the form HOST:PORT"),
        ({}, (None, 2, 0), "need the address of the first host. Give --coordinator=HOST:PORT"),
        ({"SLURM_STEP_NUM_TASKS": "4", **SLURM}, (None, 3), "--processes=3, but the SLURM has 4"),
    ],
)
def test_numbers_that_do_not_fit_are_named(environment, values, given, words):
    environment(values)
    with pytest.raises(ValueError, match=words):
        hosts.detect(*given)


def test_a_cluster_whose_hosts_are_not_found_says_how_to_run_alone(environment):
    environment({"SLURM_STEP_NUM_TASKS": "4"})
    with pytest.raises(RuntimeError, match="a part of a SLURM, but.*--processes=1 to run as a single process"):
        hosts.detect()


def test_what_must_be_the_same_leaves_out_folders_of_the_host_itself():
    prints = hosts.prints({"data": {"cache_dir": "/x", "seq_len": 8}, "train": {"steps": 3}})
    assert prints["config.data.seq_len"] == "8" and prints["config.train.steps"] == "3"
    assert {"jax", "jaxlib", "Python", "the code of softmask_jax"} < prints.keys()
    assert "config.data.cache_dir" not in prints


def test_hosts_compare_the_code_of_the_whole_package(tmp_path):
    assert hosts.CODE == Path(softmask_jax.__file__).parent
    (tmp_path / "room").mkdir()
    digests = {hosts._code(tmp_path)}
    for name in ("main.py", "room/part.py"):
        (tmp_path / name).write_text("x = 1")
        hosts._code.cache_clear()
        digests.add(hosts._code(tmp_path))
    assert len(digests) == 3
