"""The study: its sizes, and the config of every training run.

Every run continues one base of its part, binary or by a recipe of soft-masking, over seeds of data order and noise.
"Equal FLOPs" are those of the binary run: a soft-masked run makes fewer updates (`train.budget=iso_flops`)."""
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from softmask_jax import config as config_schema
from softmask_jax.config import Config
from softmask_jax.convert import tiny
from softmask_jax.io.files import write_json
from softmask_jax.models import families
from softmask_jax.models.denoiser import Denoiser
from softmask_jax.training.update_flops import budgeted, mean_passes

# With this start of the scalars lambda is about 0.1 at first.
SOFT_MASK = {"k": 3, "p_sm": 0.8, "init_scale": 0.5, "init_centre": -3.0, "init_steepness": 2.0}
PAPERS = {"init_scale": 0.0, "init_centre": -0.75, "init_steepness": 6.66}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Everything that decides the numbers; by default for two to three hours on two CPU cores."""

    seeds: tuple[int, ...] = (1, 2, 3)
    recipes: tuple[str, ...] = ()  # of `RECIPES`, () for all
    shortened: tuple[int, ...] = (1, 2, 4, 8)  # all of the steps, a half, a quarter, an eighth
    compilation_cache: bool = False  # programs kept in the study's folder may not run on another CPU
    # Text: the standard library of this Python
    vocabulary: int = 2048  # of the BPE
    length: int = 128  # tokens of a window
    text_width: int = 128
    text_blocks: int = 4
    text_batch: int = 16
    text_base_steps: int = 5000
    text_steps: int = 1000  # of the binary continuation
    documents: int = 0  # 0 for all
    draws: int = 4  # masks of a validation window
    samples: int = 64  # a model and number of steps
    # Puzzles
    puzzles: int = 20_000
    clues: tuple[int, int] = (3, 12)  # the fewest and the most of a puzzle
    tests: int = 500
    puzzle_width: int = 96
    puzzle_layers: int = 4
    puzzle_batch: int = 32
    puzzle_base_steps: int = 2000
    puzzle_steps: int = 1000
    # Both
    learning_rate: float = 2e-3
    warmup: int = 100
    compute_dtype: str = "float32"
    remat: str = "full"  # on a CPU computing the activations again is faster than writing and reading them


SIZES = {
    "default": Sizes(),
    "smoke": Sizes(
        seeds=(1, 2), recipes=("binary", "soft", "binary_updates", "paper_start"), shortened=(1, 4),
        compilation_cache=True, vocabulary=300, length=16, text_width=16, text_blocks=1, text_batch=8,
        text_base_steps=4, text_steps=5, documents=30, draws=1, samples=4, puzzles=60, tests=8, puzzle_width=16,
        puzzle_layers=1, puzzle_batch=8, puzzle_base_steps=4, puzzle_steps=5, warmup=2,
    ),
    "gpu": Sizes(
        vocabulary=4096, length=256, text_width=384, text_blocks=8, text_batch=64, text_base_steps=8000,
        text_steps=4000, samples=256, puzzle_width=128, learning_rate=1e-3,
        compute_dtype="bfloat16", remat="none",
    ),
}  # fmt: skip


def check_sizes(out: Path, sizes: Sizes, elsewhere: str) -> None:
    """Store the sizes of a study, or ValueError if the folder's is of others."""
    path, ours = out / "sizes.json", json.loads(json.dumps(dataclasses.asdict(sizes)))
    if not path.exists():
        write_json(path, ours)
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    if different := [name for name in ours | theirs if ours.get(name) != theirs.get(name)]:
        raise ValueError(f"{out} holds a study of other sizes ({', '.join(different)}); {elsewhere}.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A way to continue a base."""

    name: str
    title: str
    soft_mask: Mapping = dataclasses.field(default_factory=dict)  # keys of the config's section
    every_seed: bool = False  # else the first seed alone
    sampled: bool = False  # in few steps, too
    puzzles: bool = False  # of the puzzles, too
    equal_updates: bool = False  # as many updates as the recipe `soft`, whatever they cost


BASE = Recipe("base", "the base, not continued", {"variant": "none"}, puzzles=True)
BINARY, SOFT = "binary", "soft"
RECIPES = (
    Recipe(BINARY, "binary", {"variant": "none"}, every_seed=True, sampled=True, puzzles=True),
    Recipe(SOFT, "soft-masked (top 3, p_sm 0.8)", every_seed=True, sampled=True, puzzles=True),
    # A second pass that feeds nothing back has the gradient of a single one: its run is this one, at more cost.
    Recipe("binary_updates", "binary, as many updates as soft-masked (a second pass that feeds nothing back)",
           {"variant": "none"}, every_seed=True, equal_updates=True),
    Recipe("paper_start", "the paper's start of the scalars (scale 0)", PAPERS),
    Recipe("p_sm_0.5", "p_sm 0.5", {"p_sm": 0.5}),
    Recipe("p_sm_1", "p_sm 1", {"p_sm": 1.0}),
    Recipe("k_1", "top 1: hard feedback, the likeliest token", {"k": 1}, sampled=True, puzzles=True),
    Recipe("k_8", "top 8", {"k": 8}),
    Recipe("slerp", "top 3 on the sphere (slerp)", {"variant": "slerp"}),
    Recipe("full", "the full vocabulary, learned temperature", {"variant": "full"}, sampled=True, puzzles=True),
    Recipe("hidden", "a projection of the hidden state (self-conditioning)", {"variant": "hidden"}, sampled=True,
           puzzles=True),
)  # fmt: skip
TEXT, PUZZLE = "text", "puzzle"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run."""

    part: str  # TEXT or PUZZLE
    recipe: Recipe
    seed: int
    config: Config
    token_flops: float  # FLOPs of a forward pass, a token
    passes: float  # cost of an update in forward passes

    @property
    def name(self) -> str:
        return base(self.part) if self.recipe == BASE else f"{self.part}-{self.recipe.name}-{self.seed}"

    @property
    def flops(self) -> float:
        """FLOPs of all updates, without those of the base."""
        tokens = self.config.updates * self.config.train.global_batch_size * self.config.longest_row
        return tokens * self.passes * self.token_flops

    @property
    def soft(self) -> bool:
        return self.config.soft_mask.variant != "none"


def base(part: str) -> str:
    """Name of the run that the others of a part continue."""
    return f"{part}-base"


def runs(sizes: Sizes, out: Path) -> list[Run]:
    """All training runs in order: bases before what continues them, the main comparison before the others."""
    chosen = []
    for part, make in ((TEXT, _text), (PUZZLE, _puzzle)):
        recipes = [one for one in RECIPES if one.name in (sizes.recipes or [one.name])]
        recipes = [one for one in recipes if part == TEXT or one.puzzles]
        continued = [(one, seed) for seed in sizes.seeds for one in recipes if one.every_seed or seed == sizes.seeds[0]]
        for recipe, seed in [(BASE, sizes.seeds[0]), *continued]:
            chosen.append(Run(part, recipe, seed, *make(sizes, out, recipe, seed)))
    return sorted(chosen, key=lambda run: (not (run.recipe == BASE or run.recipe.every_seed), run.part != TEXT))


def _text(sizes: Sizes, out: Path, recipe: Recipe, seed: int) -> tuple[Config, float, float]:
    values = _common(sizes, out, TEXT, recipe, seed)
    values["model"] |= {
        "hidden_size": sizes.text_width, "num_blocks": sizes.text_blocks, "num_heads": 4, "cond_dim": 64,
        "dropout": 0.0,
    }  # fmt: skip
    values["data"] |= {
        "source": "stdlib", "tokenizer": "bpe", "bpe_vocab_size": sizes.vocabulary, "seq_len": sizes.length,
        "max_documents": sizes.documents,
    }  # fmt: skip
    values["train"] |= {"global_batch_size": sizes.text_batch}
    return _with_steps(values, recipe, sizes.text_base_steps if recipe == BASE else sizes.text_steps,
                       {"vocab_size": sizes.vocabulary, "mask_token_id": sizes.vocabulary - 1})


def _puzzle(sizes: Sizes, out: Path, recipe: Recipe, seed: int) -> tuple[Config, float, float]:
    values = _common(sizes, out, PUZZLE, recipe, seed)
    values["model"] |= {
        "kind": "dream", "base": str(out / "dream" / "model"), "base_source": str(out / "dream" / "hf"),
    }  # fmt: skip
    values["objective"] = {"t_min": 0.05, "t_max": 1.0, "supervise_pads": False}
    values["data"] |= {
        "source": "chat", "tokenizer": "base", "paths": f"jsonl:{out / 'dream' / 'puzzles.jsonl'}", "max_tokens": 128,
        "buckets": "128", "validation_fraction": 0.02,
    }  # fmt: skip
    values["train"] |= {"global_batch_size": sizes.puzzle_batch}
    return _with_steps(values, recipe, sizes.puzzle_base_steps if recipe == BASE else sizes.puzzle_steps,
                       {"hf_config": about_base(sizes.puzzle_width, sizes.puzzle_layers)})


def about_base(width: int, layers: int) -> dict:
    """config.json of the small Dream, in Hugging Face's format, as far as its sizes and special tokens go."""
    return tiny.RECIPES["dream"].config | {
        "hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_hidden_layers": layers, "torch_dtype": "float32", "vocab_size": 261, "mask_token_id": 260,
        "eos_token_id": 256,
    }  # fmt: skip


def _common(sizes: Sizes, out: Path, part: str, recipe: Recipe, seed: int) -> dict:
    return {
        "model": {"compute_dtype": sizes.compute_dtype, "remat": sizes.remat},
        "soft_mask": SOFT_MASK | recipe.soft_mask,
        "data": {"cache_dir": str(out / "tokens")},
        "optimizer": {
            "learning_rate": sizes.learning_rate, "warmup_steps": sizes.warmup, "ema_decay": 0.998,
            "schedule": "constant" if recipe == BASE else "cosine",
        },
        "train": {
            "budget": "iso_flops", "seed": seed, "log_every": 50,
            "compilation_cache": str(out / "compiled") if sizes.compilation_cache else "auto",
        },
        "checkpoint": {"every": 250, "keep": 1, "keep_best": 0},
        "eval": {"every": 500, "batch_size": 16, "windows": 160, "max_windows": 160},
        "sample": {"every": 0, "count": 0},
        "init": {} if recipe == BASE else {"checkpoint": str(out / "runs" / base(part)), "weights": "ema"},
    }  # fmt: skip


def _with_steps(values: dict, recipe: Recipe, steps: int, about: Mapping) -> tuple[Config, float, float]:
    """The config with its number of updates, `Run.token_flops` and `Run.passes`. about: what the family's builder needs
    to know of the network."""
    values["train"]["steps"] = steps
    if recipe.equal_updates:
        soft = config_schema.from_dict(values | {"soft_mask": SOFT_MASK})
        values["train"]["steps"] = budgeted(soft, _build(soft, about)).updates
    config = config_schema.from_dict(values)
    denoiser, length = _build(config, about), config.longest_row
    return budgeted(config, denoiser), denoiser.flops_per_token(length), mean_passes(denoiser, config, length)


def _build(config: Config, about: Mapping) -> Denoiser:
    return families.of(config.model.kind).build(config.model, config.soft_mask, about)
