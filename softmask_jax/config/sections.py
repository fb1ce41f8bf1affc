"""The sections of a config: every key with its default, the paper's value for the 169M model, and its meaning."""
import dataclasses

from softmask_jax.config.kinds import KINDS
from softmask_jax.config.keys import BELOW_ONE, FRACTION, INSIDE, NON_NEGATIVE, POSITIVE, SHARE, key

DTYPES = ("float32", "bfloat16")
LOSSES, WEIGHTS = ("", "nelbo", "dream", "llada"), ("time", "context_adaptive", "uniform")
SOURCES = ("stdlib", "files", "jsonl", "parquet", "tfds", "hf", "shards", "mixture", "chat")


@dataclasses.dataclass(frozen=True)
class Model:
    # Network
    kind: str = key("dit", "network; dream and llada read their sizes from `base`", KINDS)
    base: str = key("", "folder of a converted model (not dit)")
    base_source: str = key("", "what `base` is converted from: hf://OWNER/NAME, or a folder (not dit)")
    # Sizes (kind dit)
    hidden_size: int = key(768, "width of the residual stream, features", POSITIVE)
    num_blocks: int = key(12, "transformer blocks", POSITIVE)
    num_heads: int = key(12, "attention heads a block", POSITIVE)
    cond_dim: int = key(128, "width of the noise level's embedding, features", POSITIVE)
    mlp_ratio: int = key(4, "width of the MLP / hidden_size", POSITIVE)
    dropout: float = key(0.1, "rate on the residual branches", BELOW_ONE)
    rope_base: float = key(1e4, "base of the rotary angles")
    # Precision and memory
    param_dtype: str = key("float32", "parameters of a base, or of a trained whole model in use (not dit)", DTYPES)
    base_dtype: str = key("float", "storage of a base's kernels; int8 needs an adapter (not dit)", ("float", "int8"))
    compute_dtype: str = key("bfloat16", "matrix products", DTYPES)
    remat: str = key("none", "recomputed in backward passes: none | attention | products | dots | mlp (not dit) | full")
    attention: str = key("auto", "implementation: auto | xla | cudnn (a GPU) | splash (a TPU)")
    # Adapter on a frozen base (not dit)
    adapter: str = key("none", "weights that train", ("none", "lora", "dora"))
    adapter_rank: int = key(16, "rank of the adapter's products", POSITIVE)
    adapter_alpha: float = key(16.0, "the adapter's scale x rank", POSITIVE)
    adapter_dropout: float = key(0.0, "dropout rate on the adapter's inputs", BELOW_ONE)
    adapter_targets: str = key("^(q|k|v|o)$", "regular expression that finds the adapted products by name")


@dataclasses.dataclass(frozen=True)
class SoftMask:
    variant: str = key("topk", "what is mixed into masks", ("topk", "full", "slerp", "hidden", "none"))
    k: int = key(3, "predictions mixed into a mask (topk, slerp)", POSITIVE)
    p_sm: float = key(0.8, "probability of a two-pass training step", FRACTION)
    # Start of the learned weight lambda and of the temperature
    init_scale: float = key(0.0, "omega_s, the largest lambda", FRACTION)
    init_centre: float = key(-0.75, "omega_b, the negative entropy at which lambda is half of omega_s, nats")
    init_steepness: float = key(6.66, "omega_a, the steepness of lambda in the negative entropy, 1/nats")
    init_temperature: float = key(1.0, "temperature of the full mixture")


