"""What a task is."""

import dataclasses
from typing import Literal

Kind = Literal["last_word", "multiple_choice", "winograd", "minimal_pairs"]


@dataclasses.dataclass(frozen=True)
class Item:
    """One question: the model's choice among ``options``, pairs of context and continuation."""

    id: str
    """Names the row, e.g. ``arc_easy_test:17`` (line 17 of the file)."""
    contexts: tuple[str, ...]
    """Context of each option."""
    choices: tuple[str, ...]
    """Text of each option without what joins it to its context; its UTF-8 length normalises ``acc_norm``."""
    gold: int
    group: str = ""
    """Phenomenon or domain, scored on its own too. Empty: none."""

    def continuation(self, option: int) -> str:
        """The option's text as it follows its context: one space is put between two that have none there."""
        context, choice = self.contexts[option], self.choices[option]
        glued = context and not context[-1].isspace() and not choice[0].isspace()
        return " " + choice if glued else choice


@dataclasses.dataclass(frozen=True)
class Task:
    """A named list of items of one kind."""

    name: str
    kind: Kind
    items: tuple[Item, ...]
    neutral: str = ""
    """Context of the reference term of ``acc_pmi``, after the end-of-text token. Empty: that token alone."""
