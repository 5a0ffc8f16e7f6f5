"""Word runs that two texts share: how held-out text is kept apart from training text.

A *word* is a longest run of letters and digits, in lower case; a *run* is 13 words in a row within one
document. Runs are compared by 64-bit hashes: a collision can delete a block too many (with about 1e7 runs,
about once in 1e12 look-ups), and can never keep one that is shared.
"""

import hashlib
import re
from collections.abc import Iterable

import numpy as np

RUN_WORDS = 13
_WORD = re.compile(r"[^\W_]+")
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no word of a run is multiplied away


def words(text: str) -> list[str]:
    """Words of ``text``: runs of letters and digits, in lower case."""
    return _WORD.findall(text.lower())


class RunIndex:
    """The set of word runs of some documents.

    Args:
      documents: texts whose runs are kept; a run never crosses two of them.
      run: words in a run.
    """

    def __init__(self, documents: Iterable[str], run: int = RUN_WORDS):
        self._run = run
        self._words: dict[str, int] = {}
        hashes = [self._hashes(words(document)) for document in documents]
        self._known = np.unique(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)

    def __len__(self) -> int:
        """Distinct runs."""
        return len(self._known)

    def shared(self, text_words: list[str]) -> np.ndarray:
        """Bool array: does the run that starts at each word stand in the indexed documents?

        Its length is ``max(0, len(text_words) - run + 1)``.
        """
        asked = self._hashes(text_words)
        if not len(self._known):
            return np.zeros(len(asked), bool)
        place = np.minimum(np.searchsorted(self._known, asked), len(self._known) - 1)
        return self._known[place] == asked

    def _hashes(self, text_words: list[str]) -> np.ndarray:
        count = len(text_words) - self._run + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        known = self._words
        values = np.empty(len(text_words), np.uint64)
        for i, word in enumerate(text_words):
            value = known.get(word)
            if value is None:
                value = known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
            values[i] = value
        total = np.zeros(count, np.uint64)
        for offset in range(self._run):
            total = total * np.uint64(_FACTOR) + values[offset : offset + count]
        return total


def remove_shared_blocks(text: str, index: RunIndex, separator: str) -> tuple[str, int]:
    """Deletes the blocks of ``text`` that take part in a run of ``index``.

    A deletion brings other words together, so this repeats until no run is shared.

    Args:
      text: one held-out document.
      index: runs of the training text.
      separator: regular expression between blocks, such as ``"\\n\\n+"``; it must match no word.

    Returns:
      The text that is left, and how many blocks were deleted.
    """
    parts = re.split(f"({separator})", text)
    blocks, gaps = parts[0::2], parts[1::2] + [""]
    by_block = [words(block) for block in blocks]
    left = list(range(len(blocks)))
    while True:
        sequence = [word for i in left for word in by_block[i]]
        owner = np.repeat(np.array(left, np.int64), [len(by_block[i]) for i in left])
        starts = np.flatnonzero(index.shared(sequence))
        if not len(starts):
            break
        touched = np.unique(owner[(starts[:, None] + np.arange(index._run)).ravel()])
        gone = set(touched.tolist())
        left = [i for i in left if i not in gone]
    kept = "".join(blocks[i] + (gaps[i] if n + 1 < len(left) else "") for n, i in enumerate(left))
    return kept, len(blocks) - len(left)