@dataclasses.dataclass(frozen=True)
class Objective:
    loss: str = key("", "loss: nelbo (running text) | dream (conversations) | llada; '' for that of the kind", LOSSES)
    noise_eps: float = key(1e-3, "alpha at t = 1: the share of tokens that stay unmasked", BELOW_ONE)
    fresh_noise: bool = key(True, "draw t, masks and coins anew in every epoch; False repeats the first epoch's")
    # Running text
    t_eps: float = key(1e-3, "smallest t", INSIDE)
    stratified: bool = key(True, "stratify t over the batch")
    short_batches: float = key(0.01, "share of the batches that are cut to a random length (loss llada)", FRACTION)
    # Conversations
    t_min: float = key(0.2, "smallest t (loss dream)")
    t_max: float = key(0.8, "largest t (loss dream)")
    t_per: str = key("row", "what draws a t of its own (loss dream)", ("row", "batch"))
    weighting: str = key("time", "weights; time is 1/t, context_adaptive is for loss dream, uniform for llada", WEIGHTS)
    divisor: str = key("response", "tokens that divide a row's loss: its response's with pads, the batch's mean "
                       "response's (tokens) or 1 (rows) (loss llada)", ("response", "tokens", "rows"))  # fmt: skip
    weight_eps: float = key(0.0, "added to the probability of a mask in its weight; dllm: 1e-6 (loss llada)",
                            NON_NEGATIVE)  # fmt: skip
    cart_p: float = key(0.1, "decay with distance, of a geometric distribution (context_adaptive)")
    supervise_pads: bool = key(True, "supervise the pads behind a response")


