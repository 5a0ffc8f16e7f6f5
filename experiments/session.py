"""What the commands share: flags and errors, reading a config, opening a workdir safely, and the facts in it."""

import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import importlib.util
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import config_flags

import kernels_pallas
from kernels_pallas.grouped_matmul.ffn import Weights
from moejax import checkpoint, count, dispatch, limits, plan, pretrained, routing, sharding, validate
from moejax.config import ConfigError, ExperimentConfig, MeshConfig, config_hash, from_mapping, to_dict
from moejax.data import Corpus
from moejax.experts import GATED
from moejax.interrupt import exit_code, outlast_collections, terminate
from moejax.plan import parse_mesh, sizes
from moejax.results import ResultsError, environment_facts, write_atomically

flags.disclaim_key_flags()  # what is defined here is a flag of the command that asked for it, and in its --help

BINDING = ("model", "data", "train", "init_from")
"""Groups of fields that a workdir's checkpoints depend on; evaluation, table and mesh may change between calls."""
FREE = ("root", "cache_dir", "log_every", "checkpoint_every", "keep_checkpoints")
"""Fields in those groups that change no number. What the texts are is held by their hash, wherever they lie."""
SCORED = ("max_tokens",)
"""Fields of ``eval`` that validation scores depend on: the best checkpoint is chosen among equal ones only. Where pairs
of a batch compete, ``batch_size`` too (:func:`_scored`)."""
SESSION = ("command", "commit", "dirty", "device", "device_count", "process_count", "versions")
"""Facts of ``env.json`` that may differ from call to call; ``sessions`` keeps those of each."""
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full",
    errno.EFBIG: "a file may not become that large here (ulimit -f, or the file system)",
}
BEGUN = ("config.json", "env.json")
"""What a call writes into a workdir before it has made anything; :data:`LOCK`, ``metrics.jsonl`` and ``checkpoints``
are then empty."""
LOCK = ".lock"
"""File in a workdir in use, locked by the process that uses it; it names that process."""

Define = Callable[[flags.FlagValues, list[str] | None], None]
"""``(values, argv)``; argv None: that of the process."""
Command = Callable[[flags.FlagValues], int]


def launch(define: Define, command: Command) -> None:
    """Runs a program: ``define`` makes its flags, ``command`` reads them and returns the exit code.

    What a user can mend is one paragraph on standard error and exit code 2, without a traceback.
    """
    logging.set_verbosity(logging.WARNING)  # JAX's notes on platforms that are not there

    def parser(argv: list[str]) -> list[str]:
        code = guarded(lambda: parse_flags(argv, flags.FLAGS))
        return argv[:1] if code == 0 else sys.exit(code)

    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # imports are over: see experiments/__init__.py
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminate)
        outlast_collections()
        define(flags.FLAGS, None)
        app.run(lambda argv: sys.exit(guarded(lambda: command(flags.FLAGS))), flags_parser=parser)
    except KeyboardInterrupt as error:  # also a second one, while the first is dealt with
        sys.exit(interrupted(error))


def call(define: Define, command: Command, arguments: Sequence[str]) -> int:
    """The same program inside this process, with flags of its own; returns the exit code."""
    values, argv = flags.FlagValues(), ["program", *arguments]
    define(values, argv)

    def parsed() -> int:
        parse_flags(argv, values)
        return command(values)

    return guarded(parsed)


def guarded(action: Callable[[], int | None]) -> int:
    """Exit code of ``action``; an error that a user can mend is printed and gives 2, Ctrl-C 130, SIGTERM 143."""
    try:
        return action() or 0
    except (ConfigError, ResultsError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: {FULL[error.errno]}{where}: what was finished is kept; make room, and the same command goes on",
            file=sys.stderr,
            flush=True,
        )
        return 2
    except KeyboardInterrupt as error:
        return interrupted(error)


def interrupted(error: KeyboardInterrupt) -> int:
    """Says so, and returns the exit code."""
    print("interrupted: what was finished is kept; the same command goes on", file=sys.stderr, flush=True)
    return exit_code(error)


