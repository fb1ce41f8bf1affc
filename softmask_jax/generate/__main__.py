"""Generate text: continue prompts, answer chats, fill holes, or write freely.

    python -m softmask_jax.generate --checkpoint=runs/stdlib --prompt='def main(' --steps=32
    python -m softmask_jax.generate --checkpoint=models/dream --chat --prompt='Write a haiku.' --max_new_tokens=64
    python -m softmask_jax.generate --checkpoint=runs/dream7b --prompts=prompts.jsonl --out=answers.jsonl
    python -m softmask_jax.generate --checkpoint=runs/stdlib --unconditional=4 --alg=remdm_cap

A line of prompts.jsonl is a text, or an object with one of "prompt", "messages" (a chat), "parts" (texts, and numbers
of masks to fill between them) or "tokens" (ids, the mask's where text is wanted); and "id", "max_new_tokens" or
"forced" ({"3": text or id}: what must stand in the answer at a position). The same command goes on with an --out that
was interrupted; an answer depends neither on what else is in the file nor, but for the rounding of bfloat16, on the
size of the batch.
"""
import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import softmask_jax
from softmask_jax.config.command_line import command, say
from softmask_jax.data import prompts
from softmask_jax.distributed.preemption import StopSignal
from softmask_jax.generate import sampler_flags
from softmask_jax.generate.batches import FAILED, Generator, Shape, lay_out, plan, shape_of
from softmask_jax.io.answers import AnswerFile, count, described, key_of, summarize
from softmask_jax.io.files import check_writable, write_atomically
from softmask_jax.report import viewer
from softmask_jax.report.patterns import Encoder, Pattern, token_id
from softmask_jax.samplers.dream import ALGORITHMS as DREAMS

# Of a model that has no length of its own, as in Dream's own scripts.
NEW_TOKENS = 256
BATCH_SIZE = 8


def wanted(flags: argparse.Namespace) -> list[prompts.Row]:
    """The rows that the command line asks for. ValueError or OSError for such as cannot be used."""
    if flags.prompts:
        return prompts.read(flags.prompts)
    if flags.unconditional:
        return [prompts.Row(f"row {i + 1}", prompts.MASKS, None) for i in range(flags.unconditional)]
    return prompts.every(enumerate(flags.prompt, 1), lambda pair: prompts.named(f"--prompt number {pair[0]}", pair[1]))


def encoder(flags: argparse.Namespace, model) -> Encoder:
    """How rows become tokens for this model. ValueError for lengths that it cannot have."""
    fixed = model.padding == "right"
    if flags.length and not fixed:
        raise ValueError("--length is for models that write a text of fixed length; give this one --max_new_tokens.")
    if flags.unconditional and not fixed:
        raise ValueError("--unconditional is for models that write a text of fixed length; give this one a --prompt.")
    if flags.length and flags.length > model.max_length:
        raise ValueError(f"--length={flags.length} is more than the {model.max_length} positions of this model.")
    new_tokens = flags.max_new_tokens or (None if fixed else NEW_TOKENS)
    bos = fixed if flags.bos is None else flags.bos
    return Encoder(model, flags.length or model.max_length, new_tokens, flags.chat, flags.system, bos)


