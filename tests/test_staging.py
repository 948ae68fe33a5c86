"""A job of tools/tokenize_corpus.py that was killed resumes, and writes the bytes of a job that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import encoding, staging
from pretrain.data.indexed import DataError, TokenFile
from tests.test_tools_data import ROOT, make_texts, tool

OUTPUTS = [f"_{part}{end}" for part in ("train", "valid") for end in (".bin", ".idx", ".json")]
# The tool with small chunks, each of which is committed; it dies without a warning at the rename with the given number.
RUN = """
import os, runpy, signal, sys
from pretrain.data import encoding, staging
encoding._CHUNK_CHARACTERS, staging.SECONDS_BETWEEN_COMMITS = 100_000, 0
left, rename = int(sys.argv[1]), os.replace
def replace(*paths):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)
os.replace, sys.argv = replace, sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder with a megabyte of text, a tokenizer, and the token files of an undisturbed job."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": text}) + "\n" for text in make_texts(3000, 100)]
    (folder / "text.jsonl").write_text("".join(lines))
    tool("train_tokenizer", "--input", folder / "text.jsonl", "--output", folder / "tokenizer", "--vocab-size", 400)
    tool("tokenize_corpus", *flags(folder, folder / "whole"))
    return folder


def flags(text: Path, output: Path, *more) -> list[str]:
    own = ["--input", text / "text.jsonl", "--tokenizer", text / "tokenizer", "--output", output, "--valid-fraction", 0.1]
    return [*map(str, [*own, "--workers", 1, *more])]


def start(kill_at: int, words: list[str]) -> subprocess.Popen:
    """The tool, killed at its rename number `kill_at`; 0: not."""
    command = [sys.executable, "-c", RUN, str(kill_at), str(ROOT / "tools" / "tokenize_corpus.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def killed_at(kill_at: int, words: list[str]) -> None:
    job = start(kill_at, words)
    _, error = job.communicate(timeout=120)
    assert job.returncode == -signal.SIGKILL, error


def assert_same(text: Path, output: Path) -> None:
    for end in OUTPUTS:
        assert Path(f"{output}{end}").read_bytes() == Path(f"{text / 'whole'}{end}").read_bytes(), end
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".") or path.suffix == ".tmp"]


def test_a_resumed_job_encodes_only_the_rest_and_writes_the_same_bytes(text, tmp_path, monkeypatch):
    killed_at(4, flags(text, tmp_path / "new"))
    kept = json.loads((tmp_path / "new.progress.tmp").read_text())["documents"]
    encoded, encode = [], encoding.encode_chunk
    monkeypatch.setattr(encoding, "_CHUNK_CHARACTERS", 100_000)
    monkeypatch.setattr(encoding, "encode_chunk", lambda folder, names, texts, first: (
        encoded.extend(names), encode(folder, names, texts, first))[1])  # fmt: skip
    error = tool("tokenize_corpus", *flags(text, tmp_path / "new")).stderr
    assert 0 < kept == 3000 - len(encoded) and f"{kept:,} documents" in error
    assert_same(text, tmp_path / "new")


