"""Convert weights between PyTorch's tools and this package:

    python -m softmask_jax.convert --src=hf://Dream-org/Dream-v0-Instruct-7B --dst=models/dream
    python -m softmask_jax.convert --src=hf://Dream-org/Dream-v0-Instruct-7B --dst=models/dream_int8 --int8
    python -m softmask_jax.convert --src=hf://GSAI-ML/LLaDA-8B-Instruct --dst=models/llada
    python -m softmask_jax.convert --src=mdlm.ckpt --dst=models/mdlm --weights=ema --verify
    python -m softmask_jax.convert --src=runs/owt --dst=exported --to=hf
    python -m softmask_jax.convert --src=adapter --base=models/dream --merge --dst=merged --to=hf

--src: Hugging Face folders of Dream, LLaDA and MDLM, PEFT adapters on Dream and LLaDA, MDLM's Lightning checkpoints,
converted models, and runs of this package. --dst appears when it is complete; after a kill the same command starts
again.
"""
import argparse
import sys
from collections.abc import Sequence

from softmask_jax.config.command_line import command, command_parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("convert", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--src", required=True, help="a folder, a file, or hf://owner/name")
    add("--dst", required=True, help="the folder to write; refused unless it is new or empty")
    add("--to", choices=("orbax", "hf"), help="by default the other side: our folder, or PyTorch's")
    add("--weights", choices=("raw", "ema"), help="where the source holds both; ema by default")
    add("--base", default="", help="with --merge: the model that the adapter was trained on")
    add("--merge", action="store_true", help="write the base with the adapter merged in")
    add("--int8", action="store_true", help="a base's kernels as int8, frozen below an adapter")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights; by default the source's")
    add("--tokenizer", default="", help="to put into our folder, as config.data.tokenizer names it")
    add("--verify", action="store_true", help="read the result and compare; with a --dst that exists, only that")
    flags = parser.parse_args(argv)
    if flags.merge != bool(flags.base):
        parser.error("--merge and --base belong together")
    return flags


@command(interrupted="Interrupted; nothing was left. The same command starts again.")
def main(argv: list[str]) -> None:
    flags = parse(argv)

    # Imports JAX.
    from softmask_jax.convert.conversion import convert

    print(convert(flags))


if __name__ == "__main__":
    sys.exit(main())
