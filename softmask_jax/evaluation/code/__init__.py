"""Code that a model writes: problems, prompts, programs out of answers, and a sandbox that tries them."""
from softmask_jax.evaluation.code.task import CodeTask

__all__ = ["CodeTask"]
