"""The task "generative": quality of texts that a model writes from masks alone.

Generative perplexity by a causal model (GPT-2-large in the paper); entropy of a text's tokens, which shows the
repetition that perplexity rewards; MAUVE against human texts, whole windows of a validation split with BOS and EOS, as
many and as long as the samples. As in the reference (`language/main.py`, `sample_eval` and `load_human_references`, on
top of `s-sahoo/duo`), texts are decoded with their `<|endoftext|>` and retokenized by the scorer, at most 1,024 tokens
each; unlike there, decoding keeps spaces before punctuation and the order of human texts is NumPy's."""
import dataclasses

import numpy as np

from softmask_jax.data.shards.cache import ENVIRONMENT_VARIABLE, cache_folder
from softmask_jax.data.sources import Source
from softmask_jax.evaluate.generative import mauve_score, samples, scores
from softmask_jax.evaluate.generative.samples import Samples
from softmask_jax.evaluate.generative.scorer import Scorer, open_files
from softmask_jax.evaluate.generative.scores import Scores
from softmask_jax.evaluate.models import checkpoints
from softmask_jax.evaluate.perplexity.conversations import is_chat
from softmask_jax.evaluate.perplexity.text_sets import Text, described, open_source, other_text, own_text
from softmask_jax.evaluate.settings import Generative as Config, Settings, budgets, check_least
from softmask_jax.evaluate.task import Estimate, Piece, Result, Work, pieces
from softmask_jax.io.answers import count as counted

# The paper's samples and scorer.
PAPER_COUNT, PAPER_LENGTH = 5_000, 1_024
GPT2_LARGE = (1_280, 36)
# Seeds of MAUVE's clustering, the settings' own first.
SEEDS = 3
REFERENCES, NONE = "config.generative.references", "none"
GIVE_REFERENCES = f"name a text instead, {REFERENCES}='files:texts/*.txt', or leave MAUVE out with {REFERENCES}={NONE}"
CACHE = f"point config.data.cache_dir or {ENVIRONMENT_VARIABLE} at a folder that can be written"
NO_INTERVAL = ("MAUVE has no interval: texts that are drawn again, as for a bootstrap, look further from the "
               "references than they are. Its values by other clusterings: results.json, details.mauve.by_seed.")


@dataclasses.dataclass(frozen=True)
class Generative:
    """See `task.Task`."""

    name = "generative"
    sections = ("samples", "sampler", "generative")
    sweeps = True

    def check(self, settings: Settings, *, allow_code: bool, allow_unsafe_code: bool) -> None:
        config = settings.generative
        for one in checkpoints(settings.models):
            if is_chat(one.path):
                raise ValueError(f"generative: {one.path} is a model of conversations, which only answers; leave the task out.")
        check_least(settings, "samples", count=1, batch_size=1, length=0)
        check_least(settings, "generative", batch_size=1, mauve_buckets=0)
        if not config.mauve_scaling > 0:
            raise ValueError(f"config.generative.mauve_scaling is {config.mauve_scaling}; it must be above 0.")
        for budget in budgets(settings.run.budgets):
            samples.budgeted(settings.sampler, settings.samples.length or PAPER_LENGTH, budget)
        if config.references != NONE:
            mauve_score.check_installed()
        if config.mauve_buckets > 2 * settings.samples.count:
            raise ValueError("config.generative.mauve_buckets is more than twice config.samples.count.")
        _reference_source(config)
        longest = open_files(config.scorer, config.compute_dtype)[0].config.max_positions
        if not 2 <= (length := config.max_length) <= longest:
            raise ValueError(f"config.generative.max_length is {length}; the scorer takes 2 to {longest} tokens.")

    def run(self, work: Work) -> Result:
        """Write, score, compare, resumably. ValueError for an unsuitable model or references."""
        samples.check_model(work.model)
        config = work.settings.generative
        # Opened first: hours of sampling should not end in a missing file.
        text = _open_references(work)
        written = samples.write(work)
        work.check_stop()
        scorer = Scorer(config.scorer, work.mesh, config.compute_dtype)
        options = {"max_length": config.max_length, "batch_size": config.batch_size, "check_stop": work.check_stop}
        ours = scores.score(scorer, written.texts, work.folder, **options, hosts=work.hosts)
        entropy = samples.entropies(written.tokens)
        estimates = {"generative_perplexity": ours.perplexity(), "entropy": Estimate.of_mean(entropy, unit="nats")}
        network = {name: getattr(scorer.config, name) for name in ("hidden_size", "num_layers", "vocab_size")}
        details = {"scored_tokens_per_text": float(ours.counted.mean()),
                   "scorer": network | {"fingerprint": scorer.fingerprint}}  # fmt: skip
        notes = _notes(written, ours, scorer)
        if text is not None:
            count, length = written.tokens.shape
            order = np.random.default_rng(work.settings.run.seed).permutation(len(text.windows))[:count]
            tokens = text.windows.gather(order)[:, :length]
            texts, cache = [work.model.tokenizer.decode(row) for row in tokens], work.model.config.data.cache_dir
            people = scores.score(scorer, texts, cache_folder(cache), **options, elsewhere=CACHE)
            estimates["mauve"], details["mauve"] = _mauve(work, ours, people)
            details["references"] = {
                "count": len(texts), "entropy": float(samples.entropies(tokens).mean()),
                "generative_perplexity": people.perplexity().value,
            }  # fmt: skip
            if len(texts) < count:
                notes.append(f"MAUVE is against {len(texts):,} references, all there are, for {count:,} samples.")
            notes += [NO_INTERVAL, *text.notes]
        estimates["tokens_per_call"] = Estimate.of_ratio(written.filled, written.calls, better="higher")
        # The median leaves out batches with compilation.
        cost = {"calls": float(written.calls.mean()), "seconds": float(np.median(written.seconds))}
        return Result(estimates, cost, details, tuple(notes))

    def compare(self, baseline: Work, other: Work) -> dict[str, Estimate]:
        """Nothing: texts of two models have no common rows to pair."""
        return {}


