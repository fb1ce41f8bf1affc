"""Command line of `softmask_jax.generate`."""
import argparse
from collections.abc import Sequence

from softmask_jax.config import option_flags
from softmask_jax.config.command_line import command_parser
from softmask_jax.distributed import hosts
from softmask_jax.io.paths import to_path
from softmask_jax.io.runs import only_run
from softmask_jax.samplers import Options, SoftMask

# Flags that decide the answers, beside the checkpoint, the prompts and the sampler's options.
DECISIVE = (
    "weights", "base", "chat", "system", "max_new_tokens", "length", "bos", "num_samples", "seed", "forbid", "stop",
)  # fmt: skip

# Help of the sampler's options; the default is the name.
HELPS = {
    "alg": "how masks are filled. mdlm, remdm_cap, remdm_rescale, remdm_conf, remdm_loop: drawn along the noise "
    "schedule, remdm masks tokens again; origin, maskgit_plus, topk_margin, entropy: Dream's, the surest first but for "
    "origin; low_confidence, random: LLaDA's, the likeliest first or any; confidence_threshold, confidence_factor: all "
    "that are sure enough (default: mdlm, entropy for Dream, low_confidence for LLaDA)",
    "steps": "denoising steps (default: 128 for mdlm and remdm, else about one a token)",
    "temperature": "of the draws; 0 takes the likeliest token, but for mdlm and remdm (default: 1 for these, else 0)",
    "top_p": "draw from the likeliest tokens that reach this probability",
    "top_k": "draw from this many of the likeliest tokens",
    "alg_temp": "above 0, positions are drawn by their confidence instead of taken in its order",
    "nucleus_p": "nucleus of the draws of mdlm and remdm",
    "eta": "how much remdm masks again",
    "t_on": "the time when remdm_loop begins to mask again",
    "t_off": "when it ends",
    "alpha_on": "the share of tokens that remdm_loop keeps in between",
    "cfg_scale": "above 0, guide the draws away from what the model says without the prompt; twice the work",
    "block_length": "fill blocks of so many positions from left to right",
    "cache": "keys and values kept while a block is filled: none, prefix, dual (all outside the block) (default: dual, "
    "or none for low_confidence and random)",
    "full_call": "whether the call at a block's start commits its first token only (first), or by the rule (rule) "
    "(default: first, or rule for low_confidence and random)",
    "threshold": "confidence_threshold: how sure (default: 0.9); low_confidence: all as sure as that, instead of equal "
    "numbers a step",
    "factor": "confidence_factor: Fast-dLLM's (default: 1); low_confidence takes it, too",
    "tokens_per_step": "fill so many tokens a step",
    "suppress_mask": "never predict the mask itself",
    "end_penalty": "nats off the logits of end of text and padding, against empty answers",
    "logits_eos_inf": "never write the end of text",
    "confidence_eos_eot_inf": "low_confidence: tokens that end a text come last",
    "stop_at_end": "no more work on what stands behind an end of text",
    "soft_mask": "none, or VARIANT[:K[:SCHEDULE]] such as topk:3 (default: as the model was trained)",
    "compat": "as the reference where ours is better",
    "forbidden": "",  # --forbid
}


def soft_mask(text: str):
    """"none" or `SoftMask` of "variant:k:schedule". argparse.ArgumentTypeError for another text."""
    if text == "none":
        return "none"
    variant, k, schedule = (text.split(":", 2) + ["", ""])[:3]
    try:
        return SoftMask(variant, int(k or 1), schedule or "none")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


_positive.__name__ = "integer"


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The flags; of the sampler's options only those on the command line. Raises as `only_run` without --checkpoint."""
    parser = command_parser("generate", description, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint",
        help="a run's folder, a converted model's or, with --base, an adapter's; by default the only run in runs/")
    add("--weights", default="ema", choices=("ema", "raw"), help="which weights of a run")
    add("--step", type=int, help="which checkpoint of a run; the newest by default")
    add("--base", default="", help="of an adapter, the converted model that it was trained on")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    source.add_argument("--prompts", default="", metavar="FILE", help="rows of JSON; of text if *.txt; - is stdin")
    source.add_argument("--unconditional", type=_positive, default=0, metavar="N", help="N texts from masks alone")
    add("--out", default="", metavar="FILE",
        help="JSON lines, written as answers come; goes on where it stopped, refuses other settings")
    add("--chat", action="store_true", help="prompts are a user's message, rendered by the model's chat template")
    add("--system", default="", metavar="TEXT", help="the system's message before it")
    add("--max_new_tokens", type=_positive, help="of a prompt; 256, or up to --length")
    add("--length", type=_positive, help="of a text, for models of fixed length; the training length by default")
    add("--bos", action=argparse.BooleanOptionalAction, help="begin texts with BOS; by default where training did")
    add("--num_samples", type=_positive, default=1, help="answers to each prompt")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--batch_size", type=_positive, help="rows at a time; by default 8, or all if they are fewer")
    add("--forbid", action="append", default=[], metavar="TOKEN", help="never write it: an id, or a text of one token")
    add("--stop", action="append", default=[], metavar="TEXT", help="cut answers there")
    add("--show_cost", action="store_true", help="print below each answer what it cost")
    add("--trajectory", default="", metavar="PAGE",
        help="write a page that shows the first answer step by step; replaces the file")
    add("--debug", action="store_true", help="show the traceback of an error")
    hosts.add_flags(parser)
    group = parser.add_argument_group("the sampler's options")
    option_flags.add(group, Options, helps=HELPS, readers={"soft_mask": soft_mask})
    flags = parser.parse_args(argv)
    flags.out, flags.trajectory = (str(to_path(path)) if path else "" for path in (flags.out, flags.trajectory))
    if flags.system and not flags.chat:
        parser.error("--system is for --chat")
    if "" in flags.stop:
        parser.error("--stop must be a text")
    if not 0 <= flags.seed < 2**32:
        parser.error("--seed must be in 0 .. 2**32 - 1")
    if flags.checkpoint is None:
        flags.checkpoint = only_run("--checkpoint={}")
    return flags


def options(flags: argparse.Namespace) -> Options:
    """The sampler's options on the command line. ValueError for contradictions."""
    chosen = Options(**option_flags.present(flags, Options))
    # Without blocks a threshold may have a limit of steps.
    limited = chosen.block_length is None and (chosen.alg == "confidence_threshold" or chosen.threshold is not None)
    if chosen.steps is not None and not (chosen.counts_steps() or limited):
        raise ValueError("How many steps there are follows from how many tokens each fills; leave --steps out.")
    return chosen
