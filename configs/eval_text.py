"""The paper's numbers for language models: validation perplexity; generative perplexity, entropy and MAUVE of 5,000 texts at
1,024, 512, 256 and 128 steps (arXiv 2510.17206, section 4).

    hf download openai-community/gpt2-large --local-dir models/gpt2-large
    python -m softmask_jax.evaluate --config=configs/eval_text.py --checkpoint=binary=runs/owt_binary \\
        --checkpoint=soft=runs/owt_soft --out=evaluations/owt

`:remdm` writes the texts with ReMDM: the cap of 0.04 at 512, 256 and 128 steps. `:remdm_loop` is the paper's at 1,024.
`:smoke` is the same code at toy size, for any model: without a scorer it measures perplexity alone.
"""
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            run=dict(tasks="perplexity; generative", budgets="1; 1/2; 1/4; 1/8"),
            perplexity=dict(draws=4, batch_size=32),
            samples=dict(count=5_000, batch_size=32),
            sampler=dict(alg="mdlm", steps=1024, nucleus_p=0.9),
            generative=dict(scorer="models/gpt2-large", max_length=1024, mauve_scaling=5.0, mauve_seed=25),
        )
    )
    if variant == "remdm":
        config.run.budgets = "1; 1/2; 1/4"
        config.sampler.update(alg="remdm_cap", eta=0.04, steps=512)
    elif variant == "remdm_loop":
        config.run.budgets = "1"
        config.sampler.update(alg="remdm_loop", eta=0.02, t_on=0.55, t_off=0.05, alpha_on=0.9)
    elif variant == "smoke":
        config.run.update(tasks="perplexity", budgets="1; 1/2")
        config.perplexity.update(draws=2, max_windows=16, batch_size=8)
        config.samples.update(count=8, batch_size=8)
        config.sampler.steps = 4
    elif variant:
        raise ValueError(f"configs/eval_text.py has no variant '{variant}'; it has 'remdm', 'remdm_loop' and 'smoke'.")
    return config
