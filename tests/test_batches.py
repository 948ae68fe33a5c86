"""Batches contain the right tokens in the right order however the work is split, and unusable data are refused on opening."""

import contextlib
import errno
import itertools
import math
import os
import struct
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pretrain.config import DataConfig, SourceConfig, SyntheticConfig
from pretrain.data.batches import open_train, open_valid, read_ahead
from pretrain.data.indexed import DataError, TokenFile

from .test_indexed import END, documents, write, write_megatron

T = 16
OPEN = dict(seed=1, vocab_size=100, tokenizer_fingerprint="made-of-tests")


def config(*paths, weights=None, valid=(), **options) -> DataConfig:
    weights = weights or [1.0] * len(paths)
    train = [SourceConfig(path=str(path), weight=weight) for path, weight in zip(paths, weights, strict=True)]
    options = dict(sequence_length=T) | options
    return DataConfig(train=train, valid=[SourceConfig(path=str(path)) for path in valid], **options)


def random_lengths(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 60, count).tolist()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three sources of different sizes; the smallest is read for many epochs within the tests."""
    folder = tmp_path_factory.mktemp("sources")
    for name, seed, count in (("small", 1, 3), ("middle", 2, 40), ("large", 3, 300)):
        write(folder / name, documents(random_lengths(seed, count), seed=seed))
    return [folder / name for name in ("small", "middle", "large")]


@pytest.fixture(scope="module")
def data(sources):
    return open_train(config(*sources, weights=[1, 2, 3], document_mask=True), **OPEN)


# ---------------------------------------------------------------- training


def test_a_batch_consists_of_the_windows_that_sample_ids_lists(data, sources):
    tokens = [token_file.read([0], [token_file.num_tokens]) for token_file in map(TokenFile, sources)]
    batch = data.take(777, 50)
    assert batch.tokens_BT.shape == batch.labels_BT.shape == batch.documents_BT.shape == (50, T)
    assert {tensor.dtype for tensor in batch} == {torch.int64} and all(tensor.is_contiguous() for tensor in batch)
    for row, (source, _, sample) in enumerate(data.sample_ids(777, 50)):
        window = tokens[source][sample * T : sample * T + T + 1]
        assert np.array_equal(batch.tokens_BT[row], window[:-1])
        assert np.array_equal(batch.labels_BT[row], window[1:])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_the_global_batch_does_not_depend_on_ranks_and_micro_batches(data, world_size):
    global_batch = 48
    share = global_batch // world_size
    for step in (0, 1, 7, 1000):
        expected = data.take(step * global_batch, global_batch)
        for micro_batch in (m for m in range(1, share + 1) if share % m == 0):
            parts = [
                data.take(step * global_batch + rank * share + start, micro_batch)
                for rank in range(world_size)
                for start in range(0, share, micro_batch)
            ]
            for mine, theirs in zip(zip(*parts, strict=True), expected, strict=True):
                assert torch.equal(torch.cat(mine), theirs)


def test_a_batch_names_the_source_of_each_sample_if_there_are_several(data, sources):
    assert data.take(17, 40).sources_B.tolist() == [source for source, *_ in data.sample_ids(17, 40)]
    assert open_train(config(sources[0]), **OPEN).take(0, 4).sources_B is None


def test_every_window_is_read_once_per_epoch_and_fewer_tokens_than_a_window_are_left(sources):
    data = open_train(config(sources[2]), **OPEN)
    n = data.samples_per_epoch
    assert n == (data.sources[0].num_tokens - 1) // T
    for epoch in range(3):
        ids = data.sample_ids(epoch * n, n)
        assert sorted(ids) == [(0, epoch, sample) for sample in range(n)]
    first, second = data.sample_ids(0, n), data.sample_ids(n, n)
    assert [sample for _, _, sample in first] != [sample for _, _, sample in second]
    labels = sorted(data.take(0, n).labels_BT.flatten().tolist())
    assert labels == sorted(TokenFile(sources[2]).read([1], [n * T]).tolist())


def test_position_is_the_inverse_of_sample_ids(data):
    for offset, sample in enumerate(data.sample_ids(5000, 30)):
        assert data.position(*sample) == 5000 + offset


def test_take_is_thread_safe(data):
    positions = list(range(0, 4000, 40))
    alone = [data.take(position, 40) for position in positions]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda position: data.take(position, 40), positions))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_without_document_mask_there_are_no_documents(sources):
    assert open_train(config(*sources), **OPEN).take(0, 2).documents_BT is None
    assert len(open_train(config(*sources), **OPEN).take(5, 0).tokens_BT) == 0


def test_document_lengths_are_those_of_the_numbers_and_end_with_their_row(data):
    batch, lengths = data.take(0, 20), []
    for numbers in batch.documents_BT.tolist():
        lengths += [len(list(group)) for _, group in itertools.groupby(numbers)]
    assert batch.document_lengths.tolist() == lengths and sum(lengths) == 20 * T


def test_a_document_starts_after_each_end_of_document(data):
    batch = data.take(0, 200)
    for tokens, numbers in zip(batch.tokens_BT.tolist(), batch.documents_BT.tolist(), strict=True):
        expected, number = [], 0
        for token in tokens:
            expected.append(number)
            number += token == END
        assert numbers == expected
    assert batch.documents_BT.max() >= 2
    assert (batch.labels_BT >= 0).all()


def test_files_without_a_sidecar_give_the_same_documents_from_their_index(tmp_path):
    docs = documents(random_lengths(5, 50))
    write(tmp_path / "sealed", docs)
    write_megatron(tmp_path / "foreign", docs)
    sealed, foreign = (open_train(config(tmp_path / name, document_mask=True), **OPEN) for name in ("sealed", "foreign"))
    n = sealed.samples_per_epoch
    assert all(torch.equal(a, b) for a, b in zip(sealed.take(0, n).inputs, foreign.take(0, n).inputs, strict=True))
    valid = config(document_mask=True, valid=[tmp_path / "sealed", tmp_path / "foreign"])
    one, other = (v.take(list(range(v.num_samples))) for v in open_valid(valid, **OPEN))
    counted = one.labels_BT != -100
    assert torch.equal(one.documents_BT[counted], other.documents_BT[counted])


def test_the_fingerprint_changes_with_the_stream_and_with_nothing_else(tmp_path, sources):
    base = dict(weights=[1, 2, 3])

    def fingerprint(paths, seed=1, **options):
        return open_train(config(*paths, **(base | options)), **(OPEN | {"seed": seed})).fingerprint

    for path in sources:
        for end in (".bin", ".idx", ".json"):
            os.link(f"{path}{end}", tmp_path / (path.name + end))
    write(tmp_path / "other", documents(random_lengths(1, 3), seed=9))
    same = fingerprint(sources)
    assert same == fingerprint([tmp_path / path.name for path in sources])
    assert same == fingerprint(sources, weights=[0.1, 0.2, 0.3]) == fingerprint(sources, document_mask=True)
    changed = [
        fingerprint(sources, seed=2),
        fingerprint(sources, sequence_length=T + 1),
        fingerprint(sources, weights=[1, 2, 3.0001]),
        fingerprint(sources[::-1]),
        fingerprint([tmp_path / "other", *sources[1:]]),
        fingerprint(sources[:2], weights=[1, 2]),
    ]
    assert len({same, *changed}) == 7


def test_a_reference_line_is_the_weighted_mean_if_all_sources_have_it(tmp_path, data, sources):
    sidecars = [TokenFile(path).sidecar for path in sources]
    expected = sum(sidecar.unigram_entropy_nats * share for sidecar, share in zip(sidecars, [1 / 6, 1 / 3, 1 / 2], strict=True))
    assert data.reference_lines["unigram"] == pytest.approx(expected)
    assert data.reference_lines["uniform"] == math.log(100)
    write_megatron(tmp_path / "foreign", documents())
    assert set(open_train(config(sources[0], tmp_path / "foreign"), **OPEN).reference_lines) == {"uniform", "unigram"}


def test_the_description_shows_the_share_of_each_source(data):
    lines = data.description()
    assert len(lines) == 4 and f"{data.samples_per_epoch:,} samples" in lines[0]
    assert "small" in lines[1] and "16.67 %" in lines[1]


def test_synthetic_data_are_read_like_files():
    settings = DataConfig(synthetic=SyntheticConfig(kind="markov", num_samples=100), sequence_length=T, document_mask=True)
    data, (valid,) = open_train(settings, **OPEN), open_valid(settings, **OPEN)
    assert data.samples_per_epoch == 100 and data.take(95, 10).tokens_BT.shape == (10, T)
    assert not data.take(0, 3).documents_BT.any()
    assert sorted(data.sample_ids(0, 100)) == [(0, 0, sample) for sample in range(100)]
    assert data.reference_lines["floor"] == valid.reference_lines["floor"] == pytest.approx(1.75 * math.log(2))
    assert valid.num_samples == 100 and valid.num_labels == 100 * T and valid.bytes_per_token is None
    assert (valid.take([0, 99, 100, None]).labels_BT != -100).all(dim=1).tolist() == [True, True, False, False]
    assert data.fingerprint != open_train(settings, **(OPEN | {"vocab_size": 99})).fingerprint


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize("count", [2, 3, T, T + 1, T + 2, 5 * T, 5 * T + 1, 1000])
def test_validation_counts_every_token_but_the_first_once(tmp_path, count):
    tokens = np.append(np.random.default_rng(0).integers(3, 100, count - 1), END)
    write(tmp_path / "v", [tokens])
    (valid,) = open_valid(config(valid=[tmp_path / "v"]), **OPEN)
    batch = valid.take(list(range(valid.num_samples)))
    counted = batch.labels_BT != -100
    assert batch.labels_BT[counted].tolist() == tokens[1:].tolist()
    assert batch.tokens_BT[counted].tolist() == tokens[:-1].tolist()
    assert valid.num_labels == count - 1 == counted.sum()
    assert valid.num_samples == -(-(count - 1) // T)
    assert valid.bytes_per_token == 4 * (count - 1) / count


def test_validation_samples_past_the_end_are_masked_at_any_row(sources):
    (valid,) = open_valid(config(valid=[sources[0]], document_mask=True), **OPEN)
    last = valid.num_samples - 1
    batch = valid.take([None, last, 10**9, 0, None, last])
    assert (batch.labels_BT != -100).any(dim=1).tolist() == [False, True, False, True, False, True]
    assert torch.equal(batch.labels_BT[1], batch.labels_BT[5]) and torch.equal(batch.documents_BT[1], batch.documents_BT[5])
    assert batch.tokens_BT.min() >= 0


def test_validation_sets_have_unique_names(tmp_path, sources):
    (tmp_path / "x").mkdir()
    write(tmp_path / "x" / "middle")
    paths = [sources[0], sources[1], tmp_path / "x" / "middle", tmp_path / "x" / "middle"]
    names = [valid.name for valid in open_valid(config(valid=paths), **OPEN)]
    assert names == ["small", f"{sources[1].parent.name}-middle", "x-middle", "x-middle-2"]
    assert open_valid(config(), **OPEN) == []


# ---------------------------------------------------------------- refusals


def test_all_problems_are_reported_together_with_their_keys(tmp_path, sources):
    write(tmp_path / "tiny", documents([5]))
    settings = config(tmp_path / "missing", tmp_path / "tiny", sources[0], weights=[1, -1, math.nan])
    with pytest.raises(DataError) as caught:
        open_train(settings, **(OPEN | {"tokenizer_fingerprint": "another"}))
    message = str(caught.value)
    for part in (
        "data.train[1].weight",
        "data.train[2].weight",
        f"data.train[0].path: {tmp_path / 'missing'}",
        f"data.train[1].path: {tmp_path / 'tiny'}: contains 5 tokens, 17 are needed",
        f"data.train[2].path: {sources[0]}: was tokenized with tokenizers/test (fingerprint made-of-tests)",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (dict(vocab_size=101), "100 ids.* 101"),
        (dict(vocab_size=50), "id is 99.* 0 to 49"),
        (dict(vocab_size=50, tokenizer_fingerprint=None), "id is 99"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused_for_training_and_validation(sources, options, what):
    settings = config(sources[2], valid=[sources[2]])
    for opened, key in ((open_train, "train"), (open_valid, "valid")):
        with pytest.raises(DataError, match=rf"data\.{key}\[0\]\.path: .*{what}"):
            opened(settings, **(OPEN | options))


def test_a_larger_model_vocabulary_without_a_tokenizer_is_allowed(sources):
    open_train(config(sources[2]), **(OPEN | {"vocab_size": 101, "tokenizer_fingerprint": None}))


@pytest.mark.parametrize("where", [0, 500_000, 999_999])
def test_too_large_ids_in_a_file_without_a_sidecar_are_found_anywhere(tmp_path, where):
    tokens = np.zeros(1_000_000, dtype="<u2")
    tokens[where : where + 30_000] = 100  # the sample of a file consists of runs, not of all tokens
    tokens[where] = 100
    tokens.tofile(tmp_path / "flat.bin")
    with pytest.raises(DataError, match=r"flat\.bin.* 0 to 100.* 0 to 99"):
        open_train(config(tmp_path / "flat.bin"), **OPEN)


def test_an_invalid_id_that_the_sample_missed_is_reported_with_its_place_when_it_is_read(tmp_path):
    tokens = np.zeros(1_000_001 + 3, dtype="<u2")
    tokens[11_000] = 100  # between the runs that are sampled
    tokens.tofile(tmp_path / "flat.bin")
    data = open_train(config(tmp_path / "flat.bin"), **OPEN)
    length = config(tmp_path / "flat.bin").sequence_length
    sample = 11_000 // length
    what = rf"flat\.bin: token 11,000 is id 100.* sample {sample} of flat\.bin"
    with pytest.raises(DataError, match=what):
        data.take(data.position(0, 0, sample), 1)
    data.take(data.position(0, 0, sample + 1), 1)
    (valid,) = open_valid(config(valid=[tmp_path / "flat.bin"]), **OPEN)
    valid.source.vocab_size = 0  # the last partial sample is checked, too
    with pytest.raises(DataError, match="is id 0"):
        valid.take([valid.num_samples - 1])


class Changing:
    """Training and validation data of a file without a sidecar, with document masks, that a test changes while it is open."""

    def __init__(self, folder, sidecar=False):
        self.prefix, docs = folder / "used", documents(random_lengths(1, 400))
        write(self.prefix, docs)
        if not sidecar:
            (folder / "used.json").unlink()
        self.config = config(self.prefix, valid=[self.prefix], document_mask=True)
        self.train, (self.valid,) = open_train(self.config, **OPEN), open_valid(self.config, **OPEN)
        self.before = self.take()

    def take(self):
        return [self.train.take(0, 8).tokens_BT, self.valid.take([0, 1]).tokens_BT]

    def rewrite(self, end, offset, data):
        with open(f"{self.prefix}{end}", "r+b") as file:
            file.seek(offset)
            file.write(data)
        os.utime(f"{self.prefix}{end}", ns=(1, 1))  # the clock of a file system is coarse


@pytest.mark.parametrize("sidecar", [False, True])
def test_ids_outside_the_vocabulary_that_appear_later_are_reported_with_file_token_sample_and_vocabulary(tmp_path, sidecar):
    data = Changing(tmp_path, sidecar)
    data.rewrite(".bin", 2 * 37, b"\xfe\xff")
    data.train.sources[0].file.watch()  # as if the sample had missed the change
    length = data.config.sequence_length
    position = data.train.position(0, 0, 37 // length)
    what = rf"used\.bin: token 37 is id 65534, in sample {37 // length} of used; the model has ids 0 to 99;"
    with pytest.raises(DataError, match=what) as error:
        data.train.take(position, 1)
    assert error.value.status == 2 and ("quarantine" in str(error.value)) == (not sidecar)


def test_tokens_that_are_rewritten_under_a_job_are_noticed_even_with_valid_ids(tmp_path):
    data = Changing(tmp_path)
    os.utime(f"{data.prefix}.bin")  # touched, with the same content
    assert all(torch.equal(a, b) for a, b in zip(data.take(), data.before, strict=True))
    data.rewrite(".bin", 0, np.full(50, 7, "<u2").tobytes())
    for take in (lambda: data.train.take(0, 1), lambda: data.valid.take([3])):
        with pytest.raises(DataError, match=r"used\.bin: was rewritten while in use") as error:
            take()
        assert error.value.status == 2


def test_files_that_are_replaced_or_removed_under_a_job_stay_in_use(tmp_path):
    data = Changing(tmp_path)
    write(tmp_path / "other", documents(seed=5))
    for end in (".bin", ".idx"):
        os.replace(tmp_path / f"other{end}", f"{data.prefix}{end}")
    assert all(torch.equal(a, b) for a, b in zip(data.take(), data.before, strict=True))
    for end in (".bin", ".idx"):
        os.unlink(f"{data.prefix}{end}")
    assert all(torch.equal(a, b) for a, b in zip(data.take(), data.before, strict=True))


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_a_pair_that_shrinks_under_a_job_is_an_error_of_the_storage_and_not_the_end_of_the_process(tmp_path, end):
    data = Changing(tmp_path)
    os.truncate(f"{data.prefix}{end}", 40)
    with pytest.raises(OSError, match="truncated while in use") as error:
        data.take()
    assert error.value.filename == f"{data.prefix}{end}"


@pytest.mark.parametrize("value", [-1, 0, 5, 10**12])
def test_an_index_that_is_rewritten_under_a_job_is_refused(tmp_path, value):
    """Pointers, then document numbers, become `value`; also where the sample of the index misses that: no traceback then."""
    data = Changing(tmp_path)
    file = data.train.sources[0].file
    count = file.num_documents
    for offset in (34 + 4 * count + 8, 34 + 12 * count + 8):
        data.rewrite(".idx", offset, np.full(count - 2, value, "<i8").tobytes())
        with pytest.raises(DataError, match=r"used\.idx: was rewritten while in use"):
            data.take()
        with contextlib.suppress(DataError), pytest.MonkeyPatch.context() as patch:
            patch.setattr(file, "require_unchanged", lambda: None)
            data.train.take(0, 8)


def test_int32_read_as_uint16_and_negative_ids_are_refused(tmp_path):
    np.full(1000, 70_000, dtype="<i4").tofile(tmp_path / "flat.bin")
    write_megatron(tmp_path / "negative", [[-1] * 100], dtype="<i4", code=4)
    for name, what in (("flat.bin", "70000 to 70000"), ("negative", "-1 to -1")):
        with pytest.raises(DataError, match=what):
            open_train(config(tmp_path / name), **OPEN)


def test_contradictory_and_empty_settings_are_refused(tmp_path, sources):
    with pytest.raises(DataError, match=r"data\.train"):
        open_train(DataConfig(), **OPEN)
    with pytest.raises(DataError, match=r"data\.synthetic"):
        open_train(config(sources[0], synthetic=SyntheticConfig()), **OPEN)
    np.zeros(100, dtype="<u2").tofile(tmp_path / "flat.bin")
    with pytest.raises(DataError, match=r"data\.document_mask"):
        open_train(config(tmp_path / "flat.bin", document_mask=True), **OPEN)
    write(tmp_path / "one", [np.array([END])])
    with pytest.raises(DataError, match=r"data\.valid\[0\]\.path: .* 1 tokens, 2 "):
        open_valid(config(valid=[tmp_path / "one"]), **OPEN)


# ---------------------------------------------------------------- size


def sparse_pair(prefix, num_tokens: int) -> int:
    """Writes a pair of files of zeros that takes no disk space; returns the number of tokens that the file system allowed."""
    length = 2 * 10**9  # of one document; the format has 32 bits for it
    while True:
        try:
            with open(f"{prefix}.bin", "wb") as file:
                os.truncate(file.fileno(), 2 * num_tokens)
            break
        except OSError as error:
            assert error.errno == errno.EFBIG
            num_tokens //= 2
    count = num_tokens // length
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1))
        file.write(np.full(count, length, dtype="<i4").tobytes())
        file.write((np.arange(count, dtype="<i8") * 2 * length).tobytes() + np.arange(count + 1, dtype="<i8").tobytes())
    os.truncate(f"{prefix}.bin", 2 * count * length)
    return count * length


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_a_trillion_tokens_cost_no_time_to_open_and_no_memory(tmp_path):
    num_tokens = sparse_pair(tmp_path / "huge", 10**12)
    assert num_tokens > 10**11, "the files that this file system allows are too small for the claim"
    tracemalloc.start()
    resident, started = resident_bytes(), time.process_time()
    data = open_train(config(tmp_path / "huge", sequence_length=2048, document_mask=True), **OPEN)
    batch = data.take(10**8, 64)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.samples_per_epoch == (num_tokens - 1) // 2048 and batch.tokens_BT.shape == (64, 2048)
    assert seconds < 10  # 0.1 on an idle machine; building an index or scanning all tokens would take minutes
    assert peak < 16 << 20 and resident_bytes() - resident < 64 << 20


def test_the_next_read_happens_while_the_caller_uses_this_one_and_an_error_comes_in_its_place():
    began, released = [], threading.Event()

    def read(place: int) -> int:
        began.append(place)
        if place == 1:
            assert released.wait(30)
        if place == 3:
            raise OSError("gone")
        return 10 * place

    contents = read_ahead(read, range(9))
    assert next(contents) == 0  # returned although the read of 1, which has begun, is not done
    released.set()
    assert [next(contents), next(contents)] == [10, 20]
    with pytest.raises(OSError, match="gone"):
        next(contents)
    assert began == [0, 1, 2, 3] and list(read_ahead(read, [])) == [] and list(read_ahead(read, [5])) == [50]
