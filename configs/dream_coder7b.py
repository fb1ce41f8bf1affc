"""Dream-Coder-7B with soft-masking: DoRA on a frozen base, one epoch of Ling-Coder (arXiv 2510.17206).

    python -m softmask_jax.convert --src=hf://Dream-org/Dream-Coder-v0-Instruct-7B --dst=models/dream_coder
    python -m softmask_jax.main --config=configs/dream_coder7b.py --workdir=runs/dream_coder7b
    python -m softmask_jax.convert --src=runs/dream_coder7b --to=hf --dst=adapters/dream_coder7b

The last command writes a PEFT adapter with transparency_config.json beside it. The clipping of 0.875 is that of the
gradient's mean over 8 micro-batches; the paper's 7.0 was that of their sum. `:binary` trains without soft-masking.
`:smoke` runs the same code in seconds, on the model and the conversations of `python -m softmask_jax.convert.tiny_dream`.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            model=dict(
                kind="dream", base="models/dream_coder", param_dtype="bfloat16", compute_dtype="bfloat16", remat="mlp",
                adapter="dora", adapter_rank=16, adapter_alpha=16.0, adapter_targets="^(q|k|v|o)$",
            ),  # fmt: skip
            soft_mask=dict(variant="topk", k=1, p_sm=0.5, init_scale=0.0, init_centre=-0.75, init_steepness=6.66),
            objective=dict(t_min=0.2, t_max=0.8, t_per="row", weighting="time", supervise_pads=True),
            data=dict(
                source="chat", tokenizer="base", validation_fraction=0.1, max_train=300_000, max_validation=500,
                max_tokens=2048, min_response=5, shuffle_seed=1231, buckets="256,512,1024,2176",
                paths="hf:inclusionAI/Ling-Coder-SFT:train",
            ),  # fmt: skip
            # About one epoch; warm-up over 3 % of it.
            optimizer=dict(
                learning_rate=1e-5, sm_learning_rate=1e-2, schedule="cosine", warmup_steps=1005, clip_norm=0.875,
                ema_decay=0.0,
            ),  # fmt: skip
            train=dict(steps=33_500, global_batch_size=8, micro_batches=8, seed=1231, log_every=20),
            mesh=dict(data=1, fsdp=-1),
            checkpoint=dict(every=100, keep=2, keep_best=1),
            eval=dict(every=100, batch_size=8, seed=1231),
            sample=dict(every=1000, count=2, steps=128, length=128),
        )
    )
    if variant == "binary":
        config.soft_mask.variant = "none"
    elif variant == "smoke":
        config.model.base = "runs/tiny_dream/model"
        config.data.update(paths="jsonl:runs/tiny_dream/chats.jsonl", buckets="256")
        config.optimizer.update(warmup_steps=2)
        config.train.update(steps=6, log_every=2)
        config.checkpoint.update(every=3)
        config.eval.update(every=3)
        config.sample.update(every=3, count=1, steps=4, length=8)
    elif variant:
        raise ValueError(f"configs/dream_coder7b.py has no variant '{variant}'; it has 'binary' and 'smoke'.")
    return config
