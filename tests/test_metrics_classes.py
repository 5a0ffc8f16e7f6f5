"""Loads by token class: which class a token has, and that the layers' sums by class add up, whatever the router."""

import dataclasses
from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import limits, routing
from moejax.config import AttentionConfig, MeshConfig, RouterConfig
from moejax.data import TOKEN_CLASSES, TokenClassifier
from moejax.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer, byte_alphabet, train_bpe
from moejax.model import Decoder, build
from moejax.moe import summarise
from moejax.sharding import make_mesh, put_batch
from moejax.types import MoEMetrics, RouteContext, TokenClass
from tests.moe_fakes import filled
from tests.small import quick_compilation, random_batch, small_model

TEXT = "The cafe's  404 errors,\n\tin 中文 and \u00e9t\u00e9.\n"


@pytest.fixture(scope="module", autouse=True)
def quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.mktemp("programs")):
        yield


def named(tokenizer: Tokenizer, text: str) -> list[tuple[bytes, str]]:
    ids, texts = tokenizer.encode(text), tokenizer.token_bytes()
    found = TokenClassifier(tokenizer)(ids[None])[0]
    return [(texts[i], TOKEN_CLASSES[c]) for i, c in zip(ids, found, strict=True)]


def test_classes_of_bytes():
    found = named(ByteTokenizer(), "The 4x's\n\u00e9a")
    assert [c for _, c in found] == [
        "word start", "word continuation", "word continuation", "whitespace", "digits", "word start", "punctuation",
        "word start", "whitespace", "other", "other", "word start",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer(train_bpe(300, [TEXT * 3, "the errors in the cafe " * 9]), "trained")


def test_classes_of_bpe(bpe: BpeTokenizer):
    found = named(bpe, TEXT)
    assert b"".join(text for text, _ in found) == TEXT.encode()
    by_text = dict(found)
    assert by_text[b"The"] == "word start" and by_text[b" cafe"] == "word start"
    assert {by_text[text] for text in by_text if text.decode(errors="ignore").strip()[:1] in ("中", "é")} <= {
        "word start", "word continuation", "other",
    }  # fmt: skip
    assert {by_text[text] for text in by_text if text.strip().isdigit()} == {"digits"}
    assert {by_text[text] for text in by_text if not text.strip()} == {"whitespace"}
    assert {by_text[text] for text in by_text if text.startswith((b"'", b",", b"."))} == {"punctuation"}


def test_a_word_in_pieces_starts_once(bpe: BpeTokenizer):
    found = named(bpe, " errorsinthecafe")
    assert len(found) > 1
    assert [c for _, c in found] == ["word start"] + ["word continuation"] * (len(found) - 1)


def test_documents_begin_words_and_ids_without_text_are_other():
    tokenizer = ByteTokenizer()
    tokens = np.array([[ord("a"), ord("b"), ord("c"), tokenizer.eot_id, 300]])
    segments = np.array([[1, 1, 2, 2, 2]])
    found = TokenClassifier(tokenizer)(tokens, segments)[0]
    assert [TOKEN_CLASSES[c] for c in found] == ["word start", "word continuation", "word start", "other", "other"]


def test_bytes_of_tokens(bpe: BpeTokenizer):
    assert sorted(byte_alphabet().values()) == list(range(256))
    for tokenizer in (bpe, ByteTokenizer()):
        texts = tokenizer.token_bytes()
        assert [len(text) for text in texts] == tokenizer.byte_lengths.tolist()
        assert b"".join(texts[i] for i in tokenizer.encode(TEXT)) == TEXT.encode()
        assert texts[tokenizer.eot_id] == b""


# --- sums of the layers -------------------------------------------------------------------------------------------


def add_up(m: MoEMetrics) -> None:
    by = m.by_class
    assert by is not None and by.routed.shape == (*m.routed.shape[:-1], 3, m.routed.shape[-1])
    np.testing.assert_array_equal(by.routed.sum(axis=-2), m.routed)
    np.testing.assert_array_equal(by.tokens.sum(axis=-1), m.tokens)
    np.testing.assert_array_equal(by.dropped.sum(axis=-1), m.dropped)
    np.testing.assert_allclose(by.entropy_sum.sum(axis=-1), m.entropy_sum, rtol=1e-5)


# Tables of all other routers have the form of the first.
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("topk_of_softmax", "expert_choice") else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(routing.FAMILIES)
    ],
)
def test_classes_add_up_for_every_router(name: str):
    fam = routing.FAMILIES[name]
    router = RouterConfig(name=name, k=max(fam.min_k, min(2, fam.max_k or 2)), noncausal="allow")
    rng = np.random.default_rng(0)
    tokens, experts = 40, 4
    weights = {n: rng.normal(size=spec.shape).astype(np.float32) for n, spec in fam.arrays(8, experts).items()}
    classes, mask = rng.integers(0, 3, tokens).astype(np.int32), np.arange(tokens) < 33
    x = rng.normal(size=(tokens, 8)).astype(np.float32)

    @jax.jit
    def both(x: np.ndarray) -> tuple[MoEMetrics, MoEMetrics]:
        off = RouteContext(mask=jnp.asarray(mask))
        made = fam.route(x, weights, off, router)
        kept = limits.apply((limits.token_drop(0.75, "score"),), made, off)
        on = dataclasses.replace(off, token_class=TokenClass(jnp.asarray(classes), 3))
        return tuple(summarise(made, kept, ctx, jnp.int32(0)) for ctx in (off, on))

    off, on = jax.device_get(both(x))
    assert off.by_class is None
    chex.assert_trees_all_equal(dataclasses.replace(on, by_class=None), off)
    add_up(on)
    real = np.bincount(classes[mask], minlength=3)
    np.testing.assert_array_equal(on.by_class.tokens, real)  # padding counts nowhere
    assert on.dropped > 0
    if fam.causal:
        np.testing.assert_array_equal(on.by_class.routed.sum(axis=1), router.k * real)


