"""What `python -m softmask_jax.generate` does with its flags."""
import argparse
import contextlib
import dataclasses
import json

import softmask_jax
from softmask_jax.config.command_line import say
from softmask_jax.config.progress import Progress
from softmask_jax.data import prompts
from softmask_jax.distributed.preemption import StopSignal
from softmask_jax.generate import sampler_flags
from softmask_jax.generate.batches import FAILED, Batch, Generator, counts_masks, plan, shape_of
from softmask_jax.generate.text import NEW_TOKENS
from softmask_jax.io.answers import AnswerFile, Hosts, count, described, key_of, summarize
from softmask_jax.io.files import check_writable, write_atomically
from softmask_jax.io.paths import to_path
from softmask_jax.report.patterns import Encoder, token_id

BATCH_SIZE = 8


def read_rows(flags: argparse.Namespace) -> list[prompts.Row]:
    """Rows of the command line. ValueError or OSError for unusable ones."""
    if flags.prompts:
        return prompts.read(flags.prompts)
    if flags.unconditional:
        return [prompts.Row(f"row {i + 1}", prompts.MASKS, None) for i in range(flags.unconditional)]
    return prompts.every(enumerate(flags.prompt, 1), lambda pair: prompts.named(f"--prompt number {pair[0]}", pair[1]))


def encoder(flags: argparse.Namespace, model) -> Encoder:
    """Encoder of rows to tokens of this model. ValueError for lengths that it cannot have."""
    fixed = model.family.fixed_length
    for name, instead in (("length", "--max_new_tokens"), ("unconditional", "a --prompt")):
        if getattr(flags, name) and not fixed:
            raise ValueError(f"--{name} is for models that write a text of fixed length; give this one {instead}.")
    if flags.length and flags.length > model.max_length:
        raise ValueError(f"--length={flags.length} is more than the {model.max_length} positions of this model.")
    new_tokens = flags.max_new_tokens or (None if fixed else NEW_TOKENS)
    bos = fixed if flags.bos is None else flags.bos
    return Encoder(model, flags.length or model.max_length, new_tokens, flags.chat, flags.system, bos)


