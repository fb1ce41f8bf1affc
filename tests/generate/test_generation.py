"""Batches of rows: which rows go together, what they are padded to, and what is made of what the model wrote."""
import jax
import numpy as np
import pytest

from softmask_jax.data import prompts
from softmask_jax.generate import batches
from softmask_jax.generate.batches import Batch, Generator, Shape, lay_out, plan, row_key, shape_of
from softmask_jax.report.patterns import Encoder, Pattern
from tests.helpers.fake_model import END, FakeModel, MASK

def run(model, *values, batch_size=4, samples=1, done=(), seed=0, stops=(), **options):
    """Rows of the answer file by key."""
    rows = [prompts.named(f"row {i}", value) if value else prompts.Row(f"row {i}", prompts.MASKS, None)
            for i, value in enumerate(values)]  # fmt: skip
    encode = Encoder(model, **{"limit": model.max_length, "max_new_tokens": 5} | options)
    patterns = [encode(row) for row in rows]
    shapes = [shape_of(pattern, model, encode.limit) for pattern in patterns]
    generator, found = Generator(model, None, seed, tuple(stops)), {}
    for batch in plan(shapes, samples=samples, batch_size=batch_size, done=done):
        for row in generator.batch(batch, rows, patterns):
            assert (row["index"], row["sample"]) not in found
            found[row["index"], row["sample"]] = row
    return found


def without_time(rows):
    return {key: {name: value for name, value in row.items() if name != "seconds"} for key, row in rows.items()}


TEXTS = ["x" * n for n in (3, 70, 64, 65, 1, 130, 5, 9, 100)]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_an_answer_depends_neither_on_the_batch_nor_on_what_is_done(padding):
    together = without_time(run(FakeModel(padding), *TEXTS))
    assert list(sorted(together)) == [(i, 0) for i in range(9)]
    for batch_size in (1, 2, 16):
        assert without_time(run(FakeModel(padding), *TEXTS, batch_size=batch_size)) == together
    done = {(0, 0), (4, 0), (5, 0)}
    rest = run(FakeModel(padding), *TEXTS, done=done, batch_size=2)
    assert set(together) - done <= set(rest) and all(together[key] == row for key, row in without_time(rest).items())
    longer = without_time(run(FakeModel(padding), *TEXTS, "more", "and more"))
    assert all(longer[key] == row for key, row in together.items())
    assert without_time(run(FakeModel(padding), *TEXTS, seed=1)) != together


def test_samples_of_a_prompt_differ_and_do_not_depend_on_how_many_there_are():
    three, two = (without_time(run(FakeModel(), "ab", "cd", samples=samples, batch_size=4)) for samples in (3, 2))
    assert len(three) == 6 and all(three[key] == row for key, row in two.items())
    assert len({three[0, sample]["text"] for sample in range(3)}) == 3


def test_rows_of_one_length_share_a_program_and_the_last_batch_is_filled_up():
    model = FakeModel()
    run(model, *TEXTS, batch_size=4)
    assert model.seen == [((4, before + 5), True, before) for before in (192, 128, 64, 64)]


def test_the_plan_skips_batches_that_are_done_and_changes_no_other():
    shapes = [Shape(64, 0, False)] * 5
    whole = plan(shapes, samples=1, batch_size=2)
    assert [batch.keys for batch in whole] == [((0, 0), (1, 0)), ((2, 0), (3, 0)), ((4, 0),)]
    assert all(batch.size == 2 for batch in whole)
    assert plan(shapes, samples=1, batch_size=2, done={(0, 0), (1, 0), (2, 0)}) == whole[1:]
    assert plan(shapes[:1], samples=1, batch_size=8) == [Batch(shapes[0], ((0, 0),), 8)]


def test_longer_rows_come_first():
    shapes = [Shape(length, 0, True) for length in (64, 192, 128)]
    assert [batch.shape.length for batch in plan(shapes, samples=1, batch_size=2)] == [192, 128, 64]


def pattern(length, answer=0, masks=None):
    masks = length - answer if masks is None else masks
    return Pattern(np.array([1] * (length - masks) + [MASK] * masks, np.int32), answer)


LEFT, RIGHT = FakeModel("left"), FakeModel("right")


def test_what_is_padded_on_the_left_begins_its_answer_at_a_multiple_of_64():
    assert shape_of(pattern(69, 64), LEFT, 2048) == (69, 64, True)
    assert shape_of(pattern(70, 65), LEFT, 2048) == (133, 128, True)
    assert shape_of(pattern(70), LEFT, 2048) == (128, 0, True)


def test_what_is_padded_on_the_right_has_a_mask_of_attention_only_if_it_needs_one():
    assert shape_of(pattern(100, 3), RIGHT, 100) == (100, 0, False)
    assert shape_of(pattern(64, 3), RIGHT, 100) == (64, 0, False)
    assert shape_of(pattern(65, 3), RIGHT, 100) == (100, 0, True)
    assert shape_of(pattern(5), RIGHT, 100) == (64, 0, True)


