"""Google Cloud as launch/tpu.sh sees it: states, what a host says of its run, and what was asked for."""

PLACE = ["--name=dream", "--project=my-project", "--zone=us-west4-a", "--type=v5litepod-16", "--bucket=gs://my-bucket",
         "--poll=0"]  # fmt: skip
RUN = ["--config=configs/dream7b.py", "--workdir=runs/dream"]
NOT_FOUND = {"err": "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found\n", "code": 1}
ACCOUNT = "serviceAccount:123-compute@developer.gserviceaccount.com"
STATE = "queued-resources describe .*state.state"


def says(*states: str) -> list[dict]:
    return [NOT_FOUND if state == "NONE" else {"out": f"{state}\n"} for state in states]


def status(text: str) -> dict:
    return {"out": f"softmask_jax {text}\n"}


def steps(world) -> list[str]:
    """What was asked of Google, in order, without the looks."""
    names = {
        "queued-resources create": "create", "queued-resources delete": "delete", "node.sh setup": "setup",
        "node.sh start": "start", "node.sh stop": "stop", "node.sh follow": "follow",
    }  # fmt: skip
    found = []
    for call in world.calls("gcloud"):
        found += [name for part, name in names.items() if part in " ".join(call["words"])]
    return found
