"""Flags for the fields of a dataclass, whatever they are."""
import argparse
import dataclasses

import pytest

from softmask_jax.config import option_flags


@dataclasses.dataclass(frozen=True)
class Options:
    name: str = "one"
    steps: int = 8
    rate: float = 0.5
    limit: float | None = None
    top: int | None = 50
    fast: bool = False
    ids: tuple[int, ...] = ()
    blend: dict | None = None
    hidden: int = 0
    described: int = dataclasses.field(default=1, metadata={"help": "100 % of it"})


HELPS = {"steps": "how many", "hidden": ""}


def parse(*words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    option_flags.add(parser, Options, helps=HELPS, readers={"blend": lambda text: {"by": text}})
    return option_flags.present(parser.parse_args(words), Options)


def test_only_what_is_given_is_there():
    assert parse() == {}
    assert parse("--steps=3", "--name", "two") == {"steps": 3, "name": "two"}


def test_texts_become_what_the_fields_types_say():
    found = parse("--rate=1", "--limit=0.1", "--top=none", "--ids=1, 2,3", "--blend=none")
    assert found == {"rate": 1.0, "limit": 0.1, "top": None, "ids": (1, 2, 3), "blend": {"by": "none"}}
    assert isinstance(found["rate"], float) and Options(**found).top is None


def test_booleans_may_stand_alone():
    assert parse("--fast") == parse("--fast=true") == {"fast": True} and parse("--fast=False") == {"fast": False}


@pytest.mark.parametrize("word", ["--steps=2.5", "--steps=none", "--fast=perhaps", "--ids=a", "--hidden=1", "--step=3"])
def test_what_is_no_value_or_no_flag_ends_with_status_2(word, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(word)
    assert ended.value.code == 2 and word.split("=")[0] in capsys.readouterr().err


def test_help_texts_come_from_the_table_the_field_or_its_name(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "how many (default: 8)" in said and "100 % of it (default: 1)" in said and "rate (default: 0.5)" in said
    assert "hidden" not in said
