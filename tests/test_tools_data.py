"""The data tools do what their flags say, and refuse impossible requests with status 2 and one line."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pretrain.data.indexed import TokenFile
from pretrain.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = [first + last for first in ("ba", "kil", "nor", "the", "wo", "zun", "3") for last in ("d", "ger", "lim", "po", "sat")]


class Output(NamedTuple):
    stdout: str
    stderr: str


def tool(name: str, *arguments, status: int = 0, stdin: bytes = b"") -> Output:
    """Runs tools/<name>.py in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        patch.setattr(sys, "path", ["", *sys.path])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    assert (end.value.code or 0) == status, out.getvalue() + err.getvalue()
    return Output(out.getvalue(), err.getvalue())


def make_texts(count: int, words: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(rng.choice(WORDS, rng.integers(1, words))) + "\n" for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text (200 documents occur three times), a tokenizer, and token files made by one worker."""
    folder = tmp_path_factory.mktemp("data")
    texts = make_texts(3000, 100)
    for i in range(0, 600, 3):
        texts[i + 1] = texts[i + 2] = texts[i]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tool("train_tokenizer", "--input", folder / "text.jsonl", "--output", folder / "tokenizer", "--vocab-size", 400)
    tokenize(folder, "one")
    return folder


def tokenize_flags(folder: Path, name: str, fraction: float = 0.1) -> list:
    flags = ["--input", folder / "text.jsonl", "--tokenizer", folder / "tokenizer", "--output", folder / name]
    return [*flags, "--workers", 1, "--valid-fraction", fraction]


def tokenize(folder: Path, name: str, *more, fraction: float = 0.1, **options) -> Output:
    return tool("tokenize_corpus", *tokenize_flags(folder, name, fraction), *more, **options)


def texts_of(prefix, tokenizer: Tokenizer) -> list[str]:
    file = TokenFile(prefix)
    return [tokenizer.decode(file.document(i).tolist()) for i in range(file.num_documents)]


# ---------------------------------------------------------------- tokenize_corpus


def test_every_document_arrives_once_shuffled_and_complete(folder):
    tokenizer = Tokenizer.load(folder / "tokenizer")
    train, valid = (texts_of(folder / f"one_{part}", tokenizer) for part in ("train", "valid"))
    written = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    assert sorted(train + valid) == sorted(written)
    assert 200 < len(valid) < 400
    assert not set(train) & set(valid)  # duplicates are on one side
    numbers = [int(text.split(":")[0]) for text in train]
    assert abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]) < 0.1
    files = [TokenFile(folder / f"one_{part}") for part in ("train", "valid")]
    assert sum(file.sidecar.utf8_bytes for file in files) == sum(len(text.encode()) for text in written)
    for file in files:
        assert file.sidecar.shuffled and file.sidecar.tokenizer_fingerprint == tokenizer.fingerprint
        file.check_checksums()


def test_any_number_of_workers_writes_the_same_bytes(folder):
    command = [
        sys.executable,
        ROOT / "tools" / "tokenize_corpus.py",
        *map(str, tokenize_flags(folder, "two")),
        "--workers",
        "2",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    for part in ("train", "valid"):
        for end in (".bin", ".idx", ".json"):
            assert (folder / f"one_{part}{end}").read_bytes() == (folder / f"two_{part}{end}").read_bytes()


def test_seed_and_no_shuffle_decide_the_order(folder):
    tokenizer = Tokenizer.load(folder / "tokenizer")
    tokenize(folder, "seeded", "--seed", 5)
    assert texts_of(folder / "seeded_train", tokenizer)[:9] != texts_of(folder / "one_train", tokenizer)[:9]
    tokenize(folder, "plain", "--no-shuffle", fraction=0)
    written = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    assert texts_of(folder / "plain", tokenizer) == written
    assert not TokenFile(folder / "plain").sidecar.shuffled


def test_standard_input_is_tokenized_like_the_file(folder):
    tokenize(folder, "file", "--no-shuffle", fraction=0)
    tokenize(folder, "stdin", "--no-shuffle", "--input", "-", "--stdin-format", "jsonl", fraction=0,
             stdin=(folder / "text.jsonl").read_bytes())  # fmt: skip
    assert (folder / "stdin.bin").read_bytes() == (folder / "file.bin").read_bytes()


def test_the_report_has_the_numbers_of_the_files(folder):
    report = tokenize(folder, "report").stdout
    sidecars = {part: TokenFile(folder / f"report_{part}").sidecar for part in ("train", "valid")}
    numbers = ["3,000 documents", "5.991", *(sidecar.corpus["sha256"] for sidecar in sidecars.values())]
    for part, sidecar in sidecars.items():
        numbers += [f"report_{part}: {sidecar.num_tokens:,} tokens in {sidecar.num_documents:,} documents"]
        numbers += [f"{sidecar.utf8_bytes / sidecar.num_tokens:.2f} bytes"]
    numbers += [
        f"{sidecars['train'].unigram_entropy_nats:.3f}  unigram",
        f"{sidecars['train'].bigram_entropy_nats:.3f}  bigram",
    ]
    assert all(number in report for number in numbers), report


def test_templates_formats_and_near_duplicates_are_recorded_and_counted(folder, tmp_path):
    rows = [
        ("One", "a b c d e f g h " * 9),
        ("Two", "i j k l m n o p " * 9),
        ("Three", "a b c d e f g h " * 8 + "A B; C d e f g"),
    ]
    table = "title,text\n" + "".join(f'"{title}","{text}"\n' for title, text in rows)
    (tmp_path / "part-00000").write_bytes(gzip.compress(table.encode()))
    flags = [
        "--input",
        tmp_path / "part-00000",
        "--format",
        "csv",
        "--template",
        r"{title}:\n{text}",
        "--near-duplicates",
        "drop",
    ]
    flags += ["--duplicate-similarity", 0.7]
    done = tokenize(folder, "", *flags, "--output", tmp_path / "new", "--no-shuffle", fraction=0)
    assert texts_of(tmp_path / "new", Tokenizer.load(folder / "tokenizer")) == [f"{title}:\n{text}" for title, text in rows[:2]]
    corpus = TokenFile(tmp_path / "new").sidecar.corpus
    assert corpus["template"] == r"{title}:\n{text}" and corpus["near_duplicates"]["dropped"] == 1
    assert "1 near-duplicate" in done.stderr and "read 2 documents" in done.stdout
    tool("train_tokenizer", *flags, "--output", tmp_path / "t", "--vocab-size", 280)
    info = json.loads((tmp_path / "t" / "tokenizer_info.json").read_text())
    assert info["corpus"]["near_duplicates"] == corpus["near_duplicates"] and info["corpus"]["num_documents"] == 2
    assert not {"template", "near_duplicates"} & TokenFile(folder / "one_train").sidecar.corpus.keys()


def test_a_killed_run_leaves_no_file_under_a_final_name_and_no_process(folder, tmp_path):
    for i in range(20):
        os.link(folder / "text.jsonl", tmp_path / f"{i}.jsonl")
    flags = ["--input", tmp_path, "--tokenizer", folder / "tokenizer", "--output", tmp_path / "killed", "--workers", 2]
    command = [sys.executable, ROOT / "tools" / "tokenize_corpus.py", *map(str, flags)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (workers := children(process.pid)):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [path.name for path in tmp_path.glob("killed*") if path.suffix != ".tmp"]
    deadline = time.monotonic() + 60
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"processes {alive} survived"
        time.sleep(0.1)
    tool("tokenize_corpus", *flags, "--input", folder / "text.jsonl", "--workers", 1)  # leftovers do not block the next run
    assert TokenFile(tmp_path / "killed").num_documents == 3000


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("needs /proc")
    return [int(child) for child in path.read_text().split()]


def test_a_killed_worker_names_memory_and_the_flag_that_lowers_it(folder, tmp_path):
    command = [sys.executable, ROOT / "tools" / "tokenize_corpus.py", *map(str, tokenize_flags(folder, tmp_path / "new"))]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True)
    while not (workers := children(process.pid)):
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(workers[0], signal.SIGKILL)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2 and "memory" in error and "--workers" in error and "text.jsonl:" in error, error
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- text that a tokenizer loses


@pytest.fixture(scope="module")
def lossy(tmp_path_factory) -> Path:
    """A tokenizer that knows ASCII only and joins unknown characters in one id, as SentencePiece without byte fallback."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    pieces = ["<unk>", "<eos>", "\u2581", *map(chr, range(33, 127))]
    library = Library(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    folder = tmp_path_factory.mktemp("lossy")
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return folder


def write_jsonl(path: Path, texts: list[str]) -> list:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ["--input", path, "--workers", 1]


@pytest.mark.parametrize("ascii", [1, 20], ids=["one chunk", "after several chunks"])
def test_text_that_becomes_unknown_ids_is_an_error_wherever_it_stands(lossy, tmp_path, ascii):
    """The unknown ids alone would be too few to notice: each document becomes one."""
    texts = ["plain ascii text " * 2000] * ascii + ["天气很好" * 40] * 300
    flags = [*write_jsonl(tmp_path / "a.jsonl", texts), "--tokenizer", lossy, "--output", tmp_path / "new"]
    error = tool("tokenize_corpus", *flags, status=2).stderr
    assert "48,000 of" in error and "300 unknown ids" in error and "--max-unknown-fraction" in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    error = tool("tokenize_corpus", *flags, "--max-unknown-fraction", 1).stderr
    assert "48,000 of" in error and "a.jsonl" in error
    sidecar = TokenFile(tmp_path / "new").sidecar
    assert sidecar.corpus["unknown_characters"] == 48_000 and sidecar.corpus["unknown_tokens"] == 300
    out = tool("inspect_data", "--data", tmp_path / "new").stdout
    assert f"{sidecar.corpus['unknown_fraction']:.3%}" in out


def test_a_few_unknown_characters_are_noted_fewer_are_not_and_text_that_says_unk_is_none(lossy, tmp_path):
    for count, noted in ((0, False), (3, False), (30, True)):
        flags = write_jsonl(tmp_path / "a.jsonl", ["plain <unk> text " * 500, "天气" * count])
        flags += ["--tokenizer", lossy, "--output", tmp_path / "new", "--overwrite"]
        error = tool("tokenize_corpus", *flags).stderr
        assert (f"{2 * count} of" in error) == noted, error
        assert ("unknown_fraction" in TokenFile(tmp_path / "new").sidecar.corpus) == (count > 0)


def test_unknown_text_with_the_id_that_ends_documents_is_refused_with_its_place(lossy, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_bytes((lossy / "tokenizer.json").read_bytes())
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    flags = [*write_jsonl(tmp_path / "a.jsonl", ["ascii", "天气"]), "--tokenizer", tmp_path / "t", "--output", tmp_path / "new"]
    assert "a.jsonl:2" in tool("tokenize_corpus", *flags, "--max-unknown-fraction", 1, status=2).stderr


def test_our_tokenizer_loses_nothing_and_says_nothing(folder, tmp_path):
    flags = write_jsonl(tmp_path / "a.jsonl", ["天气很好\u2581 \0\t😀" * 40] * 30)
    error = tokenize(folder, "a", *flags, "--output", tmp_path / "new", "--max-unknown-fraction", 0, fraction=0).stderr
    assert "note" not in error and "unknown_fraction" not in TokenFile(tmp_path / "new").sidecar.corpus


def test_a_change_by_the_tokenizer_is_found_in_any_document_of_a_chunk(lossy, tmp_path):
    """Not only in the first one, which was once the only one that was compared."""
    texts = ["plain text"] + ["two  spaces"] * 2000
    write_jsonl(tmp_path / "a.jsonl", texts)
    library = json.loads((lossy / "tokenizer.json").read_text())
    library["normalizer"] = {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(library))
    (tmp_path / "t" / "tokenizer_config.json").write_bytes((lossy / "tokenizer_config.json").read_bytes())
    flags = ["--input", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "t", "--output", tmp_path / "new", "--workers", 1]
    error = tool("tokenize_corpus", *flags).stderr
    assert "two  spaces" in error and "two spaces" in error and "lossy" in error


@pytest.mark.slow
def test_a_long_line_needs_little_more_memory_than_its_text(tmp_path, lossy):
    """By the peak of the process itself, in which a library would take 100 bytes and more per byte of text."""
    write_jsonl(tmp_path / "a.jsonl", ["some words of text " * 1_000_000])
    run = "import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    run += "finally: print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    command = [sys.executable, "-c", run, ROOT / "tools" / "tokenize_corpus.py", "--input", tmp_path / "a.jsonl"]
    command += ["--tokenizer", lossy, "--output", tmp_path / "new", "--workers", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-2]) < 800_000, done.stdout


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--valid-fraction", "1.5"], "--valid-fraction"),
        (["--workers", "0"], "--workers"),
        (["--output", "{folder}/"], "--output"),
        (["--output", "{folder}/new.bin"], "--output"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--input", "nowhere.txt"], "nowhere.txt"),
        (["--hf", "also"], "--hf"),
        (["--text-key", "body"], "text.jsonl:1"),
        (["--text-key", "body", "--template", "{{text}}"], "--template"),
        (["--template", "{{text"], "--template"),
        (["--format", "xml"], "--format"),
        (["--format", "parquet"], "text.jsonl"),
        (["--near-duplicates", "drop", "--duplicate-similarity", "1"], "--duplicate-similarity"),
        (["--output", "{folder}/one"], "one_valid.json"),
        (["--valid-fraction", "1e-12"], "new_valid"),
    ],
)
def test_tokenize_corpus_refuses_and_leaves_nothing(folder, flags, part):
    error = tokenize(folder, "new", *(flag.format(folder=folder) for flag in flags), status=2).stderr
    assert part in error and "Traceback" not in error
    assert not list(folder.glob("new*"))


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--max-megabytes", "nan"], "--max-megabytes"),
        (["--max-megabytes", "0"], "--max-megabytes"),
        (["--vocab-size", "-5"], "--vocab-size"),
        (["--vocab-size", 10**6], "--vocab-size"),
        (["--output", "{folder}/tokenizer"], "/tokenizer"),
    ],
)
def test_train_tokenizer_refuses_and_leaves_nothing(folder, flags, part):
    flags = ["--vocab-size", 400, "--output", folder / "t", *(str(flag).format(folder=folder) for flag in flags)]
    error = tool("train_tokenizer", "--input", folder / "text.jsonl", *flags, status=2).stderr
    assert part in error and "Traceback" not in error
    assert not (folder / "t").exists()


