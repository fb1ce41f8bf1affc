"""Which values of a config go together; those of a single key are in `sections`."""
from softmask_jax.config.kinds import KINDS

CONVERT = "python -m softmask_jax.convert --src=hf://Dream-org/Dream-v0-Instruct-7B --dst=models/dream makes one"
EXAMPLES = {
    "files": "texts/**/*.txt",
    "jsonl": "texts/*.jsonl",
    "parquet": "texts/*.parquet",
    "tfds": "lm1b:train",
    "hf": "Skylion007/openwebtext:train",
    "shards": "data/owt",
    "mixture": "0.7 jsonl:web/*.jsonl; 0.3 stdlib",
    "chat": "jsonl:chats/*.jsonl",
}
BASED_ONLY = {"base": "", "adapter": "none", "param_dtype": "float32", "base_dtype": "float"}


def check(config) -> None:
    """Raise ValueError, in one line, for values of a `Config` that cannot work together."""
    model, data = config.model, config.data
    if model.hidden_size % (2 * model.num_heads):
        raise ValueError(
            f"config.model.hidden_size ({model.hidden_size}) must be a multiple of twice config.model.num_heads "
            f"({model.num_heads}): rotary embeddings turn pairs of features."
        )
    batch, parts = config.train.global_batch_size, config.train.micro_batches
    if batch % parts:
        raise ValueError(
            f"config.train.global_batch_size ({batch}) must be a multiple of config.train.micro_batches ({parts})."
        )
    saves, scores = config.checkpoint.every, config.eval.every
    if config.checkpoint.keep_best and scores and scores % saves and saves % scores:
        raise ValueError(
            f"config.eval.every ({scores}) must be a multiple of config.checkpoint.every ({saves}), or the other way "
            "round: the best checkpoints are chosen among those validated at their step (config.checkpoint.keep_best=0 "
            "keeps none of them)."
        )
    if data.seq_len < 4:
        raise ValueError("config.data.seq_len must be at least 4: a window holds BOS, EOS and text between them.")
    if KINDS[model.kind].from_base:
        _check_based(config)
    elif any(getattr(model, name) != default for name, default in BASED_ONLY.items()):
        raise ValueError(f"config.model.{', '.join(BASED_ONLY)} are for config.model.kind={_kinds(from_base=True)}.")
    if KINDS[model.kind].chat != (data.source == "chat"):
        chat = _kinds(chat=True)
        raise ValueError(f"config.data.source=chat and config.model.kind={chat} belong together: give both or neither.")
    if data.source == "chat" and not 0 < config.objective.t_min <= config.objective.t_max <= 1:
        raise ValueError("config.objective must have 0 < t_min <= t_max <= 1.")
    if data.source in EXAMPLES and not data.paths:
        example = EXAMPLES[data.source]
        raise ValueError(f"config.data.source is '{data.source}': say where with --config.data.paths='{example}'.")
    if (data.validation_rule == "paths") != bool(data.validation_paths):
        raise ValueError(
            "config.data.validation_paths and config.data.validation_rule='paths' belong together: give both or "
            "neither."
        )


def _kinds(**properties: bool) -> str:
    return "|".join(name for name, kind in KINDS.items() if properties.items() <= kind._asdict().items())


def _check_based(config) -> None:
    if not config.model.base:
        kind = config.model.kind
        raise ValueError(f"config.model.kind is '{kind}': name the converted model with config.model.base; {CONVERT}.")
    if config.model.base_dtype == "int8" and config.model.adapter == "none":
        raise ValueError(
            "config.model.base_dtype is 'int8', which cannot be trained: train an adapter on it "
            "(config.model.adapter=dora), or all of a base in float (config.model.base_dtype=float)."
        )
