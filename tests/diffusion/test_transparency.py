"""The reference's transparency_config.json, written and read."""
import json

import pytest

from softmask_jax.diffusion import soft_masking, transparency
from tests.golden import FOLDER


def test_a_published_file_is_written_as_it_was_read():
    published = json.loads((FOLDER / "dora/adapter/transparency_config.json").read_text())
    settings, raw = transparency.read(published)
    assert transparency.write(settings, raw) == published


def test_a_variant_that_the_reference_lacks_is_not_written():
    with pytest.raises(ValueError, match="no soft-masking variant 'slerp'"):
        transparency.write({"variant": "slerp", "k": 3, "schedule": "none"}, soft_masking.init_scalars())
