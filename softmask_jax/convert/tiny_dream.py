"""A tiny random Dream and conversations for it:

    python -m softmask_jax.convert.tiny_dream --out=runs/tiny_dream

The same as `softmask_jax.convert.tiny --family=dream`.
"""
import sys

from softmask_jax.config.command_line import command
from softmask_jax.convert.tiny import make, run

__all__ = ["main", "make"]


@command()
def main(argv: list[str]) -> None:
    run("convert.tiny_dream", __doc__, argv, "dream")


if __name__ == "__main__":
    sys.exit(main())
