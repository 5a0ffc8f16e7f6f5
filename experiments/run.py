"""Trains, evaluates, and makes the paper's table that the config names.

    python -m experiments.run --config=configs/papers/capacity_aware.py:tiny --workdir=runs/ca --config.train.steps=200

The same command on the same workdir resumes; what is finished is skipped. ``--dry_run`` checks the config and prints
the plan without touching the workdir or allocating the model, for any devices: --mesh=data=8,expert=2, --platform,
--dry_run_compile (``docs/plan.md``). ``--row=ID`` measures a results row again and says
whether it agrees (``docs/results.md``).
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import dry_run, session
from experiments.training_rows import PAPER as TRAINING
from experiments.training_rows import training_rows
from moejax import checkpoint, count, metrics, pretrained, sharding, validate
from moejax.config import ConfigError, ExperimentConfig, config_hash
from moejax.data import Corpus, load_corpus, train_iterator
from moejax.evaluate import Request, evaluate_tasks, narrow_rows, prepare, request_batches
from moejax.loop import Run, check_origin, resolve_vocab
from moejax.ngram import ngram_baseline
from moejax.plan import cut_by_virtual_ranks
from moejax.progress import show_load
from moejax.results import append_rows, read_rows
from moejax.tasks import Task, continuation_task, load_task

MADE = ("row", "scale", "config", "command", "commit", "dirty", "device", "device_count", "versions", "time")
"""Fields that the rows of one evaluation share: what they are called, and where and when it was done."""
NGRAM_ORDERS = (3, 6)
NGRAM_TRAIN_BYTES = 8_000_000
"""Bytes of each domain that the n-gram baselines are fitted on, at most."""


def load_tasks(config: ExperimentConfig, corpus: Corpus, token_shards: int) -> list[Task]:
    """The tasks that ``eval.tasks`` names; "builtin" is cut from the corpus's held-out text.

    Raises:
      ConfigError: a task that cannot be used, two of one name, or batches that virtual ranks cannot share.
    """
    tasks, files = [], dict[str, str]()
    for name in config.eval.tasks:
        file = "builtin (the task cut from held-out text)" if name == "builtin" else str(Path(config.data.root) / name)
        if name == "builtin":
            split = config.eval.final_split
            texts = {d: corpus.documents(d, split) for d in corpus.domains if split in corpus.splits(d)}
            per_domain = max(1, (config.eval.task_limit or 300) // len(texts))
            tasks.append(continuation_task(texts, per_domain=per_domain, seed=config.data.seed))
        else:
            tasks.append(load_task(file, config.eval.task_limit))
        if other := files.get(tasks[-1].name):  # rows go by the task's name: those of one would replace the other's
            raise ConfigError(
                f"eval.tasks names two tasks {tasks[-1].name!r}, {other} and {file}: their rows could not be told "
                'apart; leave one out, rename a file, or give it a first line {"kind": ..., "task": "ANOTHER NAME"}'
            )
        files[tasks[-1].name] = file
    for task in tasks:  # an unusable task is an error now, not after the training
        asked = prepare(task, corpus.tokenizer, config.data.seq_len)
        if config.model.moe.virtual_ranks > 1 and validate.has_experts(config.model):
            _check_ranks_of(task, asked.requests, config, token_shards)
    return tasks


def _check_ranks_of(task: Task, requests: Sequence[Request], config: ExperimentConfig, token_shards: int) -> None:
    """Raises ConfigError where virtual ranks do not divide the batches of a task, whose rows are shorter than texts."""
    sizes, short = config.eval.batch_size, narrow_rows(config.model.attention.rope)
    for batch, _ in request_batches(requests, sizes, config.data.seq_len, short):
        rows, width = batch["tokens"].shape
        what = f"a batch of task {task.name!r} in {rows} rows of {width}"
        tokens = rows // sizes * width  # for each sequence that eval.batch_size counts
        for problem in cut_by_virtual_ranks(config, "eval.batch_size", sizes, tokens, token_shards, what):
            raise ConfigError(str(problem))


def task_hash(task: Task) -> str:
    """SHA-256 of all that is scored of a task: of what was read, as its file may change while the model trains."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(task), sort_keys=True).encode()).hexdigest()


