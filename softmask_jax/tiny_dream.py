"""Moved to `softmask_jax.convert.tiny_dream`; this name is removed in the next release."""
from softmask_jax.convert.tiny_dream import main

if __name__ == "__main__":
    raise SystemExit(main())
