"""Tiny models that lm-evaluation-harness finds by name, local tasks for it, and what it should find, by brute force."""
import functools
import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import softmask_jax
from softmask_jax import config
from softmask_jax.data import ByteTokenizer
from softmask_jax.models import denoiser
from tests.helpers.chat_models import chat_model
from tests.helpers.tiny_run import settings

LOADED: dict = {}


@pytest.fixture(scope="module")
def mdlm(tmp_path_factory):
    """A model of windows of 24 bytes, far from uniform, that `load` knows by its name."""
    values = settings(tmp_path_factory.mktemp("mdlm"), data__seq_len=24)
    wanted, tokenizer = config.from_dict(values), ByteTokenizer()
    network = denoiser.build(wanted.model, wanted.soft_mask, vocab_size=258, mask_token_id=tokenizer.mask_token_id)
    params = jax.jit(network.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params["backbone"])
    random = np.random.default_rng(0)
    leaves = [leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    params = {"backbone": jax.tree.unflatten(tree, leaves), "soft_mask": params["soft_mask"]}
    LOADED["mdlm"] = softmask_jax.Model(wanted, tokenizer, network, params, 8)
    return LOADED["mdlm"]


def chatting(folder, family: str):
    """A tiny model with its chat template, that `load` knows by its family's name."""
    LOADED[family] = chat_model(folder, family, torch_dtype="float32")
    return LOADED[family]


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    return chatting(tmp_path_factory.mktemp("dream"), "dream")


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return chatting(tmp_path_factory.mktemp("llada"), "llada")


@pytest.fixture(scope="module", autouse=True)
def by_name():
    """`load` gives the models of `LOADED`; the harness knows no task but those it is shown."""
    import lm_eval.tasks

    load = softmask_jax.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmask_jax, "load", lambda path, **how: LOADED.get(path) or load(path, **how))
        patch.setattr(lm_eval.tasks, "TaskManager", functools.partial(lm_eval.tasks.TaskManager, include_defaults=False))
        # Its handler keeps the standard error of the first test that ran it.
        patch.setenv("LMEVAL_LOG_LEVEL", "CRITICAL")
        yield


def lm(checkpoint, **given):
    from softmask_jax.evaluate.lm_eval.model import SoftmaskLM

    return SoftmaskLM(checkpoint=checkpoint, **given)


def requests(kind, *every):
    return [SimpleNamespace(request_type=kind, args=args) for args in every]


def write_task(folder, name, rows, **entries) -> str:
    """A task of the harness over `rows`; returns its file, which is JSON and therefore YAML."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0,
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}, **entries,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return str(folder / f"{name}.yaml")


def results(folder) -> dict:
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


def samples(folder, name) -> list[dict]:
    (file,) = folder.rglob(f"samples_{name}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def over_all_orders(model, context, scored) -> float:
    """The mean over orders of the sum of log p, by recursion over what is still masked; plain masks, all logits at once."""
    count, mask = len(scored), model.mask_token_id
    sets = [left for size in range(1, count + 1) for left in itertools.combinations(range(count), size)]
    noisy = np.array([[*context, *(mask if i in left else scored[i] for i in range(count))] for left in sets])
    z = np.asarray(model.logits(noisy, shifted=True), np.float64)
    if model.padding == "right":
        z[..., mask] = -np.inf
    logs = dict(zip(sets, (z - np.logaddexp.reduce(z, -1, keepdims=True))[:, len(context) :]))
    mean = {(): 0.0}
    for left in sets:
        rest = [mean[left[:i] + left[i + 1 :]] + logs[left][place, scored[place]] for i, place in enumerate(left)]
        mean[left] = float(np.mean(rest))
    return mean[tuple(range(count))]
