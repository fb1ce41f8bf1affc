"""An hour or two on two CPU cores: a masked diffusion model of Python source, continued with soft-masking and without.

    python -m softmask_jax.main --config=configs/stdlib_bpe.py:base
    python -m softmask_jax.main --config=configs/stdlib_bpe.py
    python -m softmask_jax.main --config=configs/stdlib_bpe.py:binary
    python -m softmask_jax.evaluate.compare runs/stdlib_bpe-binary runs/stdlib_bpe

The two continuations cost the same FLOPs: 3,800 binary updates, 3,119 soft-masked ones. `:smoke` runs the same code at
toy size in seconds, from scratch.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            model=dict(
                hidden_size=128, num_blocks=4, num_heads=4, cond_dim=64, dropout=0.0, compute_dtype="float32",
                remat="full",  # on a CPU computing the activations again is faster than writing and reading them
            ),  # fmt: skip
            # The paper's start (scale 0, centre -0.75) needs thousands of steps to open.
            soft_mask=dict(k=3, p_sm=0.8, init_scale=0.5, init_centre=-3.0, init_steepness=2.0),
            data=dict(source="stdlib", tokenizer="bpe", bpe_vocab_size=4096, seq_len=256),
            optimizer=dict(learning_rate=2e-3, warmup_steps=100, schedule="cosine", ema_decay=0.998),
            train=dict(steps=3800, budget="iso_flops", global_batch_size=16, log_every=20),
            checkpoint=dict(every=500, keep=2),
            eval=dict(every=500, batch_size=16, windows=160),
            sample=dict(every=0, count=4, steps=128, nucleus_p=0.9),
            init=dict(checkpoint="runs/stdlib_bpe-base", weights="ema"),
        )
    )
    if variant == "base":
        config.soft_mask.variant = "none"
        config.init.checkpoint = ""
        config.optimizer.schedule = "constant"
        config.train.steps = 3500
    elif variant == "binary":
        config.soft_mask.variant = "none"
    elif variant == "smoke":
        config.model.update(hidden_size=32, num_blocks=2, num_heads=2, cond_dim=16)
        config.data.update(
            bpe_vocab_size=300, seq_len=32, max_documents=40, validation_rule="last", validation_documents=8
        )
        config.optimizer.update(warmup_steps=2)
        config.train.update(steps=6, global_batch_size=8, log_every=2)
        config.checkpoint.update(every=3)
        config.eval.update(every=3, batch_size=8, windows=16, max_windows=16)
        config.sample.update(count=1, steps=4)
        config.init.checkpoint = ""
    elif variant:
        raise ValueError(f"configs/stdlib_bpe.py has no variant '{variant}'; it has 'base', 'binary' and 'smoke'.")
    return config
