"""The paper's 169M model on OpenWebText, from scratch: 1M steps of 512 x 1,024 tokens (arXiv 2510.17206; MDLM).

    python -m softmask_jax.data.prepare --source=hf --paths=Skylion007/openwebtext:train \
        --tokenizer=hf://openai-community/gpt2 --validation_rule=last --validation_documents=100000 --out=data/owt
    python -m softmask_jax.main --config=configs/mdlm_owt.py

`:binary` trains without soft-masking; at equal compute a soft-masked run makes fewer updates:
--config.train.budget=iso_compute_paper halves them, iso_flops makes 3 / (3 + p_sm) of them. `:smoke` runs the same
code at toy size, on the standard library, in seconds.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            model=dict(
                hidden_size=768, num_blocks=12, num_heads=12, cond_dim=128, dropout=0.1, compute_dtype="bfloat16",
                remat="products",
            ),  # fmt: skip
            soft_mask=dict(variant="topk", k=3, p_sm=0.8, init_scale=0.0, init_centre=-0.75, init_steepness=6.66),
            data=dict(source="shards", paths="data/owt", tokenizer="shards", seq_len=1024),
            optimizer=dict(
                learning_rate=3e-4, sm_learning_rate=1e-2, schedule="constant", warmup_steps=2500, clip_norm=1.0,
                ema_decay=0.9999,
            ),  # fmt: skip
            train=dict(steps=1_000_000, global_batch_size=512, seed=1, budget="iso_update"),
            checkpoint=dict(every=5000),
            eval=dict(every=5000),
            sample=dict(every=5000, steps=128, nucleus_p=0.9),
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
    elif variant:
        raise ValueError(f"configs/mdlm_owt.py has no variant '{variant}'; it has 'binary' and 'smoke'.")
    return config