def _reference_source(config: Config) -> Source | None:
    """Source of the references, None for the run's own split or none. ValueError for missing files."""
    if config.references in ("", NONE):
        return None
    try:
        (source,) = described(f"references={config.references}").values()
    except ValueError:
        raise ValueError(f"{REFERENCES} is '{config.references}'; name one text as 'files:texts/*.txt'.") from None
    return open_source(REFERENCES, *source)


def _open_references(work: Work) -> Text | None:
    """Windows of human text; None for config.generative.references=none. ValueError, OSError: see `text_sets`."""
    if work.settings.generative.references == NONE:
        return None
    source = _reference_source(work.settings.generative)
    if source is None:
        return own_text(work.path, work.model, GIVE_REFERENCES)
    return other_text(REFERENCES, source, work.model)


def _mauve(work: Work, ours: Scores, people: Scores) -> tuple[Estimate, dict]:
    """MAUVE and its details, values by other clusterings among them; see NO_INTERVAL."""
    config, mine, theirs = work.settings.generative, ours.features[ours.written], people.features[people.written]
    options = {"scaling": config.mauve_scaling, "buckets": config.mauve_buckets}
    decisive = options | {"seed": config.mauve_seed, "samples": ours.key, "references": people.key}

    def clustered(piece: Piece) -> list[dict]:
        index = int(piece.index[0])
        seed = config.mauve_seed + index
        scored = mauve_score.mauve(theirs, mine, seed=seed, **options)
        return [{"index": index, "seed": seed, **dataclasses.asdict(scored)}]

    with work.records("mauve", decisive, SEEDS) as file:
        work.complete(file, pieces(np.arange(SEEDS), 1, 1), clustered)
        rows = [file.rows[index, 0] for index in range(SEEDS)]
    details = {name: rows[0][name] for name in ("star", "frontier_integral", "buckets")}
    details["by_seed"] = {str(row["seed"]): row["value"] for row in rows}
    return Estimate(rows[0]["value"], count=len(mine), better="higher"), details


def _notes(written: Samples, ours: Scores, scorer: Scorer) -> list[str]:
    notes, network = [], scorer.config
    count, length = written.tokens.shape
    if (count, length) != (PAPER_COUNT, PAPER_LENGTH):
        notes.append(f"{count:,} samples of {length:,} tokens; the paper's numbers are of {PAPER_COUNT:,} of "
                     f"{PAPER_LENGTH:,} and cannot be compared with these.")
    if (network.hidden_size, network.num_layers) != GPT2_LARGE:
        notes.append(f"The scorer has {counted(network.num_layers, 'layer')} of width {network.hidden_size}; the "
                     "paper's is GPT-2-large, 36 of 1,280.")
    if empty := int((~ours.written).sum()):
        notes.append(f"{empty:,} samples are empty texts: they count for entropy alone.")
    return notes
