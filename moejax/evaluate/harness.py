"""The three questions that lm-eval asks a model: log-likelihood, rolling log-likelihood, greedy text.

The definitions are those of lm-eval 0.4 (``TemplateLM`` and its causal Hugging Face model, Gao et al., "The Language
Model Evaluation Harness"). Written against the ``args`` tuples of its requests: lm-eval itself is only imported by
:func:`adapt`. The model comes in as two callables.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int

from moejax.config import ConfigError
from moejax.evaluate import scoring
from moejax.evaluate.requests import Request, bucket_lengths, request_batches, window_of
from moejax.evaluate.scoring import ScoreFn

Tokens = list[int]
LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the number of tokens to generate, the first that is given counts."""
OF_DRAWS = ("top_k", "top_p", "min_p", "seed")
"""Arguments without a meaning where the most likely token is taken."""


class GenerateFn(Protocol):
    """Continues prompts greedily: yields one token for each, ``max_new_tokens`` times at most.

    Prompts are padded to ``pad_to`` tokens, which changes no result. What rows that have ``ended`` still get is not
    read; the caller writes it there.
    """

    def __call__(
        self, prompts: list[Int[np.ndarray, "n"]], max_new_tokens: int, pad_to: int, ended: Bool[np.ndarray, "B"]
    ) -> Iterator[Int[np.ndarray, "B"]]: ...


class Tokenizer(scoring.Tokenizer, Protocol):
    """Text to token ids without special tokens, and back."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    def decode(self, ids: Sequence[int], /) -> str: ...


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a ``generate_until`` request asks for."""

    max_new_tokens: int
    until: tuple[str, ...]


