"""Between the harness's texts and tokens: plain contexts, and chats that a model's template rendered."""
from collections.abc import Mapping, Sequence

from softmask_jax.data.chat.template import ChatTemplate, SHIELDS, encode_renderings, shield_contents
from softmask_jax.data.sources.listing import fingerprint


class Texts:
    """Encodes texts with a model's tokenizer. bos: contexts begin with it, but for chats, whose template says it.

    The harness gets a chat as text and gives it back as such: special tokens that a message spells out stay broken up in
    it by an invisible character (see `chat_template`), so that those of the template alone become ids.
    """

    def __init__(self, model, bos: bool):
        self.model, self.bos = model, bos
        # The harness renders all chats, or asks for the template, before the first text is encoded.
        self.chats = False

    def fingerprint(self) -> str:
        template = self.model.template
        return fingerprint(self.model.tokenizer.fingerprint(), template.fingerprint() if template else "")

    def template(self, name: bool | str = True) -> ChatTemplate:
        """The model's chat template. ValueError if it has none, or none of that name."""
        found = self.model.template
        if found is None:
            raise ValueError("This model has no chat template; leave --apply_chat_template out.")
        if name not in (True, "default"):
            raise ValueError(f"This model has one chat template, not {name!r}; give --apply_chat_template without a name.")
        self.chats = True
        return found

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text; without the generation prompt its last message is left open, to be gone on with."""
        template = self.template()
        messages, _ = shield_contents(messages, self.model.tokenizer.special_tokens)
        text = template.render(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = messages[-1]["content"]
        for content in (last, last.rstrip(), last.strip()):
            if (place := text.rfind(content)) >= 0:
                return text[: place + len(content)]
        raise ValueError("The chat template changes the beginning of an answer; it cannot be gone on with.")

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Ids of a text; begin: of a context, which may begin with BOS, and is a chat if chats were rendered."""
        tokenizer = self.model.tokenizer
        if self.chats and begin:
            broken = [(token[0], token[1:]) for token in tokenizer.special_tokens if token]
            shield = next((s for s in SHIELDS if s in text and any(a + s + b in text for a, b in broken)), "")
            return encode_renderings(tokenizer, [(text, shield)])[0].tolist()
        return [tokenizer.bos_id] * (begin and self.bos) + tokenizer.encode(text).tolist()
