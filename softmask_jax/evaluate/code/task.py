"""Evaluation tasks of code: a model's answers to a benchmark's problems, programs extracted from them, and pass@k.

The numbers come from two files of the task's folder: `answers` and `verdicts`, the outcome of each program. Without leave
to run programs there are answers alone; the same command with leave continues from them.
"""
import collections
import contextlib
import dataclasses
import os
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from tqdm import tqdm

from softmask_jax.data import prompts
from softmask_jax.evaluate.code import extraction, problems, prompts as wording, sandbox
from softmask_jax.evaluate.code.pass_at_k import difference, estimate, pass_at_k
from softmask_jax.evaluate.code.problems import HUMANEVAL, Problem
from softmask_jax.evaluate.code.running import FAILED, Limits, PASSED, Program
from softmask_jax.evaluate.generative.samples import budgeted, counts_steps
from softmask_jax.evaluate.settings import Code, Settings, budgets, check_least, listed
from softmask_jax.evaluate.task import Estimate, Result, Work
from softmask_jax.generate.batches import Generator, plan, shape_of
from softmask_jax.io.answers import count, key_of, summarize
from softmask_jax.io.files import plain
from softmask_jax.samplers import Options

NEW_TOKENS = {HUMANEVAL: 768, problems.MBPP: 512}
# MiB; an interpreter with NumPy needs them to start.
LEAST_MEMORY = 128
UNSAFE = (
    "Programs ran without a sandbox, with limits alone: they could read and write whatever the user can who ran this."
)


@dataclasses.dataclass(frozen=True)
class CodeTask:
    """One of `problems.TASKS`."""

    name: str
    sections: tuple[str, ...] = ("code", "code_sampler")
    sweeps: bool = True

    def check(self, settings: Settings, *, allow_code: bool, allow_unsafe_code: bool) -> None:
        """ValueError, OSError or ImportError for impossible settings and problems, or without a sandbox for programs."""
        code = settings.code
        check_least(settings, "code", limit=0, samples=1, max_new_tokens=0, steps=0, prompt_tokens=1, batch_size=1,
                    memory=LEAST_MEMORY, workers=0)  # fmt: skip
        if not 0 < code.timeout < 3_600:
            raise ValueError(f"config.code.timeout is {code.timeout} seconds; give more than 0, and less than an hour.")
        chosen_ks(code)
        for budget in budgets(settings.run.budgets):
            self._sampler(settings, budget)
        self._problems(code)
        if allow_code:
            leave_to_run(allow_unsafe_code)
        elif allow_unsafe_code:
            raise ValueError("--allow_unsafe_code says how programs may run; that they may says --allow_code: give both.")

    def run(self, work: Work) -> Result:
        code = work.settings.code
        given = self._problems(code)
        answers = self._answers(work, given)
        summary = summarize(answers.values())
        # The median: batches that were compiled for are left out, once there are many.
        cost = {"calls": summary["calls"], "seconds": float(np.median([row["seconds"] for row in answers.values()]))}
        shares = {name: summary[name] for name in ("empty", "ended", "new_tokens", "tokens_per_call")}
        notes = [_lengths(answers)] if summary["errors"] == 0 else [
            f"{count(summary['errors'], 'answer')} of {len(answers):,} could not be made, the model's logits were NaN or "
            "infinite; they count as failed."
        ]  # fmt: skip
        if not work.allow_code:
            notes.append("No program was run. The same command with --allow_code runs these answers, in a sandbox.")
            return Result({}, cost, {"answers": shares}, tuple(filter(None, notes)), complete=False)
        verdicts = self._verdicts(work, given, answers)
        passed = _passed(verdicts, len(given))
        notes += [UNSAFE] * any(not row["sandbox"] for row in verdicts.values())
        kinds = collections.Counter(row["kind"] for row in verdicts.values())
        details = {
            "answers": shares, "verdicts": dict(kinds.most_common()), "program_seconds": round(float(np.mean(
                [row["seconds"] for row in verdicts.values()])), 3), "correct": dict(zip([p.id for p in given], passed)),
        }  # fmt: skip
        found = {f"pass@{k}": estimate([pass_at_k(code.samples, c, k) for c in passed]) for k in chosen_ks(code)}
        return Result(found, cost, details, tuple(filter(None, notes)))

    def compare(self, baseline: Work, other: Work) -> dict[str, Estimate]:
        """Paired by problem; {} unless programs of both were run."""
        code = other.settings.code
        given = self._problems(code)
        total, found = len(given) * code.samples, []
        for work in (baseline, other):
            if not (work.folder / "verdicts.jsonl").exists():
                return {}
            with work.records("verdicts", self._run_settings(code, given), total) as file:
                if not file.complete:
                    return {}
                found.append(_passed(file.rows, len(given)))
        rates = {k: [[pass_at_k(code.samples, c, k) for c in passed] for passed in found] for k in chosen_ks(code)}
        return {f"pass@{k}": difference(theirs, ours) for k, (ours, theirs) in rates.items()}

    def _problems(self, code: Code) -> list[Problem]:
        return problems.load(self.name, code.problems, limit=code.limit, compat=code.compat)

    def _sampler(self, settings: Settings, budget: Fraction) -> Options:
        """Options with the task's default number of steps, or a share of it. ValueError for a share where the sampler has
        no fixed number."""
        code, options = settings.code, settings.code_sampler
        new_tokens = _new_tokens(self.name, code)
        steps = code.steps or options.steps or (new_tokens if counts_steps(options) else None)
        return budgeted(dataclasses.replace(options, steps=steps), new_tokens, budget, "code_sampler")

    def _answers(self, work: Work, given: list[Problem]) -> dict:
        """Every answer by (problem, sample), after the missing ones are generated."""
        code, new_tokens = work.settings.code, _new_tokens(self.name, work.settings.code)
        options = self._sampler(work.settings, work.budget)
        decisive = {
            "problems": problems.fingerprint(given), "samples": code.samples, "chat": code.chat,
            "max_new_tokens": new_tokens, "prompt_tokens": code.prompt_tokens, "batch_size": code.batch_size,
            "sampler": plain(dataclasses.asdict(options)), "seed": work.settings.run.seed,
            "cut": "as by the reference" if code.compat else "at the model's end",
        }  # fmt: skip
        with work.records("answers", decisive, len(given) * code.samples) as file:
            if file.complete:
                return dict(sorted(file.rows.items()))
            model = work.model
            chat = wording.can_chat(model) if code.chat is None else code.chat
            if model.tokenizer is None or chat and not wording.can_chat(model):
                absent = "tokenizer" if model.tokenizer is None else "chat template (config.code.chat=False does without)"
                raise ValueError(f"{work.name} has no {absent}, so it cannot be asked for programs.")
            asked = [wording.row(self.name, problem, chat) for problem in given]
            patterns = prompts.every(asked, wording.Asker(model, new_tokens, code.prompt_tokens))
            options = dataclasses.replace(options, alg=options.alg or model.default_alg)
            generator = Generator(
                model, options, work.settings.run.seed, wording.stops(self.name, chat, code.compat),
                wording.ends(model, code.compat),
            )  # fmt: skip
            shapes = [shape_of(pattern, model, model.max_length) for pattern in patterns]
            batches = plan(shapes, samples=code.samples, batch_size=code.batch_size, done=file.rows)
            for batch in self._bar(batches, len(batches), f"{work.name}: {self.name}, answers"):
                file.add([row for row in generator.batch(batch, asked, patterns) if key_of(row) not in file.rows])
                work.check_stop()
            return dict(sorted(file.rows.items()))

    def _run_settings(self, code: Code, given: list[Problem]) -> Mapping:
        return {"problems": problems.fingerprint(given), "samples": code.samples, "timeout": code.timeout,
                "memory": code.memory, "compat": code.compat}  # fmt: skip

    def _verdicts(self, work: Work, given: list[Problem], answers: Mapping) -> dict:
        """Outcome of each answer's program by (problem, sample), after the missing ones are run."""
        code = work.settings.code
        with work.records("verdicts", self._run_settings(code, given), len(answers)) as file:
            keys = [key for key in answers if key not in file.rows]
            if not keys:
                return dict(sorted(file.rows.items()))
            isolated = leave_to_run(work.allow_unsafe_code)
            broken = [key for key in keys if "error" in answers[key]]
            if broken:
                file.add([_row(key, FAILED, answers[key]["error"], 0.0, isolated) for key in broken])
            keys = [key for key in keys if key not in file.rows]
            tried = (self._program(code, given[key[0]], answers[key]) for key in keys)
            workers = code.workers or len(os.sched_getaffinity(0))
            box = sandbox.Sandbox(Limits(code.timeout, code.memory), isolated)
            with contextlib.closing(box.run(tried, workers)) as found:
                for place, verdict in self._bar(found, len(keys), f"{work.name}: {self.name}, programs"):
                    file.add([_row(keys[place], verdict.kind, verdict.detail, verdict.seconds, isolated)])
                    work.check_stop()
            return dict(sorted(file.rows.items()))

    def _program(self, code: Code, problem: Problem, answer: Mapping) -> Program:
        chat = "messages" in answer
        return Program(extraction.program(self.name, problem, answer["text"], chat, code.compat), problem.tests)

    @staticmethod
    def _bar(pieces, total: int, title: str) -> tqdm:
        return tqdm(pieces, title, total, disable=None, dynamic_ncols=True, leave=False)


