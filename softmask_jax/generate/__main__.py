"""Generate text: continue prompts, answer chats, fill holes, or write freely.

    python -m softmask_jax.generate --checkpoint=runs/stdlib --prompt='def main(' --steps=32
    python -m softmask_jax.generate --checkpoint=models/dream --chat --prompt='Write a haiku.' --max_new_tokens=64
    python -m softmask_jax.generate --checkpoint=runs/dream7b --prompts=prompts.jsonl --out=answers.jsonl
    python -m softmask_jax.generate --checkpoint=runs/stdlib --unconditional=4 --alg=remdm_cap

A line of prompts.jsonl is a text, or an object with one of "prompt", "messages" (a chat), "parts" (texts, and numbers
of masks to fill between them) or "tokens" (ids, the mask's where text is wanted); and "id", "max_new_tokens" or
"forced" ({"3": text or id}: fixed tokens of the answer by position). The same command continues an interrupted --out;
an answer depends neither on the rest of the file nor, but for the rounding of bfloat16, on the batch size. The same
command on several hosts shares the prompts among them.
"""
import logging
import sys

from softmask_jax.config.command_line import command
from softmask_jax.distributed import hosts, team
from softmask_jax.generate import sampler_flags


@command(interrupted="Interrupted. With --out the same command goes on from the last batch.", debug=True,
         out_of_memory="give a smaller --batch_size")
def main(argv: list[str]) -> int:
    """Exit status: 0 all answers are complete; 1 an error; 2 a wrong command line; 130 stopped."""
    flags = sampler_flags.parse(argv, __doc__)

    # Imports JAX.
    from softmask_jax.generate.command import Run

    logging.basicConfig(format="%(message)s")
    member, run = hosts.from_flags(flags), Run(flags)
    if member.processes > 1 and not flags.out:
        raise ValueError("Several hosts need --out=FILE, in a folder or bucket that all of them share.")
    with team.joined(member, run.settings(), f"{flags.out}.hosts") as others:
        return run(others)


if __name__ == "__main__":
    sys.exit(main())
