"""Data: documents of files or of the built-in corpus, tokenizers, and packed batches (``docs/data.md``)."""

from moejax.data.corpus import Corpus, TokenStream, load_corpus
from moejax.data.pipeline import Batch, TrainIterator, eval_batches, train_iterator
from moejax.data.sources import read_documents
from moejax.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "TokenStream",
    "Tokenizer",
    "TrainIterator",
    "eval_batches",
    "load_corpus",
    "load_tokenizer",
    "read_documents",
    "train_iterator",
]
