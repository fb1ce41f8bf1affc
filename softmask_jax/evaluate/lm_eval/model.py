"""Our models as the harness sees them: texts in, answers and likelihoods out, in the order of the requests."""
import dataclasses
import functools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

import softmask_jax
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.lm_eval import arguments
from softmask_jax.evaluate.lm_eval.likelihood import Likelihood, Span, key_of
from softmask_jax.evaluate.lm_eval.texts import Texts
from softmask_jax.generate.batches import FAILED, Generator, plan, shape_of
from softmask_jax.report.patterns import Pattern
from softmask_jax.samplers import Options, SoftMask
from softmask_jax.samplers.options import TRANSITIONS

log = logging.getLogger(__name__)
NAME = "softmask_jax"
# As the harness's other models: of an answer where the task does not say, and of rows.
NEW_TOKENS, MAX_LENGTH = 256, 2_048
# Continuations between two that an interruption loses; more make fuller batches.
AT_A_TIME = 1_024


class Ask(NamedTuple):
    """One answer to make. key: (a number that the request decides, which of its repeats)."""

    pattern: Pattern
    options: Options
    stops: tuple[str, ...]
    key: tuple[int, int]


@register_model(NAME)
class SoftmaskLM(TemplateLM):
    """A model by `arguments`.

    What these say of answers goes before what a task or --gen_kwargs says: its temperature, say, is a task's 0 only where
    --model_args has none. A likelihood is the lower bound of `likelihood`, exact where that is cheap. A continuation is
    greedy if the model writes it, token by token, the surest first, by arg-max (LLaDA's rule, arXiv 2502.09992), with
    soft-masking's feedback in between. Importing this module is enough for `lm_eval.simple_evaluate` to know the model.

    Raises ValueError, OSError or ImportError, each one line, for a model that cannot be loaded or used so.
    """

    def __init__(self, **given):
        super().__init__()
        self.arguments = arguments.read(given)
        own = self.arguments.model
        mesh = self.arguments.mesh
        self.model = softmask_jax.load(
            own.checkpoint, weights=own.weights, step=own.step, base=own.base,
            mesh=None if mesh is None else sharding.make_mesh(**dataclasses.asdict(mesh)),
        )  # fmt: skip
        if self.model.tokenizer is None:
            raise ValueError("This model has no tokenizer; convert it again with its tokenizer files beside it.")
        if own.max_length and own.max_length > self.model.max_length:
            raise ValueError(f"--model_args: max_length={own.max_length} is above the model's {self.model.max_length:,}.")
        self.max_length = own.max_length or min(MAX_LENGTH, self.model.max_length)
        # What is wrong with the sampler's options is said before the tasks are read.
        self.arguments.options_for(self.model.default_alg, 1)
        self.texts = Texts(self.model, bos=self.model.family.fixed_length if own.bos is None else own.bos)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping, additional_config: Mapping | None = None):
        """The harness's own flags, such as --batch_size, give way to the same in --model_args; `auto` is our default."""
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if str(more.get("batch_size", "")).startswith("auto"):
            del more["batch_size"]
        return cls(**{**more, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping | None = None):
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.model.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Decides what the harness's cache of rendered requests is valid for."""
        return self.texts.fingerprint()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.texts.template(chat_template).text if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        return self.texts.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.texts.encode(string, begin=add_special_tokens is not False)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # Behind a chat's prompt an answer is encoded by itself, as in training.
        if self.texts.chats:
            return self.texts.encode(context), self.model.tokenizer.encode(continuation).tolist()
        return super()._encode_pair(context, continuation)

    def get_model_info(self) -> dict:
        """For the file of results."""
        return {"model_num_parameters": self.model.denoiser.num_params, "model_step": self.model.step}

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        repeats, asks, groups = Counter(), [], {}
        for index, request in enumerate(requests):
            # The harness repeats the very same object; others with the same text get the same answer.
            asks.append(self._ask(*request.args, repeat=repeats[id(request)]))
            repeats[id(request)] += 1
            groups.setdefault(asks[-1].options, []).append(index)
        found: list = [None] * len(requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for options, members in groups.items():
                patterns, keys = [asks[i].pattern for i in members], [asks[i].key for i in members]
                for place, tokens in self._filled(patterns, keys, options):
                    index = members[place]
                    generator = Generator(self.model, options, stops=asks[index].stops)
                    found[index] = generator.answer(asks[index].pattern, tokens)["text"]
                    self.cache_hook.add_partial("generate_until", requests[index].args, found[index])
                    bar.update()
        return found

    def _ask(self, context: str, gen_kwargs: Mapping, repeat: int) -> Ask:
        wanted = normalize_gen_kwargs(dict(gen_kwargs), NEW_TOKENS)
        count = self.arguments.model.max_new_tokens or wanted["max_gen_toks"]
        if count >= self.max_length:
            raise ValueError(
                f"{count:,} new tokens leave no room for a prompt in the {self.max_length:,} positions of a row; give "
                "--model_args max_new_tokens=..., or a larger max_length."
            )
        ids = self._cut(self.tok_encode(context) or [self.prefix_token_id], self.max_length - count)
        tokens = np.concatenate([ids, np.full(count, self.model.mask_token_id)]).astype(np.int32)
        options = self.arguments.options_for(self.model.default_alg, count)
        options = _with_draws(options, wanted)
        until = wanted.get("until") or []
        stops = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        number = key_of(context, json.dumps(dict(gen_kwargs), sort_keys=True, default=str)) >> 33
        return Ask(Pattern(tokens, len(ids)), options, stops, (number, repeat))

    def _filled(self, patterns: Sequence[Pattern], keys: Sequence, options: Options) -> Iterator[tuple[int, np.ndarray]]:
        """(index, tokens without padding) of each pattern, its masks filled. ValueError where the model makes NaN."""
        generator = Generator(self.model, options, self.arguments.model.seed)
        shapes = [shape_of(pattern, self.model, self.max_length) for pattern in patterns]
        for batch in plan(shapes, samples=1, batch_size=self.arguments.model.batch_size):
            # Every program takes as many rows: the first ones are computed again where there are too few.
            rows = [row for row, _ in batch.filled]
            out = generator.fill([keys[row] for row in rows], [patterns[row] for row in rows], batch.shape)
            if not np.asarray(out.finite).all():
                raise ValueError(f"{FAILED}: there is no answer; check the checkpoint.")
            for row, (index, _), tokens in zip(rows, batch.keys, np.asarray(out.tokens)):
                yield index, generator.unpadded(patterns[row], tokens)

    def _cut(self, ids: Sequence[int], room: int) -> list[int]:
        """The last `room` of a context's tokens, behind the BOS if it begins with one."""
        ids = list(ids)
        if len(ids) <= room:
            return ids
        _say_once(f"Contexts of more than {room:,} tokens lose their beginning (--model_args max_length).")
        begins = self.texts.bos and ids[0] == self.prefix_token_id and room > 0
        return ids[:1] * begins + ids[len(ids) - room + begins :]

    def _loglikelihood_tokens(self, requests: Sequence, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        spans = []
        for (context, continuation), before, scored in requests:
            if len(scored) > self.max_length:
                raise ValueError(
                    f"A continuation of {len(scored):,} tokens is longer than the {self.max_length:,} positions of a row; "
                    "give a larger --model_args max_length, or leave this task out."
                )
            before = self._cut(before, self.max_length - len(scored))
            spans.append(Span(np.array([*before, *scored], np.int32), len(before), key_of(context, continuation)))
        found: list = [None] * len(requests)
        with tqdm(total=len(spans), desc="Likelihoods", disable=disable_tqdm) as bar:
            for first in range(0, len(spans), AT_A_TIME):
                part = spans[first : first + AT_A_TIME]
                greedy = self._greedy(part)
                for index, nats in self._estimate(part):
                    found[first + index] = (nats, greedy[index])
                    self.cache_hook.add_partial("loglikelihood", requests[first + index][0], found[first + index])
                    bar.update()
        return found

    @property
    def _estimate(self) -> Likelihood:
        own, soft_mask = self.arguments.model, self.arguments.options.soft_mask
        soft_mask = SoftMask() if soft_mask == "none" else soft_mask
        return Likelihood(self.model, own.mc_num, own.batch_size, own.seed, soft_mask)

    def _greedy(self, spans: Sequence[Span]) -> list[bool]:
        found = [self.arguments.model.check_greedy] * len(spans)
        some = [i for i, span in enumerate(spans) if found[i] and len(span.tokens) > span.start]
        patterns = []
        for span in (spans[i] for i in some):
            tokens = span.tokens.copy()
            tokens[span.start :] = self.model.mask_token_id
            patterns.append(Pattern(tokens, 0))
        options = Options("maskgit_plus", tokens_per_step=1, suppress_mask=True, soft_mask=self.arguments.options.soft_mask)
        for place, tokens in self._filled(patterns, [(0, 0)] * len(some), options):
            found[some[place]] = bool((tokens == spans[some[place]].tokens).all())
        return found

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: windows of `max_length` positions, each scored behind BOS or the token before it."""
        spans, owners = [], []
        for index, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(
                self.texts.encode(text, begin=False), self.prefix_token_id, self.max_length - 1, context_len=1
            )
            for number, (before, scored) in enumerate(map(make_disjoint_window, windows)):
                spans.append(Span(np.array([*before, *scored], np.int32), len(before), key_of(text, number)))
                owners.append(index)
        found, left = [0.0] * len(requests), Counter(owners)
        for place, nats in tqdm(self._estimate(spans), total=len(spans), desc="Likelihoods", disable=disable_tqdm):
            index = owners[place]
            found[index] += nats
            left[index] -= 1
            if not left[index]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, found[index])
        return found


def _with_draws(options: Options, wanted: Mapping) -> Options:
    """The options, with what a task says of draws where they do not say it.

    Where it wants none Dream's algorithms take the likeliest token; mdlm and remdm draw in any case.
    """
    ours = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
    if options.alg in TRANSITIONS:
        ours = {"temperature": "temperature", "top_p": "nucleus_p"}
    given = {ours[name]: wanted[name] for name in ours if wanted["do_sample"] and wanted.get(name)}
    return dataclasses.replace(options, **{name: x for name, x in given.items() if getattr(options, name) is None})


@functools.cache
def _say_once(text: str) -> None:
    log.warning(text)
