"""Self-contained HTML page that plays a denoising: tokens, feedback in each mask, curves.

Frame f shows the tokens after step f and, at masks, the input of step f + 1: lambda and the top tokens of step f's
prediction. Frame 0 is the sampler's input with plain masks."""
import dataclasses
import json
from collections.abc import Mapping, Sequence

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
    made: Generated, tokenizer: Tokenizer, *, mask_token_id: int, rows: Sequence[int] = (0,),
    title: str = "A text, step by step", facts: Mapping[str, object] | None = None, note: str = "",
    attention_mask: np.ndarray | None = None,
) -> str:  # fmt: skip
    """The page as HTML, all text escaped.

    made: result with a `trace`; several `rows` of it give the reader a choice. facts: model, sampler, settings by name.
    note: a sentence below them. attention_mask: [B L], 0 at padding, which is left out.
    ValueError: no trace, no step, a row out of range, more than `MOST_ROWS` rows, a mask of another shape."""
    if not 1 <= len(rows) <= MOST_ROWS:
        raise ValueError(f"A page holds 1 to {MOST_ROWS} rows, not {len(rows)}.")
    shown = [row_of(made, row, mask_token_id=mask_token_id, attention_mask=attention_mask) for row in rows]
    broken = [
        f"Sample {number}: a logit was not finite, so this text means nothing."
        for number, finite in enumerate(np.asarray(made.finite)[list(rows)], 1) if not finite
    ]  # fmt: skip
    content = json.dumps(encoded(shown, tokenizer), separators=(",", ":"))
    for letter in "<>&":
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    facts = ((page.text(name), page.text(value)) for name, value in (facts or {}).items())
    names = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    note = f"<p>{page.text(note)}</p>" if note else ""
    samples = [(row, i, f", sample {i + 1}" if len(shown) > 1 else "") for i, row in enumerate(shown)]
    return page.document(
        title,
        f'<header><h1>{page.text(title)}</h1>\n<dl class="facts">{names}</dl>{note}</header>\n',
        page.warnings(broken),
        _player(shown),
        *(f'<div class="curves" data-row="{i}">{page.figures(*_curves(row, of))}</div>\n' for row, i, of in samples),
        *(_ending(row, of, tokenizer) for row, _, of in samples),
        page.asset("viewer_guide.html"),
        f'<script type="application/json" id="trace">{content}</script>\n',
        # Mask tints vary in lightness of one hue: readable without colour vision.
        style="\n" + page.asset("viewer.css"),
        script="\n" + page.asset("viewer.js"),
    )


def encoded(rows: Sequence[Row], tokenizer: Tokenizer) -> dict:
    """Input of viewer.js; tokens are indices into "pieces", -1 is the mask.

    "pieces": [id, text, kind] each, see `Pieces`. "unit": lambda of one part. "k": candidates per mask. "rows", each
    with "start": tokens of frame 0; "changes" per step: position and new token of each, flat; "masks" per frame, flat
    over masks: lambda, entropy of the prediction (-1 if the previous step had a token there), k times token and pi,
    empty before the first prediction; "called" per step."""
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
        "k": rows[0].token_ids.shape[-1],
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
    return {"start": start, "changes": changes, "masks": masks, "called": called}


def _player(rows: Sequence[Row]) -> str:
    """Controls, legend and containers filled by viewer.js."""
    steps = rows[0].steps
    usual = min(SPEEDS, key=lambda speed: abs(speed - steps / PLAYS_FOR))
    speeds = "".join(
        f'<option value="{speed}"{" selected" * (speed == usual)}>{speed} step{"s" * (speed > 1)}/s</option>'
        for speed in SPEEDS
    )
    options = "".join(f'<option value="{row}">{row + 1} of {len(rows)}</option>' for row in range(len(rows)))
    chooser = f'<label>Sample <select id="row">{options}</select></label>' if len(rows) > 1 else ""
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
        "viewer_player.html", steps=steps, speeds=speeds, chooser=chooser, scale=scale,
        inside=" checked" * bool(largest),
        marks="".join(f'<li><span class="p {look}">word</span> {text}</li>' for look, text, used in marks if used),
    )  # fmt: skip


def _curves(row: Row, sample: str) -> list[str]:
    step, counts = np.arange(1, row.steps + 1), row.counts()
    moves = [Series(name, step, count) for name, count in counts.items() if name == "committed" or count.any()]
    charts = [
        ("Mean entropy", "nats", [Series("nats", step, row.mean(row.entropy))], True),
        ("Mean \u03bb", "\u03bb", [Series("\u03bb", step, row.mean(row.weight))], row.weight.any()),
        ("Tokens per step", "tokens", moves, True),
        ("Masks left", "masks", [Series("masks", np.arange(row.steps + 1), row.masked.sum(1))], True),
        ("Network calls so far", "calls", [Series("calls", step, row.called.cumsum())], not row.called.all()),
    ]
    return [line_chart(title + sample, series, y_label=label) for title, label, series, shown in charts if shown]


def _ending(row: Row, sample: str, tokenizer: Tokenizer) -> str:
    text = tokenizer.decode([token for token in row.tokens[-1].tolist() if token < tokenizer.vocab_size])
    return f"<details><summary>The text at the end{sample}</summary>\n<pre>\n{page.text(text)}</pre></details>\n"
