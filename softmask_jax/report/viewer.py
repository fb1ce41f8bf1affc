"""Self-contained HTML page that plays a denoising: tokens, feedback in each mask, curves.

Frame f shows the tokens after step f and, at masks, the input of step f + 1: lambda and the top tokens of step f's
prediction. Frame 0 is the sampler's input with plain masks."""
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from softmask_jax.data import Tokenizer
from softmask_jax.report import page
from softmask_jax.report.chart_axes import number
from softmask_jax.report.charts import Series, line_chart
from softmask_jax.report.viewer_pieces import Pieces
from softmask_jax.samplers.result import Generated

MOST_ROWS = 8
# Units of integers: lambda in parts of the page's largest, pi and entropy (nats) in thousandths.
LAMBDA_PARTS, PARTS = 9999, 1000
SPEEDS = (1, 2, 4, 8, 16, 32)
# Default duration of playback, seconds.
PLAYS_FOR = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of S steps; fields as in `Trace`, without batch."""

    tokens: np.ndarray  # [S+1 L]: before every step and at the end
    called: np.ndarray
    weight: np.ndarray
    token_ids: np.ndarray
    shares: np.ndarray
    entropy: np.ndarray
    mask_token_id: int

    @property
    def steps(self) -> int:
        return len(self.called)

    @property
    def masked(self) -> np.ndarray:
        """[S+1 L] bool."""
        return self.tokens == self.mask_token_id

    def counts(self) -> dict[str, np.ndarray]:
        """Numbers of tokens committed, re-masked and replaced by each step, [S] each."""
        before, after = self.masked[:-1], self.masked[1:]
        other = ~before & ~after & (self.tokens[:-1] != self.tokens[1:])
        return {"committed": (before & ~after).sum(1), "re-masked": (~before & after).sum(1), "changed": other.sum(1)}

    def mean(self, values: np.ndarray) -> np.ndarray:
        """[S L] -> [S]: mean over the input masks of each step; NaN without masks."""
        mask = self.masked[:-1]
        count = mask.sum(1)
        return np.where(count > 0, (values * mask).sum(1) / np.maximum(count, 1), np.nan)


def row_of(made: Generated, index: int, *, mask_token_id: int, attention_mask: np.ndarray | None = None) -> Row:
    """A row of a sampler's result, cut to the steps made; arguments and errors as in `trajectory_page`."""
    if made.trace is None:
        raise ValueError("A page of the denoising needs its trace: call the sampler with trace=True.")
    steps, tokens = int(made.steps), np.asarray(made.tokens)
    if steps < 1:
        raise ValueError("The sampler made no step (no mask was there to fill): there is no denoising to show.")
    if not 0 <= index < len(tokens):
        raise ValueError(f"There is no row {index}: {len(tokens)} were made.")
    attended = np.ones(tokens.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if attended.shape != tokens.shape:
        raise ValueError(f"attention_mask must have the shape of the tokens, {tokens.shape}, not {attended.shape}.")

    def cut(values) -> np.ndarray:
        return np.asarray(values)[:steps, index, attended[index]]

    weight, shares, neg_entropy = (
        np.nan_to_num(cut(values), nan=0.0, posinf=0.0, neginf=0.0)
        for values in (made.trace.weight, made.trace.shares, made.trace.neg_entropy)
    )
    return Row(
        np.concatenate([cut(made.trace.tokens), tokens[None, index, attended[index]]]),
        np.asarray(made.trace.called)[:steps], weight, cut(made.trace.token_ids), shares, np.maximum(-neg_entropy, 0.0),
        mask_token_id,
    )  # fmt: skip


def trajectory_page(
    made: Generated | Mapping[str, Generated], tokenizer: Tokenizer, *, mask_token_id: int, rows: Sequence[int] = (0,),
    title: str = "A text, step by step", facts: Mapping[str, object] | None = None, note: str = "",
    attention_mask: np.ndarray | None = None,
) -> str:  # fmt: skip
    """The page as HTML, all text escaped.

    made: result with a `trace`; several `rows` of it give the reader a choice. Of results by name, the same row of each
    plays side by side. facts: model, sampler, settings by name. note: a sentence below them. attention_mask: [B L], 0
    at padding, which is left out. ValueError: no trace, no step, a row out of range, more than `MOST_ROWS` rows, a mask of another shape."""
    beside = isinstance(made, Mapping)
    if beside and len(rows) > 1:
        raise ValueError("Results by name show one row of each; give the index of one.")
    results = [(name, one, row) for name, one in (made if beside else {"": made}).items() for row in rows]
    if not 1 <= len(results) <= MOST_ROWS:
        raise ValueError(f"A page holds 1 to {MOST_ROWS} rows, not {len(results)}.")
    shown = [row_of(one, row, mask_token_id=mask_token_id, attention_mask=attention_mask) for _, one, row in results]
    names = [name if beside else f"sample {i}" for i, (name, _, _) in enumerate(results, 1)]
    broken = [
        f"{name[0].upper()}{name[1:]}: a logit was not finite, so this text means nothing."
        for name, (_, one, row) in zip(names, results) if not np.asarray(one.finite)[row]
    ]  # fmt: skip
    content = json.dumps(encoded(shown, tokenizer, names if beside else ()), separators=(",", ":"))
    for letter in "<>&":
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    facts = ((page.text(name), page.text(value)) for name, value in (facts or {}).items())
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    note = f"<p>{page.text(note)}</p>" if note else ""
    several = names if len(shown) > 1 else [""]
    charts = [_curves(dict(zip(names, shown)))] if beside else [
        _curves({"": row}, f", {name}" if name else "") for name, row in zip(several, shown)
    ]  # fmt: skip
    return page.document(
        title,
        f'<header><h1>{page.text(title)}</h1>\n<dl class="facts">{facts}</dl>{note}</header>\n',
        page.warnings(broken),
        _player(shown, names if beside else ()),
        *(f'<div class="curves" data-row="{i}">{page.figures(*one)}</div>\n' for i, one in enumerate(charts)),
        *(_ending(row, f", {name}" if name else "", tokenizer) for name, row in zip(several, shown)),
        page.asset("viewer_guide.html"),
        f'<script type="application/json" id="trace">{content}</script>\n',
        # Mask tints vary in lightness of one hue: readable without colour vision.
        style="\n" + page.asset("viewer.css"),
        script="\n" + page.asset("viewer.js"),
    )


def encoded(rows: Sequence[Row], tokenizer: Tokenizer, names: Sequence[str] = ()) -> dict:
    """Input of viewer.js; tokens are indices into "pieces", -1 is the mask.

    "pieces": [id, text, kind] each, see `Pieces`. "unit": lambda of one part. "names" of rows that play side by side.
    "rows", each with "k": candidates per mask; "start": tokens of frame 0; "changes" per step: position and new token
    of each, flat; "masks" per frame, flat over masks: lambda, entropy of the prediction (-1 if the previous step had a
    token there), k times token and pi, empty before the first prediction; "called" per step."""
    # Tokens, and candidates at masks with a prediction.
    used = [part.ravel() for row in rows for part in (row.tokens, row.token_ids[1:][row.masked[1:-1]])]
    ids, counts = np.unique(np.concatenate(used), return_counts=True)
    # Frequent tokens get short indices.
    ids, mask = ids[np.argsort(-counts, kind="stable")], rows[0].mask_token_id
    ids = ids[ids != mask]
    piece_of = np.full(max(ids.max(initial=0), mask) + 1, -1)
    piece_of[ids] = np.arange(len(ids))
    unit, pieces = _largest_lambda(rows) / LAMBDA_PARTS, Pieces(tokenizer)
    return {
        "pieces": [[id_, *pieces(id_)] for id_ in ids.tolist()],
        "unit": float(f"{unit:.8g}"),
        "parts": LAMBDA_PARTS,
        "names": list(names),
        "rows": [_encoded_row(row, piece_of, unit) for row in rows],
    }


def _largest_lambda(rows: Sequence[Row]) -> float:
    return max(float(row.weight.max(initial=0.0)) for row in rows)


def _encoded_row(row: Row, piece_of: np.ndarray, unit: float) -> dict:
    changes, masks, masked = [], [[]], row.masked
    for before, after in zip(row.tokens, row.tokens[1:]):
        at = np.flatnonzero(before != after)
        changes.append(np.stack([at, piece_of[after[at]]], 1).ravel().tolist())
    for frame in range(1, row.steps):
        at = np.flatnonzero(masked[frame])
        weight = np.rint(row.weight[frame, at] / unit) if unit else np.zeros(len(at))
        entropy = np.where(masked[frame - 1, at], np.rint(row.entropy[frame - 1, at] * PARTS), -1)
        tokens, shares = piece_of[row.token_ids[frame, at]], np.rint(row.shares[frame, at] * PARTS)
        pairs = np.stack([tokens, shares], -1).reshape(len(at), 2 * tokens.shape[-1])
        masks.append(np.column_stack([weight, entropy, pairs]).astype(int).ravel().tolist())
    start, called = piece_of[row.tokens[0]].tolist(), row.called.astype(int).tolist()
    return {"start": start, "changes": changes, "masks": masks, "called": called, "k": row.token_ids.shape[-1]}


def _player(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Controls, legend and containers filled by viewer.js. names: of rows that play side by side."""
    steps = max(row.steps for row in rows)
    usual = min(SPEEDS, key=lambda speed: abs(speed - steps / PLAYS_FOR))
    speeds = "".join(
        f'<option value="{speed}"{" selected" * (speed == usual)}>{speed} step{"s" * (speed > 1)}/s</option>'
        for speed in SPEEDS
    )
    options = "".join(f'<option value="{row}">{row + 1} of {len(rows)}</option>' for row in range(len(rows)))
    chooser = f'<label>Sample <select id="row">{options}</select></label>' if len(rows) > 1 and not names else ""
    scale = '<span class="p m" aria-hidden="true">\u2581</span> mask, plain: \u03bb is 0 throughout'
    largest = _largest_lambda(rows)
    if largest:
        ramp = '<span class="scale" aria-hidden="true"></span>'
        scale = f"mask, \u03bb&nbsp;=&nbsp;0{ramp}{number(largest)}, the largest on this page"
    counts = [row.counts() for row in rows]
    marks = (
        ("new", "committed in this step", True),
        ("m back", "re-masked in this step", any(count["re-masked"].any() for count in counts)),
        ("changed", "changed in this step", any(count["changed"].any() for count in counts)),
        ("given", "given", any(not row.masked[0].all() for row in rows)),
    )
    return page.asset(
        "viewer_player.html", texts=_texts(names), steps=steps, speeds=speeds, chooser=chooser, scale=scale,
        inside=" checked" * bool(largest),
        marks="".join(f'<li><span class="p {look}">word</span> {text}</li>' for look, text, used in marks if used),
    )  # fmt: skip


def _texts(names: Sequence[str]) -> str:
    """Containers of the texts, each below its name if there are several."""
    text = '<div class="text" role="listbox" aria-label="{}"></div>'
    if not names:
        return text.format("The text, position by position")
    parts = (
        f'<section><h2>{page.text(name)}</h2><p class="count pale"></p>'
        f'{text.format(page.text(f"{name}, by position"))}</section>'
        for name in names
    )
    return f'<div class="beside">{"".join(parts)}</div>'


def _curves(rows: Mapping[str, Row], of: str = "") -> list[str]:
    """Charts of a row, or of rows by name in the same charts. of: ends the titles."""

    (row, *_) = rows.values()

    def series(unit: str, values: Callable[[Row], np.ndarray], first: int = 1) -> list[Series]:
        measured = {name or unit: values(row) for name, row in rows.items()}
        return [Series(name, np.arange(first, first + len(one)), one) for name, one in measured.items()]

    moves = series("committed", lambda row: row.counts()["committed"])
    if len(rows) == 1:
        moves += [Series(kind, moves[0].x, count) for kind, count in [*row.counts().items()][1:] if count.any()]
    fed, reused = (any(test(row) for row in rows.values()) for test in (
        lambda row: row.weight.any(), lambda row: not row.called.all(),
    ))  # fmt: skip
    charts = [
        ("Mean entropy", "nats", series("nats", lambda row: row.mean(row.entropy)), True),
        ("Mean \u03bb", "\u03bb", series("\u03bb", lambda row: row.mean(row.weight)), fed),
        ("Tokens per step", "tokens", moves, True),
        ("Masks left", "masks", series("masks", lambda row: row.masked.sum(1), 0), True),
        ("Network calls so far", "calls", series("calls", lambda row: row.called.cumsum()), reused),
    ]
    return [line_chart(title + of, lines, y_label=label) for title, label, lines, shown in charts if shown]


def _ending(row: Row, sample: str, tokenizer: Tokenizer) -> str:
    text = tokenizer.decode([token for token in row.tokens[-1].tolist() if token < tokenizer.vocab_size])
    return f"<details><summary>The text at the end{sample}</summary>\n<pre>\n{page.text(text)}</pre></details>\n"
