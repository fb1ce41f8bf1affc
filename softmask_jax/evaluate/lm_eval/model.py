"""Our models as the harness sees them: texts in, answers and likelihoods out, in the order of the requests."""
import contextlib
import dataclasses
import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

import softmask_jax
from softmask_jax.config.progress import Progress
from softmask_jax.data.chat.template import SHIELDS, encode_renderings, shield_contents
from softmask_jax.data.sources.listing import fingerprint
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.lm_eval import arguments
from softmask_jax.evaluate.lm_eval.likelihood import Likelihood, Span, key_of
from softmask_jax.generate.batches import FAILED, Generator, plan, shape_of
from softmask_jax.io.answers import AnswerFile, Hosts
from softmask_jax.report.patterns import Pattern
from softmask_jax.samplers import Options, SoftMask
from softmask_jax.samplers.algorithms import LLADA, TRANSITIONS

log = logging.getLogger(__name__)
warn_once = functools.cache(log.warning)
NAME = "softmask_jax"
# Defaults of the harness's other models: tokens of an answer, and of a row.
NEW_TOKENS, MAX_LENGTH = 256, 2_048
# Continuations scored at once: an interruption loses at most these, and more make fuller batches.
AT_A_TIME = 1_024


class Ask(NamedTuple):
    """One answer to generate."""

    pattern: Pattern
    options: Options
    stops: tuple[str, ...]
    key: tuple[int, int]  # hash of the request, number of its repeat


