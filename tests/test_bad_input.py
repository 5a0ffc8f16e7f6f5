"""Bad input through the real command: one sentence, exit code 2, and a workdir in which no byte has changed.

Mistakes in flags and fields on a workdir that is not there yet: ``tests/test_run.py``.
"""

import hashlib
import json
import lzma
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import run, session
from tests.small import execute

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def arguments(workspace: Path) -> list[str]:
    return [f"--config={workspace / 'small_config.py'}:plain", "--config.model.num_layers=1"]


@pytest.fixture(scope="module")
def half(workspace: Path, arguments: list[str]) -> Path:
    """A workdir that stopped at step 4 of 6, with checkpoints of steps 3 (the best) and 4; nobody writes to it."""
    workdir = workspace / "half"
    with pytest.MonkeyPatch.context() as patch:
        train = run.Run.train
        patch.setattr(run.Run, "train", lambda self, **_: stop_at(self, 4, train))
        assert execute(*arguments, f"--workdir={workdir}") == 130
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3", "4"}
    return workdir


def stop_at(made: run.Run, step: int, train: Callable) -> object:
    """Asks the loop to stop once ``step`` is saved."""
    take = made.trainer.step

    def stepping(state, batch):
        state, result = take(state, batch)
        if int(state.step) == step:
            os.kill(os.getpid(), 2)
        return state, result

    made.trainer.step = stepping
    return train(made)


@pytest.fixture
def copy(half: Path, tmp_path: Path) -> Path:
    return shutil.copytree(half, tmp_path / "copy")


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(capfd: pytest.CaptureFixture[str], workdir: Path, message: str, *arguments: str) -> str:
    """Runs the command, which must refuse in one sentence and change nothing; returns the sentence."""
    before = hashes(workdir)
    capfd.readouterr()
    code = execute(f"--workdir={workdir}", *arguments)
    said = capfd.readouterr()
    assert code == 2, said.err
    # progress lines may come before it: the plan, and what the data cache makes
    sentence = said.err.splitlines()[-1]
    assert sentence.startswith("error: ") and re.search(message, sentence), said.err
    assert said.err.count("error: ") == 1 and "Traceback" not in said.err and "Warning" not in said.err, said.err
    assert hashes(workdir) == before
    return sentence


# --- fields, on a workdir with a run in it --------------------------------------------------------------------------

