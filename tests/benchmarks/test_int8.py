"""The benchmark of int8 kernels in a few steps: what it reports, not how good it is."""
import json

import pytest

from softmask_jax.benchmarks import int8

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "CONVERSATIONS", 160)
        patch.setattr(int8, "SIZES", int8.SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
        arguments = [f"--folder={folder}", "--steps=3", "--adapter_steps=2", f"--json={folder / 'out.json'}"]
        assert int8.main(arguments) == 0
    return json.loads((folder / "out.json").read_text())


def test_float_and_int8_are_compared_on_the_same_masks(found):
    rows = {(row["base"], row["products"]): row for row in found["bases"]}
    exact = rows["float", "float32"]
    assert (exact["change"], exact["logits"], exact["agree"]) == (0.0, 0.0, 1.0)
    for way in (("float", "bfloat16"), ("int8", "float32"), ("int8", "bfloat16")):
        row = rows[way]
        assert 0 < row["logits_rms"] < 0.05 and row["low"] <= row["change"] <= row["high"]
        assert row["loss"] == pytest.approx(exact["loss"] + row["change"]) == pytest.approx(exact["loss"], rel=0.02)


def test_an_adapter_is_trained_on_both(found):
    plain, small = found["adapted"]
    assert (plain["base"], small["base"]) == ("float", "int8") and plain["change"] == 0
    assert small["loss"] == pytest.approx(plain["loss"], rel=0.02) and small["before"] != plain["before"]


def test_the_table_has_a_line_for_each(found):
    said = int8.markdown(found)
    assert said.count("| int8 ") == 3 and said.count("| float ") == 3