def all_or_nothing(action: Callable[[], int]) -> int:
    """Exit code of ``action``, which writes at its end alone: Ctrl-C and SIGTERM say that nothing was written."""
    try:
        return action()
    except KeyboardInterrupt as error:
        say("interrupted: nothing was written")
        return exit_code(error)


def define_config_flag(
    values: flags.FlagValues, argv: list[str] | None, text: str = "Config file, with a variant after a colon."
) -> None:
    """``--config`` and a flag for each field of its config; ``argv`` as in :data:`Define`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        text,
        lock_config=True,
        flag_values=values,
        sys_argv=argv,  # it looks there for the fields that are set
    )


def define_checkpoint_flag(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "checkpoint", None,
        "Workdir, its checkpoints folder, one step folder, or a Hugging Face folder.",
        flag_values=values,
    )  # fmt: skip


def define_mtp_flag(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "mtp", False, "Also the multi-token-prediction modules of the weights, all that there are.", flag_values=values
    )


def define_mesh_flag(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "mesh", None, "Devices to spread tokens and experts over, e.g. data=2,expert=4. None: one.", flag_values=values
    )


@contextlib.contextmanager
def on_mesh(values: flags.FlagValues) -> Generator[jax.sharding.Mesh | None]:
    """The mesh that ``--mesh`` names, in force within; None without the flag.

    Raises:
      ConfigError: a mesh that the devices here cannot make.
    """
    if values.mesh is None:
        yield None
        return
    mesh = sharding.make_mesh(parse_mesh(values.mesh, MeshConfig(data=1)))
    with jax.set_mesh(mesh):
        yield mesh


def parse_flags(argv: list[str], values: flags.FlagValues) -> None:
    """Parses ``argv`` into ``values``.

    Raises:
      ConfigError: an unknown flag or field, a value of the wrong type, a config file or variant that is not there.
    """
    try:
        rest = values(argv)
        if "config" in values and values["config"].value is not None:
            values["config"].value.keys()  # a file that failed to load raises when it is first touched
    except Exception as error:  # ml_collections raises AttributeError, KeyError, OSError, ... of its own
        raise ConfigError(_flag_error(error, argv)) from error
    if len(rest) > 1:
        raise ConfigError(f"arguments {rest[1:]} are not flags: write --flag=value, fields as --config.field=value")


def _flag_error(error: BaseException, argv: list[str]) -> str:
    inner = error
    while inner.args and isinstance(inner.args[0], BaseException):
        inner = inner.args[0]
    lines = [line.strip() for line in str(inner.args[0] if inner.args else inner).splitlines() if line.strip()]
    if isinstance(error, AttributeError | KeyError):
        name = lines[0].strip("'\"")
        given = [a for a in argv if name in a.partition("=")[0].split(".")]
        return f"{given[0] if given else name}: the config has no field {name!r}. {' '.join(lines[1:])}".strip()
    config = next((a for a in argv if a.startswith("--config=")), "--config")
    if isinstance(error, OSError):
        path = Path(config.partition("=")[2].partition(":")[0])
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        if close and not path.exists():
            return f"{config}: there is no such file; did you mean {path.parent / close[0]}?"
        return f"{config}: the file cannot be loaded: {lines[-1]}"
    if any(line.startswith("Traceback") for line in lines):
        last = lines[-1]
        return f"{config}: {last.removeprefix('ValueError: ')}" if last.startswith("ValueError: ") else str(error)
    return " ".join(lines)


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def read_config(config_dict: Any) -> ExperimentConfig:
    """The checked config.

    Raises:
      ConfigError: see ``moejax.config`` and ``moejax.validate``.
    """
    config = from_mapping(ExperimentConfig, config_dict)
    validate.check(config)
    table = config.table.name
    if table and importlib.util.find_spec(f"experiments.papers.{table}") is None:
        raise ConfigError(f"table.name={table!r}: there is no module experiments/papers/{table}.py")
    return config


@contextlib.contextmanager
def open_workdir(workdir: Path, config: ExperimentConfig, corpus: Corpus) -> Generator[None]:
    """Makes the folder, keeps other processes out of it, and writes ``config.json``, unless it holds a run with another
    config or other texts. One that has made nothing yet gives way.

    Raises:
      ConfigError: the folder cannot be written, is in use, or holds another run; the message lists what differs.
    """
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_alone(workdir))
            different = _other_run(workdir, config, corpus)
            if different and _made_nothing(workdir):
                say(f"note: --workdir={workdir} was begun with another config, which made nothing: it is begun anew")
                if jax.process_index() == 0:
                    (workdir / "env.json").unlink(missing_ok=True)  # of that other run
            elif different:
                raise ConfigError(
                    f"--workdir={workdir} holds a run with another config: {'; '.join(different[:8])}. "
                    "Use another --workdir, or the old settings to continue that run."
                )
            text = json.dumps(to_dict(config), indent=1, sort_keys=True) + "\n"
            write_atomically(workdir / "config.json", text)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise ConfigError(
                f"--workdir={workdir} cannot be written ({error.strerror}): choose a folder that you may write"
            ) from error
        yield


@contextlib.contextmanager
def _alone(workdir: Path) -> Generator[None]:
    """Holds the lock of a workdir. The system frees it when the process ends, however that ends.

    Raises:
      ConfigError: another process holds it.
    """
    if jax.process_index():
        yield
        return
    path = workdir / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 400).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise ConfigError(
                f"--workdir={workdir} is in use by {holder}: two runs in one folder would overwrite each other. "
                "Wait for that process or stop it, or use another --workdir"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)  # the one before us removed the file while we opened it
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _stored(path: Path) -> dict[str, Any]:
    """The JSON object of a file of the workdir; {} if there is none."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): restore it, or use another --workdir") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object: restore it, or use another --workdir")
    return value


