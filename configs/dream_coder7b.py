"""Dream-Coder-7B with soft-masking: DoRA on a frozen base, one epoch of Ling-Coder (arXiv 2510.17206).

    python -m softmask_jax.main --config=configs/dream_coder7b.py --fetch
    python -m softmask_jax.convert --src=runs/dream_coder7b --to=hf --dst=adapters/dream_coder7b

--fetch downloads and converts the base where it is not there. The last command writes a PEFT adapter with
transparency_config.json beside it. The clipping of 0.875 is that of the gradient's mean over 8 micro-batches; the
paper's 7.0 was that of their sum. `:binary` trains without soft-masking.

`:own` is for a file of your own chats, hundreds to thousands of them:

    python -m softmask_jax.main --config=configs/dream_coder7b.py:own --config.data.paths=chats.jsonl --fetch

It is not the paper's and not tuned. The learning rate is ten times the paper's: 1e-4 and three epochs are those of
DoRA's authors for an 8B model (arXiv 2402.09353, their `llama3_8B_DoRA.sh`). Lambda starts open, as the paper's start
takes thousands of steps to open; warm-up takes at most 3 % of the run.

`:smoke` runs the same code in seconds, on the model and the conversations of `python -m softmask_jax.convert.tiny_dream`.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            model=dict(
                kind="dream", base="models/dream_coder", base_source="hf://Dream-org/Dream-Coder-v0-Instruct-7B",
                param_dtype="bfloat16", compute_dtype="bfloat16", remat="mlp",
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
    elif variant == "own":
        config.soft_mask.update(init_scale=0.2, init_centre=-1.0)
        config.data.update(paths="", max_validation=200)
        config.optimizer.update(learning_rate=1e-4)
        config.train.update(epochs=3.0, log_every=5)
        config.checkpoint.update(every=50)
        config.eval.update(every=50)
        config.sample.update(every=0, count=3)
    elif variant == "smoke":
        config.model.update(base="runs/tiny_dream/model", base_source="runs/tiny_dream/hf")
        config.data.update(paths="jsonl:runs/tiny_dream/chats.jsonl", buckets="256")
        config.optimizer.update(warmup_steps=2)
        config.train.update(steps=6, log_every=2)
        config.checkpoint.update(every=3)
        config.eval.update(every=3)
        config.sample.update(every=3, count=1, steps=4, length=8)
    elif variant:
        raise ValueError(f"configs/dream_coder7b.py has no variant '{variant}'; it has 'binary', 'own' and 'smoke'.")
    return config
