"""The scalars of soft-masking: raw and effective values against the reference, and their ranges."""
import chex
import jax.numpy as jnp
import numpy as np
import pytest

from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.soft_masking import Scalars
from tests.diffusion.test_soft_masking import GOLDEN, META, RAW, RAW_KEYS


def test_raw_and_effective_scalars_match_the_reference():
    for name, raw in RAW.items():
        values = soft_masking.effective(raw)
        for ours, theirs in [*RAW_KEYS.items(), ("raw_temperature", "raw_temperature")]:
            assert raw[ours].dtype == jnp.float32
            np.testing.assert_allclose(raw[ours], GOLDEN[f"raw/{name}/{theirs}"], rtol=1e-5, atol=1e-7)
        for field in Scalars._fields:
            np.testing.assert_allclose(getattr(values, field), GOLDEN[f"eff/{name}/{field}"], rtol=2e-6)


class Lambda(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_lambda_is_the_papers_formula_eager_and_compiled(self):
        scale, centre, steepness, neg_entropy = 0.7, -1.5, 3.0, np.linspace(-6, 0, 7)
        raw = soft_masking.raw_from_effective(scale, centre, steepness)
        mix_weight = self.variant(lambda raw, h: soft_masking.mix_weight(h, soft_masking.effective(raw)))
        expected = scale / (1 + np.exp(-steepness * (neg_entropy - centre)))
        chex.assert_trees_all_close(mix_weight(raw, jnp.asarray(neg_entropy, jnp.float32)), expected, rtol=1e-5)


def test_scalars_at_the_ends_of_their_ranges_are_finite_and_as_recorded():
    recorded = META["corner_raw"]
    for scale in ("0.0", "-0.0", "0.5", "1.0"):
        raw = soft_masking.init_scalars(scale=float(scale))["raw_scale"]
        np.testing.assert_allclose(raw, float(recorded[f"logit({scale}, eps=1e-6)"]), rtol=1e-6)
    for text, field in (("centre", "centre"), ("steep", "steepness")):
        entries = {k: v for k, v in recorded.items() if k.startswith(text)}
        assert entries
        for key, pair in entries.items():
            value = float(key.split("=")[1])
            want = [float(x) for x in pair.strip("[]").split(",")]
            if (value >= 0) if field == "centre" else (value <= 0):
                with pytest.raises(ValueError, match=f"soft_mask.{field}"):
                    soft_masking.init_scalars(**{field: value})
                continue
            raw = soft_masking.init_scalars(**{field: value})
            got = getattr(soft_masking.effective(raw), field)
            # the reference overflows to infinity at 100
            raw_want, got_want = want if np.isfinite(want).all() else (abs(value), value)
            np.testing.assert_allclose(raw[f"raw_{field}"], raw_want, rtol=1e-6)
            np.testing.assert_allclose(got, got_want, rtol=2e-6)


def test_raw_from_effective_is_the_inverse_of_effective():
    for values in [(9.98377799987793e-07, -0.75, 6.65625, 1.0), (0.5, -100.0, 200.0, 1e-3), (0.999, -1e-4, 1e-4, 50.0)]:
        np.testing.assert_allclose(soft_masking.effective(soft_masking.raw_from_effective(*values)), values, rtol=2e-4)
    for scale in (0.0, 1.0):
        got = soft_masking.effective(soft_masking.raw_from_effective(scale, -1.0, 1.0)).scale
        np.testing.assert_allclose(got, scale, atol=1e-30)


@pytest.mark.parametrize("field, values", [
    ("scale", [-0.1, 1.1, float("nan"), float("inf")]),
    ("centre", [0.0, 0.5, float("nan"), float("-inf")]),
    ("steepness", [0.0, -1.0, float("nan"), float("inf")]),
    ("temperature", [0.0, -1.0, float("nan"), float("inf")]),
])  # fmt: skip
def test_scalars_outside_their_ranges_are_refused_by_name(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"soft_mask.{field}"):
            soft_masking.init_scalars(**{field: value})
        with pytest.raises(ValueError, match=f"soft_mask.{field}"):
            soft_masking.raw_from_effective(**{"scale": 0.5, "centre": -1.0, "steepness": 1.0, field: value})
    with pytest.raises(ValueError, match="further than 1e-06 from 0"):
        soft_masking.raw_from_effective(0.5, -1e-7, 1.0)
