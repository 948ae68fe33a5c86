"""A source of many files is read like one file: every window once, none across files, whatever names the files."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config import DataConfig, SourceConfig
from pretrain.data import shards
from pretrain.data.batches import MASKED, open_train, open_valid
from pretrain.data.checks import check_shards
from pretrain.data.indexed import DataError, DataMissing, TokenFile
from pretrain.data.reads import OpenFiles
from tests.models import train_here

from .test_batches import OPEN, T, random_lengths
from .test_indexed import END, all_tokens, documents, write, write_megatron
from .test_tools_data import tool

ROOT = Path(__file__).resolve().parents[1]
SIZES = [40, 1, 12, 90, 3, 25]
"""Documents of the shards below; the second has less than a window."""


def source(path, **options) -> SourceConfig:
    path = [str(each) for each in path] if isinstance(path, list) else str(path)
    return SourceConfig(path=path, **options)


def settings(*train, valid=(), **options) -> DataConfig:
    train, valid = ([each if isinstance(each, SourceConfig) else source(each) for each in kind] for kind in (train, valid))
    return DataConfig(train=train, valid=valid, **(dict(sequence_length=T) | options))


@pytest.fixture(scope="module")
def web(tmp_path_factory) -> Path:
    """A folder of shards with sidecars, named so that their order by name is not that of their numbers."""
    folder = tmp_path_factory.mktemp("data") / "web"
    folder.mkdir()
    for number, size in enumerate(SIZES):
        lengths = [7] if size == 1 else random_lengths(number, size)
        write(folder / f"part-{3 * number}", documents(lengths, seed=number))
    return folder


def files_of(folder: Path) -> list[TokenFile]:
    return [TokenFile(path.with_suffix("")) for path in sorted(folder.glob("*.idx"))]


# ---------------------------------------------------------------- the files that a path names


def test_folders_patterns_and_lists_name_their_files_in_the_order_of_names(web):
    names = [str(web / f"part-{number}") for number in (0, 12, 15, 3, 6, 9)]
    assert shards.find_files(str(web)) == shards.find_files(f"{web}/") == names
    for pattern in ("*", "part-*", "part-*.bin", "*.idx", "../web/**", "part-[0-9]*"):
        assert list(map(os.path.realpath, shards.find_files(str(web / pattern)))) == list(map(os.path.realpath, names)), pattern
    assert shards.find_files(str(web / "part-1?")) == names[1:3]
    assert shards.find_files([str(web / "part-9"), str(web / "part-1*")]) == [names[5], *names[1:3]]
    assert shards.find_files(str(web.parent / "**")) == names


def test_a_folder_is_read_without_the_folders_below_it_and_without_other_files(web, tmp_path):
    folder = shutil.copytree(web, tmp_path / "x[1]")  # a bracket in the name of a folder is none of a pattern
    shutil.copytree(web, folder / "below")
    for name in ("readme.md", "part-99.bin.tmp", ".hidden.bin", "notes.json"):
        (folder / name).write_bytes(b"no tokens")
    np.arange(50, dtype="<u2").tofile(folder / "flat.bin")
    names = shards.find_files(str(folder))
    assert len(names) == len(SIZES) + 1 and names[0] == str(folder / "flat.bin")
    assert len(shards.find_files(f"{shutil.copytree(folder, tmp_path / 'plain')}/**")) == 2 * len(SIZES) + 1


def test_a_pair_is_preferred_to_a_folder_of_the_same_name(web, tmp_path):
    write(tmp_path / "web")
    shutil.copytree(web, tmp_path / "web")
    write(tmp_path / "odd[1]*")
    assert shards.is_one_file(str(tmp_path / "web")) and shards.is_one_file(str(tmp_path / "odd[1]*"))
    assert not shards.is_one_file(f"{tmp_path / 'web'}/") and not shards.is_one_file([str(tmp_path / "web")])
    assert len(open_train(settings(tmp_path / "web"), **OPEN).sources[0].files) == 1
    assert len(shards.find_files(f"{tmp_path / 'web'}/")) == len(SIZES)


def test_a_path_that_names_nothing_or_a_file_twice_is_refused(web, tmp_path):
    (tmp_path / "outer").mkdir()
    shutil.copytree(web, tmp_path / "outer" / "inner")
    for path, what in (
        (tmp_path / "outer", r"outer.*inner.*outer/\*\*"),
        (web / "nothing-*", "nothing-.*: no token file here"),
        ([], "empty list"),
        ([web / "part-0", web / "part-99*"], r"part-99\*: no token file"),
    ):
        with pytest.raises(DataMissing, match=what):
            shards.find_files(source(path).path)
    with pytest.raises(DataError, match=r"part-12: named twice"):
        shards.find_files([str(web / "part-1*"), str(web / "part-12")])
    os.symlink(web, tmp_path / "link")
    with pytest.raises(DataError, match=r"part-0: named twice"):
        shards.find_files([str(web), str(tmp_path / "link")])


def test_two_sources_with_the_same_file_are_refused_where_a_pattern_hides_it(web):
    with pytest.raises(DataError, match=r"data\.train\[1\]\.path: names .*part-12, as data\.train\[0\]"):
        open_train(settings(web / "part-1*", web / "part-12"), **OPEN)
    open_train(settings(web / "part-12", web / "part-12"), **OPEN)
    open_valid(settings(web, valid=[web / "part-1*"]), **OPEN)  # the preflight warns


def test_sources_are_named_after_their_folder_and_names_are_unique(web, tmp_path, monkeypatch):
    other = shutil.copytree(web, tmp_path / "web")
    monkeypatch.chdir(tmp_path)
    sources = (
        web / "part-0",
        web / "part-1*",
        "web/part-?",
        [web / "part-6", web / "part-9"],
        [other / "part-12", "web/part-15"],
    )
    names = [each.name for each in open_train(settings(*sources), **OPEN).sources]
    outer, own = web.parent.name, tmp_path.name
    assert names == ["part-0", "web-part", "web-part-2", f"{outer}-web", f"{own}-web"]
    monkeypatch.chdir(other)
    for path, name in ((web, "web"), ("*", "web"), ("../web/**", "web"), ("p*", "p"), ("part-1[0-9]", "part"), ("./", "web")):
        assert open_train(settings(path), **OPEN).sources[0].name == name, path


# ---------------------------------------------------------------- reading


def test_each_window_of_each_file_is_a_sample_and_none_crosses_files(web):
    data = open_train(settings(web, document_mask=True), **OPEN)
    windows = [
        tokens[first : first + T + 1] for tokens in map(all_tokens, files_of(web)) for first in range(0, len(tokens) - T, T)
    ]
    assert data.samples_per_epoch == len(windows)
    batch, ids = data.take(0, len(windows)), data.sample_ids(0, len(windows))
    assert sorted(sample for _, _, sample in ids) == list(range(len(windows)))
    for row, (_, _, sample) in enumerate(ids):
        assert np.array_equal(batch.tokens_BT[row], windows[sample][:-1])
        assert np.array_equal(batch.labels_BT[row], windows[sample][1:])
        ends = np.cumsum(np.append(0, windows[sample][:-2] == END))
        assert np.array_equal(batch.documents_BT[row], ends)


def test_stages_of_other_lengths_read_each_block_of_each_file_once_per_epoch(web):
    """Lengths of 16, 48 and 24 tokens share blocks of 48, which do not cross files either."""
    stages = [(position, settings(web, sequence_length=length)) for position, length in ((0, T), (100, 3 * T), (120, 24))]
    data = open_train(stages[0][1], **OPEN, stages=stages)
    blocks = [
        tokens[b : b + 3 * T + 1] for tokens in map(all_tokens, files_of(web)) for b in range(0, len(tokens) - 3 * T, 3 * T)
    ]
    read, epoch_ends = np.zeros((len(blocks), 3 * T), dtype=int), False
    for position in range(len(blocks) * 3):
        ((_, epoch, sample),), batch = data.sample_ids(position, 1), data.take(position, 1)
        length = batch.tokens_BT.shape[1]
        block, first = sample * length // (3 * T), sample * length % (3 * T)
        assert batch.tokens_BT[0].tolist() == blocks[block][first : first + length].tolist()
        counted = (batch.labels_BT[0] != MASKED).numpy()
        assert batch.labels_BT[0][counted].tolist() == blocks[block][1:][first : first + length][counted].tolist()
        if epoch_ends := epoch > 0:
            break
        read[block, first : first + length] += counted
    assert epoch_ends and (read == 1).all()


@pytest.mark.parametrize("last", [2, T, T + 1, T + 2, 3 * T + 1])
def test_validation_counts_every_token_but_the_first_of_each_file_once(tmp_path, last):
    counts = [5 * T + 7, 1, 2 * T + 1, last]
    for number, count in enumerate(counts):
        write(tmp_path / f"v{number}", [np.append(np.random.default_rng(number).integers(3, 100, count - 1), END)])
    (valid,) = open_valid(settings(valid=[tmp_path]), **OPEN)
    batch = valid.take([*range(valid.num_samples), None, valid.num_samples])
    counted = batch.labels_BT != MASKED
    tokens = list(map(all_tokens, files_of(tmp_path)))
    assert batch.labels_BT[counted].tolist() == np.concatenate([each[1:] for each in tokens]).tolist()
    assert batch.tokens_BT[counted].tolist() == np.concatenate([each[:-1] for each in tokens]).tolist()
    assert valid.num_labels == sum(counts) - len(counts) == counted.sum() and not counted[-2:].any()
    assert valid.take([valid.num_samples - 1, 0]).labels_BT[0].tolist() == batch.labels_BT[-3].tolist()


def test_a_single_shard_gives_the_batches_and_the_fingerprint_of_the_file(web):
    one, same = (open_train(settings(path, document_mask=True), **OPEN) for path in (web / "part-9", web / "part-9*"))
    assert one.fingerprint == same.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(one.take(3, 40).inputs, same.take(3, 40).inputs, strict=True))
    assert one.reference_lines == same.reference_lines


def test_files_of_several_types_and_without_sidecars_are_one_source(tmp_path):
    docs = documents(random_lengths(1, 60), seed=1)
    for folder in ("sealed", "foreign"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        part = docs[20 * number : 20 * number + 20]
        write(tmp_path / "sealed" / str(number), part)
        write_megatron(tmp_path / "foreign" / str(number), part, **({"dtype": "<i4", "code": 4} if number == 1 else {}))
    both = [open_train(settings(tmp_path / name, document_mask=True), **OPEN) for name in ("sealed", "foreign")]
    n = both[0].samples_per_epoch
    assert all(torch.equal(a, b) for a, b in zip(both[0].take(0, n).inputs, both[1].take(0, n).inputs, strict=True))
    assert {file.dtype.name for file in both[1].sources[0].files} == {"uint16", "int32"}
    ids = np.unique(np.concatenate(docs), return_counts=True)[1] / sum(map(len, docs))
    assert both[1].reference_lines["unigram"] == pytest.approx(-(ids * np.log(ids)).sum())


def test_the_common_sidecar_has_sums_means_and_extremes(web):
    files = files_of(web)
    common, sizes = shards.common_sidecar(files), [file.num_tokens for file in files]
    assert (common.num_tokens, common.num_documents) == (sum(sizes), sum(file.num_documents for file in files))
    assert common.utf8_bytes == sum(file.sidecar.utf8_bytes for file in files)
    assert common.max_id == max(file.sidecar.max_id for file in files)
    mean = np.average([file.sidecar.bigram_entropy_nats for file in files], weights=sizes)
    assert common.bigram_entropy_nats == pytest.approx(mean)
    (valid,) = open_valid(settings(valid=[web]), **OPEN)
    assert valid.bytes_per_token == pytest.approx(common.utf8_bytes / sum(sizes))


def test_the_fingerprint_changes_with_content_and_order_but_not_with_the_place(web, tmp_path):
    def fingerprint(path):
        return open_train(settings(path), **OPEN).fingerprint

    moved = shutil.copytree(web, tmp_path / "moved")
    same = fingerprint(web)
    assert same == fingerprint(moved) == fingerprint(web / "part-*")
    for end in (".bin", ".idx", ".json"):
        os.rename(moved / f"part-3{end}", moved / f"part-0a{end}")  # another order
    renamed = fingerprint(moved)
    write(moved / "part-6", documents(random_lengths(2, SIZES[2]), seed=99), overwrite=True)
    assert len({same, renamed, fingerprint(moved), fingerprint(web / "part-1*")}) == 4


# ---------------------------------------------------------------- refusals


def test_files_that_contradict_each_other_are_refused_with_both_names(web, tmp_path):
    docs = documents(random_lengths(1, 20))
    for change in ({"fingerprint": "another"}, {"vocab_size": 90}):
        folder = shutil.copytree(web, tmp_path / str(*change))
        write(folder / "part-2", [np.minimum(doc, 80) for doc in docs], **change)
        options = OPEN | {"tokenizer_fingerprint": None}
        with pytest.raises(DataError, match=rf"part-0 and .*part-2 differ in .*{next(iter(change.values()))}"):
            open_train(settings(folder), **options)
    folder = shutil.copytree(web, tmp_path / "unsealed")
    (folder / "part-12.json").unlink()
    with pytest.raises(DataError, match=r"part-12: has no metadata sidecar .*part-0 has one"):
        open_valid(settings(valid=[folder]), **OPEN)


def test_problems_of_many_files_are_counted_not_listed(web, tmp_path):
    folder = shutil.copytree(web, tmp_path / "many")
    for number in range(40):
        write(folder / f"wrong-{number:02}", documents([T + 1]), fingerprint="another")
    with pytest.raises(DataError) as caught:
        open_train(settings(folder), **OPEN)
    assert "wrong-00" in str(caught.value) and "wrong-39" not in str(caught.value) and "more like these" in str(caught.value)
    for path in folder.glob("wrong*.bin"):
        os.truncate(path, 10)
    with pytest.raises(DataError, match=r"wrong-03\.bin: 10 bytes found(.|\n)*and 35 more like these"):
        open_train(settings(folder), **OPEN)


@pytest.mark.parametrize("first", [0, 1])
def test_missing_files_are_found_by_the_numbers_in_their_names(tmp_path, first):
    for number in range(3):
        for name in ("code", "web"):
            write(tmp_path / f"{name}-{number + first:05}-of-00003")
    files = shards.open_shards(str(tmp_path))
    assert check_shards(files, "here", block_length=1) == []
    (found,) = check_shards([files[0], *files[2:]], "here", block_length=1)
    assert (
        found.name == "shards-missing"
        and f"1 of the 3 files {tmp_path}/code-*-of-00003 are not there: {1 + first};" in found.text
    )


def test_files_without_a_window_are_allowed_unless_all_are(tmp_path):
    for number in range(3):
        write(tmp_path / str(number), documents([T]))
    with pytest.raises(DataError, match=f"none of the 3 files contains {T + 1} tokens"):
        open_train(settings(tmp_path), **OPEN)
    write(tmp_path / "3", documents([T + 1]))
    assert open_train(settings(tmp_path), **OPEN).samples_per_epoch == 1


def test_an_invalid_id_is_reported_with_its_file_and_the_sample_of_the_source(tmp_path):
    for number in range(3):
        tokens = np.zeros(1_000_001, dtype="<u2")
        tokens[30_000] = 100 * (number == 1)  # between the runs that are sampled
        tokens.tofile(tmp_path / f"{number}.bin")
    data = open_train(settings(tmp_path), **OPEN)
    sample = 1_000_000 // T + 30_000 // T
    assert sum(len(file.sample()) for file in data.sources[0].files) <= 64 * 8192  # what one file costs
    data.take(data.position(0, 0, sample + 1), 1)
    with pytest.raises(DataError, match=rf"1\.bin: token 30,000 is id 100, in sample {sample} of {tmp_path.name};"):
        data.take(data.position(0, 0, sample), 1)


# ---------------------------------------------------------------- open files


def test_batches_do_not_depend_on_how_many_files_are_open(web):
    expected = open_train(settings(web, document_mask=True), **OPEN).take(0, 300)
    data = open_train(settings(web, document_mask=True), **OPEN)
    few = OpenFiles(1)
    for file in data.sources[0].files:
        file._open_files = few
    with ThreadPoolExecutor(4) as pool:
        for batch in pool.map(lambda _: data.take(0, 300), range(8)):
            assert all(torch.equal(a, b) for a, b in zip(batch.inputs, expected.inputs, strict=True))


def test_more_files_than_a_process_may_open_are_read(web, tmp_path):
    """300 pairs with at most 64 descriptors: opened, read in full by 4 threads, and checked before the start."""
    for number in range(50):
        for path in web.iterdir():
            os.link(path, tmp_path / f"{number}-{path.name}")
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from concurrent.futures import ThreadPoolExecutor
from pretrain.config import DataConfig, SourceConfig
from pretrain.data.batches import open_train, open_valid
from pretrain.data.checks import check_checksums
source = SourceConfig(path={str(tmp_path)!r})
data = DataConfig(train=[source], valid=[source], sequence_length={T}, document_mask=True)
train, (valid,) = open_train(data, **{OPEN}), open_valid(data, **{OPEN})
with ThreadPoolExecutor(4) as pool:
    rows = sum(len(batch.tokens_BT) for batch in pool.map(lambda i: train.take(50 * i, 50), range(40)))
found = check_checksums(train.sources[0].files, "here")
print(len(train.sources[0].files), rows, len(valid.take(list(range(100))).tokens_BT), found)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "300 2000 100 []\n"), done.stderr


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("sidecar", [True, False])
def test_a_file_that_is_rewritten_or_replaced_while_it_is_closed_is_noticed(web, tmp_path, is_open, sidecar):
    folder = shutil.copytree(web, tmp_path / "used")
    if not sidecar:
        for path in folder.glob("*.json"):
            path.unlink()
    data = open_train(settings(folder, document_mask=True), **OPEN)
    shard = data.sources[0].files[2]
    everything = data.samples_per_epoch
    before = data.take(0, everything)
    if is_open:
        with open(shard.bin_path, "r+b") as file:
            file.write(np.full(5, 7, "<u2").tobytes())
        os.utime(shard.bin_path, ns=(1, 1))  # the clock of a file system is coarse
    else:
        for file in data.sources[0].files:
            file._open_files = OpenFiles(1)
        shutil.copy(shard.bin_path, tmp_path / "copy")
        os.replace(tmp_path / "copy", shard.bin_path)  # the same content
        assert torch.equal(data.take(0, everything).tokens_BT, before.tokens_BT)
        for file in data.sources[0].files:
            file._open_files = OpenFiles(1)
        before_ns = os.stat(shard.bin_path).st_mtime_ns
        content = Path(shard.bin_path).read_bytes()
        (tmp_path / "copy").write_bytes(content[:2][::-1] + content[2:])
        os.utime(tmp_path / "copy", ns=(before_ns, before_ns))  # as a tool that keeps times copies
        os.replace(tmp_path / "copy", shard.bin_path)
    with pytest.raises(DataError, match=rf"{Path(shard.bin_path).name}: was rewritten while in use"):
        data.take(0, everything)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("name", ["", "part-9"])
def test_files_close_with_the_last_reference_to_their_source(web, name):
    def number_of_open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    gc.disable()
    try:
        before = number_of_open_files()
        data = open_train(settings(web / name), **OPEN)
        data.take(0, 100)
        assert number_of_open_files() > before
        del data
        assert number_of_open_files() == before
    finally:
        gc.enable()


def test_memory_per_file_is_a_few_kilobytes(web, tmp_path):
    for number in range(300):
        for end in (".bin", ".idx", ".json"):
            os.link(web / f"part-9{end}", tmp_path / f"{number:04}{end}")
    opened = open_train(settings(tmp_path / "000*"), **OPEN)  # whatever is imported or cached
    tracemalloc.start()
    try:
        opened = open_train(settings(tmp_path), **OPEN)
        opened.take(0, 600)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(opened.sources[0].files) == 300 and used < 300 * 12_000


# ---------------------------------------------------------------- weights


def test_weights_of_null_read_each_sample_once_per_epoch(web, tmp_path):
    write(tmp_path / "small", documents(random_lengths(5, 9), seed=5))
    sources = [source(web, weight=None), source(tmp_path / "small", weight=None)]
    data = open_train(settings(*sources), **OPEN)
    assert data.passes(data.samples_per_epoch) == pytest.approx([1, 1], abs=0.06)
    size = data.num_samples[0] * T
    same = open_train(settings(source(web, weight=None), source(tmp_path / "small", weight=size / 3)), **OPEN)
    assert (
        open_train(settings(source(web, weight=3), source(tmp_path / "small", weight=1)), **OPEN).fingerprint
        == same.fingerprint
    )
    with pytest.raises(DataError, match=r"data\.train\[1\]\.weight: got 1, but another weight is null"):
        open_train(settings(sources[0], source(tmp_path / "small")), **OPEN)


# ---------------------------------------------------------------- a run

RUN = """
run: {name: tiny}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 100}
data: {sequence_length: 16, document_mask: true}
batch: {global_batch_size: 8, micro_batch_size: 8}
train: {max_steps: 6}
checkpoint: {every_steps: 3, keep_last: 9}
log: {every_steps: 1, sinks: [jsonl]}
"""


def test_a_run_over_shards_resumes_and_its_samples_are_found_shown_and_excluded(web, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(RUN)
    flags = ["--config", str(tmp_path / "run.yaml"), "--run.directory", str(tmp_path)]
    by_folder, by_list = (
        ["--data.train", f"[{{path: {path}}}]", "--data.valid", f"[{{path: {web}/part-1*}}]"]
        for path in (web, [f"{web}/part-0", f"{web}/part-12*", f"{web}/part-15", f"{web}/part-[3-9]"])
    )
    assert train_here([*flags, *by_folder]) == 0
    whole = losses(tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / "step_00000006")
    (tmp_path / "tiny" / "run_state.json").unlink()
    assert train_here([*flags, *by_list, "--checkpoint.resume", "auto"]) == 0
    assert losses(tmp_path / "tiny") == whole
    assert train_here([*flags, "--data.train", f"[{{path: {web}/part-1*}}]"]) == 2
    assert "differ from the checkpoint's" in capsys.readouterr().err

    run, bad = tmp_path / "tiny", tmp_path / "bad.txt"
    output = "".join(tool("inspect_data", "--run", run, "--step", 5, "--quarantine", bad))
    first = next(line for line in output.splitlines() if ", sample " in line)
    sample, name = int(first.split(", sample ")[1].split(",")[0]), first.split(", in ")[1]
    text = output.split(first)[1].splitlines()[1]
    document = int(text.split("document ")[1].split(",")[0])
    first_samples = np.cumsum([(file.num_tokens - 1) // T for file in files_of(web)])
    file = files_of(web)[int(np.searchsorted(first_samples, sample, side="right"))]
    assert file.path == name and f"web {sample}  #" in bad.read_text()
    where = "".join(tool("inspect_data", "--run", run, "--document", f"0:{document}"))
    assert name in where and f"sample {sample}: steps 5 (epoch 0)" in where
    before = sum(each.num_documents for each in files_of(web) if each.path < file.path)
    tokens = file.document(document - before).tolist()
    assert str(tokens[int(text.split("from its token ")[1].split(":")[0])]) == text.split(": ")[1].split()[0]


def losses(run: Path) -> dict[int, float]:
    return {each["step"]: each["loss"] for each in map(json.loads, open(run / "metrics.jsonl")) if "loss" in each}


def test_inspect_data_describes_and_verifies_a_folder(web, tmp_path):
    output = "".join(tool("inspect_data", "--data", web, "--verify", "--documents", 1))
    total = sum(file.num_tokens for file in files_of(web))
    assert f"{len(SIZES)} files: {total:,} tokens (uint16)" in output
    assert f"{len(SIZES)} files and their indexes match all {2 * len(SIZES)} checksums" in output
    folder = shutil.copytree(web, tmp_path / "damaged")
    content = bytearray((folder / "part-15.bin").read_bytes())
    content[30] ^= 1
    (folder / "part-15.bin").write_bytes(content)
    assert "part-15.bin: damaged" in "".join(tool("inspect_data", "--data", folder, "--verify", status=2))
