"""NLTK's interpolated n-gram model (Witten and Bell) of token windows, to score samples independently of the models."""
from collections.abc import Sequence

import numpy as np

try:
    from nltk.lm import WittenBellInterpolated
    from nltk.util import everygrams
except ImportError as error:
    raise ImportError(f"Scores of samples need `pip install 'softmask_jax[reproduce]'` ({error}).") from error

ORDER = 4


class NGrams:
    """`model(tokens [N L]) -> [N L - 1]`: -log p of each token after the first, nats, float64."""

    def __init__(self, windows: np.ndarray, vocab_size: int, order: int = ORDER):
        """windows: [W L] token ids; contexts do not reach across windows. Every token counts once more, so that none
        has probability 0."""
        self.order, self.model = order, WittenBellInterpolated(order)
        vocabulary = [str(token) for token in range(vocab_size)]
        self.model.fit([[(token,) for token in vocabulary]], vocabulary)
        self.model.fit(everygrams(_words(row), max_len=order) for row in windows)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return -np.log(2) * np.array([self._bits(_words(row)) for row in tokens])

    def _bits(self, words: Sequence[str]) -> list[float]:
        """log2 p of each word after the first."""
        contexts = (words[max(0, i - self.order + 1) : i] for i in range(1, len(words)))
        return [self.model.logscore(word, context) for word, context in zip(words[1:], contexts, strict=True)]


def _words(row: np.ndarray) -> list[str]:
    """Token ids as NLTK's words."""
    return [str(token) for token in row.tolist()]
