"""Writes a checkpoint's logits of given tokens, to hold one program's numbers against another's.

    python -m experiments.logits --checkpoint=runs/ca --tokens=tokens.npy --output=logits.npy [--dtype=float32]
        [--mesh=data=2,expert=4]

``tokens.npy``: int32 ``[B, S]``, each row one document from its start. ``logits.npy``: float32 ``[B, S, V]``, where
``logits[b, s]`` is about the token after ``tokens[b, :s + 1]``. Beside it nothing is written.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments import session
from moejax.config import ConfigError
from moejax.data.cache import replacing
from moejax.dispatch import token_shards
from moejax.model import Decoder
from moejax.pretrained import open_model


def read_tokens(path: Path) -> Int[np.ndarray, "B S"]:
    """The token ids of a ``.npy`` file.

    Raises:
      ConfigError: no such file, not an array of two axes of whole numbers, or an empty one.
    """
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--tokens={path} cannot be read as one .npy array ({error})") from error
    if not isinstance(tokens, np.ndarray):
        raise ConfigError(f"--tokens={path} is an archive of arrays: save one array with numpy.save")
    if tokens.dtype.kind not in "iu":
        raise ConfigError(f"--tokens={path} has dtype {tokens.dtype}: token ids are int32; save tokens.astype('int32')")
    if tokens.ndim != 2 or tokens.size == 0:
        raise ConfigError(f"--tokens={path} has shape {tokens.shape}: expected [B, S] with at least one token")
    return tokens


def logits(model: Decoder, tokens: Int[np.ndarray, "B S"], batch_size: int = 0) -> Float[np.ndarray, "B S V"]:
    """Logits in float32, ``batch_size`` rows at a time (0: all at once).

    Rows are independent unless the model drops pairs (``moe.capacity_factor``) or its router is not causal: then a
    batch is one unit, as in training.

    Raises:
      ConfigError: ids outside the vocabulary.
    """
    vocab = model.config.vocab_size
    wrong = np.argwhere((tokens < 0) | (tokens >= vocab))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ConfigError(
            f"tokens[{row}, {column}]={tokens[row, column]} and {len(wrong) - 1} others lie outside the "
            f"checkpoint's vocabulary, 0..{vocab - 1}: use its tokenizer"
        )
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state: nnx.State, tokens: Array, mask: Array) -> Array:
        return nnx.merge(graph, state)(tokens, mask=mask, key=jax.random.key(0)).logits.astype(jnp.float32)

    shards = token_shards()
    size = -(-min(batch_size or len(tokens), len(tokens)) // shards) * shards
    out = []
    for first in range(0, len(tokens), size):
        rows = tokens[first : first + size].astype(np.int32)
        padded = np.zeros((size, tokens.shape[1]), np.int32)  # one shape: the last batch does not compile anew
        padded[: len(rows)] = rows
        mask = np.broadcast_to((np.arange(size) < len(rows))[:, None], padded.shape)
        out.append(np.asarray(forward(state, padded, mask))[: len(rows)])
    return np.concatenate(out)


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    session.define_checkpoint_flag(values)
    flags.DEFINE_string("tokens", None, "File of int32 [B, S], made by numpy.save.", flag_values=values)
    flags.DEFINE_string("output", None, "File to write: float32 [B, S, V].", flag_values=values)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Type of the computation. Default: the config's.", flag_values=values
    )
    session.define_mesh_flag(values)
    flags.DEFINE_integer("batch_size", 0, "Rows at a time; 0: all.", lower_bound=0, flag_values=values)


def command(values: flags.FlagValues) -> int:
    for name in ("checkpoint", "tokens", "output"):
        if not values[name].value:
            raise ConfigError(f"--{name} is missing: see python -m experiments.logits --help")
    output = Path(values.output)
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output={output}: there is no folder {output.parent}; make it first")
    tokens = read_tokens(Path(values.tokens))
    with session.on_mesh(values) as mesh:
        model, _, meta = open_model(values.checkpoint, compute_dtype=values.dtype, mesh=mesh)
        result = logits(model, tokens, values.batch_size)
    with replacing(output) as file:
        np.save(file, result, allow_pickle=False)
    session.say(
        f"{output}: float32 {list(result.shape)} of step {meta['step']}, computed in {model.config.compute_dtype}"
    )
    return 0


if __name__ == "__main__":
    session.launch(define_flags, command)
