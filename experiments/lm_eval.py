"""Evaluates a checkpoint with lm-eval (EleutherAI's harness): any of its tasks, also those that generate text.

    pip install 'moejax[eval]'
    python -m experiments.lm_eval --checkpoint=runs/ca --tasks=lambada_openai,arc_easy [--num_fewshot=5] [--limit=100]
        [--batch_size=8] [--max_length=2048] [--add_bos_token] [--output=results.json]
    python -m experiments.lm_eval --checkpoint=runs/ca --tasks=arc_easy --capacity_limit=token_drop:factor=1.5
    python -m experiments.lm_eval --checkpoint=runs/ca --tasks=mine --include_path=FOLDER    # tasks of one's own

From Python: ``lm_eval.simple_evaluate(model=experiments.lm_eval.open_model("runs/ca"), tasks=[...])``. The definitions
are lm-eval's (``docs/tasks.md``).
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments import limit_flags, session
from experiments.generate import tokenizer_of
from moejax import decode
from moejax.config import ConfigError, ModelConfig
from moejax.evaluate.harness import GenerateFn, Harness, adapt
from moejax.evaluate.requests import narrow_rows
from moejax.evaluate.scoring import Batch, ScoreFn
from moejax.model import Decoder
from moejax.pretrained import context_length
from moejax.pretrained import open_model as open_weights
from moejax.results import write_atomically
from moejax.train import token_nll
from moejax.types import Limit


def score_fn(model: Decoder, vocab_size: int, *, dropless: bool, limits: tuple[Limit, ...] | None = None) -> ScoreFn:
    """Log-probabilities of targets under the model, and whether each is the likeliest of the tokenizer's ids.

    Args:
      model: computes in its ``compute_dtype``, log-probabilities in float32.
      vocab_size: of the tokenizer; the model's is padded.
      dropless: without the config's limits, so that the answer to one request does not depend on the others.
      limits: these instead, whatever ``dropless`` says; they act within a batch.
    """
    in_force = limits or (() if dropless else None)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: dict[str, Array]) -> tuple[Array, Array]:
        out = nnx.merge(graph, state)(
            batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], mask=batch["mask"],
            limits=in_force, key=jax.random.key(0),
        )  # fmt: skip
        greedy = jnp.argmax(out.logits[..., :vocab_size], axis=-1) == batch["targets"]
        return -token_nll(out.logits, batch["targets"]), greedy

    def score(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        logprob, greedy = run(state, {name: jnp.asarray(value) for name, value in batch.items()})
        return np.asarray(logprob), np.asarray(greedy)

    return score


def generate_fn(
    model: Decoder, vocab_size: int, limits: tuple[Limit, ...] = (), limit_steps: bool = False
) -> GenerateFn:
    """Greedy decoding; ids that the tokenizer does not have are never chosen. Dropless but for ``limits``, which act on
    prompts, and on each step with ``limit_steps``: then one token at a time, as no ended row may be in the next."""

    how: dict[str, Any] = {"limits": limits, "limit_steps": limit_steps} if limits else {}
    if limits and limit_steps:
        how["at_a_time"] = 1

    def known(logits: Float[Array, "B V"], key: Array) -> Int[Array, "B"]:
        return decode.greedy(logits[:, :vocab_size], key)

    def generate(
        prompts: list[np.ndarray], max_new_tokens: int, pad_to: int, ended: np.ndarray
    ) -> Iterator[np.ndarray]:
        return decode.generate(model, prompts, max_new_tokens, sampler=known, pad_to=pad_to, ended=ended, **how)

    return generate


def open_harness(
    checkpoint: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    max_length: int | None = None,
    dropless: bool = True,
    limits: Callable[[ModelConfig], tuple[Limit, ...]] = lambda model: (),
    limit_steps: bool = False,
    **options: Any,
) -> tuple[Harness, str]:
    """(the checkpoint's model as `Harness`, its name: model name, step and tokenizer).

    Args:
      checkpoint: workdir of a run, its checkpoints folder, one step folder, or a Hugging Face folder.
      dtype: of the computation; None: the config's.
      max_length: tokens that the model sees at once; None: the sequence length of its training, of a Hugging Face
        folder its ``max_position_embeddings``.
      dropless: without the config's limits (capacity factor); generation is always so.
      limits: of the checkpoint's model, the limits in force instead.
      limit_steps: they act on the steps of generation too.
      options: further fields of `Harness`.

    Raises:
      ConfigError: no checkpoint there, or its tokenizer is not what it was; steps limited on virtual ranks.
    """
    max_length = max_length or context_length(checkpoint)  # raises before minutes of reading
    model, config, meta = open_weights(checkpoint, compute_dtype=dtype)
    tokenizer = tokenizer_of(config.data, meta.get("data", {}), model.config.vocab_size)
    size, in_force = tokenizer.vocab_size, limits(model.config)
    if limit_steps and (ranks := decode.virtual_ranks(model.config, in_force)) > 1:
        raise ConfigError(
            f"--limit_decode with model.moe.virtual_ranks={ranks} in the checkpoint: it would have to divide the rows "
            "of every batch, and the last one has fewer; leave out --limit_decode, or set virtual_ranks=1"
        )
    harness = Harness(
        score_fn(model, size, dropless=dropless, limits=in_force),
        generate_fn(model, size, in_force, limit_steps),
        tokenizer,
        max_length,
        short_length=narrow_rows(model.config.attention.rope),
        fills=not in_force,
        **options,
    )
    return (
        harness,
        f"{config.name} step {meta['step']} of {Path(checkpoint).resolve()}, {tokenizer.name} {tokenizer.hash}",
    )


def open_model(checkpoint: str | Path, **options: Any) -> Any:
    """The checkpoint as an ``lm_eval.api.model.LM``; arguments and errors as :func:`open_harness`, and ConfigError
    without lm-eval."""
    return adapt(*open_harness(checkpoint, **options))


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    del argv
    session.define_checkpoint_flag(values)
    flags.DEFINE_list("tasks", [], "Names of lm-eval's tasks, with commas between.", flag_values=values)
    flags.DEFINE_integer("num_fewshot", None, "Examples in the context. Default: the task's.", 0, flag_values=values)
    flags.DEFINE_integer("limit", None, "Documents of each task. Default: all.", 1, flag_values=values)
    flags.DEFINE_integer("batch_size", 8, "Requests of max_length tokens at a time.", 1, flag_values=values)
    flags.DEFINE_integer(
        "max_length",
        None,
        "Tokens seen at once; longer contexts lose their left end, and how many did is told. Default: as in training; "
        "of a Hugging Face folder its max_position_embeddings. Where memory ends, lower --batch_size, then this.",
        1,
        flag_values=values,
    )
    flags.DEFINE_integer("max_gen_toks", 256, "Tokens to generate where a task says nothing.", 1, flag_values=values)
    flags.DEFINE_bool("add_bos_token", False, "Begin contexts with the end-of-text token.", flag_values=values)
    flags.DEFINE_bool("dropless", True, "Score without the model's own capacity limits.", flag_values=values)
    limit_flags.define_flags(values, "capacity_limit")
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Type of the computation. Default: the config's.", flag_values=values
    )
    flags.DEFINE_string("include_path", None, "Folder of further task files (YAML).", flag_values=values)
    flags.DEFINE_string("output", None, "JSON file for the results.", flag_values=values)


def command(values: flags.FlagValues) -> int:
    if not values.checkpoint:
        raise ConfigError("--checkpoint is missing: give the workdir of a run, e.g. --checkpoint=runs/quickstart")
    if not values.tasks:
        raise ConfigError("--tasks is missing: name lm-eval's tasks, e.g. --tasks=lambada_openai,arc_easy")
    if values.output:
        session.check_output(values.output)
    if values.include_path and not Path(values.include_path).is_dir():
        raise ConfigError(f"--include_path={values.include_path}: there is no such folder")
    manager = task_manager(values.tasks, values.include_path)
    harness, name = open_harness(
        values.checkpoint,
        dtype=values.dtype,
        max_length=values.max_length,
        dropless=values.dropless,
        limits=lambda model: limit_flags.given(values, model, "capacity_limit"),
        limit_steps=values.limit_decode,
        batch_size=values.batch_size,
        add_bos_token=values.add_bos_token,
        max_gen_toks=values.max_gen_toks,
    )
    evaluate(harness, name, manager, values)
    return 0


def task_manager(tasks: list[str], include_path: str | None) -> Any:
    """lm-eval's index of tasks.

    Raises:
      ConfigError: lm-eval is not installed, or has no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed: pip install 'moejax[eval]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ConfigError(
            f"--tasks={','.join(unknown)}: lm-eval has no such task; `lm_eval ls tasks` lists them; --include_path "
            "names a folder of your own"
        )
    return manager


