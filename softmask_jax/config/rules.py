"""Rules over several keys of a config; those of a single key are in `sections`."""
from softmask_jax.config.kinds import KINDS

CONVERT = "python -m softmask_jax.convert --src={kind.source} --dst=models/{model.kind} makes one"
EXAMPLES = {
    "files": "texts/**/*.txt",
    "jsonl": "texts/*.jsonl",
    "parquet": "texts/*.parquet",
    "tfds": "lm1b:train",
    "hf": "Skylion007/openwebtext:train",
    "shards": "data/owt",
    "mixture": "0.7 jsonl:web/*.jsonl; 0.3 stdlib",
    "chat": "chats.jsonl",
}
# Choices of objective.loss.
LOSSES = {"chat": ("dream", "llada"), "text": ("nelbo", "llada")}
BASED_ONLY = {"base": "", "base_source": "", "adapter": "none", "param_dtype": "float32", "base_dtype": "float"}


def check(config) -> None:
    """Raise ValueError, in one line, for values of a `Config` that cannot work together."""
    for broken, message in _rules(config):
        if broken:
            raise ValueError(message)


def _rules(config):
    """(whether it is broken, its message) of each rule."""
    model, data, objective = config.model, config.data, config.objective
    kind = KINDS[model.kind]
    yield model.hidden_size % (2 * model.num_heads), (
        f"config.model.hidden_size ({model.hidden_size}) must be a multiple of twice config.model.num_heads "
        f"({model.num_heads}): rotary embeddings turn pairs of features."
    )
    batch, parts = config.train.global_batch_size, config.train.micro_batches
    yield batch % parts, (
        f"config.train.global_batch_size ({batch}) must be a multiple of config.train.micro_batches ({parts})."
    )
    saves, scores = config.checkpoint.every, config.eval.every
    yield config.checkpoint.keep_best and scores and scores % saves and saves % scores, (
        f"config.eval.every ({scores}) must be a multiple of config.checkpoint.every ({saves}), or the other way "
        "round: the best checkpoints are chosen among those validated at their step (config.checkpoint.keep_best=0 "
        "keeps none of them)."
    )
    yield data.seq_len < 4, "config.data.seq_len must be at least 4: a window holds BOS, EOS and text between them."
    yield kind.from_base and not model.base, (
        f"config.model.kind is '{model.kind}': name the converted model with config.model.base; {CONVERT.format(kind=kind, model=model)}."
    )
    yield kind.from_base and model.base_dtype == "int8" and model.adapter == "none", (
        "config.model.base_dtype is 'int8', which cannot be trained: train an adapter on it "
        "(config.model.adapter=dora), or all of a base in float (config.model.base_dtype=float)."
    )
    yield not kind.from_base and any(getattr(model, name) != default for name, default in BASED_ONLY.items()), (
        f"config.model.{', '.join(BASED_ONLY)} are for config.model.kind={_kinds('from_base')}."
    )
    chats = data.source == "chat"
    yield not (kind.chat if chats else kind.text), (
        f"config.data.source=chat and config.model.kind={_kinds('chat')} belong together: give both or neither."
    )
    losses = LOSSES["chat" if chats else "text"]
    yield objective.loss and objective.loss not in losses, (
        f"config.objective.loss is '{objective.loss}', for config.data.source={data.source} take {' or '.join(losses)}."
    )
    yield chats and not 0 < objective.t_min <= objective.t_max <= 1, (
        "config.objective must have 0 < t_min <= t_max <= 1."
    )
    yield data.source in EXAMPLES and not data.paths, (
        f"config.data.source is '{data.source}': say where with --config.data.paths='{EXAMPLES.get(data.source)}'."
    )
    yield (data.validation_rule == "paths") != bool(data.validation_paths), (
        "config.data.validation_paths and config.data.validation_rule='paths' belong together: give both or neither."
    )


def _kinds(attribute: str) -> str:
    return "|".join(name for name, kind in KINDS.items() if getattr(kind, attribute))