@register_model(NAME)
class SoftmaskLM(TemplateLM):
    """A model by `arguments`; they win over options of a task and --gen_kwargs. Importing this module registers it.

    A likelihood is the lower bound of `likelihood`. A continuation is greedy if the model writes it by arg-max, token by
    token, the surest first (LLaDA's rule, arXiv 2502.09992), with soft-masking's feedback. ValueError, OSError or ImportError, one line, for a model that cannot be loaded or used."""

    hosts = Hosts()  # that share the requests
    folder: Path | None = None  # of the files with their results, which all of them see

    def __init__(self, **model_args):
        super().__init__()
        self.arguments = arguments.read(model_args)
        own, mesh = self.arguments.model, self.arguments.mesh
        mesh = None if mesh is None else sharding.make_mesh(**dataclasses.asdict(mesh), devices=jax.local_devices())
        self.model = softmask_jax.load(own.checkpoint, weights=own.weights, step=own.step, base=own.base, mesh=mesh)
        if self.model.tokenizer is None:
            raise ValueError("This model has no tokenizer; convert it again with its tokenizer files beside it.")
        longest = self.model.max_length
        if own.max_length and own.max_length > longest:
            raise ValueError(f"--model_args: max_length={own.max_length} is above the model's {longest:,}.")
        self.max_length = own.max_length or min(MAX_LENGTH, longest)
        # Fail on wrong sampler options before the tasks are read.
        self.arguments.options_for(self.model.default_alg, 1)
        soft_mask = self.arguments.options.soft_mask
        soft_mask = SoftMask() if soft_mask == "none" else soft_mask
        estimate = own.estimate or ("llada" if self.model.default_alg in LLADA else "stratified")
        self.likelihood = Likelihood(
            self.model, own.mc_num, own.batch_size, own.seed, soft_mask, self.arguments.options.cfg_scale or 0.0,
            arguments.ESTIMATES[estimate],
        )  # fmt: skip
        self.bos = self.model.family.fixed_length if own.bos is None else own.bos
        # The harness renders all chats, or asks for the template, before the first text is encoded.
        self.chats = False

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping, additional_config: Mapping | None = None):
        """The harness's own flags, such as --batch_size, give way to --model_args; `auto` is our default."""
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if str(more.get("batch_size", "")).startswith("auto"):
            del more["batch_size"]
        return cls(**more | dict(arg_dict))

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
        """Key of the harness's cache of rendered requests."""
        template = self.model.template
        return fingerprint(self.model.tokenizer.fingerprint(), template.fingerprint() if template else "")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Text of the model's chat template. ValueError if it has none, or none of that name."""
        if not chat_template:
            return None
        if self.model.template is None:
            raise ValueError("This model has no chat template; leave --apply_chat_template out.")
        if chat_template not in (True, "default"):
            raise ValueError(f"This model has one chat template, not {chat_template!r}; give --apply_chat_template "
                             "without a name.")
        self.chats = True
        return self.model.template.text

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text; without the generation prompt it ends with its last message. Special tokens that a message
        spells out are broken by an invisible character (see `data.chat.template`)."""
        self.chat_template(True)
        messages, _ = shield_contents(chat_history, self.model.tokenizer.special_tokens)
        text = self.model.template.render(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = messages[-1]["content"]
        for content in (last, last.rstrip(), last.strip()):
            if (start := text.rfind(content)) >= 0:
                return text[: start + len(content)]
        raise ValueError("The chat template changes the beginning of an answer; it cannot be gone on with.")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a context: a chat if chats were rendered, else with BOS; add_special_tokens: False is no context."""
        tokenizer, begin = self.model.tokenizer, add_special_tokens is not False
        if not (self.chats and begin):
            return [tokenizer.bos_id] * (begin and self.bos) + tokenizer.encode(string).tolist()
        broken = [(token[0], token[1:]) for token in tokenizer.special_tokens if token]
        shield = next((s for s in SHIELDS if s in string and any(a + s + b in string for a, b in broken)), "")
        return encode_renderings(tokenizer, [(string, shield)])[0].tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # A chat's answer is encoded by itself, as in training.
        if self.chats:
            return self.tok_encode(context), self.model.tokenizer.encode(continuation).tolist()
        return super()._encode_pair(context, continuation)

    def get_model_info(self) -> dict:
        """Entries for the results file."""
        return {"model_num_parameters": self.model.denoiser.num_params, "model_step": self.model.step}

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        repeats, asks = Counter(), []
        for request in requests:
            # The harness repeats a request as the same object; other objects of the same text get the same answer.
            asks.append(self._ask(*request.args, repeat=repeats[id(request)]))
            repeats[id(request)] += 1

        def answer(indices: Sequence[int]) -> Iterator[tuple[int, str]]:
            groups: dict = {}
            for index in indices:
                groups.setdefault(asks[index].options, []).append(index)
            for options, members in groups.items():
                patterns, keys = [asks[i].pattern for i in members], [asks[i].key for i in members]
                for member, tokens in self._filled(patterns, keys, options):
                    index = members[member]
                    generator = Generator(self.model, options, stops=asks[index].stops)
                    yield index, generator.answer(asks[index].pattern, tokens)["text"]

        return self._answered("generate_until", [request.args for request in requests], answer, disable_tqdm)

    def _answered(
        self, kind: str, requests: Sequence, answer: Callable[[Sequence[int]], Iterator[tuple[int, Any]]], quiet: bool
    ) -> list:
        """Results of all requests, in order: `answer` yields (index, result) of some. Of several hosts each answers its
        share, and has all in the end."""
        results, mine, file = {}, range(len(requests)), None
        with contextlib.ExitStack() as stack:
            if self.hosts.processes > 1:
                name = fingerprint(self.arguments, self.model.step, requests)[:16]
                file = AnswerFile(self.folder / f"{kind}-{name}.jsonl", {"requests": name}, len(requests), self.hosts)
                stack.enter_context(file).settle({})
                mine = [index for index in self.hosts.share(mine) if (index, 0) not in file.rows]
            shown = stack.enter_context(Progress(len(mine), kind, "requests", disable=quiet))
            for index, result in shown.over(answer(mine)):
                results[index] = result
                self.cache_hook.add_partial(kind, requests[index], result)
                if file:
                    file.add([{"index": index, "result": result}])
                self.hosts.check()
            if file:
                file.gather()
                results = {index: row["result"] for (index, _), row in file.rows.items()}
        return [results[index] for index in range(len(requests))]

    def _ask(self, context: str, gen_kwargs: Mapping, repeat: int) -> Ask:
        wanted = normalize_gen_kwargs(dict(gen_kwargs), NEW_TOKENS)
        count = self.arguments.model.max_new_tokens or wanted["max_gen_toks"]
        if count >= self.max_length:
            raise ValueError(f"{count:,} new tokens leave no room for a prompt in the {self.max_length:,} positions of "
                             "a row; give --model_args max_new_tokens=..., or a larger max_length.")
        ids = self._cut(self.tok_encode(context) or [self.prefix_token_id], self.max_length - count)
        tokens = np.concatenate([ids, np.full(count, self.model.mask_token_id)]).astype(np.int32)
        options = _with_draws(self.arguments.options_for(self.model.default_alg, count), wanted)
        until = wanted.get("until") or []
        stops = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        number = key_of(context, json.dumps(dict(gen_kwargs), sort_keys=True, default=str)) >> 33
        return Ask(Pattern(tokens, len(ids)), options, stops, (number, repeat))

    def _filled(
        self, patterns: Sequence[Pattern], keys: Sequence, options: Options
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Index and unpadded tokens of each pattern, its masks filled. ValueError for NaN."""
        generator = Generator(self.model, options, self.arguments.model.seed)
        shapes = [shape_of(pattern, self.model, self.max_length) for pattern in patterns]
        for batch in plan(shapes, samples=1, batch_size=self.arguments.model.batch_size):
            # Full batches, the first rows repeated.
            rows = [row for row, _ in batch.filled]
            out = generator.fill([keys[row] for row in rows], [patterns[row] for row in rows], batch.shape)
            if not np.asarray(out.finite).all():
                raise ValueError(f"{FAILED}: there is no answer; check the checkpoint.")
            for row, (index, _), tokens in zip(rows, batch.keys, np.asarray(out.tokens)):
                yield index, generator.unpadded(patterns[row], tokens)

    def _cut(self, ids: Sequence[int], room: int) -> list[int]:
        """The last `room` of a context's tokens, its BOS kept."""
        ids = list(ids)
        if len(ids) <= room:
            return ids
        warn_once(f"Contexts of more than {room:,} tokens lose their beginning (--model_args max_length).")
        begins = self.bos and ids[0] == self.prefix_token_id and room > 0
        return ids[:1] * begins + ids[len(ids) - room + begins :]

    def _loglikelihood_tokens(self, requests: Sequence, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        spans = []
        for (context, continuation), before, scored in requests:
            if len(scored) > self.max_length:
                raise ValueError(f"A continuation of {len(scored):,} tokens is longer than the {self.max_length:,} "
                                 "positions of a row; give a larger --model_args max_length, or leave this task out.")
            before = self._cut(before, self.max_length - len(scored))
            spans.append(Span(np.array([*before, *scored], np.int32), len(before), key_of(context, continuation)))

        def answer(indices: Sequence[int]) -> Iterator[tuple[int, tuple[float, bool]]]:
            for first in range(0, len(indices), AT_A_TIME):
                part = indices[first : first + AT_A_TIME]
                scored = [spans[index] for index in part]
                greedy = self._greedy(scored)
                yield from ((part[number], (nats, greedy[number])) for number, nats in self.likelihood(scored))

        texts = [request[0] for request in requests]
        return [tuple(result) for result in self._answered("loglikelihood", texts, answer, disable_tqdm)]

    def _greedy(self, spans: Sequence[Span]) -> list[bool]:
        """Whether the model writes each continuation itself; False for all without check_greedy."""
        greedy = [self.arguments.model.check_greedy] * len(spans)
        checked = [i for i, span in enumerate(spans) if greedy[i] and len(span.tokens) > span.start]
        patterns = []
        for tokens, start, _ in (spans[i] for i in checked):
            masks = np.full(len(tokens) - start, self.model.mask_token_id, np.int32)
            patterns.append(Pattern(np.concatenate([tokens[:start], masks]), 0))
        own = self.arguments.options
        options = Options("maskgit_plus", tokens_per_step=1, suppress_mask=True, soft_mask=own.soft_mask,
                          cfg_scale=own.cfg_scale)  # fmt: skip
        for row, tokens in self._filled(patterns, [(0, 0)] * len(checked), options):
            greedy[checked[row]] = bool((tokens == spans[checked[row]].tokens).all())
        return greedy

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Likelihoods of whole texts, in windows of `max_length` positions behind BOS or the token before."""
        arguments = [request.args for request in requests]

        def answer(indices: Sequence[int]) -> Iterator[tuple[int, float]]:
            spans, owners = [], []
            for index in indices:
                (text,) = arguments[index]
                ids = self.tok_encode(text, add_special_tokens=False)
                windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, context_len=1)
                for number, (before, scored) in enumerate(map(make_disjoint_window, windows)):
                    spans.append(Span(np.array([*before, *scored], np.int32), len(before), key_of(text, number)))
                    owners.append(index)
            sums, left = dict.fromkeys(indices, 0.0), Counter(owners)
            yield from ((index, 0.0) for index in indices if not left[index])
            for span, nats in self.likelihood(spans):
                index = owners[span]
                sums[index] += nats
                left[index] -= 1
                if not left[index]:
                    yield index, sums[index]

        return self._answered("loglikelihood_rolling", arguments, answer, disable_tqdm)


def _with_draws(options: Options, wanted: Mapping) -> Options:
    """The options, completed by a task's. mdlm and remdm draw even without do_sample."""
    ours = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
    if options.alg in TRANSITIONS:
        ours = {"temperature": "temperature", "top_p": "nucleus_p"}
    draws = {ours[name]: wanted[name] for name in ours if wanted["do_sample"] and wanted.get(name)}
    return dataclasses.replace(options, **{name: x for name, x in draws.items() if getattr(options, name) is None})
