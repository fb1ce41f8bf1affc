"""Moved to `softmask_jax.compile.plan`; this name is removed in the next release."""
from softmask_jax.compile.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
