"""Writes a checkpoint's logits of given tokens, to hold one program's numbers against another's.

    python -m experiments.logits --checkpoint=runs/ca --tokens=tokens.npy --output=logits.npy [--dtype=float32]
        [--mesh=data=2,expert=4] [--mtp]

``tokens.npy``: int32 ``[B, S]``, each row one document from its start. ``logits.npy``: float32 ``[B, S, V]``, where
``logits[b, s]`` is about the token after ``tokens[b, :s + 1]``.

``--mtp`` also reads the multi-token-prediction modules, K of them, and writes theirs to ``logits.mtp.npy``
(``--mtp_output`` names another file): float32 ``[K, B, S, V]``, where ``[k - 1, b, s]`` is about the token
``k + 1`` places after ``tokens[b, s]``, given ``tokens[b, :s + k + 1]``. The last k places of a row have no such
prediction and hold NaN. Beside these nothing is written.
"""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments import replicate_flags, session
from moejax.config import ConfigError
from moejax.data.cache import replacing
from moejax.dispatch import token_shards
from moejax.limits import of_config
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
    return _computed(model, tokens, batch_size, mtp=False)[0]


def all_logits(
    model: Decoder, tokens: Int[np.ndarray, "B S"], batch_size: int = 0
) -> tuple[Float[np.ndarray, "B S V"], Float[np.ndarray, "K B S V"]]:
    """:func:`logits`, and those of the multi-token-prediction modules, NaN where a place has no prediction."""
    main, further = _computed(model, tokens, batch_size, mtp=True)
    return main, np.moveaxis(further, 1, 0)


def _computed(model: Decoder, tokens: Int[np.ndarray, "B S"], batch_size: int, *, mtp: bool) -> list[np.ndarray]:
    """``[logits]``, with ``mtp`` also those of the modules, ``[B, K, S, V]``."""
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
    def forward(state: nnx.State, tokens: Array, mask: Array) -> list[Array]:
        made = nnx.merge(graph, state)(tokens, mask=mask, key=jax.random.key(0), mtp=mtp)
        out = [made.logits.astype(jnp.float32)]
        if made.further is not None:
            known = jnp.where(made.further.valid[..., None], made.further.logits, jnp.nan)
            out.append(jnp.moveaxis(known, 0, 1))
        return out

    shards = token_shards()
    size = -(-min(batch_size or len(tokens), len(tokens)) // shards) * shards
    out = []
    for first in range(0, len(tokens), size):
        rows = tokens[first : first + size].astype(np.int32)
        padded = np.zeros((size, tokens.shape[1]), np.int32)  # one shape: the last batch does not compile anew
        padded[: len(rows)] = rows
        mask = np.broadcast_to((np.arange(size) < len(rows))[:, None], padded.shape)
        out.append([np.asarray(array)[: len(rows)] for array in forward(state, padded, mask)])
    return [np.concatenate(arrays) for arrays in zip(*out, strict=True)]


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    session.define_checkpoint_flag(values)
    flags.DEFINE_string("tokens", None, "File of int32 [B, S], made by numpy.save.", flag_values=values)
    flags.DEFINE_string("output", None, "File to write: float32 [B, S, V].", flag_values=values)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Type of the computation. Default: the config's.", flag_values=values
    )
    session.define_mesh_flag(values)
    replicate_flags.define_flags(values)
    session.define_mtp_flag(values)
    flags.DEFINE_string(
        "mtp_output", None, "With --mtp: file for their logits. Default: --output with .mtp before its ending.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("batch_size", 0, "Rows at a time; 0: all.", lower_bound=0, flag_values=values)


def command(values: flags.FlagValues) -> int:
    for name in ("checkpoint", "tokens", "output"):
        if not values[name].value:
            raise ConfigError(f"--{name} is missing: see python -m experiments.logits --help")
    replicate_flags.check(values)
    outputs = _outputs(values)
    tokens = read_tokens(Path(values.tokens))
    with session.on_mesh(values) as mesh:
        model, _, meta = open_model(values.checkpoint, compute_dtype=values.dtype, mesh=mesh, mtp=values.mtp)
        model = replicate_flags.applied(values, model, mesh, of_config(model.config.moe))
        results = all_logits(model, tokens, values.batch_size) if values.mtp else [
            logits(model, tokens, values.batch_size)]  # fmt: skip
    with contextlib.ExitStack() as stack:  # all of them or none
        for output, result in zip(outputs, results, strict=True):
            np.save(stack.enter_context(replacing(output)), result, allow_pickle=False)
    for output, result in zip(outputs, results, strict=True):
        session.say(
            f"{output}: float32 {list(result.shape)} of step {meta['step']}, computed in {model.config.compute_dtype}"
        )
    return 0


def _outputs(values: flags.FlagValues) -> list[Path]:
    """The files to write: of the model, and with ``--mtp`` of the multi-token-prediction modules.

    Raises:
      ConfigError: no folder for one of them, two that are one, or a file for modules that are not asked for.
    """
    outputs = {"output": Path(values.output)}
    if values.mtp_output and not values.mtp:
        raise ConfigError(f"--mtp_output={values.mtp_output} is for the logits that --mtp asks for: add --mtp")
    if values.mtp:
        beside = outputs["output"]
        default = beside.with_name(f"{beside.stem}.mtp{beside.suffix}")
        outputs["mtp_output"] = Path(values.mtp_output) if values.mtp_output else default
    for name, path in outputs.items():
        session.check_output(path, name)
    if len({path.absolute() for path in outputs.values()}) < len(outputs):
        raise ConfigError(f"--mtp_output={values.mtp_output} is --output too: name another file")
    return list(outputs.values())


if __name__ == "__main__":
    session.launch(define_flags, command)
