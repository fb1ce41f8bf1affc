"""Code tasks: a model's answers to a benchmark's problems, the programs in them, pass@k.

Numbers come from the files `answers` and `verdicts`; a command without --allow_code only makes answers."""
import collections
import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

import numpy as np

from softmask_jax.config.progress import Progress
from softmask_jax.data import prompts
from softmask_jax.evaluate.code import extraction, problems, prompts as wording, sandbox
from softmask_jax.evaluate.code.pass_at_k import difference, estimate, pass_at_k
from softmask_jax.evaluate.code.problems import HUMANEVAL, Problem
from softmask_jax.evaluate.code.running import FAILED, Limits, PASSED, Program
from softmask_jax.evaluate.generative.samples import budgeted
from softmask_jax.evaluate.settings import Code, Settings, budgets, check_least
from softmask_jax.evaluate.task import Estimate, Result, Work
from softmask_jax.generate.batches import Generator, plan, shape_of
from softmask_jax.io.answers import AnswerFile, Key, count, key_of, summarize
from softmask_jax.io.files import plain, split_paths
from softmask_jax.samplers import Options

NEW_TOKENS = {HUMANEVAL: 768, problems.MBPP: 512}
# MiB that an interpreter with NumPy needs to start.
LEAST_MEMORY = 128
NOT_RUN = "No program was run. The same command with --allow_code runs these answers, in a sandbox."
UNSAFE = "Programs ran without a sandbox, with limits alone: they could read and write whatever the user can."


@dataclasses.dataclass(frozen=True)
class CodeTask:
    """One of `problems.HUB`; see `task.Task`."""

    name: str
    sections: tuple[str, ...] = ("code", "code_sampler")
    sweeps: bool = True

    def check(self, settings: Settings, *, allow_code: bool, allow_unsafe_code: bool) -> None:
        """ValueError, OSError or ImportError for impossible settings or problems, or if there is no sandbox."""
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
            use_sandbox(allow_unsafe_code)
        elif allow_unsafe_code:
            raise ValueError("--allow_unsafe_code is an addition to --allow_code: give both.")

    def run(self, work: Work) -> Result:
        code = work.settings.code
        asked = self._problems(code)
        answers = self._answers(work, asked)
        summary = summarize(answers.values())
        # The median leaves out batches with compilation.
        cost = {"calls": summary["calls"], "seconds": float(np.median([row["seconds"] for row in answers.values()]))}
        details = {"answers": {name: summary[name] for name in ("empty", "ended", "new_tokens", "tokens_per_call")}}
        notes = _notes(answers, summary["errors"])
        if not work.allow_code:
            return Result({}, cost, details, (*notes, NOT_RUN), complete=False)
        verdicts = self._verdicts(work, asked, answers)
        passed = _passed(verdicts, len(asked))
        notes += [UNSAFE] * any(not row["sandbox"] for row in verdicts.values())
        details |= {
            "verdicts": dict(collections.Counter(row["kind"] for row in verdicts.values()).most_common()),
            "program_seconds": round(float(np.mean([row["seconds"] for row in verdicts.values()])), 3),
            "correct": {problem.id: correct for problem, correct in zip(asked, passed)},
        }
        rates = {f"pass@{k}": estimate([pass_at_k(code.samples, c, k) for c in passed]) for k in chosen_ks(code)}
        return Result(rates, cost, details, tuple(notes))

    def compare(self, baseline: Work, other: Work) -> dict[str, Estimate]:
        """Paired by problem; {} unless programs of both were run."""
        code = other.settings.code
        asked = self._problems(code)
        passed = []
        for work in (baseline, other):
            if not (work.folder / "verdicts.jsonl").exists():
                return {}
            with work.records("verdicts", _decisive(code, asked), len(asked) * code.samples) as file:
                if not file.complete:
                    return {}
                passed.append(_passed(file.rows, len(asked)))
        rates = {k: [[pass_at_k(code.samples, c, k) for c in correct] for correct in passed] for k in chosen_ks(code)}
        return {f"pass@{k}": difference(theirs, ours) for k, (ours, theirs) in rates.items()}

    def _problems(self, code: Code) -> list[Problem]:
        return problems.load(self.name, code.problems, limit=code.limit, compat=code.compat)

    def _new_tokens(self, code: Code) -> int:
        return code.max_new_tokens or NEW_TOKENS[problems.family(self.name)]

    def _sampler(self, settings: Settings, budget: Fraction) -> Options:
        """Options with a share of the steps. ValueError if the sampler has no fixed number of them."""
        code, options, new_tokens = settings.code, settings.code_sampler, self._new_tokens(settings.code)
        steps = code.steps or options.steps or (new_tokens if options.counts_steps() else None)
        return budgeted(dataclasses.replace(options, steps=steps), new_tokens, budget, "code_sampler")

    def _answers(self, work: Work, asked: list[Problem]) -> dict[Key, dict]:
        """Every answer by problem and sample, the missing ones generated first."""
        code, options = work.settings.code, self._sampler(work.settings, work.budget)
        decisive = {
            "problems": problems.fingerprint(asked), "samples": code.samples, "chat": code.chat,
            "max_new_tokens": self._new_tokens(code), "prompt_tokens": code.prompt_tokens, "batch_size": code.batch_size,
            "sampler": plain(dataclasses.asdict(options)), "seed": work.settings.run.seed,
            "cut": "as by the reference" if code.compat else "at the model's end",
        }  # fmt: skip
        with work.records("answers", decisive, len(asked) * code.samples) as file:
            if not file.complete:
                self._generate(work, asked, options, file)
            work.gather(file)
            return dict(sorted(file.rows.items()))

    def _generate(self, work: Work, asked: list[Problem], options: Options, file: AnswerFile) -> None:
        code, model = work.settings.code, work.model
        can_chat = model.template is not None
        chat = can_chat if code.chat is None else code.chat
        if model.tokenizer is None or chat and not can_chat:
            absent = "tokenizer" if model.tokenizer is None else "chat template (config.code.chat=False does without)"
            raise ValueError(f"{work.name} has no {absent}, so it cannot be asked for programs.")
        rows = [wording.row(self.name, problem, chat) for problem in asked]
        lengths = {"new_tokens": self._new_tokens(code), "prompt_tokens": code.prompt_tokens}
        patterns = prompts.every(rows, lambda row: wording.pattern(model, row, **lengths))
        options = dataclasses.replace(options, alg=options.alg or model.default_alg)
        stops, ends = wording.stops(self.name, chat, code.compat), wording.ends(model, code.compat)
        generator = Generator(model, options, work.settings.run.seed, stops, ends)
        shapes = [shape_of(pattern, model, model.max_length) for pattern in patterns]
        batches = plan(shapes, samples=code.samples, batch_size=code.batch_size, done=file.rows, hosts=work.hosts)
        for batch in _shown(batches, len(batches), f"{work.name}: {self.name}, batches of answers"):
            file.add([row for row in generator.batch(batch, rows, patterns) if key_of(row) not in file.rows])
            work.check_stop()

    def _verdicts(self, work: Work, asked: list[Problem], answers: Mapping[Key, Mapping]) -> dict[Key, dict]:
        """Outcome of each answer's program by problem and sample, the missing ones run first."""
        with work.records("verdicts", _decisive(work.settings.code, asked), len(answers)) as file:
            own = work.hosts.share(list(answers))
            if missing := {key: answers[key] for key in own if key not in file.rows}:
                self._run(work, asked, missing, file)
            work.gather(file)
            return dict(sorted(file.rows.items()))

    def _run(self, work: Work, asked: list[Problem], answers: Mapping[Key, Mapping], file: AnswerFile) -> None:
        code, isolated = work.settings.code, use_sandbox(work.allow_unsafe_code)

        def row(key: Key, kind: str, detail: str, seconds: float = 0.0) -> dict:
            return {"index": key[0], "sample": key[1], "kind": kind, "detail": detail, "seconds": seconds,
                    "sandbox": isolated}  # fmt: skip

        def program(key: Key) -> Program:
            problem, answer = asked[key[0]], answers[key]
            source = extraction.program(self.name, problem, answer["text"], "messages" in answer, code.compat)
            return Program(source, problem.tests)

        if broken := [row(key, FAILED, answer["error"]) for key, answer in answers.items() if "error" in answer]:
            file.add(broken)
        keys = [key for key, answer in answers.items() if "error" not in answer]
        limits, workers = Limits(code.timeout, code.memory), code.workers or len(os.sched_getaffinity(0))
        verdicts = sandbox.run(map(program, keys), limits, isolated=isolated, workers=workers)
        with contextlib.closing(verdicts):
            for number, verdict in _shown(verdicts, len(keys), f"{work.name}: {self.name}, programs"):
                file.add([row(keys[number], verdict.kind, verdict.detail, verdict.seconds)])
                work.check_stop()


