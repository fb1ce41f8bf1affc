"""What conversion refuses."""
import pytest

from softmask_jax.convert.sources import open_model


def refused(path, *said: str, weights=None) -> None:
    """Opening and checking is one clear line."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        open_model(path, weights).table()
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    for part in said:
        assert part in text, text
