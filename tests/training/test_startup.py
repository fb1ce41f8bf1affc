"""The stopwatch of a run's start, and where compiled programs are kept."""
import jax
import pytest

from softmask_jax import config
from softmask_jax.training import startup
from softmask_jax.training.startup import Stopwatch


def test_a_stopwatch_tells_its_phases():
    watch = Stopwatch(begun=0.0)
    watch.lap("weights")
    assert watch.line().startswith("First step after ") and list(watch.seconds) == ["imports", "weights"]
    assert sum(watch.seconds.values()) == pytest.approx(watch.last)


@pytest.mark.parametrize("setting, own, backend, used", [
    ("auto", None, "tpu", "{cache}/compiled"),
    ("auto", None, "gpu", "{cache}/compiled"),
    ("auto", None, "cpu", ""),
    ("auto", "/mine", "tpu", "/mine"),
    ("", None, "tpu", ""),
    ("/other", "/mine", "cpu", "/other"),
])  # fmt: skip
def test_compiled_programs_are_kept_for_accelerators_and_where_the_user_says(setting, own, backend, used, monkeypatch):
    chosen = {"jax_compilation_cache_dir": own}
    monkeypatch.setattr(startup.jax.config, "update", chosen.__setitem__)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", property(lambda _: own), raising=False)
    settings = config.from_dict({"train": {"compilation_cache": setting}, "data": {"cache_dir": "/cache"}})
    assert startup.keep_compiled_programs(settings) == used.format(cache="/cache")
    assert chosen["jax_compilation_cache_dir"] == (used.format(cache="/cache") or own)
