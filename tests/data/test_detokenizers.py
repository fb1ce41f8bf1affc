"""Detokenizers: the spacing that people write."""
import pytest

from softmask_jax.data.sources import detokenize


@pytest.mark.parametrize(
    ("spaced", "written"),
    [
        ("It 's fine , he said .", "It's fine, he said."),
        ("See http : / / a.org / b and https : / / c.org / d .", "See http://a.org/b and https://c.org/d."),
        ("One thing . Another thing . The end .", "One thing. Another thing. The end."),
        ("Who ? Me ! Why ?", "Who? Me! Why?"),
        ("Stop !", "Stop!"),
        ("Ratio : three ; and / or", "Ratio: three; and/or"),
        ('He said " yes , sir " loudly', 'He said "yes, sir" loudly'),
        ("( round ) and [ square ]", "(round) and [square]"),
        ("the ' odd one ' out", "the 'odd one' out"),
        ("$ 5 or £ 4", "$5 or £4"),
        ("nothing to do", "nothing to do"),
        ("", ""),
    ],
)
def test_lm1b_spacing_is_undone(spaced, written):
    assert detokenize(spaced, "lm1b") == written


def test_a_quote_is_joined_to_the_word_before_it_when_a_word_follows_at_once():
    assert detokenize("the dogs ' tails and 'tis", "lm1b") == "the dogs ' tails and'tis"


def test_an_unknown_detokenizer_names_those_there_are():
    with pytest.raises(ValueError, match="'lm2b' is unknown; choose '' or one of lm1b$"):
        detokenize("", "lm2b")
