"""Moved to `softmask_jax.evaluate.compare`; this name is removed in the next release."""
from softmask_jax.evaluate.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
