"""The 169M recipe on text8, 256 characters a window: 1M steps of 512 x 256 (D3PM's split; MDLM's tokens).

    unzip text8.zip && mkdir -p data/text8
    head -c 90000000 text8 > data/text8/train.txt && tail -c +90000001 text8 | head -c 5000000 > data/text8/validation.txt
    python -m softmask_jax.main --config=configs/text8.py

The text is one document, cut into windows like any other. `softmask_jax.evaluate --tasks=perplexity` has its bits per
character: of the text, without BOS and EOS of a window, unless with --config.perplexity.compat=True.
`:binary` trains without soft-masking, `:smoke` runs the same code at toy size, on the standard library, in seconds.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            model=dict(
                hidden_size=768, num_blocks=12, num_heads=12, cond_dim=128, dropout=0.1, compute_dtype="bfloat16",
            ),  # fmt: skip
            soft_mask=dict(variant="topk", k=3, p_sm=0.8, init_scale=0.0, init_centre=-0.75, init_steepness=6.66),
            data=dict(
                source="files", paths="data/text8/train.txt", tokenizer="text8", seq_len=256,
                validation_rule="paths", validation_paths="data/text8/validation.txt",
            ),  # fmt: skip
            optimizer=dict(
                learning_rate=3e-4, sm_learning_rate=1e-2, schedule="constant", warmup_steps=2500, clip_norm=1.0,
                ema_decay=0.9999,
            ),  # fmt: skip
            train=dict(steps=1_000_000, global_batch_size=512, seed=1),
            checkpoint=dict(every=10_000),
            eval=dict(every=10_000, batch_size=512, windows=4096),
            sample=dict(every=10_000, steps=256, nucleus_p=1.0),
        )
    )
    if variant == "binary":
        config.soft_mask.variant = "none"
    elif variant == "smoke":
        config.model.update(hidden_size=32, num_blocks=2, num_heads=2, cond_dim=16)
        config.data.update(
            source="stdlib", paths="", seq_len=32, max_documents=40, validation_rule="last", validation_documents=8,
            validation_paths="",
        )  # fmt: skip
        config.optimizer.update(warmup_steps=2)
        config.train.update(steps=6, global_batch_size=8, log_every=2)
        config.checkpoint.update(every=3)
        config.eval.update(every=3, batch_size=8, windows=16, max_windows=16)
        config.sample.update(every=3, count=1, steps=4)
    elif variant:
        raise ValueError(f"configs/text8.py has no variant '{variant}'; it has 'binary' and 'smoke'.")
    return config
