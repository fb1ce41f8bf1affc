"""The task "perplexity": the NELBO of held-out windows, with one pass and with soft-masking's two on the same masks.

An upper bound on -log p(x) (MDLM, arXiv 2406.07524, eq. 10); its exponential per token, BOS and EOS included, is the
papers' perplexity. Text8's bits per character count only the text's characters. A model fine-tuned on conversations has
no such bound: its validation loss is measured (`conversations`)."""
import dataclasses

import numpy as np

from softmask_jax.data.tokenizers import Text8Tokenizer
from softmask_jax.evaluate.perplexity import conversations, estimates, mask_draws, records
from softmask_jax.evaluate.perplexity.text_sets import AT_A_TIME, OWN, Text, described, evenly_spaced, sources, texts_of
from softmask_jax.evaluate.settings import Settings, check_least
from softmask_jax.evaluate.task import Estimate, Result, Work, pieces

UNITS = {"nelbo": "nats/token", "loss": "nats"}
# Settings that may differ between records of the same windows and masks.
OF_THE_MODEL = ("step", "variant", "k", "p_sm")
# Explanations of the numbers by (compat, of conversations).
NOTES = {
    (False, False): "NELBO over {draws} draws of t and masks a window, the same for every model; 95 % intervals are "
    "over windows and cover these and their draws.",
    (True, False): "By the reference's protocol: one t a window, stratified within batches of {batch_size}; intervals "
    "are over windows.",
    (False, True): "The recipe's loss of responses over {draws} draws of t and masks an example, the same for every "
    "model; 95 % intervals are over examples.",
    (True, True): "The recipe's own validation: t evenly spaced over the examples, a coin decides between one pass and "
    "two.",
}


@dataclasses.dataclass(frozen=True)
class Validation:
    """See `task.Task`."""

    name = "perplexity"
    sections = ("perplexity",)
    sweeps = False

    def check(self, settings: Settings, *, allow_code: bool, allow_unsafe_code: bool) -> None:
        check_least(settings, "perplexity", draws=1, batch_size=1, bins=1, max_windows=0)
        if not sources(settings.perplexity.texts) and not settings.perplexity.own:
            raise ValueError("config.perplexity.own=False leaves no text; name some in config.perplexity.texts.")

    def run(self, work: Work) -> Result:
        """Texts one after the other, each with its own record and estimates. ValueError for none, or a changed one."""
        settings = work.settings.perplexity
        values, curves, notes = {}, {}, []
        if chat := conversations.is_chat(work.path):
            columns = conversations.measured(work)
            values = estimates.estimates(columns, "loss", 1, UNITS["loss"])
            curves[OWN] = estimates.cross_entropy_by_t(columns, settings.bins)
        else:
            for text in texts_of(work.path, work.model, own=settings.own, others=sources(settings.texts)):
                columns = _measured(work, text)
                characters = _characters(work.model.tokenizer, text, columns.numbers, settings.compat)
                of_text = estimates.estimates(columns, "nelbo", text.windows.seq_len, UNITS["nelbo"], characters)
                values |= _prefixed(text.name, of_text)
                curves[text.name] = estimates.cross_entropy_by_t(columns, settings.bins)
                notes += text.notes
        notes.append(NOTES[settings.compat, chat].format(draws=settings.draws, batch_size=settings.batch_size))
        calls = columns.values["t"].shape[1] * len(columns.passes)
        return Result(values, {"calls": calls}, {"cross_entropy_by_t": curves}, tuple(notes))

    def compare(self, baseline: Work, other: Work) -> dict[str, Estimate]:
        """Window by window where both records are of the same windows, tokens and masks; {} elsewhere."""
        values = {}
        for name in (OWN, *described(other.settings.perplexity.texts)):
            ours, theirs = (records.stored(work.folder, name) for work in (other, baseline))
            if ours is None or theirs is None or _shared(ours[0]) != _shared(theirs[0]):
                continue
            metric, tokens = ours[0]["metric"], ours[0]["tokens"]
            values |= _prefixed(name, estimates.differences(theirs[1], ours[1], metric, tokens, UNITS[metric]))
        return values


def _prefixed(text: str, values: dict[str, Estimate]) -> dict[str, Estimate]:
    return values if text == OWN else {f"{text}/{name}": value for name, value in values.items()}


def _shared(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in OF_THE_MODEL}


def _characters(tokenizer, text: Text, numbers: np.ndarray, compat: bool) -> np.ndarray | None:
    """Number of characters of each window [W] if a token is one; else None. compat: BOS and EOS count."""
    if tokenizer.kind != Text8Tokenizer.kind:
        return None
    ends = () if compat else (tokenizer.bos_id, tokenizer.eos_id)
    parts = np.array_split(numbers, -(-len(numbers) // AT_A_TIME))
    return np.concatenate([np.isin(text.windows.gather(part), ends, invert=True).sum(1) for part in parts])


def _measured(work: Work, text: Text) -> records.Columns:
    """Columns of one text, missing rows measured first."""
    settings, model, seed = work.settings.perplexity, work.model, work.settings.run.seed
    objective, batch_size = model.objective, settings.batch_size
    numbers = evenly_spaced(len(text.windows), settings.max_windows)
    if settings.compat:
        draws, strata = 1, mask_draws.of_the_reference(len(numbers), batch_size)
    else:
        draws, strata = settings.draws, mask_draws.stratified(len(numbers), settings.draws, seed)
        objective = dataclasses.replace(objective, stratified=True)
    decisive = {
        "metric": "nelbo", "text": text.fingerprint(numbers), "tokenizer": model.tokenizer.fingerprint(),
        "tokens": text.windows.seq_len, "windows": len(numbers), "draws": draws, "seed": seed, "compat": settings.compat,
        # Batches decide t only in the reference's protocol.
        "batch_size": batch_size if settings.compat else 0, "step": model.step, **records.settings_of(objective),
    }  # fmt: skip
    return records.recorded(
        work, text.name, decisive, pieces(numbers, draws, batch_size), numbers=numbers, strata=strata,
        gather=lambda index, _: {"tokens": text.windows.gather(index), "index": index.astype(np.int32)},
        program=mask_draws.nelbo_program(model.denoiser, objective, work.mesh),
    )  # fmt: skip
