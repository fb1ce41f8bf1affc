"""Pickles are read as data: nothing that they name is imported, nothing is called."""
import pickle

import pytest

from softmask_jax.convert import pickles
from softmask_jax.convert.pickles import BadPickle, Stub, read
from tests.helpers.checkpoint_files import Global, pickled

PLAIN = {
    "epoch": 1, "big": 2**70, "negative": -5, "nothing": None, "yes": True, "no": False, "half": 0.5, "text": "déjà",
    "bytes": b"\x00\xff", "list": [1, [2, {"three": (4, 5, 6, 7)}]], "tuple": (1,), "pair": (1, 2), "triple": (1, 2, 3),
    "empty": [(), [], {}], 7: "number",
}  # fmt: skip


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_those_of_pickle_in_every_protocol(protocol):
    value = dict(PLAIN)
    if protocol < 3:
        value.pop("bytes")  # written as a call of a codec there
    assert read(pickle.dumps(value, protocol=protocol)) == value


def test_shared_and_circular_references_are_kept():
    shared = [1]
    circle = {"one": shared, "two": shared}
    circle["self"] = circle
    found = read(pickle.dumps(circle))
    assert found["one"] is found["two"] and found["self"] is found


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_payload_is_not_run_but_named(tmp_path, protocol):
    class Payload:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path / 'run'}",)

    found = read(pickle.dumps({"innocent": Payload()}, protocol=protocol))
    assert isinstance(found["innocent"], Stub)
    assert found["innocent"].name in ("posix.system", "os.system")
    assert not (tmp_path / "run").exists()


def test_classes_that_do_not_exist_keep_their_state():
    content = b"\x80\x02cno_such_module\nThing\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    found = read(content)
    assert (found.name, found.args, found.state) == ("no_such_module.Thing", (), {"a": 1})


def test_calls_of_calls_and_attributes_are_inert():
    content = pickled([Global("builtins.getattr", Global("builtins.eval"), "__self__")])
    assert read(content)[0].name == "builtins.getattr"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\x80\x02}",  # no end
        b"\x80\x02.",  # nothing on the stack
        b"\x80\x02(.",  # a mark
        b"\x80\x02K\x01K\x02s.",  # items for a number
        b"\x80\x02h\x05.",  # a memo that was never put
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x05\x97.",  # an out-of-band buffer
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a length beyond the file
        b"\x80\x02K\x01K\x02R.",  # a call of a number
        b"\x80\x02t.",  # a tuple without its mark
    ],
)
def test_damaged_and_odd_pickles_are_one_clear_error(content):
    with pytest.raises(BadPickle) as error:
        read(content)
    assert "\n" not in str(error.value)


def test_a_memo_index_of_two_billion_takes_no_memory():
    assert read(b"\x80\x02}r\xff\xff\xff\x7f.") == {}


def test_deep_nesting_and_deep_keys_do_not_overflow():
    deep = b"\x80\x02)" + b"\x85" * 200_000 + b"."
    assert isinstance(read(deep), tuple)
    key = b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s."
    assert read(key) == {}


def test_a_pickle_larger_than_any_is_refused(monkeypatch):
    monkeypatch.setattr(pickles, "MOST_BYTES", 10)
    with pytest.raises(BadPickle, match="11 bytes"):
        read(b"x" * 11)