def final_evaluation(run: Run, tasks: list[Task], say: Any) -> bool:
    """Held-out bits per byte by domain beside byte n-grams, and tasks, of the best checkpoint; False: done before."""
    config, corpus = run.config, run.corpus
    state, step = run.best()
    done = [r for r in metrics.read_metrics(run.workdir / "metrics.jsonl") if r["kind"] == "final"]
    asked = {"step": step, "split": config.eval.final_split, "max_tokens": config.eval.final_max_tokens,
             "batch_size": config.eval.batch_size, "tasks": list(config.eval.tasks),
             "task_limit": config.eval.task_limit, "task_hashes": [task_hash(task) for task in tasks]}  # fmt: skip
    if done and done[-1].get("asked") == asked:
        say(f"evaluation of step {step}: done before")
        return False
    split = config.eval.final_split
    scores, loads = run.score_domains(run.scorer(state), split, config.eval.final_max_tokens)
    if loads:
        load = run.load_row("final_load", step, loads) | {"split": split}
        run.writer.write(load)
        title = f"expert load of step {step}, {split} text (docs/healthy.md):"
        show_load(load, title, None if say is session.say else say)
    cut = f"; the model read its first {config.eval.final_max_tokens} tokens" if config.eval.final_max_tokens else ""
    say(f"fitting byte n-gram baselines (they read the whole split{cut}) ...")
    ngram = {str(n): ngram_baseline(corpus, n, split, max_train_bytes=NGRAM_TRAIN_BYTES) for n in NGRAM_ORDERS}
    for domain, score in scores.items():
        say(f"  {domain:10s} {score.bits_per_byte:.3f} bits per byte   perplexity {score.perplexity:.2f} per token   "
            + "   ".join(f"byte {n}-gram {ngram[n][domain]:.3f}" for n in ngram if domain in ngram[n]))  # fmt: skip
    rows = []
    for task in evaluate_tasks(
        run.scorer(state),
        tasks,
        corpus.tokenizer,
        batch_size=config.eval.batch_size,
        seq_len=config.data.seq_len,
        short=narrow_rows(config.model.attention.rope),
    ):
        rows += [{k: row[k] for k in ("task", "metric", "value", "stderr", "n", "chance")} for row in task.rows]
        for row in task.rows:
            if "/" not in row["task"]:
                chance = f" (chance {row['chance']:.2f}, n={row['n']})" if row["chance"] is not None else ""
                say(f"  {row['task']} {row['metric']} {row['value']:.3f}{chance}")
    if rows:
        run.writer.write({"kind": "tasks", "step": step, "tasks": rows})
    run.writer.write(
        {
            "kind": "final",
            "step": step,
            "split": split,
            "asked": asked,
            "config_hash": config_hash(config),
            "ngram": ngram,
            "ngram_max_train_bytes": NGRAM_TRAIN_BYTES,
            "bits_per_byte": {d: s.bits_per_byte for d, s in scores.items()},
            "perplexity": {d: s.perplexity for d, s in scores.items()},
        }
    )
    return True


def add_training_rows(workdir: Path, evaluated: bool) -> None:
    """Adds the run's own rows; those of an evaluation that was done before stay, with where and when it was done.

    Of these, one that is missing (its line was broken, and deleted) is made again and says what its neighbours say.
    """
    file, rows = workdir / "results.jsonl", training_rows(workdir)
    if not evaluated and rows:
        mine = [r for r in read_rows(file) if (r.paper, r.config_hash) == (TRAINING, rows[0].config_hash)]
        place = {name: getattr(mine[-1], name) for name in MADE} if mine else {}
        there = {row.metric for row in mine}
        rows = [dataclasses.replace(row, **place) for row in rows if row.metric not in there]
    if rows:
        append_rows(file, rows)


def plan(config: ExperimentConfig) -> str:
    """What the run would be, in lines: parameters, tokens, FLOPs, bytes of parameters and optimizer."""
    p = count.parameters(config.model)
    tokens = config.train.steps * config.train.batch_size * config.data.seq_len
    flops = count.forward_flops_per_token(config.model, config.data.seq_len)
    state = p.total * 4 * 3
    lines = [
        f"config {config.name} ({config_hash(config)})",
        f"parameters {p.total:,} total, {p.active:,} active per token; routed experts {p.routed_experts / p.total:.0%}",
    ]
    if not config.train.steps:
        return "\n".join([*lines, f"no training: the weights of {config.init_from} as they are"])
    lines += [
        f"training {config.train.steps:,} steps x {config.train.batch_size} sequences x {config.data.seq_len} tokens "
        f"= {tokens:,} tokens, {3 * flops * tokens:.3g} model FLOPs ({flops:,.0f} forward per token)",
        f"parameters and AdamW state in float32: {state / 2**30:.2f} GiB, gradients {p.total * 4 / 2**30:.2f} GiB",
    ]
    if config.model.vocab_size == 0:
        lines.append("vocabulary: taken from the tokenizer when data is read; embeddings are not counted above")
    return "\n".join(lines)


def check_held_out(config: ExperimentConfig, corpus: Corpus) -> None:
    """Raises ConfigError where validation or the final evaluation would find nothing to read."""
    for split, reader in (("valid", "validation"), (config.eval.final_split, "eval.final_split")):
        if reader == "validation" and not config.train.steps:
            continue
        if not any(split in corpus.splits(domain) for domain in corpus.domains):
            raise ConfigError(f"no domain has a {split!r} split, which {reader} reads: set data.domains.<name>.{split}")


