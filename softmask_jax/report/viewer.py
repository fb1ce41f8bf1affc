"""Self-contained HTML page that plays a denoising: every step, the feedback in each mask, curves.

Frame f shows the tokens after step f and, at its masks, the input of step f + 1: lambda and the likeliest tokens of
step f's prediction. Frame 0 is the sampler's input, whose masks are plain.
"""
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

PANEL_HINT = "Point at a position, tap it, or reach it with Tab: here is what its mask carries."
MOST_ROWS = 8
# Lambda is written in parts of the page's largest, pi and entropy (nats) in thousandths.
LAMBDA_PARTS, PARTS = 9999, 1000
SPEEDS = (1, 2, 4, 8, 16, 32)
# About how long a page plays, seconds, unless the reader chooses.
PLAYS_FOR = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of S steps: tokens [S+1 L] before every step and at the end; other fields as in `Trace`, without batch."""

    tokens: np.ndarray
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
        """Tokens that each step [S] committed, re-masked and exchanged for others."""
        before, after = self.masked[:-1], self.masked[1:]
        other = ~before & ~after & (self.tokens[:-1] != self.tokens[1:])
        return {"committed": (before & ~after).sum(1), "re-masked": (~before & after).sum(1), "changed": other.sum(1)}

    def mean_entropy(self) -> np.ndarray:
        """[S] nats: of each step's prediction over its input masks; NaN where there were none."""
        return _mean(self.entropy, self.masked[:-1])

    def mean_lambda(self) -> np.ndarray:
        """[S]: over each step's input masks; NaN where there were none."""
        return _mean(self.weight, self.masked[:-1])


