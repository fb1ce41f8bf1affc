"""The model of `softmask-jax demo`: 1.6M parameters, Python's standard library, half an hour on two CPU cores.

    python -m softmask_jax.main --config=configs/demo.py:base
    python -m softmask_jax.main --config=configs/demo.py
    python -m softmask_jax.convert --src=runs/demo --to=hf --dtype=bfloat16 --dst=demo_model
    gzip -9 -n demo_model/model.safetensors

The base is binary, its continuation soft-masked: the first seed of the study that `configs/README.md` tells of. The
last two commands make the folder `softmask_jax/generate/demo_model`. `:smoke` runs the same code at toy size in
seconds, from scratch.
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
            data=dict(source="stdlib", tokenizer="bpe", bpe_vocab_size=2048, seq_len=128),
            optimizer=dict(learning_rate=2e-3, warmup_steps=100, schedule="cosine", ema_decay=0.998),
            train=dict(steps=1000, budget="iso_flops", seed=1, global_batch_size=16, log_every=50),
            checkpoint=dict(every=250, keep=1, keep_best=0),
            eval=dict(every=500, batch_size=16, windows=160, max_windows=160),
            sample=dict(every=0, count=3, steps=16, nucleus_p=0.5),
            init=dict(checkpoint="runs/demo-base", weights="ema"),
        )
    )
    if variant == "base":
        config.soft_mask.variant = "none"
        config.init.checkpoint = ""
        config.optimizer.schedule = "constant"
        config.train.steps = 5000
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
        raise ValueError(f"configs/demo.py has no variant '{variant}'; it has 'base' and 'smoke'.")
    return config