def run_command(
    config: ExperimentConfig, workdir: Path, *, max_seconds: float = 0.0, say: Callable[[str], None] = session.say
) -> int:
    """Trains, evaluates and makes the table, or goes on where an earlier call stopped.

    Returns:
      0, also when ``max_seconds`` ended the training; 130 after Ctrl-C or SIGTERM.

    Raises:
      ConfigError: what cannot work, nearly always before ``workdir`` is touched.
    """
    begin = time.monotonic()
    seeds = config.table.seeds or (config.train.seed,)
    adopted = pretrained.adopt(config)
    validate.check(adopted)
    if (lost := pretrained.limits_left_out(config)) is not None:
        say(f"note: {config.init_from} has limits that are not in force here: {lost} puts them there")
    config = session.with_seed(adopted, seeds[0])  # the workdir's own run; the others lie under seeds/
    mesh = sharding.make_mesh(config.mesh)
    shards = sharding.token_shards(mesh)
    validate.check_devices(config, shards)
    table = importlib.import_module(f"experiments.papers.{config.table.name}") if config.table.name else None
    if table is not None:
        table.check(config)
    corpus = load_corpus(config.data, train=config.train.steps > 0)
    config = resolve_vocab(config, corpus)
    check_held_out(config, corpus)
    if config.train.steps and not config.init_from and not corpus.tokenizer.exact:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} changes the text before it is read: bits per byte of a model "
            "trained from scratch would be of another text; use 'byte' or a byte-level BPE, or init_from=FOLDER"
        )
    if config.train.steps:  # raises where text is too short
        train_iterator(corpus, batch_size=config.train.batch_size, seed=config.train.seed)
    tasks = load_tasks(config, corpus, shards)
    session.grouped_matmul_facts(config, shards)
    read_rows(workdir / "results.jsonl")  # a broken line is an error now, not after the training
    origin = session.begin_from(workdir, config, corpus)
    begins = origin is not None and not checkpoint.steps_in(workdir / "checkpoints")
    if begins:
        check_origin(origin, config, corpus)
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.open_workdir(workdir, config, corpus))
        session.keep_programs(corpus)
        run = Run(config, corpus, mesh, workdir, origin)
        stack.callback(run.close)
        run.prepare()
        facts = session.write_env(workdir, config, corpus, shards, origin, mesh.size)
        say(plan(config))
        epochs = ", ".join(f"{d} {e:.2f} epochs" for d, e in facts["data"]["epochs"].items() if config.train.steps)
        if origin is not None and begins and lost is None:  # limits are all that can differ where some are left out
            session.tell_changes(origin, config, say)
        say(f"data {corpus.hash}" + (f": {epochs}" if epochs else ""))
        say(f"experts on {facts['device']} by grouped_ffn back end {facts['grouped_matmul']['implementation']!r}")
        for line in session.exchange_line(facts["expert_parallelism"]):
            say(line)
        runs: dict[int, Run] = {}
        for seed in seeds:
            folder = workdir if seed == seeds[0] else workdir / "seeds" / str(seed)
            if seed != seeds[0]:
                folder.mkdir(parents=True, exist_ok=True)
                run = Run(session.with_seed(config, seed), corpus, mesh, folder, origin)
                stack.callback(run.close)
            runs[seed] = run
            if len(seeds) > 1:
                say(f"seed {seed} in {folder}")
            left = max(max_seconds - (time.monotonic() - begin), 1.0) if max_seconds else 0.0
            outcome = run.train(max_seconds=left)
            if not outcome.finished or outcome.reason == "interrupted":
                say(
                    f"stopped at step {outcome.step} of {config.train.steps} ({outcome.reason}): "
                    "the same command continues"
                )
                return 0 if outcome.reason == "time" else 130
            evaluated = final_evaluation(run, tasks, say)
            if run.workdir == workdir:
                add_training_rows(workdir, evaluated)
        if table is not None:
            table.make_table(config, runs, workdir, facts, say)
    say(f"done in {time.monotonic() - begin:.0f} s; report: python -m experiments.report --workdir={workdir}")
    return 0


def define_flags(values: flags.FlagValues, argv: list[str] | None = None) -> None:
    session.define_config_flag(values, argv)
    flags.DEFINE_string(
        "workdir", None, "Folder of this run: config, metrics, checkpoints, results, report.", flag_values=values
    )
    dry_run.define_flags(values)
    flags.DEFINE_float(
        "max_seconds", 0.0, "Stop training after this time with a checkpoint; 0: no limit.", flag_values=values
    )
    flags.DEFINE_string(
        "row", None, "Id of a results row to measure again, instead of --config; 'list' shows them.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "results", [], "Where --row looks: results files or workdirs. None: the committed rows.", flag_values=values
    )


def command(values: flags.FlagValues) -> int:
    if values.row is not None:
        from experiments import rerun  # it runs the commands, this one too

        return rerun.command(values)
    if values.results:
        raise ConfigError("--results goes with --row=ID: it names the file that the row is in")
    if values.config is None:
        raise ConfigError("--config is missing: e.g. --config=configs/quickstart.py")
    dry_run.check_flags(values)
    if values.dry_run:
        return dry_run.command(values)
    config = session.read_config(values.config)
    if not values.workdir:
        raise ConfigError("--workdir is missing: give the folder that this run may write, e.g. --workdir=runs/first")
    return run_command(config, Path(values.workdir), max_seconds=values.max_seconds)


if __name__ == "__main__":
    session.launch(define_flags, command)