@pytest.mark.slow
def test_a_job_killed_at_each_of_its_commits_and_renames_loses_nothing(text, tmp_path):
    kills, kept = 0, []
    while True:
        job = start(2, flags(text, tmp_path / "new"))  # one commit or rename more than the job before
        _, error = job.communicate(timeout=120)
        if job.returncode == 0:
            break
        assert job.returncode == -signal.SIGKILL, error
        kills += 1
        kept.append(json.loads((tmp_path / "new.progress.tmp").read_text())["documents"])
        if kept[-1] == 3000:
            break
    assert kept == sorted(kept) and kills >= 8
    for rename in range(2, 8):  # the first is that of the commit before the files get their names
        killed_at(rename, flags(text, tmp_path / "new"))
    error = tool("tokenize_corpus", *flags(text, tmp_path / "new")).stderr
    assert "3,000 documents" in error
    assert_same(text, tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_killed_twice_at_any_moment_resumes_and_writes_the_same_bytes(text, tmp_path, workers):
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    for number in range(3):
        output = tmp_path / f"{number}" / "new"
        for _ in range(2):
            job = start(0, flags(text, output, "--workers", workers))
            time.sleep(rng.uniform(0.1, 1.2))
            job.kill()
            job.communicate(timeout=120)
        job = start(0, flags(text, output, "--workers", workers, "--overwrite"))  # one may have been complete
        _, error = job.communicate(timeout=120)
        assert job.returncode == 0, error
        assert_same(text, output)


def test_work_of_other_settings_is_refused_until_it_is_discarded(text, tmp_path):
    killed_at(4, flags(text, tmp_path / "new"))
    (tmp_path / "other.jsonl").write_bytes((text / "text.jsonl").read_bytes())
    for name, more in (("input", ["--input", tmp_path / "other.jsonl"]), ("on_bad_line", ["--on-bad-line", "skip"])):
        error = tool("tokenize_corpus", *flags(text, tmp_path / "new", *more), status=2).stderr
        assert name in error and "--overwrite" in error and "Traceback" not in error
        assert (tmp_path / "new.progress.tmp").exists()
    tool("tokenize_corpus", *flags(text, tmp_path / "new", "--input", tmp_path / "other.jsonl", "--overwrite"))
    assert TokenFile(tmp_path / "new_train").sidecar.corpus["inputs"] == [str(tmp_path / "other.jsonl")]
    assert (tmp_path / "new_train.bin").read_bytes() == (text / "whole_train.bin").read_bytes()


def test_seed_and_workers_may_change_because_they_do_not_change_the_encoded_documents(text, tmp_path):
    killed_at(4, flags(text, tmp_path / "new", "--seed", 5))
    job = start(0, flags(text, tmp_path / "new", "--workers", 2))
    _, error = job.communicate(timeout=120)
    assert job.returncode == 0 and "resumes" in error, error
    assert_same(text, tmp_path / "new")


def test_a_text_that_changed_is_refused_and_the_work_remains(text, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_bytes((text / "text.jsonl").read_bytes())
    words = flags(text, tmp_path / "new", "--input", own)
    killed_at(4, words)
    lines = own.read_text().splitlines(keepends=True)
    for changed in ([lines[1], lines[0], *lines[2:]], lines[:9]):
        own.write_text("".join(changed))
        error = start(0, words).communicate(timeout=120)[1]
        assert "no longer" in error and "new.*.tmp" in error and "Traceback" not in error
        assert (tmp_path / "new.progress.tmp").exists()


def test_a_bad_line_far_into_the_text_can_be_corrected_without_encoding_again(text, tmp_path):
    lines = (text / "text.jsonl").read_text().splitlines(keepends=True)
    own, words = tmp_path / "text.jsonl", flags(text, tmp_path / "new", "--input", tmp_path / "text.jsonl")
    own.write_text("".join([*lines[:2900], "{}\n"]))
    job = start(0, words)
    error = job.communicate(timeout=120)[1]
    assert job.returncode == 2 and "text.jsonl:2901" in error and "resumes" in error, error
    own.write_text("".join(lines))
    error = start(0, words).communicate(timeout=120)[1]
    assert "note: resumes" in error
    for end in (".bin", ".idx"):
        assert (tmp_path / f"new_train{end}").read_bytes() == (text / f"whole_train{end}").read_bytes()


def test_counts_of_lost_text_are_those_of_an_undisturbed_job(tmp_path):
    """With a tokenizer that knows ASCII only: the sidecar counts what it lost before and after the kill."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    pieces = ["<unk>", "<eos>", "\u2581", *map(chr, range(33, 127))]
    library = Library(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    (tmp_path / "tokenizer").mkdir()
    library.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    texts = [f"{i} {'天气很好'[i % 4]} " + "plain text " * 500 for i in range(100)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    killed_at(3, flags(tmp_path, tmp_path / "new"))
    tool("tokenize_corpus", *flags(tmp_path, tmp_path / "whole"))
    job = start(0, flags(tmp_path, tmp_path / "new"))
    error = job.communicate(timeout=120)[1]
    assert job.returncode == 0 and "resumes" in error, error
    assert TokenFile(tmp_path / "new_train").sidecar.corpus["unknown_characters"] == 100
    assert_same(tmp_path, tmp_path / "new")


def test_two_jobs_do_not_write_the_same_output(text, tmp_path):
    with staging.Staging(str(tmp_path / "new"), np.dtype("<u2"), {}):
        error = tool("tokenize_corpus", *flags(text, tmp_path / "new"), status=2).stderr
        assert "another process" in error
        with pytest.raises(DataError, match="another process"):
            staging.Staging(str(tmp_path / "new"), np.dtype("<u2"), {})
    assert not list(tmp_path.iterdir())


PEAK = """
import runpy, sys
from pretrain.data import indexed
indexed._BIGRAM_RUN_TOKENS = 1 << 10  # as if the bigram line were computed from its full sample at both sizes
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is in /proc")
def test_memory_does_not_grow_with_the_number_of_documents(text, tmp_path):
    """A list with an integer for each of them would take at least 19 MB more."""
    peaks = {}
    for count in (200_000, 800_000):
        with open(tmp_path / "many.jsonl", "w") as file:
            file.writelines(f'{{"text": "n{number}"}}\n' for number in range(count))
        flags = ["--input", tmp_path / "many.jsonl", "--tokenizer", text / "tokenizer", "--output", tmp_path / str(count)]
        program = [sys.executable, "-c", PEAK, ROOT / "tools" / "tokenize_corpus.py", *flags, "--workers", "1"]
        done = subprocess.run(list(map(str, program)), cwd=ROOT, capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout.split()[-1]) / 1000  # MB
    assert peaks[800_000] - peaks[200_000] < 8, peaks
