"""Token streams in windows, as by MDLM (arXiv 2406.07524): BOS, L - 2 tokens, EOS; the incomplete last is dropped."""
from collections.abc import Sequence

import numpy as np

from softmask_jax.data.shards import ShardStream


class Windows:
    """A token stream in windows; `gather(indices [n])`: int32 [n L]. ValueError for a stream shorter than a window."""

    def __init__(self, stream: np.ndarray | ShardStream, seq_len: int, bos_id: int, eos_id: int, name: str = "corpus"):
        if seq_len < 3:
            raise ValueError(f"data.seq_len={seq_len} must be at least 3: BOS, one token, EOS")
        self.seq_len, self.bos_id, self.eos_id, self.name = seq_len, bos_id, eos_id, name
        self.num_tokens, self._stream = len(stream), stream
        if not len(self):
            size = f"{len(stream)} tokens, less than one window of {seq_len - 2} (data.seq_len - 2)"
            raise ValueError(f"the {name} split has {size}: give it more text or lower data.seq_len")

    def __len__(self) -> int:
        return self.num_tokens // (self.seq_len - 2)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        windows = np.empty((len(indices), self.seq_len), np.int32)
        windows[:, 0], windows[:, -1] = self.bos_id, self.eos_id
        starts, length = np.asarray(indices) * (self.seq_len - 2), self.seq_len - 2
        if isinstance(self._stream, np.ndarray):
            windows[:, 1:-1] = np.lib.stride_tricks.sliding_window_view(self._stream, length)[starts]
        else:
            windows[:, 1:-1] = self._stream.spans(starts, length)
        return windows


class Mixture:
    """Windows of several corpora, numbered in a row; training draws from each by its `weights`, normalised."""

    def __init__(self, parts: Sequence[Windows], weights: Sequence[float]):
        if not all(weight > 0 for weight in weights):
            raise ValueError(f"the weights of a mixture must be positive, not {', '.join(map(str, weights))}")
        self.parts, self.weights = tuple(parts), tuple(weight / sum(weights) for weight in weights)
        self.seq_len, self.name = parts[0].seq_len, parts[0].name
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        windows = np.empty((len(indices), self.seq_len), np.int32)
        for part, start, end in zip(self.parts, self.starts, self.starts[1:], strict=False):
            chosen = (indices >= start) & (indices < end)
            if chosen.any():
                windows[chosen] = part.gather(indices[chosen] - start)
        return windows