def _other_run(workdir: Path, config: ExperimentConfig, corpus: Corpus) -> list[str]:
    """What differs from the run that the workdir holds, a line each; [] for none. Without a ``config.json`` it is the
    one whose config the newest checkpoint names."""
    old, new = _stored(workdir / "config.json"), to_dict(config)
    steps = checkpoint.steps_in(workdir / "checkpoints")
    if not old and steps:
        old = checkpoint.read_meta(workdir / "checkpoints" / str(steps[-1])).get("config", {})
    if not old:
        return []
    different = [line for group in BINDING for line in _differences(old.get(group), new.get(group), f"config.{group}")]
    for name in _scored(config):
        different += _differences(old.get("eval", {}).get(name), new["eval"][name], f"config.eval.{name}")
    before = _stored(workdir / "env.json").get("data", {})
    root = f"data.root was {old.get('data', {}).get('root')!r}, is {config.data.root!r}"
    for name, what, value in (("hash", "texts", corpus.hash), ("tokenizer_hash", "tokenizer", corpus.tokenizer.hash)):
        if before.get(name, value) != value:
            different.append(f"the {what}: hash was {before[name]}, is {value} ({root})")
    return different


def _made_nothing(workdir: Path) -> bool:
    """Whether the run of a workdir ended before its first row and its first checkpoint. Anything that such a run does
    not leave, also something half-written or a file of the user's, is a no."""
    for path in workdir.iterdir():
        if path.name in BEGUN or path.name == LOCK:
            continue
        if path.name == "metrics.jsonl" and path.is_file() and not path.stat().st_size:
            continue
        if path.name == "checkpoints" and path.is_dir() and not any(path.iterdir()):
            continue
        return False
    return True


def _scored(config: ExperimentConfig) -> tuple[str, ...]:
    """Fields of ``eval`` that validation scores of this model depend on."""
    moe = config.model.moe
    if not (config.train.steps and validate.has_experts(config.model)):
        return SCORED
    family = routing.family(moe.router, moe.num_experts, zero_experts=moe.zero_experts)
    return SCORED if family.causal and not limits.of_config(moe) else (*SCORED, "batch_size")


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [line for n in names if n not in FREE for line in _differences(old.get(n), new.get(n), f"{path}.{n}")]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


