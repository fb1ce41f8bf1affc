"""What setup.cfg cannot say: configs/ is part of the package, and the README is shown where its files are not."""
import re
from pathlib import Path

from setuptools import find_packages, setup

readme = (Path(__file__).parent / "README.md").read_text("utf-8")
setup(
    packages=[*find_packages(include=["softmask_jax*"]), "softmask_jax.configs"],
    package_dir={"softmask_jax.configs": "configs"},
    # Links and pictures of the repository become their text.
    long_description=re.sub(r"!?\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", readme),
    long_description_content_type="text/markdown",
)