@dataclasses.dataclass(frozen=True)
class Texts:
    """The keys of `data` that running text needs, too."""

    source: str = key("stdlib", "kind of `paths`; chat is conversations, the others running text", SOURCES)
    paths: str = key("", "comma-separated globs (files, jsonl, parquet) | NAME:SPLIT (tfds, hf) | folders (shards) | "
                     "`0.7 jsonl:web/*.jsonl; 0.3 stdlib` (mixture) | sources joined by `;`, each GLOBS of "
                     "*.jsonl, *.json or *.parquet, jsonl:GLOBS, parquet:GLOBS or hf:NAME:SPLIT, behind a `|` its "
                     "validation rows (chat)")  # fmt: skip
    text_key: str = key("text", "field that holds the text (jsonl, parquet, tfds, hf)")
    separator: str = key("", "text between the documents of a file (files)")
    detokenizer: str = key("", "undo the spacing of a tokenized corpus", ("", "lm1b"))
    tokenizer: str = key("bytes", "bytes | bpe (of the text) | text8 | shards (theirs) | file or folder | hf://NAME")
    bpe_vocab_size: int = key(4096, "vocabulary of tokenizer bpe, tokens")
    seq_len: int = key(1024, "length of a window, tokens")
    # Validation split
    validation_rule: str = key("hash", "a share by content, the last, or files", ("hash", "last", "paths"))
    validation_fraction: float = key(0.05, "share of documents (rule hash) or of conversations", INSIDE)
    validation_documents: int = key(0, "documents (rule last)")
    validation_paths: str = key("", "as `paths` (rule paths)")
    # Reading
    max_documents: int = key(0, "distinct documents read, 0 for all", NON_NEGATIVE)
    cache_dir: str = key("", "folder of the token cache, '' for the user's cache folder")
    prefetch: int = key(2, "batches prepared ahead", NON_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Data(Texts):
    # Conversations (source chat)
    messages_key: str = key("", "field of the messages, '' for messages, conversations, ... or prompt and completion")
    chat_template: str = key("", "*.jinja file, '' for the tokenizer's own")
    max_train: int = key(300_000, "training rows before the filters, 0 for all", NON_NEGATIVE)
    max_validation: int = key(500, "validation rows before the filters, 0 for all", NON_NEGATIVE)
    max_tokens: int = key(2048, "longest prompt and response kept, tokens", POSITIVE)
    min_response: int = key(5, "shortest response kept, tokens", POSITIVE)
    shuffle_seed: int = key(1231, "seed of splitting and shuffling")
    pads: str = key("some", "pads behind a response: 0 to 49, then up to a multiple of 8; or to the end of the row",
                    ("some", "row"))  # fmt: skip
    buckets: str = key("", "lengths of rows such as 512,1024,2048, multiples of 128 tokens; '' for every multiple")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = key(3e-4, "peak rate of the network", POSITIVE)
    sm_learning_rate: float = key(1e-2, "peak rate of the soft-masking scalars", POSITIVE)
    schedule: str = key("constant", "learning rates after warm-up", ("constant", "cosine"))
    warmup_steps: int = key(2500, "linear warm-up from 0, updates; with epochs at most 3 % of the run", NON_NEGATIVE)
    # AdamW
    b1: float = key(0.9, "decay of the first moment", BELOW_ONE)
    b2: float = key(0.999, "decay of the second moment", BELOW_ONE)
    eps: float = key(1e-8, "added to the root of the second moment")
    weight_decay: float = key(0.0, "decoupled weight decay", NON_NEGATIVE)
    clip_norm: float = key(1.0, "largest global norm of the gradient", POSITIVE)
    ema_decay: float = key(0.9999, "decay of the averaged weights, per update", BELOW_ONE)


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = key(1_000_000, "updates of a binary (variant none) run, unless epochs is set", POSITIVE)
    epochs: float = key(0.0, "passes of a binary run over the training set, instead of steps; 0 for steps",
                        NON_NEGATIVE)  # fmt: skip
    budget: str = key("iso_update", "updates of a soft-masked run: as many, half, or what the same FLOPs pay for",
                      ("iso_update", "iso_compute_paper", "iso_flops"))  # fmt: skip
    updates: int = key(0, "updates of a run, set in its config.json; 0 for what the budget buys", NON_NEGATIVE)
    global_batch_size: int = key(512, "rows of an update, on all devices together", POSITIVE)
    micro_batches: int = key(1, "parts of a batch whose gradients are accumulated; each throws its own coin", POSITIVE)
    seed: int = key(1, "seed of weights and noise", NON_NEGATIVE)
    # Logging
    log_every: int = key(50, "interval of metrics, updates", POSITIVE)
    compilation_cache: str = key("auto", "folder of JAX's compilation cache; '' for none, auto for one in the cache of "
                                 "the data, except on a CPU")  # fmt: skip
    wandb: str = key("", "project in Weights & Biases, '' for none")


@dataclasses.dataclass(frozen=True)
class Mesh:
    dcn_data: int = key(-1, "TPU slices over rows, joined by the data-centre network; -1 for as many as there are")
    # Within a slice
    data: int = key(-1, "devices over rows; -1 for all that are left (one axis may be -1)")
    fsdp: int = key(1, "devices over rows, parameters and optimiser state")
    sequence: int = key(1, "devices over the positions of activations")
    tensor: int = key(1, "devices over heads, MLP and vocabulary")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = key(5000, "interval, updates", POSITIVE)
    keep: int = key(3, "newest checkpoints kept", POSITIVE)
    keep_best: int = key(1, "best validated checkpoints kept beside them", NON_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Eval:
    every: int = key(5000, "interval of validation, updates; 0 for the end only", NON_NEGATIVE)
    batch_size: int = key(64, "windows at a time", POSITIVE)
    windows: int = key(512, "windows of a validation during training", POSITIVE)
    max_windows: int = key(0, "windows of the validation at the end, 0 for the whole split", NON_NEGATIVE)
    seed: int = key(20_000, "seed of the masks")


@dataclasses.dataclass(frozen=True)
class Sample:
    every: int = key(5000, "interval of samples, updates; 0 for the end only", NON_NEGATIVE)
    count: int = key(4, "samples", NON_NEGATIVE)
    steps: int = key(128, "denoising steps", POSITIVE)
    length: int = key(0, "tokens of a sample, 0 for the training length", NON_NEGATIVE)
    nucleus_p: float = key(0.9, "nucleus of the draws", SHARE)
    seed: int = key(30_000, "seed of the draws")


@dataclasses.dataclass(frozen=True)
class Init:
    checkpoint: str = key("", "folder of a run, or of a converted model, to start from")
    weights: str = key("ema", "weights of that run", ("raw", "ema"))
