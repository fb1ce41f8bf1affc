"""BOS, EOS and mask of foreign vocabularies, as their config files name them, else by well-known names.

A missing mask becomes a new last id. Qwen's vocabulary always gets Dream's BOS, 151665, and mask, 151666."""
import json
from collections.abc import Mapping
from pathlib import Path

from softmask_jax.data.tokenizers.base import END_OF_TEXT

EOS_NAMES = (END_OF_TEXT, "</s>", "<eos>", "[EOS]", "[SEP]")
BOS_NAMES = ("<s>", "<bos>", "[BOS]", "[CLS]")
MASK_NAMES = ("<|mask|>", "<mask>", "[MASK]", "<|mdm_mask|>")
OTHER_NAMES = ("<pad>", "<unk>", "[PAD]", "[UNK]")
CONFIG_FILE, MAP_FILE = "tokenizer_config.json", "special_tokens_map.json"

QWEN_RANKS = 151_643
# The only added tokens that are not special: text may contain them.
QWEN_TOOL_CALLS = ("<tool_call>", "</tool_call>")
DREAM_BOS, DREAM_MASK = "<|beginoftext|>", "<|mask|>"
QWEN_ADDED = (
    END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", *QWEN_TOOL_CALLS, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", DREAM_BOS, DREAM_MASK,
)
QWEN_IDS = {token: id_ for id_, token in enumerate(QWEN_ADDED, QWEN_RANKS)}


def named_tokens(folder: Path) -> dict[str, str]:
    """Tokens by role (bos, eos, mask, cls, sep) as the files in `folder` name them; empty without such files."""
    config, tokens_map = (read_json(folder / name, optional=True) for name in (CONFIG_FILE, MAP_FILE))
    named = {}
    for role in ("bos", "eos", "mask", "cls", "sep"):
        token = _text(config.get(f"{role}_token") or tokens_map.get(f"{role}_token"))
        if isinstance(token, str):
            named[role] = token
        elif token is not None:
            raise ValueError(f"{folder}: {role}_token={token!r} in {CONFIG_FILE} or {MAP_FILE} is no token; correct it")
    return named


def template_tokens(folder: Path) -> dict[str, str | list[str]]:
    """Special tokens that a chat template may name, under the names of `transformers`, from both files."""
    tokens = {}
    for name in (MAP_FILE, CONFIG_FILE):
        content = read_json(folder / name, optional=True)
        extra = content.get("extra_special_tokens")
        for key, value in (content | (extra if isinstance(extra, dict) else {})).items():
            if key == "additional_special_tokens" and isinstance(value, list):
                tokens[key] = [text for text in map(_text, value) if isinstance(text, str)]
            elif isinstance(_text(value), str) and (key.endswith("_token") or isinstance(extra, dict) and key in extra):
                tokens[key] = _text(value)
    return {key: value for key, value in tokens.items() if value}


def _text(token: object) -> object:
    """A token as text; in files also an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def special_ids(vocabulary: Mapping[str, int], named: Mapping[str, str]) -> tuple[int, int, int]:
    """BOS, EOS and mask. Raises ValueError, one line, without an EOS, or when the mask is also BOS or EOS."""
    bos_names = BOS_NAMES
    if is_qwen(vocabulary):
        vocabulary = {**vocabulary, DREAM_BOS: QWEN_IDS[DREAM_BOS], DREAM_MASK: QWEN_IDS[DREAM_MASK]}
        bos_names = (DREAM_BOS,)

    def look_up(roles: tuple[str, ...], names: tuple[str, ...]) -> int | None:
        for role in roles:
            if role in named:
                if named[role] not in vocabulary:
                    raise ValueError(f"{role}_token is {named[role]!r}, which is no token here; correct {CONFIG_FILE}")
                return vocabulary[named[role]]
        return next((vocabulary[name] for name in names if name in vocabulary), None)

    eos_id = look_up(("eos", "sep"), EOS_NAMES)
    if eos_id is None:
        raise ValueError(f"no token ends a text ({' '.join(EOS_NAMES)}); name one as eos_token in {CONFIG_FILE}")
    if bos_names is BOS_NAMES and vocabulary.get(END_OF_TEXT) == eos_id:
        bos_names = (END_OF_TEXT,)
    bos_id = look_up(("bos", "cls"), bos_names)
    mask_id = look_up(("mask",), MASK_NAMES)
    bos_id = eos_id if bos_id is None else bos_id
    mask_id = max(vocabulary.values()) + 1 if mask_id is None else mask_id
    if mask_id in (bos_id, eos_id):
        raise ValueError(f"the mask is also BOS or EOS; name another mask_token in {CONFIG_FILE}")
    return bos_id, eos_id, mask_id


def is_qwen(vocabulary: Mapping[str, int]) -> bool:
    """Whether it is the vocabulary of Qwen 2 or 2.5; later ones use Dream's ids for other tokens."""
    if any(vocabulary.get(token) != QWEN_IDS[token] for token in QWEN_ADDED[:3]):
        return False
    ours = {QWEN_IDS[token]: token for token in (DREAM_BOS, DREAM_MASK)}
    return all(ours.get(id_, token) == token for token, id_ in vocabulary.items())


def read_text(path: Path) -> str:
    """Text of a file. Raises OSError, ValueError when it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); get the file anew") from None


def read_json(path: Path, optional: bool = False) -> dict:
    """The object in a JSON file, or {} when it is missing and `optional`."""
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); get the file anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no JSON object but a {type(content).__name__}; get the file anew")
    return content