def evaluate(harness: Harness, name: str, manager: Any, values: flags.FlagValues) -> None:
    """Runs the tasks, prints lm-eval's table, and writes its results."""
    import lm_eval
    from lm_eval.utils import handle_non_serializable, make_table

    results = lm_eval.simple_evaluate(
        model=adapt(harness, name),
        tasks=manager.match_tasks(values.tasks),
        num_fewshot=values.num_fewshot,
        limit=values.limit,
        task_manager=manager,
        log_samples=False,
    )
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    if harness.truncated:
        session.say(
            f"note: {harness.truncated:,} requests lost the left end of their context, to fit --max_length="
            f"{harness.max_length}: they were not scored as the task has them; raise --max_length if the model reads "
            "longer text, or lower --num_fewshot or --max_gen_toks"
        )
    if values.output:
        settings = {n: values[n].value for n in ("add_bos_token", "dropless", "dtype", "num_fewshot", "limit")}
        if values.capacity_limit:
            settings |= {"capacity_limit": values.capacity_limit, "limit_decode": values.limit_decode}
        settings |= {"max_length": harness.max_length, "batch_size": harness.batch_size, "lm_eval": lm_eval.__version__}
        table = {"model": name, "settings": settings, "truncated": harness.truncated} | results
        write_atomically(Path(values.output), json.dumps(table, indent=1, default=handle_non_serializable) + "\n")
        session.say(f"{values.output}: results of {name}")


if __name__ == "__main__":
    session.launch(define_flags, command)
