"""Keys of `--model_args`: the model, the estimate of likelihoods, and every option of the samplers."""
import argparse
import dataclasses
from collections.abc import Mapping
from fractions import Fraction

from softmask_jax.config import option_flags
from softmask_jax.config.keys import key
from softmask_jax.config.sections import Mesh
from softmask_jax.data.sources.records import nearest
from softmask_jax.evaluate.lm_eval.masks import llada_masks, masks
from softmask_jax.generate import sampler_flags
from softmask_jax.samplers import Options
from softmask_jax.samplers.algorithms import DREAM, MDLM_STEPS

# Arguments that the harness gives every model and ours ignores: JAX knows the devices.
FOREIGN = ("device", "trust_remote_code", "max_batch_size")
ESTIMATES = {"stratified": masks, "llada": llada_masks}
# steps may be a share of the sampler's own number, such as 1/4.
OPTION_HELPS = sampler_flags.HELPS | {"steps": "", "forbidden": "ids that are never written, as [1,2]"}


@dataclasses.dataclass(frozen=True)
class Model:
    checkpoint: str = key("", "a run's folder, or a converted model's")
    weights: str = key("ema", "ema or raw, of a run")
    step: int | None = key(None, "which checkpoint of a run; the newest by default")
    base: str = key("", "of an adapter, the converted model that it was trained on")
    batch_size: int = key(8, "rows of a network call")
    seed: int = key(0, "of everything that is drawn")
    max_new_tokens: int | None = key(None, "of an answer, instead of what the task asks for")
    max_length: int | None = key(None, "positions of a row at most; longer contexts lose their beginning (default: the "
                                 "model's, up to 2048)")
    bos: bool | None = key(None, "begin contexts with BOS, but for chats; by default where training did")
    mc_num: int = key(128, "masks that a likelihood is averaged over")
    estimate: str = key("", "how these are drawn: stratified, all of them where that is cheap, or llada, as its "
                        "reference does (default: llada for LLaDA, else stratified)")
    check_greedy: bool = key(True, "decode continuations to see whether they are the model's own; without, none is")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"--model_args: {message.replace('argument --', '')}.")


def _steps(text: str) -> int | Fraction:
    if "/" not in text:
        return int(text)
    share = Fraction(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the steps, which is above 0 and up to 1")
    return share


_steps.__name__ = "number of steps or share of them"


def parser() -> argparse.ArgumentParser:
    """Parser whose flags are the arguments; an error is a ValueError of one line."""
    flags = _Parser(prog="--model_args", add_help=False, allow_abbrev=False, usage="--model_args NAME=VALUE ...")
    option_flags.add(flags.add_argument_group("the model"), Model, helps={})
    group = flags.add_argument_group("the sampler's options")
    group.add_argument("--steps", type=_steps, default=argparse.SUPPRESS, metavar="INT",
                       help="denoising steps, or a share of the default such as 1/4 (default: 128 for mdlm and remdm, else "
                       "one a new token)")  # fmt: skip
    option_flags.add(group, Options, helps=OPTION_HELPS, readers={"soft_mask": sampler_flags.soft_mask})
    option_flags.add(flags.add_argument_group("several devices"), Mesh, helps={})
    return flags


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Parsed `--model_args`."""

    model: Model
    options: Options  # of the sampler, without steps if `share` decides them
    share: Fraction | None = None  # of the default number of steps
    mesh: Mesh | None = None  # its sizes; None is a single device

    def options_for(self, alg: str, new_tokens: int) -> Options:
        """Options for `new_tokens`, by default a step for each with Dream's samplers. alg: the model's own."""
        alg = self.options.alg or alg
        default = new_tokens if alg in DREAM else MDLM_STEPS
        steps = self.options.steps
        if self.share is not None:
            steps = max(1, int(self.share * default))
        elif steps is None and alg in DREAM and self.options.counts_steps(alg):
            steps = default
        return dataclasses.replace(self.options, alg=alg, steps=steps)


def read(values: Mapping[str, object]) -> Arguments:
    """Arguments by name as the harness passes them, texts or values. ValueError, one line, for a wrong one."""
    values = {name: value for name, value in values.items() if value is not None and name not in FOREIGN}
    known = [field.name for section in (Model, Options, Mesh) for field in dataclasses.fields(section)]
    for name in values:
        if name not in known:
            raise ValueError(f"--model_args has no {name[:40]!r}; {nearest(name, known)}.")
    flags = parser().parse_args([f"--{name}={_text(value)}" for name, value in values.items()])
    model = Model(**option_flags.present(flags, Model))
    if not model.checkpoint:
        raise ValueError("--model_args needs checkpoint=FOLDER, a run's or a converted model's.")
    for name in ("batch_size", "max_new_tokens", "max_length", "mc_num"):
        value = getattr(model, name)
        if value is not None and value < 1:
            raise ValueError(f"--model_args: {name} must be at least 1, not {value}.")
    if model.estimate not in ("", *ESTIMATES):
        raise ValueError(f"--model_args: estimate is '{model.estimate}'; choose one of {', '.join(ESTIMATES)}.")
    if not 0 <= model.seed < 2**32:
        raise ValueError(f"--model_args: seed must be in 0 .. 2**32 - 1, not {model.seed}.")
    share = None
    if isinstance(getattr(flags, "steps", None), Fraction):
        # Parse with any number of steps, to see whether the sampler takes one.
        share, flags.steps = flags.steps, 1
    options = sampler_flags.options(flags)
    if share is not None:
        options = dataclasses.replace(options, steps=None)
    mesh = option_flags.present(flags, Mesh)
    return Arguments(model, options, share, Mesh(**mesh) if mesh else None)


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    # The harness turns 1e3 or 8.0 into a float.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
