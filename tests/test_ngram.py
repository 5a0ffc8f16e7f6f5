"""Byte n-gram models: probabilities by hand, and that they are probabilities."""

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.ngram import ByteNGram

TEXT = "the cat sat on the mat; the dog sat on the log. " * 5 + "ünïcode too, and some other words here."


def test_unigram_by_hand():
    # a:2 b:1 c:1, D = n1 / (n1 + 2 n2) = 2 / 4; the mass passed down is D * 3 / 4 of the uniform 1/256
    p = ByteNGram(["abac"], 1).next_byte(b"")
    base = 0.5 * 3 / 4 / 256
    assert p[ord("a")] == pytest.approx(1.5 / 4 + base)
    assert p[ord("b")] == pytest.approx(0.5 / 4 + base)
    assert p[ord("z")] == pytest.approx(base)


def test_bigram_by_hand():
    # bigrams of "abab" and "ac": ab 2, ba 1, ac 1, so D2 = 2 / (2 + 2 * 1) = 1/2.
    # distinct bytes before: b 1 (a), a 1 (b), c 1 (a); none has 2, so D1 = 1/2 by its fallback.
    model = ByteNGram(["abab", "ac"], 2)
    lower = {c: 0.5 / 3 + 0.5 * 3 / 3 / 256 for c in "abc"}
    unseen = 0.5 / 256
    after_a = model.next_byte(b"a")
    assert after_a[ord("b")] == pytest.approx(1.5 / 3 + 0.5 * 2 / 3 * lower["b"])
    assert after_a[ord("c")] == pytest.approx(0.5 / 3 + 0.5 * 2 / 3 * lower["c"])
    assert after_a[ord("a")] == pytest.approx(0.5 * 2 / 3 * lower["a"])
    assert after_a[ord("z")] == pytest.approx(0.5 * 2 / 3 * unseen)
    # "c" was never followed by anything: the shorter context decides alone
    assert model.next_byte(b"c")[ord("b")] == pytest.approx(lower["b"])
    bits = -np.log2([lower["a"], after_a[ord("c")]]).mean()
    assert model.bits_per_byte("ac") == pytest.approx(bits)


@pytest.mark.parametrize("order", [1, 2, 3, 6, 8])
def test_probabilities_sum_to_one_in_any_context(order):
    model = ByteNGram([TEXT, "short", "x"], order)
    rng = np.random.default_rng(order)
    data = TEXT.encode()
    contexts = [b"", b"t", b"\xff\x00\xfe", b"the ", bytes(rng.integers(0, 256, 12, np.uint8))]
    contexts += [data[i : i + n] for i, n in zip(rng.integers(0, 200, 20), rng.integers(1, 12, 20), strict=True)]
    for context in contexts:
        p = model.next_byte(context)
        assert p.shape == (256,) and (p > 0).all()
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_scores_are_the_product_over_positions_and_stop_at_documents():
    model = ByteNGram([TEXT], 4)
    text = "the sat zoo"
    by_position = [model.next_byte(text[:i].encode())[ord(c)] for i, c in enumerate(text)]
    np.testing.assert_allclose(model.probabilities([text]), by_position)
    np.testing.assert_allclose(model.probabilities([text, text]), by_position * 2)
    assert model.bits_per_byte([text, text]) == pytest.approx(model.bits_per_byte(text))


def test_longer_contexts_help_on_repeated_text():
    bits = [ByteNGram([TEXT], order).bits_per_byte(TEXT) for order in (1, 2, 3, 6)]
    assert bits == sorted(bits, reverse=True) and bits[-1] < bits[0] / 3
    noise = bytes(np.random.default_rng(0).integers(0, 256, 4000, np.uint8))
    assert ByteNGram([TEXT], 6).bits_per_byte([noise]) > 8


def test_refusals():
    for order in (0, 9):
        with pytest.raises(ConfigError, match=f"order={order}"):
            ByteNGram(["a"], order)
    with pytest.raises(ConfigError, match="no bytes to fit"):
        ByteNGram([""], 3)
    with pytest.raises(ConfigError, match="no bytes to score"):
        ByteNGram(["a"], 3).bits_per_byte("")