def scored(model: Decoder, devices: int) -> tuple[np.ndarray, np.ndarray, MoEMetrics]:
    """Logits without and with classes, and the metrics with them."""
    piece = {name: leaf[0] for name, leaf in random_batch().items()}
    piece["token_class"] = (piece["tokens"] % 3).astype(np.int32)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])

    @jax.jit
    def forward(batch: dict) -> tuple:
        given = {"segment_ids": batch["segment_ids"], "mask": batch["mask"]}
        on = model(batch["tokens"], **given, token_class=TokenClass(batch["token_class"], 3))
        return model(batch["tokens"], **given).logits, on.logits, on.metrics

    with jax.set_mesh(mesh):
        return jax.device_get(forward(put_batch(piece, mesh)))


def test_in_the_model_classes_change_nothing_and_eight_devices_count_as_one():
    config = small_model(first_dense=0, every=1)
    config = dataclasses.replace(config, num_layers=1, activation="relu", attention=AttentionConfig(1, 1, 8))
    model = filled(lambda: build(config))
    off, on, one = scored(model, devices=1)
    np.testing.assert_array_equal(off, on)
    eight = scored(model, devices=8)[2]
    add_up(eight)
    np.testing.assert_array_equal(one.by_class.routed, eight.by_class.routed)
    np.testing.assert_array_equal(one.by_class.tokens, eight.by_class.tokens)
    np.testing.assert_allclose(one.by_class.entropy_sum, eight.by_class.entropy_sum, rtol=1e-5)
    batch = random_batch()
    real = np.bincount((batch["tokens"] % 3)[batch["mask"]], minlength=3)
    assert real.sum() < batch["tokens"].size
    np.testing.assert_array_equal(one.by_class.tokens, [real])
    np.testing.assert_array_equal(one.by_class.routed.sum(axis=2), [2 * real])