FIELDS = {
    "unknown field": (["--config.train.stepz=1"], r"--config.train.stepz=1: .*no field 'stepz'.*Did you mean.*steps"),
    "wrong enum": (["--config.model.moe.router.name=topk"], r"router.name='topk': choose one of .*expert_choice"),
    "k above E": (["--config.model.moe.router.k=5"], r"router.k=5 must lie in \[1, num_experts=4\]"),
    "heads": (["--config.model.attention.num_kv_heads=3"], r"num_heads=2 is not a multiple of num_kv_heads=3"),
    "micro-batches": (["--config.train.accumulate=3"], r"batch_size=8 is not divisible by train.accumulate=3"),
    "experts and mesh": (["--config.mesh.expert=3"], r"num_experts=4 not divisible by mesh axis 'expert'=3.*\[1, 2, 4"),
    "weight, no domain": (
        ["--config.data.domains.c.weight=2.0"],
        r"--config.data.domains.c.weight=2.0: .*no field 'c'",
    ),
    "weight, no text": (["--config.data.domains.a.train="], r"domains.a.train='': a domain of weight 1.0 needs it"),
    "negative weight": (["--config.data.domains.a.weight=-1.0"], r"domains.a.weight=-1.0: must be a finite number"),
    "no weight": (
        ["--config.data.domains.a.weight=0.0", "--config.data.domains.b.weight=0.0"],
        r"every weight is 0 \(a, b\)",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields(copy: Path, arguments: list[str], capfd: pytest.CaptureFixture[str], case: str):
    wrong, message = FIELDS[case]
    refused(capfd, copy, message, *arguments, *wrong)


# --- data -----------------------------------------------------------------------------------------------------------

DATA: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("gone.txt", None, r"gone.txt does not exist; paths are relative to data.root="),
    "empty": ("empty.txt", b"", r"empty.txt is empty; remove it or fill it"),
    "binary": ("binary.txt", b"ELF\0\0\0", r"binary.txt is binary: zero byte at byte offset 3; name a text file"),
    "no UTF-8": ("latin.txt", b"caf\xe9 au lait", r"latin.txt is not UTF-8 text: byte 0xe9 at byte offset 3"),
    "cut short": ("cut.txt.xz", lzma.compress(b"some text" * 99)[:40], r"cut.txt.xz is damaged or no .xz file"),
    "no JSON": ("rows.jsonl", b'{"text": "a"}\n{"text"\n', r"rows.jsonl:2: not JSON"),
    "too short": ("short.txt", b"a few words", r"data.seq_len=32: the train split of 'a' has 12 tokens"),
    "a picture": ("cat.png", b"\x89PNG", r"cat.png is none of .txt"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(tmp_path: Path, copy: Path, arguments: list[str], capfd: pytest.CaptureFixture[str], case: str):
    name, content, message = DATA[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for workdir in (copy, tmp_path / "new"):
        sentence = refused(capfd, workdir, message, *arguments, f"--config.data.domains.a.train={tmp_path / name}")
        assert "data." in sentence  # the field that named the file
    assert not (tmp_path / "new").exists()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "one bit": lambda folder: flip(largest(folder / "arrays")),
    "cut short": lambda folder: os.truncate(largest(folder / "arrays"), 100),
    "a file missing": lambda folder: largest(folder / "arrays").unlink(),
    "no arrays": lambda folder: shutil.rmtree(folder / "arrays"),
    "position in the data": lambda folder: (folder / "meta" / "_strings.json").write_bytes(
        (folder / "meta" / "_strings.json").read_bytes().replace(b'\\"seconds\\": ', b'\\"seconds\\": 1')
    ),
    "checksums": lambda folder: shutil.rmtree(folder / "checksums"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(copy: Path, arguments: list[str], capfd: pytest.CaptureFixture[str], damage: str):
    folder = copy / "checkpoints" / "4"
    DAMAGE[damage](folder)
    message = (
        rf"error: checkpoint {folder} (is damaged|cannot be read): .*The newest undamaged checkpoint beside it is that "
        rf"of step 3\. Nothing was deleted: .*delete this folder \({folder}\); the same command .* goes on from step 3$"
    )
    refused(capfd, copy, message, *arguments)


def test_the_way_out_of_a_damaged_checkpoint(copy: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]):
    """What the sentence says is done: the run goes on from the older one, and each row is there once."""
    flip(largest(copy / "checkpoints" / "4" / "arrays"))
    refused(capfd, copy, "goes on from step 3", *arguments)
    shutil.rmtree(copy / "checkpoints" / "4")
    assert execute(*arguments, f"--workdir={copy}") == 0
    assert "resuming at step 3" in capfd.readouterr().err
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6]


# --- the workdir itself ---------------------------------------------------------------------------------------------


def test_another_config(copy: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]):
    wrong = ["--config.train.steps=9", "--config.model.dim=32", "--config.eval.max_tokens=300"]
    sentence = refused(capfd, copy, "holds a run with another config", *arguments, *wrong)
    for line in ("config.model.dim was 16, is 32", "config.train.steps was 6, is 9", "eval.max_tokens was 256, is 300"):
        assert line in sentence
    assert "seq_len" not in sentence and "another --workdir, or the old settings" in sentence


def test_other_texts(workspace: Path, copy: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]):
    """The same paths and settings, but somebody has changed a text."""
    root = shutil.copytree(workspace, copy.parent / "root", ignore=shutil.ignore_patterns("half", "cache"))
    with (root / "train" / "a.txt").open("a") as file:
        file.write(" more")
    where = rf"\(data.root was '.*{re.escape(workspace.name)}', is '.*root'\)"
    message = r"the texts: hash was [0-9a-f]{16}, is [0-9a-f]{16} " + where
    refused(capfd, copy, message, *arguments, f"--config.data.root={root}")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_workdir_that_cannot_be_written(
    tmp_path: Path, arguments: list[str], capfd: pytest.CaptureFixture[str], place: str
):
    """Also for root, whom permissions do not stop."""
    (tmp_path / "file").write_text("a file")
    workdir = tmp_path / place
    message = rf"--workdir={workdir} cannot be written \(.+\): choose a folder that you may write"
    refused(capfd, workdir, message, *arguments)
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize("name", ["config.json", "env.json"])
def test_a_damaged_file_of_facts(copy: Path, arguments: list[str], capfd: pytest.CaptureFixture[str], name: str):
    os.truncate(copy / name, 40)
    refused(capfd, copy, rf"{copy / name} is not JSON .*: restore it, or use another --workdir", *arguments)


@pytest.mark.parametrize("line", ['{"kind": "val', '{"kind": "val\n', "[1]\n", '{"kind": "value", "color": 1}\n'])
def test_a_broken_line_of_results(copy: Path, arguments: list[str], capfd: pytest.CaptureFixture[str], line: str):
    (copy / "results.jsonl").write_text(line)
    message = r"results.jsonl:1: (broken line|the last line is cut off): .*delete it \(sed -i 1d .*\) or mend it"
    refused(capfd, copy, message, *arguments)


def test_a_workdir_in_use(copy: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]):
    with session._alone(copy):
        message = rf"--workdir={copy} is in use by process {os.getpid()} on \S+ since 20.*: two runs in one folder"
        refused(capfd, copy, message, *arguments)
    assert not (copy / session.LOCK).exists()


# --- weights to begin from ------------------------------------------------------------------------------------------


def test_init_from(half: Path, tmp_path: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]):
    workdir, begin = tmp_path / "new", [*arguments, f"--config.init_from={half}"]
    refused(
        capfd, workdir, rf"{tmp_path / 'x'}: no finished checkpoint", *arguments, f"--config.init_from={tmp_path / 'x'}"
    )
    refused(capfd, workdir, r"3 has \d+ arrays of another shape than this model", *begin, "--config.model.dim=32")
    refused(
        capfd,
        workdir,
        r"3 lacks \d+ arrays of this model, e.g. \['params/unembed",
        *begin,
        "--config.model.tie_embeddings=False",
    )
    refused(capfd, workdir, "trained with another tokenizer", *begin, "--config.data.tokenizer=bpe-train:300")
    damaged = shutil.copytree(half, tmp_path / "damaged") / "checkpoints" / "3"
    (damaged / "meta" / "_strings.json").unlink()
    refused(capfd, workdir, rf"checkpoint {damaged} cannot be read", *arguments, f"--config.init_from={damaged}")
    assert not workdir.exists()