class Run:
    """One command: its rows, and the answers so far by (row, sample); called, as one of `hosts`, it returns the exit
    status. ValueError, OSError, RuntimeError or ImportError, each one line, for anything unusable."""

    def __init__(self, flags: argparse.Namespace):
        check_writable(flags.trajectory, "--trajectory")
        self.flags, self.options, self.rows = flags, sampler_flags.options(flags), read_rows(flags)
        self.total = len(self.rows) * flags.num_samples
        self.answers: dict = {}
        self.hosts = Hosts()

    def settings(self) -> dict:
        """Everything that decides the answers, by flag."""
        checkpoint = {"checkpoint": str(to_path(self.flags.checkpoint).absolute())}
        flags = {name: getattr(self.flags, name) for name in sampler_flags.DECISIVE}
        return checkpoint | flags | dataclasses.asdict(self.options) | {"prompts": prompts.fingerprint(self.rows)}

    def __call__(self, hosts: Hosts = Hosts()) -> int:
        flags, self.hosts = self.flags, hosts
        with contextlib.ExitStack() as stack:
            file = None
            if flags.out:
                file = stack.enter_context(AnswerFile(flags.out, self.settings(), self.total, hosts))
                self.answers = file.rows
            if len(self.answers) == self.total and not flags.trajectory:
                say(f"{flags.out} has its {count(self.total, 'answer')} already; nothing is left to do.")
            elif not self._generate(file):
                if not file:
                    self._print()
                return 130
            if file:
                with StopSignal(together=False):
                    file.gather()
            if not hosts.first:
                return 0
            summary = summarize(self.answers.values())
            if file:
                file.finish(summary)
        self._print()
        say(described(summary))
        if flags.out:
            say(f"Answers      {flags.out}")
        if flags.trajectory:
            facts = {"model": f"{flags.checkpoint}, step {self.generator.model.step:,}", "seed": flags.seed}
            page = self.generator.trajectory(self.patterns[0], self.shapes[0], facts, self.answers[0, 0])
            write_atomically(flags.trajectory, page, elsewhere="give another --trajectory")
            say(f"Page         {flags.trajectory}")
        if not summary["errors"]:
            return 0
        first = min(key for key, row in self.answers.items() if "error" in row)
        say(f"Error: {summary['errors']:,} of {count(self.total, 'answer')} failed: {FAILED} (first in "
            f"{self.rows[first[0]].name}). Check the checkpoint; the other answers are complete.")  # fmt: skip
        return 1

    def _generate(self, file: AnswerFile | None) -> bool:
        """Generate the missing answers; False if a signal stopped it."""
        flags = self.flags
        with StopSignal(together=False) as stop:
            model = softmask_jax.load(flags.checkpoint, weights=flags.weights, step=flags.step, base=flags.base)
            self._prepare(model)
            size = flags.batch_size or min(BATCH_SIZE, self.total)
            batches = plan(
                self.shapes, samples=flags.num_samples, batch_size=size, done=self.answers, hosts=self.hosts
            )  # fmt: skip
            if file:
                file.settle({"step": model.step})
            if batches:
                programs = len({batch.shape for batch in batches})
                missing = count(len({key for batch in batches for key in batch.keys} - self.answers.keys()), "answer")
                say(f"Generating {missing} in {count(len(batches), 'batch', 'es')}, with "
                    f"{count(programs, 'program')} to compile ...")  # fmt: skip
            shown = Progress(self.total, "Generating", "answers", initial=len(self.answers), brief=True)
            with stop.postponed(), shown:
                return self._fill(batches, file, stop, shown)

    def _fill(self, batches: list[Batch], file: AnswerFile | None, stop: StopSignal, shown: Progress) -> bool:
        tokens = 0
        for batch in batches:
            self.hosts.check()
            answers = self.generator.batch(batch, self.rows, self.patterns)
            rows = [row for row in answers if key_of(row) not in self.answers]
            if file:
                file.add(rows)
            self.answers |= {key_of(row): row for row in rows}
            tokens += sum(row["new_tokens"] for row in rows)
            shown.update(len(rows), lambda: f"{tokens / shown.elapsed:,.1f} tokens/s")
            if stop.noted and len(self.answers) < self.total:
                more = " The same command goes on from there." if file else ""
                say(f"Stopped after {len(self.answers):,} of {count(self.total, 'answer')}.{more}")
                if self.hosts.processes > 1:
                    raise KeyboardInterrupt("it was stopped")
                return False
        return True

    def _prepare(self, model) -> None:
        """Patterns and shapes of the rows, and the generator. ValueError for rows or options unfit for the model."""
        flags = self.flags
        forbidden = {token_id(text, model.tokenizer, model.denoiser.vocab_size) for text in flags.forbid}
        if flags.trajectory and model.tokenizer is None:
            raise ValueError("--trajectory needs the model's tokenizer; convert it again with the files of it.")
        encode = encoder(flags, model)
        self.patterns = prompts.every(self.rows, encode)
        # Name the algorithm: its unusable options are refused before compiling.
        alg = self.options.alg or model.default_alg
        options = dataclasses.replace(self.options, alg=alg, forbidden=tuple(sorted(forbidden)))
        counted = counts_masks(options)
        self.shapes = [shape_of(pattern, model, encode.limit, counted=counted) for pattern in self.patterns]
        self.generator = Generator(model, options, flags.seed, tuple(flags.stop))

    def _print(self) -> None:
        """Texts of prompts from the command line; rows of JSON for those of a file, unless --out has them."""
        rows = [self.answers[key] for key in sorted(self.answers)]
        if self.flags.prompts:
            if not self.flags.out:
                print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
            return
        for row in rows:
            if self.total > 1:
                sample = f", sample {row['sample'] + 1}" if self.flags.num_samples > 1 else ""
                print(f"--- {row['index'] + 1}{sample}")
            print(row["text"] if "error" not in row else f"({row['error']})")
            if self.flags.show_cost:
                calls = f"{row['calls']} network calls, {row['tokens_per_call']:.2f} tokens a call"
                work = f"{row['positions']:,.0f} positions, {row['seconds']:.2f} s"
                print(f"    [{row['new_tokens']} new tokens, {calls}, {work}]")
