"""The sections of a config: every key, with the paper's value for the 169M model (see `config`)."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Model:
    """`kind`: dit (sizes below) | dream (`base`: the folder of a converted model, which knows its sizes).

    `adapter`: none | lora | dora, trained on a frozen `base`, on the products that `adapter_targets` (a regular
    expression) finds by name. `param_dtype`: of a base, and of a whole model that was trained once it is used or
    converted (whatever trains is float32 meanwhile). `base_dtype`: float (all of it in `param_dtype`) | int8 (its
    kernels, as `softmask_jax.convert --int8` makes them; frozen, so it needs an `adapter`). `remat`: none | attention | dots | full. `attention`: auto |
    xla | cudnn, and of a dream model splash.
    """

    kind: str = "dit"
    base: str = ""
    hidden_size: int = 768
    num_blocks: int = 12
    num_heads: int = 12
    cond_dim: int = 128
    mlp_ratio: int = 4
    dropout: float = 0.1
    rope_base: float = 1e4
    param_dtype: str = "float32"
    base_dtype: str = "float"
    compute_dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "auto"
    adapter: str = "none"
    adapter_rank: int = 16
    adapter_alpha: float = 16.0
    adapter_dropout: float = 0.0
    adapter_targets: str = "^(q|k|v|o)$"


@dataclasses.dataclass(frozen=True)
class SoftMask:
    """`variant`: topk | full | slerp | none. `p_sm`: probability of the two-pass step in training."""

    variant: str = "topk"
    k: int = 3
    p_sm: float = 0.8
    init_scale: float = 0.0
    init_centre: float = -0.75
    init_steepness: float = 6.66
    init_temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class Objective:
    """`noise_eps`: alpha_1. Of running text: `t_eps`, the smallest t, and whether t is `stratified` over the batch.

    Of conversations (model.kind dream): t between `t_min` and `t_max`, one per row or batch (`t_per`); `weighting`:
    time (1/t) | context_adaptive (with `cart_p`); whether pads behind a response are supervised (`supervise_pads`).
    `fresh_noise`: whether every epoch draws t, masks and coins anew, or repeats the first epoch's.
    """

    noise_eps: float = 1e-3
    t_eps: float = 1e-3
    stratified: bool = True
    t_min: float = 0.2
    t_max: float = 0.8
    t_per: str = "row"
    weighting: str = "time"
    cart_p: float = 0.1
    supervise_pads: bool = True
    fresh_noise: bool = True


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read, and how it becomes windows of tokens.

    `source` and `paths`: stdlib | files, jsonl, parquet (globs, comma-separated) | tfds, hf (`name:split`) | shards
    (folders that `softmask_jax.data.prepare` made) | mixture (`0.7 jsonl:web/*.jsonl; 0.3 stdlib`) | chat
    (conversations: sources joined by `;`, each `jsonl:GLOBS`, JSON arrays too, `parquet:GLOBS` or `hf:NAME:SPLIT`, and
    behind a `|` the source of its validation rows).
    `text_key`: the field that holds the text, in jsonl, parquet, tfds and hf. `separator` cuts each file into
    documents. `detokenizer`: "" | lm1b, undoes the spacing of a tokenized corpus.
    `tokenizer`: bytes | bpe (trained on the text) | text8 | shards (the one they were made with) | a file or folder of
    a tokenizer | hf://NAME.
    `validation_rule`: hash (`validation_fraction` of the documents, by content) | last (`validation_documents`) |
    paths (all of `validation_paths`, of the same kind as `paths`). `max_documents`: 0 is all. `cache_dir`: "" is the
    user's cache folder.

    Of conversations: `messages_key` ("" is messages, conversations, ..., whichever is filled, or a prompt and its
    completion: see `data.conversations`), `chat_template` (a *.jinja file, "" is the tokenizer's own), `max_train` and
    `max_validation` rows before the filters (0: all), at most `max_tokens` and a response of at least `min_response`,
    `shuffle_seed` of splitting and shuffling, `buckets`: lengths of rows, multiples of 128 ("" is every multiple,
    "512,1024,2048" compiles three programs).
    """

    source: str = "stdlib"
    paths: str = ""
    text_key: str = "text"
    separator: str = ""
    detokenizer: str = ""
    tokenizer: str = "bytes"
    bpe_vocab_size: int = 4096
    seq_len: int = 1024
    validation_rule: str = "hash"
    validation_fraction: float = 0.05
    validation_documents: int = 0
    validation_paths: str = ""
    max_documents: int = 0
    cache_dir: str = ""
    prefetch: int = 2
    messages_key: str = ""
    chat_template: str = ""
    max_train: int = 300_000
    max_validation: int = 500
    max_tokens: int = 2048
    min_response: int = 5
    shuffle_seed: int = 1231
    buckets: str = ""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`schedule`: constant | cosine, after a linear warm-up of `warmup_steps` whose first update is null."""

    learning_rate: float = 3e-4
    sm_learning_rate: float = 1e-2
    schedule: str = "constant"
    warmup_steps: int = 2500
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999


@dataclasses.dataclass(frozen=True)
class Train:
    """`micro_batches`: gradient accumulation, the coin of soft-masking is thrown once for each.

    `budget`: what `steps` updates of a binary run are worth to a soft-masked one: as many (iso_update), half as many
    (iso_compute_paper), or what the same FLOPs pay for (iso_flops); see `Config.updates`. `updates`: in the config.json
    of a run, the number that it was begun with; 0 is what the budget buys. `wandb`: a Weights & Biases project, "" is
    none.
    """

    steps: int = 1_000_000
    budget: str = "iso_update"
    updates: int = 0
    global_batch_size: int = 512
    micro_batches: int = 1
    seed: int = 1
    log_every: int = 50
    compilation_cache: str = ""
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one axis may be -1 (all that are left)."""

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 5000
    keep: int = 3
    keep_best: int = 1


@dataclasses.dataclass(frozen=True)
class Eval:
    """`every` 0: only at the end. `max_windows` 0: the whole validation split at the end of the run."""

    every: int = 5000
    batch_size: int = 64
    windows: int = 512
    max_windows: int = 0
    seed: int = 20_000


@dataclasses.dataclass(frozen=True)
class Sample:
    """`every` 0: only at the end. `length` 0: the training length."""

    every: int = 5000
    count: int = 4
    steps: int = 128
    length: int = 0
    nucleus_p: float = 0.9
    seed: int = 30_000


@dataclasses.dataclass(frozen=True)
class Init:
    """`checkpoint`: the folder of a run, or of a converted model, to start from; `weights`: raw | ema (the better start)."""

    checkpoint: str = ""
    weights: str = "ema"