class Run:
    """One command: its rows, and the answers found so far by (row, sample). Called, it returns the exit status.

    Raises ValueError, OSError, RuntimeError or ImportError, each one line, for whatever cannot be used.
    """

    def __init__(self, flags: argparse.Namespace):
        check_writable(flags.trajectory, "--trajectory")
        self.flags, self.options = flags, sampler_flags.options(flags)
        self.rows = wanted(flags)
        self.total = len(self.rows) * flags.num_samples
        self.found: dict = {}
        self.first: tuple[Generator, Pattern, Shape] | None = None

    def settings(self) -> dict:
        """What decides the answers, by flag."""
        decisive = {name: getattr(self.flags, name) for name in sampler_flags.DECISIVE}
        return {
            "checkpoint": str(Path(os.path.expanduser(self.flags.checkpoint)).absolute()), **decisive,
            **dataclasses.asdict(self.options), "prompts": prompts.fingerprint(self.rows),
        }  # fmt: skip

    def __call__(self) -> int:
        with contextlib.ExitStack() as stack:
            file = None
            if self.flags.out:
                file = stack.enter_context(AnswerFile(self.flags.out, self.settings(), self.total))
                self.found = file.rows
            if len(self.found) == self.total and not self.flags.trajectory:
                say(f"{self.flags.out} has its {count(self.total, 'answer')} already; nothing is left to do.")
            elif not self._generate(file):
                if not file:
                    self._print()
                return 130
            summary = summarize(self.found.values())
            if file:
                file.finish(summary)
        self._print()
        say(described(summary))
        if self.flags.out:
            say(f"Answers      {self.flags.out}")
        if self.flags.trajectory:
            self._trajectory(*self.first)
        if summary["errors"]:
            first = min(key for key, row in self.found.items() if "error" in row)
            say(f"Error: {summary['errors']:,} of {count(self.total, 'answer')} failed: {FAILED} (first in "
                f"{self.rows[first[0]].name}). Check the checkpoint; the other answers are whole.")  # fmt: skip
            return 1
        return 0

    def _generate(self, file: AnswerFile | None) -> bool:
        """Answer what is not answered yet; False if a signal stopped it."""
        flags = self.flags
        with StopSignal() as stop:
            model = softmask_jax.load(flags.checkpoint, weights=flags.weights, step=flags.step, base=flags.base)
            forbidden = [token_id(text, model.tokenizer, model.denoiser.vocab_size) for text in flags.forbid]
            if flags.trajectory and model.tokenizer is None:
                raise ValueError("--trajectory needs the model's tokenizer; convert it again with the files of it.")
            encode = encoder(flags, model)
            patterns = prompts.every(self.rows, encode)
            # With the algorithm's name, what it has no use for is refused before anything is compiled.
            alg = self.options.alg or model.default_alg
            options = dataclasses.replace(self.options, alg=alg, forbidden=tuple(sorted(set(forbidden))))
            grid = alg in DREAMS and options.block_length is None
            counted = grid and options.steps is None
            shapes = [shape_of(pattern, model, encode.limit, counted=counted) for pattern in patterns]
            size = flags.batch_size or min(BATCH_SIZE, self.total)
            batches = plan(shapes, samples=flags.num_samples, batch_size=size, done=self.found)
            generator = Generator(model, options, flags.seed, tuple(flags.stop))
            if file:
                file.settle({"step": model.step})
            programs = len({batch.shape for batch in batches})
            if batches:
                say(f"Generating {count(self.total - len(self.found), 'answer')} in {count(len(batches), 'batch', 'es')}, "
                    f"with {count(programs, 'program')} to compile ...")  # fmt: skip
            tokens = 0
            with stop.postponed(), tqdm(
                total=self.total, initial=len(self.found), unit="row", disable=None, dynamic_ncols=True, leave=False
            ) as bar:
                for batch in batches:
                    rows = [
                        row for key, row in zip(batch.keys, generator.batch(batch, self.rows, patterns))
                        if key not in self.found
                    ]  # fmt: skip
                    if file:
                        file.add(rows)
                    self.found |= {key_of(row): row for row in rows}
                    tokens += sum(row["new_tokens"] for row in rows)
                    bar.update(len(rows))
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.1f} tokens/s")
                    if stop.noted and len(self.found) < self.total:
                        break
            if len(self.found) < self.total:
                more = " The same command goes on from there." if file else ""
                say(f"Stopped after {len(self.found):,} of {count(self.total, 'answer')}.{more}")
                return False
            self.first = generator, patterns[0], shapes[0]
        return True

    def _trajectory(self, generator: Generator, pattern: Pattern, shape: Shape) -> None:
        """Write the page of the first answer, which is generated once more, by itself, with all that happened."""
        model, flags = generator.model, self.flags
        made = generator.fill([(0, 0)], [pattern], shape, trace=True)
        attended = lay_out([pattern], shape, model.padding, generator.pad)[1]
        length, answer = len(pattern.tokens), self.found[0, 0]
        first = 0 if model.padding == "right" else shape.length - length
        same = generator.answer(pattern, np.asarray(made.tokens)[0, first : first + length])["tokens"] == answer["tokens"]
        note = "" if same or "error" in answer else (
            "Rounding differs with the number of rows: computed by itself, as here, this text is not quite the answer given."
        )
        facts = {
            "model": f"{flags.checkpoint}, step {model.step:,}",
            "sampler": f"{generator.options.alg}, {int(made.steps):,} steps",
            "network calls": int(made.row_calls[0]), "tokens a call": f"{made.tokens_per_call[0]:.2f}",
            "seed": flags.seed,
        }  # fmt: skip
        found = viewer.trajectory_page(
            made, model.tokenizer, mask_token_id=model.mask_token_id, facts=facts, note=note, attention_mask=attended
        )
        write_atomically(flags.trajectory, found, elsewhere="give another --trajectory")
        say(f"Page         {flags.trajectory}")

    def _print(self) -> None:
        """Texts of what the command line asked for; rows of JSON where a file asked and none is to be written."""
        rows = [self.found[key] for key in sorted(self.found)]
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
                print(
                    f"    [{row['new_tokens']} new tokens, {row['calls']} network calls, {row['tokens_per_call']:.2f} "
                    f"tokens a call, {row['positions']:,.0f} positions, {row['seconds']:.2f} s]"
                )


@command(interrupted="Interrupted. With --out the same command goes on from the last batch.", debug=True,
         out_of_memory="give a smaller --batch_size")
def main(argv: list[str]) -> int:
    """Exit status: 0 all answers are there; 1 something failed; 2 the command line is wrong; 130 stopped before."""
    flags = sampler_flags.parse(argv, __doc__)
    logging.basicConfig(format="%(message)s")
    return Run(flags)()


if __name__ == "__main__":
    sys.exit(main())
