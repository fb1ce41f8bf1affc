"""Moved to `softmask_jax.evaluate.lm_eval.__main__`; this name is removed in the next release."""
from softmask_jax.evaluate.lm_eval.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
