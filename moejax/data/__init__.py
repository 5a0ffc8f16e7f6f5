"""Data: documents of files or of the built-in corpus, tokenizers, and packed batches (``docs/data.md``)."""

from moejax.data.classes import TOKEN_CLASSES, TokenClassifier
from moejax.data.corpus import Corpus, TokenStream, load_corpus
from moejax.data.pipeline import Batch, TrainIterator, eval_batches, train_iterator
from moejax.data.sources import read_documents
from moejax.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "TOKEN_CLASSES",
    "Batch",
    "Corpus",
    "TokenClassifier",
    "TokenStream",
    "Tokenizer",
    "TrainIterator",
    "eval_batches",
    "load_corpus",
    "load_tokenizer",
    "read_documents",
    "train_iterator",
]