def _new_tokens(task: str, code: Code) -> int:
    return code.max_new_tokens or NEW_TOKENS[problems.family(task)]


def leave_to_run(allow_unsafe_code: bool) -> bool:
    """Whether programs run in a sandbox. OSError if there is none and running without is not allowed."""
    if not (reason := sandbox.available()):
        return True
    if not allow_unsafe_code:
        raise OSError(
            f"There is no sandbox here for programs that a model wrote ({reason}), and none is run without: use a machine "
            "with Linux user namespaces, or accept what such programs could do with --allow_unsafe_code."
        )
    return False


def chosen_ks(code: Code) -> list[int]:
    """The k of pass@k. ValueError for more than there are samples."""
    try:
        ks = sorted({int(part) for part in listed(code.k)})
    except ValueError:
        ks = []
    if not ks or not 1 <= ks[0] <= ks[-1] <= code.samples:
        raise ValueError(
            f"config.code.k is '{code.k}'; give whole numbers from 1 to config.code.samples={code.samples}, as '1; 10'."
        )
    return ks


def _row(key, kind: str, detail: str, seconds: float, isolated: bool) -> dict:
    index, sample = key
    return {"index": index, "sample": sample, "kind": kind, "detail": detail, "seconds": seconds, "sandbox": isolated}


def _passed(verdicts: Mapping, total: int) -> list[int]:
    """Passed programs of each problem."""
    passed = collections.Counter(index for (index, _), row in verdicts.items() if row["kind"] == PASSED)
    return [passed[index] for index in range(total)]


def _lengths(answers: Mapping) -> str:
    """A note if the model was too short for the task."""
    lengths = {len(row["tokens"]) for row in answers.values()}
    if len(lengths) == 1:
        return ""
    return (
        f"Answers had {min(lengths):,} to {max(lengths):,} tokens, whatever this model's length left beside the prompt."
    )
