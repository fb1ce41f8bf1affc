"""LLaDA's numbers for code, as its authors sample them: low_confidence at temperature 0, a step for each new token
(arXiv 2502.09992, appendix B.4; LLaDA 1.5: arXiv 2505.19223; settings by benchmark in the reference's EVAL.md).

    python -m softmask_jax.evaluate --config=configs/eval_llada.py --checkpoint=llada=models/llada \\
        --allow_code --out=evaluations/llada

| variant | model, tasks | new tokens | blocks | option |
|---|---|---|---|---|
| none | Instruct, HumanEval | 512 | one | logits_eos_inf |
| `:mbpp` | Instruct, MBPP | 256 | one | confidence_eos_eot_inf |
| `:blocks` | Instruct, both | 512 | of 32 | |
| `:v15` | LLaDA 1.5, both | 512 | of 32 | confidence_eos_eot_inf |
| `:base` | Base, both, without a chat | 1024 | one | |
| `:smoke` | any, HumanEval at toy size | 8 | one | confidence_eos_eot_inf |

Questions are worded as in `configs/eval_code.py`. A fine-tuned model is asked with its own soft-masking;
`--checkpoint=plain=runs/a#none` turns it off. Other benchmarks run in the harness: `softmask_jax/evaluate/README.md`.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            run=dict(tasks="humaneval", budgets="1", seed=1234),
            code=dict(samples=1, k="1", batch_size=1, max_new_tokens=512, prompt_tokens=1024),
            code_sampler=dict(alg="low_confidence", temperature=0.0, top_p=1.0),
        )
    )
    if variant == "":
        config.code_sampler.logits_eos_inf = True
    elif variant == "mbpp":
        config.run.tasks, config.code.max_new_tokens = "mbpp", 256
        config.code_sampler.confidence_eos_eot_inf = True
    elif variant in ("blocks", "v15"):
        config.run.tasks = "humaneval; mbpp"
        config.code_sampler.block_length = 32
        if variant == "v15":
            config.code_sampler.confidence_eos_eot_inf = True
    elif variant == "base":
        config.run.tasks = "humaneval; mbpp"
        config.code.update(max_new_tokens=1024, chat=False)
    elif variant == "smoke":
        config.code.update(limit=4, max_new_tokens=8, batch_size=4)
        config.code_sampler.confidence_eos_eot_inf = True
    else:
        variants = "'mbpp', 'blocks', 'v15', 'base' and 'smoke'"
        raise ValueError(f"configs/eval_llada.py has no variant '{variant}'; it has {variants}.")
    return config