def test_where_positions_count_the_steps_there_are_about_as_many_as_masks():
    for masks, steps in [(1, 1), (2, 2), (3, 4), (9, 16), (70, 128)]:
        shape = shape_of(pattern(100, masks=masks), LEFT, 2048, counted=True)
        assert shape.length - shape.prompt_length == steps
    assert shape_of(pattern(70, 65), LEFT, 2048, counted=True) == (133, 128, True)
    assert shape_of(pattern(90, 3), RIGHT, 100, counted=True) == (100, 0, True)


def test_padding_stands_before_or_behind_and_is_not_attended_to():
    given = Pattern(np.array([5, MASK], np.int32), 1)
    tokens, attended = lay_out([given], Shape(4, 0, True), "left", 9)
    assert tokens.tolist() == [[9, 9, 5, MASK]] and attended.tolist() == [[0, 0, 1, 1]]
    tokens, attended = lay_out([given], Shape(4, 0, True), "right", 9)
    assert tokens.tolist() == [[5, MASK, 9, 9]] and attended.tolist() == [[1, 1, 0, 0]]
    assert lay_out([given], Shape(2, 0, False), "right", 9)[1] is None


def test_keys_of_answers_are_distinct():
    data = {tuple(jax.random.key_data(row_key(seed, (row, sample))).tolist())
            for seed in (0, 1) for row in range(4) for sample in range(3)}  # fmt: skip
    assert len(data) == 24


def test_a_continued_prompt_ends_at_the_end_of_text():
    write = lambda count: [*b"hi", END, *b"abcdefg"][:count]  # noqa: E731
    row = run(FakeModel(write=write), {"prompt": "q", "id": "one"})[0, 0]
    assert (row["id"], row["prompt"], row["text"], row["new_tokens"]) == ("one", "q", "hi", 2)
    assert row["ended"] and not row["empty"] and row["tokens"] == [*b"hi", END, *b"ab"]
    assert (row["calls"], row["filled"], row["tokens_per_call"], row["positions"]) == (4, 5, 1.25, 4 * 69)
    row = run(FakeModel(), "q")[0, 0]
    assert not row["ended"] and row["new_tokens"] == 5 == len(row["text"]) and "id" not in row


def test_an_answer_is_cut_at_the_first_stop_text():
    write = lambda count: [*b"a\n\nb;c"][:count]  # noqa: E731
    row = run(FakeModel(write=write), "q", stops=[";", "\n\n", "z"])[0, 0]
    assert row["text"] == "a" and row["ended"] and row["new_tokens"] == 1 and len(row["tokens"]) == 5
    assert not run(FakeModel(write=write), "q", stops=["z"])[0, 0]["ended"]


def test_answers_of_ends_alone_and_of_white_space_are_empty():
    flooded = run(FakeModel(write=lambda count: [END] * count), "q")[0, 0]
    assert flooded["empty"] and flooded["ended"] and (flooded["text"], flooded["new_tokens"]) == ("", 0)
    assert run(FakeModel(write=lambda count: [32] * count), "q")[0, 0]["empty"]
    flooded = run(FakeModel(write=lambda count: [END] * count), {"parts": ["a", 3]})[0, 0]
    assert flooded["empty"] and flooded["new_tokens"] == 0


def test_holes_come_with_their_texts_and_nothing_is_cut():
    write = lambda count: [*b"xyz", END][:count]  # noqa: E731
    row = run(FakeModel(write=write), {"parts": ["a", 2, "b", 2, "c"]}, stops=["b"])[0, 0]
    assert row["text"] == "axybz<|endoftext|>c" and row["fills"] == ["xy", "z<|endoftext|>"]
    assert row["parts"] == ["a", 2, "b", 2, "c"] and row["ended"] and row["new_tokens"] == 3
    row = run(FakeModel(write=write), {"tokens": [97, MASK]})[0, 0]
    assert row["tokens"] == [97, ord("x")] and row["text"] == "ax"


def test_the_token_that_begins_a_window_is_no_end():
    write = lambda count: [END, *b"abcdefgh" * 99][:count]  # noqa: E731
    row = run(FakeModel("right", write), None, limit=20)[0, 0]
    assert not row["ended"] and row["new_tokens"] == 20 and row["text"].startswith("abc")
    assert row["tokens"][:2] == [END, ord("a")]
    assert "masks" not in row


def test_a_row_of_nan_says_so_and_the_others_are_whole():
    rows = run(FakeModel(), "good", "a NaN", "fine")
    assert rows[1, 0]["error"] == batches.FAILED and rows[1, 0]["tokens"] == [] and rows[1, 0]["calls"] == 4
    assert "error" not in rows[0, 0] and rows[2, 0]["text"]


def test_ids_that_only_the_model_has_are_shown_as_unknown():
    generator = Generator(FakeModel(), None)
    assert generator.text(np.array([97, 258, 300, 98])) == "a\ufffd\ufffdb"
    assert generator.text(np.array([97, 98])) == "ab" and generator.text(np.array([], np.int32)) == ""
