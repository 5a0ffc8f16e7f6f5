"""Classes of tokens by their text, so that expert loads can be seen for words, digits and punctuation apart.

A token's class follows from the bytes that it stands for and, for a letter, from the token before it: with a tokenizer
of single bytes only the neighbour tells the beginning of a word from its rest. So one rule serves bytes and BPE.
"""

import numpy as np
from jaxtyping import Int

from moejax.data.tokenizers import Tokenizer

TOKEN_CLASSES = ("word start", "word continuation", "digits", "whitespace", "punctuation", "other")
"""Names of the classes; a class is its place here.

Leading whitespace of a token is set aside; the first character after it decides:

- *word start*: a letter (of any script) after whitespace of its own token, or after a token that does not end in a
  letter, or at the beginning of a document or window;
- *word continuation*: a letter right after a token that ends in a letter;
- *digits*: a decimal digit or another numeral;
- *whitespace*: nothing but whitespace;
- *punctuation*: any other character, with symbols and control characters;
- *other*: no whole character: special tokens, and bytes that are a part of one (of ``é`` with a tokenizer of bytes).
"""

START, CONTINUATION, DIGITS, WHITESPACE, PUNCTUATION, OTHER = range(len(TOKEN_CLASSES))


class TokenClassifier:
    """Gives each token of a batch its class.

    Args:
      tokenizer: whose ids are classified; an id past its vocabulary (a padded embedding table) is *other*.
    """

    count = len(TOKEN_CLASSES)

    def __init__(self, tokenizer: Tokenizer) -> None:
        kinds = [_kind(text) for text in tokenizer.token_bytes()] + [(OTHER, False, False)]
        self._class = np.array([kind[0] for kind in kinds], np.int32)
        self._leans = np.array([kind[1] for kind in kinds])  # a letter without whitespace before it
        self._ends_in_letter = np.array([kind[2] for kind in kinds])

    def __call__(
        self, tokens: Int[np.ndarray, "B S"], segment_ids: Int[np.ndarray, "B S"] | None = None
    ) -> Int[np.ndarray, "B S"]:
        """Classes of ``tokens``; ``segment_ids`` tells documents of one row apart (None: one for each row)."""
        known = np.minimum(np.asarray(tokens), len(self._class) - 1)
        before = np.zeros(known.shape, bool)
        before[:, 1:] = self._ends_in_letter[known[:, :-1]]
        if segment_ids is not None:
            before[:, 1:] &= np.asarray(segment_ids)[:, 1:] == np.asarray(segment_ids)[:, :-1]
        return np.where(before & self._leans[known], CONTINUATION, self._class[known]).astype(np.int32)


def _kind(text: bytes) -> tuple[int, bool, bool]:
    """Class of a token at the beginning of a text; whether a letter before it would change that; whether it ends in a
    letter."""
    whole = text.decode("utf-8", errors="ignore")  # the characters that are there in full
    if not whole:
        return OTHER, False, False
    rest = whole.lstrip()
    if not rest:
        return WHITESPACE, False, False
    first, ends = rest[0], whole[-1].isalpha()
    if first.isalpha():
        return START, rest == whole, ends
    return (DIGITS if first.isnumeric() else PUNCTUATION), False, ends
