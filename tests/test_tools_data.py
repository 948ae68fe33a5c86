"""The data tools, run as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.indexed import TokenFile
from pretrain.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = [first + last for first in ("ba", "kil", "nor", "the", "wo", "zun", "3") for last in ("d", "ger", "lim", "po", "sat")]


def tool(name: str, *arguments, status: int = 0, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def make_texts(count: int, words: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(rng.choice(WORDS, rng.integers(1, words))) + "\n" for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text (200 documents occur three times), a tokenizer, and token files with one worker."""
    folder = tmp_path_factory.mktemp("data")
    texts = make_texts(3000, 400)
    for i in range(0, 600, 3):
        texts[i + 1] = texts[i + 2] = texts[i]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tool("train_tokenizer", "--input", folder / "text.jsonl", "--output", folder / "tokenizer", "--vocab-size", 400)
    tokenize(folder, "one", "--workers", 1)
    return folder


def tokenize(folder: Path, name: str, *more, status: int = 0, fraction: float = 0.1):
    arguments = ["--input", folder / "text.jsonl", "--tokenizer", folder / "tokenizer", "--output", folder / name]
    return tool("tokenize_corpus", *arguments, "--valid-fraction", fraction, *more, status=status)


def texts_of(prefix, tokenizer: Tokenizer) -> list[str]:
    file = TokenFile(prefix)
    return [tokenizer.decode(file.document(i).tolist()) for i in range(file.num_documents)]


def test_every_document_arrives_once_shuffled_and_whole(folder):
    tokenizer = Tokenizer.load(folder / "tokenizer")
    train, valid = (texts_of(folder / f"one_{part}", tokenizer) for part in ("train", "valid"))
    written = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    assert sorted(train + valid) == sorted(written)
    assert 200 < len(valid) < 400
    assert not set(train) & set(valid)  # not even of those that occur three times
    numbers = [int(text.split(":")[0]) for text in train]
    assert abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]) < 0.1
    sidecars = [TokenFile(folder / f"one_{part}").sidecar for part in ("train", "valid")]
    assert sum(sidecar.utf8_bytes for sidecar in sidecars) == sum(len(text.encode()) for text in written)
    assert all(sidecar.shuffled and sidecar.tokenizer_fingerprint == tokenizer.fingerprint for sidecar in sidecars)
    for part in ("train", "valid"):
        TokenFile(folder / f"one_{part}").check_checksums()


def test_any_number_of_workers_writes_the_same_bytes(folder):
    tokenize(folder, "two", "--workers", 2)
    for part in ("train", "valid"):
        for end in (".bin", ".idx", ".json"):
            assert (folder / f"one_{part}{end}").read_bytes() == (folder / f"two_{part}{end}").read_bytes()


def test_seed_and_order_are_as_asked(folder):
    tokenizer = Tokenizer.load(folder / "tokenizer")
    tokenize(folder, "seeded", "--seed", 5, "--workers", 1)
    assert texts_of(folder / "seeded_train", tokenizer)[:9] != texts_of(folder / "one_train", tokenizer)[:9]
    tokenize(folder, "plain", "--no-shuffle", "--workers", 1, fraction=0)
    written = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    assert texts_of(folder / "plain", tokenizer) == written
    assert not TokenFile(folder / "plain").sidecar.shuffled


def test_the_report_is_true(folder):
    lines = tokenize(folder, "report", "--workers", 1).stdout.splitlines()
    sidecars = {part: TokenFile(folder / f"report_{part}").sidecar for part in ("train", "valid")}
    assert lines[0].startswith("read 3,000 documents, ") and sidecars["train"].corpus["sha256"] in lines[0]
    for part, sidecar in sidecars.items():
        (line,) = [line for line in lines if f"report_{part}:" in line]
        assert f"{sidecar.num_tokens:,} tokens in {sidecar.num_documents:,} documents" in line
        assert f"{sidecar.utf8_bytes / sidecar.num_tokens:.2f} bytes of text per token" in line
    assert "5.991  guessing: ln 400" in "\n".join(lines)
    assert f"{sidecars['train'].unigram_entropy_nats:.3f}  unigram" in "\n".join(lines)
    assert f"{sidecars['train'].bigram_entropy_nats:.3f}  bigram" in "\n".join(lines)