def test_a_single_document_is_not_split_and_the_refusal_names_the_flag_that_splits_it(folder, tmp_path):
    (tmp_path / "book.txt").write_text("A paragraph.\n\nAnother one.\n" * 100)
    flags = ["--input", tmp_path / "book.txt", "--output", tmp_path / "book"]
    assert "--text-split" in tokenize(folder, "book", *flags, fraction=0.5, status=2).stderr


def test_a_full_disk_is_reported_with_the_output_and_leaves_nothing(folder, tmp_path):
    """Simulated by a limit on the size of files."""
    run = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = sys.argv[1:]; "
    run += "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); runpy.run_path(sys.argv[0], run_name='__main__')"
    tokens = ["tokenize_corpus.py", "--tokenizer", folder / "tokenizer", "--workers", "1"]
    for name, *flags in (tokens, ["train_tokenizer.py", "--vocab-size", "400"]):
        command = [sys.executable, "-c", run, ROOT / "tools" / name, "--input", folder / "text.jsonl", *flags]
        done = subprocess.run([*command, "--output", tmp_path / "new"], capture_output=True, text=True)
        assert done.returncode == 2 and "File too large" in done.stderr and str(tmp_path / "new") in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- train_tokenizer, inspect_data


def test_a_tokenizer_is_trained_on_an_even_sample_of_a_large_corpus(folder, tmp_path):
    flags = ["--input", folder / "text.jsonl", "--output", tmp_path / "t", "--vocab-size", 350, "--max-megabytes", 0.3]
    error = tool("train_tokenizer", *flags).stderr
    assert 0.27 < float(error.split("training on ")[1].split(" MB")[0]) <= 0.31
    assert Tokenizer.load(tmp_path / "t").vocab_size == 350


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_sample_for_a_tokenizer_takes_its_share_of_every_file_whatever_their_sizes_on_disk(tmp_path, pack):
    """Files that compress by different factors; the second language comes last."""
    rng = np.random.default_rng(0)
    for i in range(4):
        words = [f"{word} " for word in (WORDS[:2] if i < 2 else ["天气", "公园", "很好"])]
        records = [json.dumps({"text": "".join(rng.choice(words, 800))}, ensure_ascii=False) + "\n" for _ in range(100)]
        (tmp_path / f"{i}.jsonl{'.gz' if pack is gzip.compress else ''}").write_bytes(pack("".join(records).encode()))
    flags = ["--input", tmp_path, "--output", tmp_path / "t", "--vocab-size", 285, "--max-megabytes", 0.3]
    output = tool("train_tokenizer", *flags)
    info = json.loads((tmp_path / "t" / "tokenizer_info.json").read_text())
    assert 280_000 < info["corpus"]["used_utf8_bytes"] <= 300_000 and "trained on 0.30 MB, sampled evenly" in output.stdout
    assert len(Tokenizer.load(tmp_path / "t").encode("天气 公园 很好")) < 8  # pieces, not 18 bytes


