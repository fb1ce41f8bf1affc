"""Which values a config may hold, beyond their types."""
CHOICES = {
    "model.kind": ("dit", "dream"),
    "model.adapter": ("none", "lora", "dora"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.base_dtype": ("float", "int8"),
    "objective.t_per": ("row", "batch"),
    "objective.weighting": ("time", "context_adaptive"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "soft_mask.variant": ("topk", "full", "slerp", "none"),
    "data.source": ("stdlib", "files", "jsonl", "parquet", "tfds", "hf", "shards", "mixture", "chat"),
    "data.detokenizer": ("", "lm1b"),
    "data.validation_rule": ("hash", "last", "paths"),
    "train.budget": ("iso_update", "iso_compute_paper", "iso_flops"),
    "optimizer.schedule": ("constant", "cosine"),
    "init.weights": ("raw", "ema"),
}
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
POSITIVE = (
    "model.hidden_size", "model.num_blocks", "model.num_heads", "model.cond_dim", "model.mlp_ratio",
    "soft_mask.k", "optimizer.learning_rate", "optimizer.sm_learning_rate", "optimizer.clip_norm",
    "train.steps", "train.global_batch_size", "train.micro_batches", "train.log_every",
    "checkpoint.every", "checkpoint.keep", "eval.batch_size", "eval.windows", "sample.steps",
    "model.adapter_rank", "model.adapter_alpha", "data.max_tokens", "data.min_response",
)  # fmt: skip
NON_NEGATIVE = (
    "optimizer.warmup_steps", "optimizer.weight_decay", "eval.every", "eval.max_windows", "sample.every",
    "sample.count", "sample.length", "data.max_documents", "data.prefetch", "checkpoint.keep_best", "train.seed",
    "data.max_train", "data.max_validation", "train.updates",
)  # fmt: skip
FRACTIONS = ("soft_mask.p_sm", "soft_mask.init_scale")
BELOW_ONE = (
    "model.dropout", "model.adapter_dropout", "optimizer.b1", "optimizer.b2", "optimizer.ema_decay",
    "objective.noise_eps",
)  # fmt: skip
WITHIN = ("objective.t_eps", "data.validation_fraction")
DREAM_ONLY = {"base": "", "adapter": "none", "param_dtype": "float32", "base_dtype": "float"}
SHARES = ("sample.nucleus_p",)


def check(flat: dict) -> None:
    """Raise ValueError, in one line, for a value of `{"section.key": value}` that cannot work."""
    for name, choices in CHOICES.items():
        if flat[name] not in choices:
            raise ValueError(f"config.{name} is '{flat[name]}'; choose one of {', '.join(choices)}.")
    for names, holds, rule in (
        (POSITIVE, lambda v: v > 0, "positive"),
        (NON_NEGATIVE, lambda v: v >= 0, "zero or positive"),
        (FRACTIONS, lambda v: 0 <= v <= 1, "between 0 and 1"),
        (BELOW_ONE, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        (WITHIN, lambda v: 0 < v < 1, "above 0 and below 1"),
        (SHARES, lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ):
        for name in names:
            if not holds(flat[name]):
                raise ValueError(f"config.{name} must be {rule}, not {flat[name]}.")
    width, heads = flat["model.hidden_size"], flat["model.num_heads"]
    if width % (2 * heads):
        raise ValueError(
            f"config.model.hidden_size ({width}) must be a multiple of twice config.model.num_heads ({heads}): rotary "
            "embeddings turn pairs of features."
        )
    batch, parts = flat["train.global_batch_size"], flat["train.micro_batches"]
    if batch % parts:
        raise ValueError(
            f"config.train.global_batch_size ({batch}) must be a multiple of config.train.micro_batches ({parts})."
        )
    saves, scores = flat["checkpoint.every"], flat["eval.every"]
    if flat["checkpoint.keep_best"] and scores and scores % saves and saves % scores:
        raise ValueError(
            f"config.eval.every ({scores}) must be a multiple of config.checkpoint.every ({saves}), or the other way "
            "round: the best checkpoints are chosen among those validated at their step (config.checkpoint.keep_best=0 "
            "keeps none of them)."
        )
    if flat["data.seq_len"] < 4:
        raise ValueError("config.data.seq_len must be at least 4: a window holds BOS, EOS and text between them.")
    if flat["model.kind"] == "dream":
        if not flat["model.base"]:
            raise ValueError(f"config.model.kind is 'dream': name the converted model with config.model.base; {CONVERT}.")
        if not 0 < flat["objective.t_min"] <= flat["objective.t_max"] <= 1:
            raise ValueError("config.objective must have 0 < t_min <= t_max <= 1.")
        if flat["model.base_dtype"] == "int8" and flat["model.adapter"] == "none":
            raise ValueError(
                "config.model.base_dtype is 'int8', which cannot be trained: train an adapter on it "
                "(config.model.adapter=dora), or all of a base in float (config.model.base_dtype=float)."
            )
    elif any(flat[f"model.{name}"] != left for name, left in DREAM_ONLY.items()):
        raise ValueError(f"config.model.{', '.join(DREAM_ONLY)} are for config.model.kind=dream.")
    if (flat["model.kind"] == "dream") != (flat["data.source"] == "chat"):
        raise ValueError("config.data.source=chat and config.model.kind=dream belong together: give both or neither.")
    source, example = flat["data.source"], EXAMPLES.get(flat["data.source"])
    if example and not flat["data.paths"]:
        raise ValueError(f"config.data.source is '{source}': say where with --config.data.paths='{example}'.")
    if (flat["data.validation_rule"] == "paths") != bool(flat["data.validation_paths"]):
        raise ValueError(
            "config.data.validation_paths and config.data.validation_rule='paths' belong together: give both or neither."
        )
