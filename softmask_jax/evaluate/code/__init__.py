"""HumanEval and MBPP: problems, prompts, extraction of programs from answers, a sandbox to run them."""
