"""Soft-masking before anything is trained: the small model that comes with the package writes a text twice with the
same draws, with plain and with soft masks, and a page plays both side by side.

    softmask-jax demo
    python -m softmask_jax.generate.demo --prompt='class Parser:' --steps=8

The model has 1.6M parameters, trained on the source of Python's standard library (configs/demo.py).
"""
import gzip
import sys
import tempfile
from pathlib import Path

from softmask_jax.config.command_line import command, command_parser, say

MODEL = Path(__file__).parent / "demo_model"  # in Hugging Face's format, its weights compressed


def load():
    """The `Model` that comes with the package."""
    import softmask_jax
    from softmask_jax.convert.__main__ import parse
    from softmask_jax.convert.conversion import convert

    with tempfile.TemporaryDirectory() as folder:
        source, model = Path(folder, "source"), Path(folder, "model")
        source.mkdir()
        for file in MODEL.iterdir():
            content = file.read_bytes()
            content = gzip.decompress(content) if file.suffix == ".gz" else content
            (source / file.name.removesuffix(".gz")).write_bytes(content)
        convert(parse([f"--src={source}", f"--dst={model}"]))
        return softmask_jax.load(model)


@command()
def main(argv: list[str]) -> None:
    parser = command_parser("generate.demo", __doc__)
    parser.add_argument("--prompt", default="def main(", help="how the text begins")
    parser.add_argument("--steps", type=int, default=16, help="steps of the sampler; fewer write more tokens at once")
    parser.add_argument("--seed", type=int, default=0, help="another seed writes another text")
    parser.add_argument("--out", default="demo.html", help="the page")
    flags = parser.parse_args(argv)

    # Imports JAX.
    from softmask_jax.config.jax_settings import checked_seed
    from softmask_jax.data.prompts import Row
    from softmask_jax.generate.beside import beside
    from softmask_jax.io.files import check_writable, write_atomically
    from softmask_jax.io.paths import to_path
    from softmask_jax.report.patterns import Encoder
    from softmask_jax.samplers import Options

    checked_seed(flags.seed)
    check_writable(flags.out, "--out")
    model, options = load(), Options(steps=flags.steps, nucleus_p=0.5)
    pattern = Encoder(model, model.max_length, bos=True)(Row("--prompt", "prompt", flags.prompt))
    facts = {"model": "1.6M parameters, Python's standard library", "steps": flags.steps}
    title = "Plain masks and soft masks, side by side"
    texts, page = beside(model, pattern, options, seed=flags.seed, title=title, facts=facts)
    for way, text in texts.items():
        print(f"--- {way}, {flags.steps} steps\n{flags.prompt}{text}\n")
    path = to_path(flags.out)
    write_atomically(path, page)
    say(f"Page  {path}")


if __name__ == "__main__":
    sys.exit(main())