def test_a_kill_in_the_middle_leaves_nothing_under_the_final_names_and_no_process(folder, tmp_path):
    for i in range(20):
        os.link(folder / "text.jsonl", tmp_path / f"{i}.jsonl")
    command = [sys.executable, str(ROOT / "tools" / "tokenize_corpus.py"), "--input", str(tmp_path)]
    command += ["--tokenizer", str(folder / "tokenizer"), "--output", str(tmp_path / "killed"), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (workers := children(process.pid)):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [path.name for path in tmp_path.glob("killed*") if path.suffix != ".tmp"]
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"processes {alive} live on"
        time.sleep(0.1)
    tool("tokenize_corpus", "--input", folder / "text.jsonl", *command[4:-1], "1")  # what was left does not stand in the way
    assert TokenFile(tmp_path / "killed").num_documents == 3000


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("needs /proc")
    return [int(child) for child in path.read_text().split()]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--valid-fraction", "1.5"], "--valid-fraction 1.5: must be"),
        (["--workers", "0"], "--workers 0: must be"),
        (["--output", "{folder}/"], "give a prefix"),
        (["--output", "{folder}/new.bin"], "give a prefix"),
        (["--tokenizer", "nowhere"], "nowhere: no tokenizer here"),
        (["--input", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--hf", "also"], "give either --input FILES or --hf NAME"),
        (["--text-key", "body"], "text.jsonl:1: no key 'body' among 'text'"),
        (["--output", "{folder}/one"], "one_valid.json"),
        (["--valid-fraction", "1e-12"], "new_valid: gets none of the 3,000 documents; use another"),
    ],
)
def test_unusable_arguments_are_refused_in_one_line_with_status_2(folder, arguments, what):
    arguments = [argument.format(folder=folder) for argument in arguments]
    done = tokenize(folder, "new", "--workers", 1, *arguments, status=2)
    assert what in done.stderr and "Traceback" not in done.stderr
    assert not list(folder.glob("new*"))


def test_one_document_is_not_divided_and_the_refusal_says_how_to_cut_it(folder, tmp_path):
    (tmp_path / "book.txt").write_text("A paragraph.\n\nAnother one.\n" * 100)
    arguments = ["--input", tmp_path / "book.txt", "--tokenizer", folder / "tokenizer", "--valid-fraction", 0.5, "--workers", 1]
    done = tool("tokenize_corpus", *arguments, "--output", tmp_path / "book", status=2)
    assert "gets none of the 1 documents; a document is not divided; say where each begins (--text-split)" in done.stderr


def test_a_full_disk_is_named_and_leaves_nothing(folder, tmp_path):
    """As a limit on the size of files; the tokenizer's library reports both in a way of its own."""
    run = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = sys.argv[1:]; "
    run += "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); runpy.run_path(sys.argv[0], run_name='__main__')"
    tokens = ["tokenize_corpus.py", "--tokenizer", folder / "tokenizer", "--workers", "1"]
    for name, *arguments in (tokens, ["train_tokenizer.py", "--vocab-size", "400"]):
        command = [sys.executable, "-c", run, ROOT / "tools" / name, "--input", folder / "text.jsonl", *arguments]
        done = subprocess.run([*command, "--output", tmp_path / "new"], capture_output=True, text=True)
        assert done.returncode == 2 and f"error: {tmp_path / 'new'}: File too large" in done.stderr, done.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--max-megabytes", "nan"], ["--max-megabytes", "0"], ["--vocab-size", "-5"]])
def test_impossible_numbers_are_refused_by_their_name(folder, tmp_path, arguments):
    about = ["--input", folder / "text.jsonl", "--output", tmp_path / "t", "--vocab-size", 350]
    done = tool("train_tokenizer", *about, *arguments, status=2)
    assert f"error: {arguments[0]} " in done.stderr and "Traceback" not in done.stderr


def test_train_tokenizer_refuses_in_one_line_with_status_2(folder):
    about = ["--input", folder / "text.jsonl", "--output"]
    done = tool("train_tokenizer", *about, folder / "tokenizer", "--vocab-size", 400, status=2)
    assert "exists already" in done.stderr and "Traceback" not in done.stderr
    done = tool("train_tokenizer", *about, folder / "t", "--vocab-size", 10**6, status=2)
    assert "allows" in done.stderr and not (folder / "t").exists()


def test_a_tokenizer_is_trained_on_an_even_sample_of_much_text(folder, tmp_path):
    about = ["--input", folder / "text.jsonl", "--output", tmp_path / "t", "--vocab-size", 350]
    done = tool("train_tokenizer", *about, "--max-megabytes", 1)
    assert "training on 1.0" in done.stderr or "training on 0.9" in done.stderr
    assert Tokenizer.load(tmp_path / "t").vocab_size == 350


def test_inspect_shows_a_file(folder):
    out = tool("inspect_data", "--data", folder / "one_train", "--verify", "--documents", 2).stdout
    sidecar = TokenFile(folder / "one_train").sidecar
    assert f"{sidecar.num_tokens:,} tokens (uint16) in {sidecar.num_documents:,} documents" in out
    assert "end-of-document id 2" in out and sidecar.tokenizer_fingerprint in out and "quantiles: 0 % " in out
    first = Tokenizer.load(folder / "tokenizer").decode(TokenFile(folder / "one_train").document(0).tolist())
    assert f"document 0: {json.dumps(first[:200])}" in out and "verified: all 1 checksums" in out


def test_inspect_shows_text_that_the_terminal_cannot(folder, tmp_path):
    (tmp_path / "a.txt").write_text("中文 text")
    arguments = ["--input", tmp_path / "a.txt", "--tokenizer", folder / "tokenizer", "--workers", 1]
    tool("tokenize_corpus", *arguments, "--output", tmp_path / "a")
    command = [sys.executable, ROOT / "tools" / "inspect_data.py", "--data", tmp_path / "a"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert done.returncode == 0 and rb'document 0: "\u4e2d\u6587 text"' in done.stdout


def test_inspect_finds_damage_and_names_it(folder, tmp_path):
    for end in (".bin", ".idx", ".json"):
        (tmp_path / f"a{end}").write_bytes((folder / f"one_train{end}").read_bytes())
    with open(tmp_path / "a.bin", "r+b") as file:
        file.seek(1000)
        file.write(b"\x07\x01")
    assert "damaged between bytes 0 and" in tool("inspect_data", "--data", tmp_path / "a", "--verify", status=2).stderr
    assert "no token file here" in tool("inspect_data", "--data", tmp_path / "b", status=2).stderr


def test_inspect_shows_the_samples_of_a_step_and_the_steps_of_a_document(folder, tmp_path):
    settings = f"""
tokenizer: {{path: {folder / "tokenizer"}}}
data: {{train: [{{path: {folder / "one_train"}}}, {{path: {folder / "one_valid"}, weight: 0.25}}], sequence_length: 64}}
batch: {{global_batch_size: 8, micro_batch_size: 2}}
train: {{max_steps: 100}}
"""
    (tmp_path / "config.yaml").write_text(settings)
    lines = tool("inspect_data", "--run", tmp_path, "--step", 3).stdout.splitlines()
    samples = [line for line in lines if ", sample " in line]
    assert lines[0] == "step 3: positions 16 to 23" and len(samples) == 8
    tokenizer = Tokenizer.load(folder / "tokenizer")
    place, *parts = lines[lines.index(samples[0]) : lines.index(samples[1])]
    assert place.startswith("16: source ")
    source, sample = "one_train" if "source 0 (one_train)" in place else "one_valid", int(place.split("sample ")[1])
    file = TokenFile(folder / source)
    window = tokenizer.decode(file.tokens[sample * 64 : sample * 64 + 65].tolist())
    assert [json.loads(part.split("and on: ")[1].removesuffix("...")) for part in parts]
    for number, part in enumerate(parts):
        document = int(part.split("document ")[1].split(",")[0])
        assert document == file.document_at(sample * 64) + number
        assert json.loads(part.split("and on: ")[1].removesuffix("...")) in window
        assert json.loads(part.split("and on: ")[1].removesuffix("...")) in tokenizer.decode(file.document(document).tolist())
    out = tool("inspect_data", "--run", tmp_path, "--document", f"{source == 'one_valid':d}:{document}").stdout
    assert f"sample {sample}: steps 3 (epoch 0)" in out
    assert "steps count from 1" in tool("inspect_data", "--run", tmp_path, "--step", 0, status=2).stderr
    assert "give SOURCE:NUMBER" in tool("inspect_data", "--run", tmp_path, "--document", "0:-1", status=2).stderr


@pytest.mark.parametrize("name", ["train_tokenizer", "tokenize_corpus", "inspect_data"])
def test_help_works_from_any_folder(name, tmp_path):
    assert "example" in tool(name, "--help", cwd=tmp_path).stdout
