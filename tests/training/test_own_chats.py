"""Your own chats: a bare file of mixed rows, epochs, a stop and a second start, answers before and after on the page."""
import html
import json
import re

import jax
import pytest

from softmask_jax import main
from softmask_jax.diffusion.soft_masking import effective
from softmask_jax.distributed import sharding
from softmask_jax.training import loop
from softmask_jax.training.tasks import conversations
from tests.helpers.dream_workshop import workshop  # noqa: F401 (fixture)

SMALL = (
    "train.global_batch_size=4", "train.micro_batches=2", "train.epochs=2", "checkpoint.every=3", "eval.every=3",
    "eval.batch_size=4", "sample.steps=4", "sample.length=8", "sample.count=2", "data.buckets=256",
)  # fmt: skip


def rows(count: int):
    """Chats in four formats in turn, and a row that is none."""
    yield {"text": "What is it?"}
    for n in range(1, count):
        question, answer = f"What is {n} + {n}?", f"{n} + {n} = {2 * n}."
        yield (
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
            {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
            {"prompt": question, "completion": answer},
            {"instruction": "Add.", "input": question, "output": answer},
        )[n % 4]


@pytest.fixture(scope="module")
def train(workshop):  # noqa: F811
    """`train("name", "key=value", stop_at=step)`: exit status of `:own` on chats.jsonl, in the workshop's folder."""
    (workshop.folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(26)))
    at, mesh = loop.StopSignal.at, sharding.make_mesh(devices=jax.devices()[:1])
    generate = conversations.diffusion_generate

    def recorded(denoiser, params, *given, **named):
        scales.append(float(effective(params["soft_mask"]).scale))
        return generate(denoiser, params, *given, **named)

    def command(name: str, *overrides: str, stop_at: int | None = None) -> int:
        given = (*workshop.overrides(), f"data.paths={workshop.folder / 'chats.jsonl'}", *SMALL, *overrides)
        words = [f"--config.{override}" for override in given]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "peak_flops", lambda device: 1e11)
            patch.setattr(conversations, "diffusion_generate", recorded)
            patch.setattr(loop.sharding, "make_mesh", lambda **_: mesh)
            patch.setattr(loop.StopSignal, "at", lambda stop, step: step == stop_at or at(stop, step))
            return main.main(["--config=dream7b:own", f"--workdir={workshop.folder / name}", *words])

    scales = command.scales = []  # of lambda, whenever answers were sampled
    return command


def metrics(folder, kind: str) -> list[dict]:
    logged = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in logged if row["kind"] == kind]


def test_epochs_of_a_bare_file_end_in_a_page_with_answers_before_and_after(workshop, train, capsys, caplog):  # noqa: F811
    folder, chats = workshop.folder / "own", workshop.folder / "chats.jsonl"
    assert train("own", stop_at=4) == 0
    # 26 rows: 3 to validate, of 22 or 23 good ones to train 5 batches of 4 an epoch.
    assert re.search(r"256 tokens, 5 steps an epoch\.\nTraining 10 steps\.", capsys.readouterr().out)
    assert "1 of" in caplog.text and "(1 messages)" in caplog.text and "has no key 'messages'" in caplog.text
    before = metrics(folder, "samples")
    assert [row["step"] for row in before] == [0]

    whole = chats.read_text()
    chats.write_text(whole + json.dumps({"prompt": "What is 1 + 2?", "completion": "1 + 2 = 3."}) + "\n")
    assert train("own") == 1 and "was trained on other text" in capsys.readouterr().err
    chats.write_text(whole)

    assert train("own") == 0
    assert "Continuing from step 4." in capsys.readouterr().out
    settings, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert summary["step"] == settings["train"]["updates"] == settings["train"]["steps"] == 10
    first, last = metrics(folder, "samples")
    assert first == before[0] and (first["step"], last["step"]) == (0, 10) and summary["samples"] == last["texts"]
    for name in ("prompts", "references"):
        assert first[name] == last[name] and len(first[name]) == 2
    assert all(re.fullmatch(r"(\d+) \+ \1 = \d+\.", text) for text in first["references"])
    assert all(f"What is {text.split()[0]} +" in prompt for text, prompt in zip(first["references"], first["prompts"]))
    assert train.scales[:2] == [pytest.approx(0.0, abs=1e-9), pytest.approx(0.2, abs=0.1)]  # first the base with plain masks
    page = (folder / "report.html").read_text()
    for title in ("Before and after", "Before training", "After 10 steps", "Reference answer", "A text, step by step"):
        assert title in page
    played = (folder / "trajectory.html").read_text("utf-8")
    assert html.escape(played) in page and "plain masks" in played and "soft masks" in played
    assert all(text in page for text in first["references"])

    assert train("own") == 0 and "This run is done (10 steps)" in capsys.readouterr().out