def row_of(made: Generated, index: int, *, mask_token_id: int, attention_mask: np.ndarray | None = None) -> Row:
    """A row of a sampler's result, cut to the steps that were made; arguments and errors as of `trajectory_page`."""
    if made.trace is None:
        raise ValueError("A page of the denoising needs its trace: call the sampler with trace=True.")
    steps, tokens = int(made.steps), np.asarray(made.tokens)
    if steps < 1:
        raise ValueError("The sampler made no step (no mask was there to fill): there is no denoising to show.")
    if not 0 <= index < len(tokens):
        raise ValueError(f"There is no row {index}: {len(tokens)} were made.")
    seen = np.concatenate([np.asarray(made.trace.tokens)[:steps, index], tokens[None, index]])
    attended = np.ones(tokens.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if attended.shape != tokens.shape:
        raise ValueError(f"attention_mask must have the shape of the tokens, {tokens.shape}, not {attended.shape}.")
    cut = np.s_[:steps, index, attended[index]]
    weight, shares, neg_entropy = (
        np.nan_to_num(np.asarray(values)[cut], nan=0.0, posinf=0.0, neginf=0.0)
        for values in (made.trace.weight, made.trace.shares, made.trace.neg_entropy)
    )
    return Row(
        seen[:, attended[index]], np.asarray(made.trace.called)[:steps], weight, np.asarray(made.trace.token_ids)[cut], shares,
        np.maximum(-neg_entropy, 0.0), mask_token_id,
    )  # fmt: skip


def trajectory_page(
    made: Generated, tokenizer: Tokenizer, *, mask_token_id: int, rows: Sequence[int] = (0,),
    title: str = "A text, step by step", facts: Mapping[str, object] | None = None, note: str = "",
    attention_mask: np.ndarray | None = None,
) -> str:  # fmt: skip
    """The page as HTML.

    Args:
      made: result with its `trace`. rows: of it; the reader chooses among several.
      facts: model, sampler, settings by name. note: a sentence below the facts. All text is escaped.
      attention_mask: [B L]; positions where it is 0 are padding and left out.

    Raises:
      ValueError: no trace, no step, no such row, more than `MOST_ROWS` rows, a mask of another shape.
    """
    if not 1 <= len(rows) <= MOST_ROWS:
        raise ValueError(f"A page holds 1 to {MOST_ROWS} rows, not {len(rows)}.")
    shown = [row_of(made, row, mask_token_id=mask_token_id, attention_mask=attention_mask) for row in rows]
    finite = np.asarray(made.finite)
    broken = [
        f"Sample {number}: a logit was not finite, so this text means nothing."
        for number, row in enumerate(rows, 1) if not finite[row]
    ]  # fmt: skip
    largest = max(float(row.weight.max(initial=0.0)) for row in shown)
    content = json.dumps(encoded(shown, tokenizer), separators=(",", ":"))
    for letter in "<>&":
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    names = "".join(
        f"<div><dt>{page.text(name)}</dt><dd>{page.text(value)}</dd></div>" for name, value in (facts or {}).items()
    )
    return page.document(
        title,
        f'<header><h1>{page.text(title)}</h1>\n<dl class="facts">{names}</dl>'
        f'{f"<p>{page.text(note)}</p>" if note else ""}</header>\n',
        page.warnings(broken),
        "<noscript><style>.player { display: none; }</style>\n<p>This page plays the denoising where scripts may run; "
        "without them it shows the curves and the text at the end.</p></noscript>\n",
        f'<div class="player">\n{_controls(shown)}{_legend(shown, largest)}<div class="scene">'
        '<div id="text" role="listbox" aria-label="The text, position by position"></div>\n'
        f'<aside id="panel" aria-label="The position looked at"><p class="pale">{PANEL_HINT}</p></aside></div></div>\n',
        *(_curves(row, number, len(shown)) for number, row in enumerate(shown)),
        *(_ending(row, number, len(shown), tokenizer) for number, row in enumerate(shown)),
        page.asset("viewer_guide.html"),
        f'<script type="application/json" id="trace">{content}</script>\n',
        # The tint of a mask is one hue from the ground's lightness to full colour: readable without colour vision too.
        style="\n" + page.asset("viewer.css"),
        script="\n" + page.asset("viewer.js"),
    )


def encoded(rows: Sequence[Row], tokenizer: Tokenizer) -> dict:
    """Input of viewer.js; -1 stands for the mask, other tokens are positions in `pieces`.

    Returns:
      "pieces": [id, text, kind] each (see `Pieces`). "unit": lambda of one part. "k": candidates of a mask. "rows", each
      with "start", the tokens of frame 0; "changes", per step the position and new token of each change, flat; "masks",
      per frame and mask lambda, the entropy of the prediction (-1 if the step before had a token there) and k times token
      and pi, flat, empty before the first prediction; "called", per step.
    """
    ids, counts = np.unique(
        np.concatenate([part.ravel() for row in rows for part in (row.tokens, _candidates(row))]), return_counts=True
    )
    # The most frequent tokens get the shortest numbers.
    ids = ids[np.argsort(-counts, kind="stable")]
    mask = rows[0].mask_token_id
    ids = ids[ids != mask]
    piece_of = np.full(max(int(ids.max(initial=0)), mask) + 1, -1)
    piece_of[ids] = np.arange(len(ids))
    unit = max(float(row.weight.max(initial=0.0)) for row in rows) / LAMBDA_PARTS
    pieces = Pieces(tokenizer)
    return {
        "pieces": [[id_, *pieces(id_)] for id_ in ids.tolist()],
        "unit": float(f"{unit:.8g}"),
        "parts": LAMBDA_PARTS,
        "k": rows[0].token_ids.shape[-1],
        "rows": [_encoded_row(row, piece_of, unit) for row in rows],
    }


def _candidates(row: Row) -> np.ndarray:
    """[N k]: of all masks with a prediction."""
    return row.token_ids[1:][row.masked[1:-1]]


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
    return {
        "start": piece_of[row.tokens[0]].tolist(), "changes": changes, "masks": masks,
        "called": row.called.astype(int).tolist(),
    }  # fmt: skip


def _controls(rows: Sequence[Row]) -> str:
    steps = rows[0].steps
    usual = min(SPEEDS, key=lambda speed: abs(speed - steps / PLAYS_FOR))
    speeds = "".join(
        f'<option value="{speed}"{" selected" * (speed == usual)}>{speed} step{"s" * (speed > 1)}/s</option>'
        for speed in SPEEDS
    )
    options = "".join(f'<option value="{row}">{row + 1} of {len(rows)}</option>' for row in range(len(rows)))
    chooser = f'<label>Sample <select id="row">{options}</select></label>' if len(rows) > 1 else ""
    inside = " checked" if any(row.weight.any() for row in rows) else ""
    return (
        '<div class="controls" role="group" aria-label="Player">\n<div class="transport">'
        '<button type="button" id="play">Play</button>'
        '<button type="button" id="back" aria-label="One step back">\u25c2</button>'
        f'<input type="range" id="slider" min="0" max="{steps}" value="0" aria-label="Step">'
        '<button type="button" id="forward" aria-label="One step forward">\u25b8</button></div>\n'
        '<p id="status" role="status" aria-live="polite"></p></div>\n'
        f'<div class="options">{chooser}<label>Speed <select id="speed">{speeds}</select></label>'
        f'<label><input type="checkbox" id="inside"{inside}> Candidates in masks</label>'
        '<label><input type="checkbox" id="grid"> Grid</label></div>\n'
    )


def _legend(rows: Sequence[Row], largest: float) -> str:
    counts = [row.counts() for row in rows]
    happens = {name: any(count[name].any() for count in counts) for name in counts[0]}
    keys = {
        ("new", "committed in this step"): True, ("m back", "re-masked in this step"): happens["re-masked"],
        ("changed", "changed in this step"): happens["changed"],
        ("given", "given"): any(not row.masked[0].all() for row in rows),
    }  # fmt: skip
    if largest:
        scale = (
            f'mask, \u03bb&nbsp;=&nbsp;0<span class="scale" aria-hidden="true"></span>{number(largest)}, '
            "the largest on this page"
        )
    else:
        scale = '<span class="p m" aria-hidden="true">\u2581</span> mask, plain: \u03bb is 0 throughout'
    items = "".join(f'<li><span class="p {look}">word</span> {text}</li>' for (look, text), on in keys.items() if on)
    return f'<ul class="legend"><li>{scale}</li>{items}</ul>\n'


def _curves(row: Row, number: int, rows: int) -> str:
    step, after = np.arange(1, row.steps + 1), f", sample {number + 1}" if rows > 1 else ""
    counts = row.counts()
    moves = [Series(name, step, count) for name, count in counts.items() if name == "committed" or count.any()]
    left = [Series("masks", np.arange(row.steps + 1), row.masked.sum(1))]
    charts = [line_chart(f"Mean entropy{after}", [Series("nats", step, row.mean_entropy())], y_label="nats")]
    if row.weight.any():
        charts.append(line_chart(f"Mean \u03bb{after}", [Series("\u03bb", step, row.mean_lambda())], y_label="\u03bb"))
    charts.append(line_chart(f"Tokens per step{after}", moves, y_label="tokens"))
    charts.append(line_chart(f"Masks left{after}", left, y_label="masks"))
    if not row.called.all():
        calls = [Series("calls", step, row.called.cumsum())]
        charts.append(line_chart(f"Network calls so far{after}", calls, y_label="calls"))
    return f'<div class="curves" data-row="{number}">{page.figures(*charts)}</div>\n'


def _ending(row: Row, number: int, rows: int, tokenizer: Tokenizer) -> str:
    text = tokenizer.decode([token for token in row.tokens[-1].tolist() if token < tokenizer.vocab_size])
    name = f"The text at the end{f', sample {number + 1}' if rows > 1 else ''}"
    return f"<details><summary>{name}</summary>\n<pre>\n{page.text(text)}</pre></details>\n"


def _mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    count = mask.sum(1)
    return np.where(count > 0, (values * mask).sum(1) / np.maximum(count, 1), np.nan)
