"""Answers to the same validation prompts before and after training, beside the reference answers."""
from softmask_jax.io.run_log import RunLog
from softmask_jax.report import page

# Limits that keep the page small enough to mail.
MOST_PROMPTS, MOST_CHARACTERS = 4, 4000


def of_run(run: RunLog) -> str:
    """HTML; "" unless samples of step 0 and later ones answer the same prompts."""
    before = _answered(run.first_samples)
    later = [(row["step"], answered) for row in run.samples if row["step"] and (answered := _answered(row))]
    if not before or not later or later[-1][1].keys() != before.keys():
        return ""
    step, after = later[-1]
    blocks = "".join(
        f"<h3>Prompt {number}</h3>\n{page.block(prompt, MOST_CHARACTERS)}" + page.figures(
            _figure("Before training", answer), _figure(f"After {step:,} steps", after[prompt][0]),
            _figure("Reference answer", reference),
        )
        for number, (prompt, (answer, reference)) in enumerate(list(before.items())[:MOST_PROMPTS], 1)
    )  # fmt: skip
    masks = "" if run.setting("init.checkpoint") else "; before training with plain masks"
    about = f"Prompts of the validation split, the likeliest token at every position{masks}."
    return f"<p>{page.text(about)}</p>\n{blocks}"


def _answered(row: dict | None) -> dict[str, tuple[str, str]]:
    """(answer, reference) by prompt of a row of samples; {} for a row without them."""
    columns = [(row or {}).get(name) for name in ("prompts", "answers", "references")]
    if not all(isinstance(column, list) for column in columns):
        return {}
    return {str(prompt): (str(answer), str(reference)) for prompt, answer, reference in zip(*columns, strict=False)}


def _figure(title: str, answer: str) -> str:
    caption = f"<figcaption>{page.text(title)}</figcaption>"
    return f"<figure>{caption}{page.block(answer, MOST_CHARACTERS)}</figure>\n"