def test_inspect_data_shows_a_file(folder):
    out = tool("inspect_data", "--data", folder / "one_train", "--verify", "--documents", 2).stdout
    file = TokenFile(folder / "one_train")
    first = Tokenizer.load(folder / "tokenizer").decode(file.document(0).tolist())
    facts = [f"{file.num_tokens:,} tokens (uint16) in {file.num_documents:,} documents", "end-of-document id 2"]
    facts += [file.sidecar.tokenizer_fingerprint, "quantiles: 0 % ", f"document 0: {json.dumps(first[:200])}", "verified"]
    assert all(fact in out for fact in facts), out


def test_inspect_data_shows_text_that_the_terminal_cannot(folder, tmp_path):
    (tmp_path / "a.txt").write_text("中文 text")
    tokenize(folder, "a", "--input", tmp_path / "a.txt", "--output", tmp_path / "a", fraction=0)
    command = [sys.executable, ROOT / "tools" / "inspect_data.py", "--data", tmp_path / "a"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert done.returncode == 0 and rb'document 0: "\u4e2d\u6587 text"' in done.stdout


def test_inspect_data_finds_damage_and_its_place(folder, tmp_path):
    for end in (".bin", ".idx", ".json"):
        (tmp_path / f"a{end}").write_bytes((folder / f"one_train{end}").read_bytes())
    with open(tmp_path / "a.bin", "r+b") as file:
        file.seek(1000)
        file.write(b"\x07\x01")
    assert "a.bin" in tool("inspect_data", "--data", tmp_path / "a", "--verify", status=2).stderr
    assert str(tmp_path / "b") in tool("inspect_data", "--data", tmp_path / "b", status=2).stderr


@pytest.fixture
def run(folder, tmp_path) -> Path:
    """The folder of a run that has written no metrics yet."""
    (tmp_path / "config.yaml").write_text(f"""
tokenizer: {{path: {folder / "tokenizer"}}}
data: {{train: [{{path: {folder / "one_train"}}}, {{path: {folder / "one_valid"}, weight: 0.25}}], sequence_length: 64}}
batch: {{global_batch_size: 8, micro_batch_size: 2}}
train: {{max_steps: 100}}
""")
    return tmp_path


def test_inspect_data_shows_the_samples_of_a_step_and_the_steps_of_a_document(folder, run):
    lines = tool("inspect_data", "--run", run, "--step", 3).stdout.splitlines()
    samples = [line for line in lines if ", sample " in line]
    assert lines[0] == "step 3: positions 16 to 23" and len(samples) == 8
    tokenizer = Tokenizer.load(folder / "tokenizer")
    place, *parts = lines[lines.index(samples[0]) : lines.index(samples[1])]
    assert place.startswith("16: source ")
    source, sample = "one_train" if "source 0 (one_train)" in place else "one_valid", int(place.split("sample ")[1])
    file = TokenFile(folder / source)
    window = tokenizer.decode(file.read([sample * 64], [65]).tolist())
    assert parts
    for number, part in enumerate(parts):
        document = int(part.split("document ")[1].split(",")[0])
        text = json.loads(part[part.index('"') :].removesuffix("..."))
        assert document == file.document_at(sample * 64) + number
        assert text and text in window and text in tokenizer.decode(file.document(document).tolist())
    out = tool("inspect_data", "--run", run, "--document", f"{source == 'one_valid':d}:{document}").stdout
    assert f"sample {sample}: steps 3 (epoch 0)" in out


@pytest.mark.parametrize(
    "flags", [["--step", "0"], ["--document", "0:-1"], ["--document", "9:0"], ["--document", "0:99999"], []]
)
def test_inspect_data_refuses_impossible_steps_and_documents(run, flags):
    error = tool("inspect_data", "--run", run, *flags, status=2).stderr
    assert (flags or ["--step"])[0] in error and "Traceback" not in error


def test_inspect_data_skips_what_the_run_skipped_although_the_last_line_of_its_metrics_is_torn(run):
    """A kill leaves such a line; so does reading while the run writes."""
    (run / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 5.0}\n{"step": 2, "rollbacks": 1, "skipped_positions": [16, 32]}\n'
        '{"step": 4, "rollbacks": 2, "skipped_positions": [4'
    )
    assert tool("inspect_data", "--run", run, "--step", 3).stdout.startswith("step 3: positions 32 to 39\n")


@pytest.mark.parametrize("name", ["train_tokenizer", "tokenize_corpus", "inspect_data"])
def test_help_works_from_any_folder(name, tmp_path):
    command = [sys.executable, ROOT / "tools" / f"{name}.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"python tools/{name}.py --" in done.stdout
