"""Soft-masking for a masked diffusion model that is there already: 100k steps on OpenWebText (arXiv 2510.17206).

    python -m softmask_jax.main --config=configs/mdlm_owt.py:binary
    python -m softmask_jax.main --config=configs/mdlm_owt_continued.py

The shards are those of configs/mdlm_owt.py. `init.weights`: the EMA is the better start, `raw` reproduces the paper.
`:binary` continues without soft-masking, the paper's baseline. `:smoke` runs the same code at toy size, in seconds:

    python -m softmask_jax.main --config=configs/mdlm_owt.py:smoke
    python -m softmask_jax.main --config=configs/mdlm_owt_continued.py:smoke
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            model=dict(
                hidden_size=768, num_blocks=12, num_heads=12, cond_dim=128, dropout=0.1, compute_dtype="bfloat16",
            ),  # fmt: skip
            soft_mask=dict(variant="topk", k=3, p_sm=0.8, init_scale=0.0, init_centre=-0.75, init_steepness=6.66),
            data=dict(source="shards", paths="data/owt", tokenizer="shards", seq_len=1024),
            optimizer=dict(
                learning_rate=3e-4, sm_learning_rate=1e-2, schedule="constant", warmup_steps=2500, clip_norm=1.0,
                ema_decay=0.9999,
            ),  # fmt: skip
            train=dict(steps=100_000, global_batch_size=512, seed=1, budget="iso_update"),
            checkpoint=dict(every=5000),
            eval=dict(every=5000),
            sample=dict(every=5000, steps=128, nucleus_p=0.9),
            init=dict(checkpoint="runs/mdlm_owt-binary", weights="ema"),
        )
    )
    if variant == "binary":
        config.soft_mask.variant = "none"
    elif variant == "smoke":
        config.model.update(hidden_size=32, num_blocks=2, num_heads=2, cond_dim=16)
        config.data.update(
            source="stdlib", paths="", tokenizer="bytes", seq_len=32, max_documents=40, validation_rule="last",
            validation_documents=8,
        )  # fmt: skip
        config.optimizer.update(warmup_steps=2)
        config.train.update(steps=6, global_batch_size=8, log_every=2)
        config.checkpoint.update(every=3)
        config.eval.update(every=3, batch_size=8, windows=16, max_windows=16)
        config.sample.update(every=3, count=1, steps=4)
        config.init.checkpoint = "runs/mdlm_owt-smoke"
    elif variant:
        raise ValueError(f"configs/mdlm_owt_continued.py has no variant '{variant}'; it has 'binary' and 'smoke'.")
    return config