def check_output(output: str | Path, flag: str = "output") -> None:
    """Raises ConfigError where a file at ``output`` could not be written, before anything is measured."""
    path = Path(output).absolute()
    if path.is_dir():
        raise ConfigError(f"--{flag}={output}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"--{flag}={output}: there is no folder {Path(output).parent}; make it first")


def command_line() -> str:
    """The command as typed: the module, then its arguments, without the cache's place, which changes no result."""
    module = Path(sys.argv[0]).stem
    arguments = [a for a in sys.argv[1:] if not a.lstrip("-").startswith("config.data.cache_dir")]
    return " ".join(["python -m", f"experiments.{module}", *(shlex.quote(a) for a in arguments)])


def row_facts(paper: str, table: str) -> dict[str, Any]:
    """What every row of values that a command measures says of where it comes from."""
    facts = environment_facts()
    return {
        "kind": "value", "paper": paper, "table": table, "command": command_line(),
        **{name: facts[name] for name in ("commit", "dirty", "device", "device_count", "versions")},
    }  # fmt: skip


def exchange_facts(config: ExperimentConfig, token_shards: int) -> dict[str, Any] | None:
    """How rows travel under expert parallelism, and how many each device reserves for a training micro-batch; None
    where tokens stay on their device.

    Raises:
      ConfigError: an exchange that this platform lacks.
    """
    moe, ranks = config.model.moe, config.mesh.expert
    if moe.dispatcher != "ep" or ranks == 1 or token_shards % ranks:  # on fewer devices than the config's it is local
        return None
    exchange = dispatch.ExpertParallel(moe).transport
    mesh = dataclasses.replace(config.mesh, data=token_shards // ranks)
    planned = sizes.make(config, mesh, plan.platform_of(config), train=True)
    return {
        "exchange": exchange, "pieces": len(dispatch.pieces(moe, planned.tokens)), "ranks": ranks,
        "experts_of_a_rank": planned.experts, "rows": planned.rows, "buffer_factor": moe.ep_buffer_factor,
        "sent": {0: "pairs", len(planned.buffers): "tokens"}.get(len(planned.token_pieces), "tokens or pairs"),
        "sent_rows": planned.sent_rows,
        **({"parts": moe.parts} if moe.parts > 1 else {}), **({"parts_apart": True} if moe.parts_apart else {}),
    }  # fmt: skip


def exchange_line(facts: dict[str, Any] | None) -> list[str]:
    """What a person is told of :func:`exchange_facts`, as no line or one."""
    if facts is None:
        return []
    held = f"{facts['buffer_factor']:g} times an even share" if facts["buffer_factor"] else "the worst case"
    pieces = f" in {facts['pieces']} pieces" if facts["pieces"] > 1 else ""
    what = f"experts in {facts['parts']} parts each, parts" if "parts" in facts else "experts"
    what += " of one expert apart" if "parts_apart" in facts else ""
    sent = "" if facts["sent"] == "pairs" else f"{facts['sent_rows']:,} for {facts['sent']} that travel, "
    return [
        f"{what} over {facts['ranks']} ranks, {facts['experts_of_a_rank']} each; {facts['sent']} travel by "
        f"{facts['exchange']!r} exchange{pieces}, rows reserved on each device: {sent}{facts['rows']:,} for experts "
        f"({held})"
    ]


def grouped_matmul_facts(config: ExperimentConfig, token_shards: int) -> dict[str, Any]:
    """Which back end computes the experts here, and why the others do not.

    Raises:
      ConfigError: ``model.moe.implementation`` names none, or one that refuses.
    """
    model, moe = config.model, config.model.moe
    dtype = jnp.dtype(model.compute_dtype)
    exchange = exchange_facts(config, token_shards)
    tokens = config.train.batch_size // config.train.accumulate * config.data.seq_len // token_shards
    pairs = exchange["rows"] if exchange else tokens * moe.router.k * moe.parts
    num_experts = moe.stored_experts // (exchange["ranks"] if exchange else 1)
    up = jax.ShapeDtypeStruct((num_experts, model.dim, moe.stored_dim), dtype)
    down = jax.ShapeDtypeStruct((num_experts, moe.stored_dim, model.dim), dtype)
    shapes: Any = (up if model.activation in GATED else None, up, down)
    weights = Weights(*shapes)
    try:
        explanation = kernels_pallas.GROUPED_FFN.explain(
            jax.ShapeDtypeStruct((pairs, model.dim), dtype),
            jax.ShapeDtypeStruct((num_experts,), jnp.int32),
            weights,
            model.activation,
            implementation=None if moe.implementation == "auto" else moe.implementation,
        )
    except ValueError as error:
        raise ConfigError(f"model.moe.implementation: {error}") from error
    if explanation.chosen is None:
        raise ConfigError(f"model.moe.implementation={moe.implementation!r} cannot run here: {explanation}")
    return {"implementation": explanation.chosen, "refused": explanation.refusals, "rows": pairs}


def begin_from(workdir: Path, config: ExperimentConfig, corpus: Corpus) -> dict[str, Any] | None:
    """Which weights the run of a workdir begins from (:func:`moejax.pretrained.origin`): those that ``init_from`` meant
    when the workdir was begun, so that a later call, or a later seed, begins from the same. None: from none.

    A run that :func:`open_workdir` will begin anew begins from what ``init_from`` means now.

    Raises:
      ConfigError: ``init_from`` leads to no finished checkpoint.
    """
    if not config.init_from:
        return None
    known = _stored(workdir / "env.json").get("init_from")
    if known and _made_nothing(workdir) and _other_run(workdir, config, corpus):
        known = None
    if known or checkpoint.steps_in(workdir / "checkpoints"):
        return known  # a run under way needs it no more
    return pretrained.origin(config.init_from)


def tell_changes(origin: dict[str, Any], config: ExperimentConfig, say: Callable[[str], None] = say) -> None:
    """Says where the run's model computes another function than the checkpoint that it begins from did."""
    if found := pretrained.changed(origin, config.model):
        say(f"note: init_from: the checkpoint was trained with {'; with '.join(found)}")


def keep_programs(corpus: Corpus) -> None:
    """Compiled programs are kept in the data cache, unless the user chose a place (``JAX_COMPILATION_CACHE_DIR``)."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(corpus.cache_dir / "programs"))


def write_env(
    workdir: Path,
    config: ExperimentConfig,
    corpus: Corpus,
    token_shards: int,
    origin: dict[str, Any] | None = None,
    devices: int | None = None,
) -> dict[str, Any]:
    """Writes ``env.json``: command, commit, device, versions, back end, parameters and data; returns it.

    ``sessions`` lists the calls that worked in this folder, the present one last: a run that was continued elsewhere
    shows it. ``devices`` is how many of those that are there do the work; None is all.
    """
    before = _stored(workdir / "env.json")
    parameters = count.parameters(config.model)
    facts = {
        "command": command_line(),
        **environment_facts(),
        **({} if devices is None else {"device_count": devices}),
        "process_count": jax.process_count(),
        "config_hash": config_hash(config),
        "grouped_matmul": grouped_matmul_facts(config, token_shards),
        "expert_parallelism": exchange_facts(config, token_shards),
        "parameters": {"total": parameters.total, "active": parameters.active},
        "flops_per_token": count.forward_flops_per_token(config.model, config.data.seq_len),
        "data": {
            "hash": corpus.hash,
            "stats": corpus.stats(),
            "tokenizer": corpus.tokenizer.name,
            "tokenizer_hash": corpus.tokenizer.hash,
            "epochs": corpus.epochs(config.train.steps * config.train.batch_size * config.data.seq_len),
        },
    }
    if origin is not None:
        facts["init_from"] = origin
    session = {name: facts[name] for name in SESSION}
    session |= {
        "time": _now(),
        "host": socket.gethostname(),
        "from_step": max(checkpoint.steps_in(workdir / "checkpoints"), default=0),
        "implementation": facts["grouped_matmul"]["implementation"],
    }
    earlier = before.get("sessions") or ([{k: before[k] for k in SESSION if k in before}] if before else [])
    facts["sessions"] = [*earlier, session]
    write_atomically(workdir / "env.json", json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return facts


def with_seed(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The config with another training seed (initialisation and data order)."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
