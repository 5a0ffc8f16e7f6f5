"""A multiple-choice task cut from held-out text."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from moejax.config import ConfigError
from moejax.tasks.forms import Item, Task


def continuation_task(
    documents_by_domain: Mapping[str, Sequence[str]],
    *,
    per_domain: int,
    seed: int,
    context_bytes: int = 400,
    choice_bytes: int = 100,
    num_choices: int = 4,
    line_domains: Collection[str] = ("code",),
    name: str = "builtin",
) -> Task:
    """Cuts a multiple-choice task from held-out text: which of four passages comes next?

    An item is a context, its true continuation, and continuations cut in the same way from other places of
    the same domain: other documents where these have enough text, else the same document clear of the item's
    own passage. Cuts are made where words begin and end, in ``line_domains`` where lines do. Choices are
    between half and all of ``choice_bytes`` long, contexts between half and all of ``context_bytes``.
    No two choices of an item are equal, or one the beginning of the other, up to white space and case. The
    true continuations of two items never overlap. The place of the gold choice is uniformly random.

    Args:
      documents_by_domain: held-out documents of each domain.
      per_domain: items of each domain.
      seed: fixes every cut. A domain's items do not depend on which other domains there are.
      context_bytes, choice_bytes: greatest lengths, in UTF-8 bytes.
      num_choices: choices of an item, the true one included.
      line_domains: names of domains that are cut at line boundaries.
      name: the task's name; each domain is a group of it.

    Raises:
      ConfigError: a size that is too small, no domain, or a domain with too little text for ``per_domain``
        items.
    """
    sizes = {"context_bytes": context_bytes, "choice_bytes": choice_bytes, "num_choices": num_choices}
    least_of = {**dict.fromkeys(sizes, 2), "per_domain": 1, "seed": 0}
    for field, value in {**sizes, "per_domain": per_domain, "seed": seed}.items():
        least = least_of[field]
        if value < least:
            raise ConfigError(f"continuation_task {field}={value}: must be at least {least}")
    if not documents_by_domain:
        raise ConfigError("continuation_task documents_by_domain is empty: give at least one domain with held-out text")
    items: list[Item] = []
    for domain, documents in documents_by_domain.items():
        digest = hashlib.sha256(domain.encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest[:4], "little")])
        places = _Places([d.encode() for d in documents], context_bytes, choice_bytes, domain in line_domains)
        drawn = places.draw(rng, per_domain)
        if len(drawn) < per_domain:
            raise ConfigError(
                f"continuation_task domain {domain!r}: {len(documents)} documents have room for "
                f"{len(drawn)} items, not per_domain={per_domain}; lower per_domain, context_bytes or "
                f"choice_bytes, or add text"
            )
        for i, place in enumerate(drawn):
            wrong = places.draw_wrong(rng, place, num_choices - 1)
            if len(wrong) < num_choices - 1:
                raise ConfigError(
                    f"continuation_task domain {domain!r}: found only {len(wrong)} passages unlike a true "
                    f"continuation, not {num_choices - 1}; give more text or lower num_choices"
                )
            order = rng.permutation(num_choices)
            choices = [places.choice(p) for p in (place, *wrong)]
            shuffled = tuple(choices[j] for j in order)
            gold = int(np.flatnonzero(order == 0)[0])
            items.append(Item(f"{name}:{domain}:{i}", (places.context(place),) * num_choices, shuffled, gold, domain))
    return Task(name, "multiple_choice", tuple(items))


class _Places:
    """Where in one domain a continuation may begin, with the context before and the passage after.

    A place is an index into ``doc`` (which document), ``left``, ``start`` and ``end`` (byte offsets: the
    context is ``[left, start)``, the passage ``[start, end)``). Cuts are made beside ASCII white space, so no
    character is broken.
    """

    def __init__(self, documents: list[bytes], context_bytes: int, choice_bytes: int, lines: bool):
        self.documents, self.choice_bytes = documents, choice_bytes
        parts: list[np.ndarray] = []
        for d, document in enumerate(documents):
            text = np.frombuffer(document, np.uint8)
            blank = np.isin(text, np.frombuffer(b" \t\n\r\x0b\x0c", np.uint8))
            brk = text == ord("\n") if lines else blank
            # A passage begins after a break and ends before one (or with the document), never on a blank.
            before, after = np.append(True, brk)[:-1], np.append(brk, True)[1:]
            first = np.flatnonzero(before & ~(brk if lines else blank))
            last = np.flatnonzero(~blank & after) + 1
            if not len(first) or not len(last):
                continue
            left = first[np.searchsorted(first, first - context_bytes)]
            end = np.append(0, last)[np.searchsorted(last, first + choice_bytes, side="right")]
            enough = (first - left >= context_bytes // 2) & (end - first >= (choice_bytes + 1) // 2)
            parts.append(np.stack([np.full(len(first), d), left, first, end], axis=1)[enough])
        table = np.concatenate(parts) if parts else np.zeros((0, 4), np.int64)
        self.doc, self.left, self.start, self.end = (table[:, i] for i in range(4))

    def context(self, place: int) -> str:
        return self.documents[self.doc[place]][self.left[place] : self.start[place]].decode()

    def choice(self, place: int) -> str:
        return self.documents[self.doc[place]][self.start[place] : self.end[place]].decode()

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Up to ``count`` places whose passages do not overlap."""
        drawn: list[int] = []
        taken: dict[int, list[int]] = {}
        for place in rng.permutation(len(self.doc)):
            if len(drawn) == count:
                break
            others = taken.setdefault(int(self.doc[place]), [])
            if all(abs(int(self.start[place]) - s) >= self.choice_bytes for s in others):
                others.append(int(self.start[place]))
                drawn.append(int(place))
        return drawn

    def draw_wrong(self, rng: np.random.Generator, place: int, count: int) -> list[int]:
        """Up to ``count`` places with passages unlike the one at ``place`` and unlike each other."""
        other = np.flatnonzero(self.doc != self.doc[place])
        apart = (self.end <= self.left[place]) | (self.start >= self.end[place])
        same = np.flatnonzero((self.doc == self.doc[place]) & apart)
        texts, wrong = [_folded(self.choice(place))], list[int]()
        for pool in (other, same):
            # Text of documents repeats (licences, templates): go on until enough passages differ.
            for candidate in _drawn(rng, pool):
                if len(wrong) == count:
                    return wrong
                text = _folded(self.choice(candidate))
                if any(text.startswith(t) or t.startswith(text) for t in texts):
                    continue
                texts.append(text)
                wrong.append(candidate)
        return wrong


def _drawn(rng: np.random.Generator, pool: np.ndarray) -> Iterator[int]:
    """All of ``pool`` in random order; shuffling it whole waits until a few single draws were not enough."""
    if len(pool):
        yield from map(int, pool[rng.integers(len(pool), size=16)])
        yield from map(int, rng.permutation(pool))


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
