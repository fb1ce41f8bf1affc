"""LLaDA-8B with soft-masking: DoRA on a frozen base, one epoch of Tulu 3 and SmolTalk.

    python -m softmask_jax.main --config=configs/llada8b.py --fetch
    python -m softmask_jax.convert --src=runs/llada8b --to=hf --dst=adapters/llada8b

No paper trains soft-masking on LLaDA. Data, adapter, soft-masking, optimiser and schedule are those of Dream-7B
(`dream7b.py`; arXiv 2510.17206); the loss is that of LLaDA's supervised fine-tuning (arXiv 2502.09992): t is uniform
in [0, 1], a masked token weighs 1/p, a response's loss is divided by its length, and ends of text, trained as any
token, fill the row behind it. `--config.objective.loss=dream --config.data.pads=some` is Dream's.

--fetch downloads and converts the base where it is not there; `--config.model.base_source=hf://GSAI-ML/LLaDA-1.5` takes
another one. The last command writes a PEFT adapter with transparency_config.json beside it. `:binary` trains without
soft-masking. `:int8` is for a single chip of 16 GB (TPU v5e): the base's kernels are int8, quantised as they are
converted.

    python -m softmask_jax.main --config=configs/llada8b.py:int8 --fetch

`:own` is for a file of your own chats, hundreds to thousands of them:

    python -m softmask_jax.main --config=configs/llada8b.py:own --config.data.paths=chats.jsonl --fetch

It is not the paper's and not tuned. The learning rate is ten times the paper's: 1e-4 and three epochs are those of
DoRA's authors for an 8B model (arXiv 2402.09353, their `llama3_8B_DoRA.sh`). Lambda starts open, as the paper's start
takes thousands of steps to open; warm-up takes at most 3 % of the run.

`:smoke` runs the same code in seconds, on what `python -m softmask_jax.convert.tiny --family=llada` makes.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            model=dict(
                kind="llada", base="models/llada", base_source="hf://GSAI-ML/LLaDA-8B-Instruct",
                param_dtype="bfloat16", compute_dtype="bfloat16", remat="mlp",
                adapter="dora", adapter_rank=16, adapter_alpha=16.0, adapter_targets="^(q|k|v|o)$",
            ),  # fmt: skip
            soft_mask=dict(variant="topk", k=1, p_sm=0.5, init_scale=0.0, init_centre=-0.75, init_steepness=6.66),
            objective=dict(loss="llada", weighting="time", divisor="response", supervise_pads=True),
            data=dict(
                source="chat", tokenizer="base", validation_fraction=0.1, max_train=300_000, max_validation=500,
                max_tokens=2048, min_response=5, shuffle_seed=1231, pads="row",
                buckets="256,512,1024,2048",
                paths="hf:allenai/tulu-3-sft-mixture:train; hf:HuggingFaceTB/smoltalk/all:train | hf:HuggingFaceTB/smoltalk/all:test",
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
    elif variant == "int8":
        config.model.update(base="models/llada_int8", base_dtype="int8")
    elif variant == "own":
        config.soft_mask.update(init_scale=0.2, init_centre=-1.0)
        config.data.update(paths="", max_validation=200)
        config.optimizer.update(learning_rate=1e-4)
        config.train.update(epochs=3.0, log_every=5)
        config.checkpoint.update(every=50)
        config.eval.update(every=50)
        config.sample.update(every=0, count=3)
    elif variant == "smoke":
        config.model.update(base="runs/tiny_llada/model", base_source="runs/tiny_llada/hf")
        config.data.update(paths="jsonl:runs/tiny_llada/chats.jsonl", buckets="256")
        config.optimizer.update(warmup_steps=2)
        config.train.update(steps=6, log_every=2)
        config.checkpoint.update(every=3)
        config.eval.update(every=3)
        config.sample.update(every=3, count=1, steps=4, length=8)
    elif variant:
        raise ValueError(f"configs/llada8b.py has no variant '{variant}'; it has 'binary', 'int8', 'own', 'smoke'.")
    return config
