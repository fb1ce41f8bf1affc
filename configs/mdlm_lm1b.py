"""The 169M recipe on LM1B, sentences of 128 WordPiece tokens: 1M steps of 512 x 128 (MDLM, arXiv 2406.07524).

    python -m softmask_jax.data.prepare --source=tfds --paths=lm1b:train --validation_rule=paths \
        --validation_paths=lm1b:test --detokenizer=lm1b --tokenizer=hf://google-bert/bert-base-uncased --out=data/lm1b
    python -m softmask_jax.main --config=configs/mdlm_lm1b.py

Sentences are packed into windows, as D3PM did; MDLM's first release padded each to 128 instead, so perplexities compare
with the packed ones only. The mask is BERT's own [MASK]. `:binary` trains without soft-masking, `:smoke` runs the same
code at toy size, on the standard library, in seconds.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            model=dict(
                hidden_size=768, num_blocks=12, num_heads=12, cond_dim=128, dropout=0.1, compute_dtype="bfloat16",
            ),  # fmt: skip
            soft_mask=dict(variant="topk", k=3, p_sm=0.8, init_scale=0.0, init_centre=-0.75, init_steepness=6.66),
            data=dict(source="shards", paths="data/lm1b", tokenizer="shards", seq_len=128),
            optimizer=dict(
                learning_rate=3e-4, sm_learning_rate=1e-2, schedule="constant", warmup_steps=2500, clip_norm=1.0,
                ema_decay=0.9999,
            ),  # fmt: skip
            train=dict(steps=1_000_000, global_batch_size=512, seed=1),
            checkpoint=dict(every=10_000),
            eval=dict(every=10_000, batch_size=512, windows=4096),
            sample=dict(every=10_000, steps=128, nucleus_p=1.0),
        )
    )
    if variant == "binary":
        config.soft_mask.variant = "none"
    elif variant == "smoke":
        config.model.update(hidden_size=32, num_blocks=2, num_heads=2, cond_dim=16)
        config.data.update(
            source="stdlib", paths="", tokenizer="bytes", detokenizer="lm1b", seq_len=32, max_documents=40,
            validation_rule="last", validation_documents=8,
        )  # fmt: skip
        config.optimizer.update(warmup_steps=2)
        config.train.update(steps=6, global_batch_size=8, log_every=2)
        config.checkpoint.update(every=3)
        config.eval.update(every=3, batch_size=8, windows=16, max_windows=16)
        config.sample.update(every=3, count=1, steps=4)
    elif variant:
        raise ValueError(f"configs/mdlm_lm1b.py has no variant '{variant}'; it has 'binary' and 'smoke'.")
    return config