def _decisive(code: Code, asked: list[Problem]) -> dict:
    return {"problems": problems.fingerprint(asked), "samples": code.samples, "timeout": code.timeout,
            "memory": code.memory, "compat": code.compat}  # fmt: skip


def _shown(items: Iterable, total: int, title: str) -> Iterator:
    """The items, showing how many are done."""
    with Progress(total, title, brief=True) as shown:
        yield from shown.over(items)


def use_sandbox(allow_unsafe_code: bool) -> bool:
    """Whether programs run in a sandbox. OSError if there is none and running without is not allowed."""
    reason = sandbox.available()
    if reason and not allow_unsafe_code:
        raise OSError(f"There is no sandbox here for a model's programs ({reason}): use a machine with Linux user "
                      "namespaces, or accept what such programs could do with --allow_unsafe_code.")
    return not reason


def chosen_ks(code: Code) -> list[int]:
    """The k of pass@k. ValueError for more than there are samples."""
    try:
        ks = sorted({int(part) for part in split_paths(code.k, ";")})
    except ValueError:
        ks = []
    if not ks or not 1 <= ks[0] <= ks[-1] <= code.samples:
        raise ValueError(f"config.code.k is '{code.k}'; give whole numbers up to config.code.samples={code.samples}.")
    return ks


def _passed(verdicts: Mapping, total: int) -> list[int]:
    """Number of passed programs of each problem."""
    passed = collections.Counter(index for (index, _), row in verdicts.items() if row["kind"] == PASSED)
    return [passed[index] for index in range(total)]


def _notes(answers: Mapping, errors: int) -> list[str]:
    """Notes on answers that failed, or on a model that was too short for the task."""
    if errors:
        return [f"{count(errors, 'answer')} of {len(answers):,} could not be made, the model's logits were NaN or "
                "infinite; they count as failed."]  # fmt: skip
    lengths = [len(row["tokens"]) for row in answers.values()]
    low, high = min(lengths), max(lengths)
    if low == high:
        return []
    return [f"Answers had {low:,} to {high:,} tokens, whatever this model's length left beside the prompt."]