@dataclasses.dataclass
class Harness:
    """A model as lm-eval sees it.

    Attributes:
      score: log-probabilities of targets, and whether each is the most likely token.
      generate: greedy continuations.
      tokenizer: of the model; its end-of-text token is what an empty context is replaced by.
      max_length: tokens that the model sees at once; longer contexts lose their left end.
      batch_size: requests of ``max_length`` tokens at a time (where that is above ``requests.WIDE``, of what the
        longest of a call needs); of shorter ones more.
      add_bos_token: begins every non-empty context with the end-of-text token too, as training began every document.
      max_gen_toks: tokens to generate where the task does not say.
      done: told of each result as soon as it is there: question, the request's args, answer.
      short_length: no request of up to so many tokens is scored in wider rows (``requests.narrow_rows``).
      fills: a last batch of fewer requests to generate is filled up with rows of one token, so that it is not compiled
        anew. Not where limits act: these rows would take part in them.
      truncated: requests whose context lost its left end, so far.
    """

    score: ScoreFn
    generate: GenerateFn
    tokenizer: Tokenizer
    max_length: int
    batch_size: int = 8
    add_bos_token: bool = False
    max_gen_toks: int = 256
    done: Callable[[str, tuple[Any, ...], Any], None] = lambda question, args, answer: None
    short_length: int = 0
    fills: bool = True
    truncated: int = dataclasses.field(default=0, init=False)

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context) in nats, and whether greedy decoding of the
        context gives just this continuation.

        Raises:
          ConfigError: a continuation without a token of its own, or longer than ``max_length``.
        """
        pairs = [self.encode_pair(*args) for args in requests]

        def tell(index: int, answer: tuple[float, bool]) -> None:
            self.done("loglikelihood", requests[index], answer)

        return self.score_pairs(pairs, tell)

    def loglikelihood_rolling(self, requests: Sequence[tuple[str]]) -> list[float]:
        """Log-likelihood of each whole text in nats; every token is predicted once, the first after end-of-text."""
        windows, owner = [], []
        for index, (text,) in enumerate(requests):
            found = list(rolling_windows(self.encode(text), self.tokenizer.eot_id, self.max_length))
            windows += found
            owner += [index] * len(found)
        totals = [0.0] * len(requests)
        left = np.bincount(owner, minlength=len(requests)) if owner else np.zeros(len(requests), int)

        def tell(window: int, answer: tuple[float, bool]) -> None:
            index = owner[window]
            totals[index] += answer[0]
            left[index] -= 1
            if not left[index]:
                self.done("loglikelihood_rolling", requests[index], totals[index])

        self.score_pairs(windows, tell)
        return totals

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The greedy continuation of each context, up to a stop string, an end token or the number of tokens asked for.

        Raises:
          ConfigError: no room for the context beside the tokens asked for; draws, or arguments that are not known.
        """
        wanted = [parse(arguments, self.max_gen_toks) for _, arguments in requests]
        prompts: list[Tokens] = []
        for (context, _), want in zip(requests, wanted, strict=True):
            room = self.max_length - want.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks={want.max_new_tokens} leaves no room for a context in max_length={self.max_length}: "
                    "ask for fewer tokens, or raise max_length if the model was trained on longer text"
                )
            tokens = self.encode_context(context)
            self.truncated += len(tokens) > room
            prompts.append(tokens[-room:] or [self.tokenizer.eot_id])
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (-wanted[i].max_new_tokens, -len(prompts[i])))
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            made = self._continue([prompts[i] for i in rows], [wanted[i] for i in rows])
            for index, text in zip(rows, made, strict=True):
                texts[index] = text
                self.done("generate_until", requests[index], text)
        return texts

    def _continue(self, prompts: list[Tokens], wanted: list[Wanted]) -> list[str]:
        begin, ends = [self.tokenizer.eot_id], self.tokenizer.stop_ids
        longest = max(len(prompt) for prompt in prompts)
        window = window_of(longest, self.max_length)
        pad_to = next(size for size in bucket_lengths(window) if size >= longest)
        filler = [begin] * (self.batch_size - len(prompts)) if self.fills else []
        arrays = [np.array(prompt, np.int32) for prompt in prompts + filler]
        rows: list[Tokens] = [[] for _ in prompts]
        texts: list[str | None] = [None] * len(prompts)
        ended = np.arange(len(arrays)) >= len(prompts)
        for new in self.generate(arrays, max(want.max_new_tokens for want in wanted), pad_to, ended):
            for i, want in enumerate(wanted):
                if texts[i] is None:
                    token = int(new[i])
                    rows[i] += [token] if token not in ends else []
                    text = self.tokenizer.decode(rows[i])
                    stopped = token in ends or any(stop in text for stop in want.until)
                    if stopped or len(rows[i]) == want.max_new_tokens:
                        texts[i], ended[i] = before_stop(text, want.until), True
            if all(text is not None for text in texts):
                break
        return [text or "" for text in texts]

    # --- tokens -------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> Tokens:
        return [int(i) for i in self.tokenizer.encode(text)]

    def encode_context(self, context: str) -> Tokens:
        """Tokens of a context; none for an empty one."""
        begin = [self.tokenizer.eot_id] if self.add_bos_token and context else []
        return begin + self.encode(context)

    def encode_pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """(context, continuation) as tokens: the continuation's are those of the whole text after as many as the
        context has alone, and white space at the context's end goes to the continuation.

        Raises:
          ConfigError: see :meth:`loglikelihood`.
        """
        shown = f"context={context[-60:]!r}, continuation={continuation[:60]!r}"
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if stripped:
            before = self.encode_context(stripped)
            after = self.encode_context(stripped + continuation)[len(before) :]
        else:
            before, after = [self.tokenizer.eot_id], self.encode(continuation)
            if after[:1] == before:
                after = after[1:]
        if not after:
            raise ConfigError(f"{shown}: the continuation adds no token to its context; there is nothing to score")
        if len(after) > self.max_length:
            raise ConfigError(
                f"{shown}: the continuation has {len(after)} tokens, more than max_length={self.max_length}: "
                "raise max_length if the model was trained on longer text, or leave the task out"
            )
        return before, after

    def score_pairs(
        self, pairs: Sequence[tuple[Tokens, Tokens]], tell: Callable[[int, tuple[float, bool]], None]
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, all most likely) of each pair's second part; ``tell`` gets them as they come.

        Raises:
          FloatingPointError: the model gave NaN for a scored token.
        """
        requests = []
        for before, after in pairs:
            whole = before + after
            tokens = whole[-(self.max_length + 1) :]
            self.truncated += len(tokens) < len(whole)
            requests.append(Request(np.array(tokens, np.int32), len(tokens) - len(after)))
        answers: dict[int, tuple[float, bool]] = {}
        window = window_of(max((len(r.tokens) - 1 for r in requests), default=1), self.max_length)
        for batch, placed in request_batches(requests, self.batch_size, window, self.short_length):
            logprob, greedy = scoring.call(self.score, batch)
            for index, row in placed:
                span = slice(requests[index].start - 1, len(requests[index].tokens) - 1)
                total = float(np.sum(logprob[row, span], dtype=np.float64))
                if math.isnan(total):
                    raise FloatingPointError(
                        f"request {index}: the model gave NaN for a scored token; its parameters or inputs are broken"
                    )
                answers[index] = total, bool(np.all(greedy[row, span]))
                tell(index, answers[index])
        return [answers[index] for index in range(len(pairs))]


def rolling_windows(tokens: Tokens, prefix: int, max_length: int) -> Iterator[tuple[Tokens, Tokens]]:
    """(context, tokens to predict), each token once: whole windows after one token of context, the last with as much
    context as fits (lm-eval's rolling windows with a context of 1, made disjoint)."""
    if tokens:
        yield [prefix], tokens[:max_length]
    for begin in range(max_length, len(tokens), max_length):
        end = min(begin + max_length, len(tokens))
        yield tokens[end - max_length - 1 : begin], tokens[begin:end]


def before_stop(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def parse(arguments: Mapping[str, Any], default: int) -> Wanted:
    """The arguments of a ``generate_until`` request; ``default`` tokens where they do not say how many.

    Raises:
      ConfigError: draws, a number of tokens below 1, stop strings that are no strings, an argument that is not known.
    """
    rest = dict(arguments)
    until = rest.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(stop, str) for stop in until):
        raise ConfigError(f"until={until!r}: stop sequences must be strings")
    given = [value for name in LIMIT_NAMES if (value := rest.pop(name, None)) is not None]
    count = int(given[0]) if given else default
    if count < 1:
        raise ConfigError(f"max_gen_toks={count}: must be at least 1")
    draws, temperature = rest.pop("do_sample", None), float(rest.pop("temperature", None) or 0.0)
    if draws or (draws is None and temperature > 0):
        raise ConfigError(
            f"do_sample={draws}, temperature={temperature:g}: only greedy decoding is there; set do_sample=False"
        )
    if unknown := sorted(rest.keys() - set(OF_DRAWS)):
        raise ConfigError(f"generation argument {unknown[0]}={rest[unknown[0]]!r} is not known here: leave it out")
    return Wanted(count, tuple(stop for stop in until if stop))


def adapt(harness: Harness, name: str) -> Any:
    """The harness as an ``lm_eval.api.model.LM``, for ``lm_eval.simple_evaluate(model=...)``.

    Args:
      harness: answers; its ``done`` is replaced, so that answers reach lm-eval's cache. Its ``truncated`` is the
        model's too.
      name: of model and tokenizer, for the keys of that cache.

    Raises:
      ConfigError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ConfigError(
            f"lm-eval cannot be imported ({error}): install the extra, pip install 'moejax[eval]'"
        ) from error

    class MoejaxLM(LM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return harness.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return harness.loglikelihood_rolling([request.args for request in requests])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return harness.generate_until([request.args for request in requests])

        @property
        def tokenizer_name(self) -> str:
            return name

        @property
        def truncated(self) -> int:
            return harness.truncated

    lm = MoejaxLM()
    harness.done = lambda question, args, answer: lm.cache_hook.add_partial(question, args, answer)
    return lm
