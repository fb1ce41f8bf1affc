"""Record the runs, the converted model and their numbers that `tests/test_before.py` holds later versions to:

    python -m tests.golden.before.record

It was run with commit 843ae97 (Python 3.11, JAX 0.10.2), and overwrites the files beside it. A run is trained to its end,
which gives the numbers, and then cut back to its first checkpoint, as if it had been killed soon after that.
"""
import tests.conftest  # noqa: F401, I001  # eight fake devices, as in the tests

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import jax

from softmask_jax import config
from softmask_jax.convert import tiny_dream
from softmask_jax.convert.__main__ import main as convert
from tests import test_before as numbers
from tests.helpers import tiny_run

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)


def write_configs() -> None:
    values = tiny_run.settings(Path("."))
    values["data"] |= dict(paths="texts/*.txt", cache_dir="cache")
    values["train"]["compilation_cache"] = ""
    tiny_run.write_config(Path(f"{numbers.MDLM}.py"), values)
    smoke = config.read(f"{ROOT}/configs/dream7b.py:smoke", [
        f"model.base={numbers.BASE}", "model.adapter_rank=4", "data.paths=jsonl:chats.jsonl", "data.cache_dir=cache",
        "train.global_batch_size=2", "train.micro_batches=2", "eval.batch_size=2", "model.remat=none",
        "sample.every=0", "sample.count=0",
    ], config.Config)  # fmt: skip
    tiny_run.write_config(Path(f"{numbers.DREAM}.py"), smoke)


def cut_back(run: Path, step: int) -> None:
    for path in (run / "checkpoints").iterdir():
        if path.name != str(step):
            shutil.rmtree(path)
    for name in ("summary.json", "report.html"):
        (run / name).unlink()
    shutil.rmtree(run / "tensorboard")


def pack(name: str, *parts: str) -> None:
    with zipfile.ZipFile(HERE / name, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for part in map(Path, parts):
            for path in sorted([part, *part.rglob("*")]):
                file.write(path)


def main() -> None:
    found: dict = {"jax": jax.__version__}
    with tempfile.TemporaryDirectory() as folder, numbers.working_in(Path(folder)):
        tiny_run.write_texts(Path("texts"))
        tiny_dream.make(Path("."), conversations=30, sizes=SIZES)
        assert convert(["--src=hf", f"--dst={numbers.BASE}", "--verify"]) == 0
        write_configs()
        found["dream_model"] = numbers.dream_numbers(numbers.BASE)
        for run, kept in numbers.KEPT.items():
            name, of_model = run.removesuffix("_run"), getattr(numbers, run.replace("_run", "_numbers"))
            numbers.train(run)
            found[f"{name}_finished"] = numbers.run_numbers(run, kept)
            cut_back(Path(run), kept)
            found[name] = of_model(run)
        found["compare"] = numbers.compare_numbers(numbers.MDLM, numbers.MDLM)
        found["evaluate"] = numbers.evaluate_numbers(numbers.MDLM)
        pack("mdlm_run.zip", numbers.MDLM, f"{numbers.MDLM}.py", "texts")
        pack("dream_model.zip", numbers.BASE)
        pack("dream_run.zip", numbers.DREAM, f"{numbers.DREAM}.py", "chats.jsonl")
    (HERE / "numbers.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
