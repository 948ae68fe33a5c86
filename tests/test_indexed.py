"""Token files are byte for byte Megatron's, appear complete or not at all, and are refused when damaged."""

import dataclasses
import errno
import gzip
import json
import os
import struct

import numpy as np
import pytest

from pretrain.data.indexed import DataError, Sidecar, TokenFile, TokenWriter, token_dtype

END = 2
LENGTHS = [5, 1, 12, 3, 40, 7, 2]


def all_tokens(file: TokenFile) -> np.ndarray:
    return file.read([0], [file.num_tokens])


def documents(lengths=LENGTHS, vocab_size=100, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(3, vocab_size, length - 1), END) for length in lengths]


def write(prefix, docs=None, *, vocab_size=100, fingerprint="made-of-tests", text_bytes=4, **options) -> Sidecar:
    docs = documents(vocab_size=vocab_size) if docs is None else docs
    about = dict(tokenizer_fingerprint=fingerprint, tokenizer_path="tokenizers/test", shuffled=True) | options
    with TokenWriter(prefix, vocab_size=vocab_size, end_of_document_id=END, **about) as writer:
        for doc in docs:
            writer.add(doc, [len(doc)], text_bytes * (len(doc) - 1))
        return writer.finish({"inputs": ["test"], "sha256": "0"})


def write_megatron(prefix, sequences, starts=None, dtype="<u2", code=8) -> None:
    """A second writer of the format, as simple as possible."""
    lengths = [len(sequence) for sequence in sequences]
    pointers = [sum(lengths[:i]) * np.dtype(dtype).itemsize for i in range(len(lengths))]
    starts = range(len(sequences) + 1) if starts is None else starts
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            file.write(np.asarray(sequence).astype(dtype).tobytes())
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(starts)))
        file.write(struct.pack(f"<{len(lengths)}i", *lengths))
        file.write(struct.pack(f"<{len(pointers)}q", *pointers))
        file.write(struct.pack(f"<{len(starts)}q", *starts))


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "code"), [(100, "<u2", 8), (65499, "<u2", 8), (65500, "<i4", 4), (200_000, "<i4", 4)]
)
def test_bytes_equal_those_of_an_independent_writer(tmp_path, vocab_size, dtype, code):
    docs = documents(vocab_size=vocab_size)
    write(tmp_path / "ours", docs, vocab_size=vocab_size)
    write_megatron(tmp_path / "theirs", docs, dtype=dtype, code=code)
    for end in (".bin", ".idx"):
        assert (tmp_path / f"ours{end}").read_bytes() == (tmp_path / f"theirs{end}").read_bytes()
    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert (tmp_path / "ours.idx").stat().st_size == 34 + 12 * 7 + 8 * 8 == 182


def test_an_index_does_not_depend_on_the_blocks_in_which_it_is_written(tmp_path, monkeypatch):
    write(tmp_path / "one")
    monkeypatch.setattr("pretrain.data.indexed._INDEX_BLOCK", 3)
    write(tmp_path / "several")
    assert (tmp_path / "one.idx").read_bytes() == (tmp_path / "several.idx").read_bytes()


def test_documents_and_tokens_are_read_back(tmp_path):
    docs = documents()
    write(tmp_path / "a", docs)
    for name in ("a", "a.bin", "a.idx"):
        file = TokenFile(tmp_path / name)
        assert (file.num_tokens, file.num_documents, file.dtype) == (70, 7, np.dtype("<u2"))
        assert all(np.array_equal(file.document(i), doc) for i, doc in enumerate(docs))
        assert np.array_equal(all_tokens(file), np.concatenate(docs))
    assert [file.document_at(token) for token in (0, 4, 5, 6, 69)] == [0, 0, 1, 2, 6]
    for number in (-1, 7):
        with pytest.raises(IndexError, match=f"document {number} of 7"):
            file.document(number)


def test_adding_one_by_one_or_all_at_once_gives_the_same_files(tmp_path):
    docs = documents()
    write(tmp_path / "one", docs)
    with TokenWriter(
        tmp_path / "all", vocab_size=100, end_of_document_id=END, tokenizer_fingerprint="made-of-tests",
        tokenizer_path="tokenizers/test", shuffled=True,
    ) as writer:  # fmt: skip
        writer.add(np.concatenate(docs), LENGTHS, 4 * (70 - 7))
        writer.finish({"inputs": ["test"], "sha256": "0"})
    for end in (".bin", ".idx", ".json"):
        assert (tmp_path / f"one{end}").read_bytes() == (tmp_path / f"all{end}").read_bytes()


def test_foreign_files_are_read_without_a_sidecar_and_with_several_sequences_per_document(tmp_path):
    docs = documents()
    write_megatron(tmp_path / "theirs", docs, starts=[0, 2, 3, 7])
    file = TokenFile(tmp_path / "theirs")
    assert file.sidecar is None and file.num_documents == 3
    assert np.array_equal(file.document(0), np.concatenate(docs[:2]))
    assert np.array_equal(file.document(2), np.concatenate(docs[3:]))
    with pytest.raises(DataError, match=r"theirs\.json"):
        file.check_checksums()


@pytest.mark.parametrize(("code", "dtype"), [(1, "<u1"), (2, "<i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_all_integer_types_are_read(tmp_path, code, dtype):
    docs = documents()
    write_megatron(tmp_path / "a", docs, dtype=dtype, code=code)
    assert np.array_equal(all_tokens(TokenFile(tmp_path / "a")), np.concatenate(docs))


def test_reads_of_many_ranges_equal_slices(tmp_path):
    write(tmp_path / "a")
    file = TokenFile(tmp_path / "a")
    starts, lengths = np.array([3, 0, 65, 10, 10]), np.array([7, 0, 5, 60, 1])
    expected = np.concatenate([all_tokens(file)[s : s + n] for s, n in zip(starts, lengths, strict=True)])
    assert np.array_equal(file.read(starts, lengths), expected)
    assert file.read([], []).size == 0
    for start, length in ((-1, 3), (68, 3), (3, -1)):
        with pytest.raises(IndexError):
            file.read([start], [length])


def test_a_file_truncated_while_in_use_raises_and_does_not_kill_the_process(tmp_path):
    write(tmp_path / "a")
    file = TokenFile(tmp_path / "a")
    os.truncate(tmp_path / "a.bin", 21)
    with pytest.raises(OSError, match="truncated") as error:
        file.read([0], [70])
    assert error.value.errno == errno.EIO and error.value.filename == str(tmp_path / "a.bin")


# ---------------------------------------------------------------- the sidecar


def test_the_sidecar_describes_the_files(tmp_path):
    docs = documents()
    sidecar = write(tmp_path / "a", docs, text_bytes=3)
    assert sidecar == TokenFile(tmp_path / "a").sidecar == Sidecar.read(tmp_path / "a.json")
    tokens = np.concatenate(docs)
    assert (sidecar.num_tokens, sidecar.num_documents, sidecar.max_id) == (70, 7, tokens.max())
    assert (sidecar.utf8_bytes, sidecar.end_of_document_id, sidecar.dtype, sidecar.shuffled) == (3 * 63, END, "uint16", True)
    p = np.bincount(tokens) / 70
    assert sidecar.unigram_entropy_nats == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum())
    assert sidecar.bigram_entropy_nats > sidecar.unigram_entropy_nats * 0.9
    TokenFile(tmp_path / "a").check_checksums()


def test_blocks_and_bigram_runs_of_a_larger_file(tmp_path, monkeypatch):
    """Several checksum blocks, and more tokens than the bigram entropy uses."""
    monkeypatch.setattr("pretrain.data.indexed._BLOCK_BYTES", 1000)
    monkeypatch.setattr("pretrain.data.indexed._BIGRAM_RUN_TOKENS", 50)
    docs = documents([40] * 200, vocab_size=20)
    sidecar = write(tmp_path / "a", docs, vocab_size=20)
    assert len(sidecar.block_checksums) == 16
    assert sidecar.bigram_entropy_nats == pytest.approx(np.log(17), rel=0.1)
    TokenFile(tmp_path / "a").check_checksums()
    with open(tmp_path / "a.bin", "r+b") as file:
        file.seek(7_500)
        file.write(b"\xff")
    damaged = TokenFile(tmp_path / "a")
    damaged.check_block(6)
    with pytest.raises(DataError, match=r"a\.bin.*7,000.*8,000"):
        damaged.check_checksums()


def test_checksums_find_a_flipped_bit_in_either_file(tmp_path):
    for name in ("a.bin", "a.idx"):
        write(tmp_path / "a", overwrite=True)
        data = bytearray((tmp_path / name).read_bytes())
        data[45] ^= 1
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            TokenFile(tmp_path / "a").check_checksums()


def test_a_sidecar_of_other_files_is_refused(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "longer", documents([5, 1, 12, 3, 40, 7, 3]))
    write(tmp_path / "fewer", documents([70]))
    for other, what in (("longer", "num_tokens.* 71 .* 70 "), ("fewer", "num_documents.* 1 .* 7 ")):
        (tmp_path / "a.json").write_bytes((tmp_path / f"{other}.json").read_bytes())
        with pytest.raises(DataError, match=what):
            TokenFile(tmp_path / "a")
    sidecar = write(tmp_path / "a", overwrite=True)
    (tmp_path / "a.json").write_text(dataclasses.replace(sidecar, dtype="int32").to_json())
    with pytest.raises(DataError, match=r"dtype.* int32 .* uint16 "):
        TokenFile(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda values: "{", "a.json"),
        (lambda values: "[1]", "format_version None"),
        (lambda values: values | {"format_version": 2}, "format_version 2"),
        (lambda values: {k: v for k, v in values.items() if k != "max_id"}, "max_id"),
        (lambda values: values | {"max_id": "7"}, "max_id"),
        (lambda values: values | {"shuffled": None, "corpus": 3}, "shuffled, corpus"),
    ],
)
def test_a_damaged_sidecar_is_refused(tmp_path, change, what):
    write(tmp_path / "a")
    path = tmp_path / "a.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(DataError, match=what):
        TokenFile(tmp_path / "a")


def test_the_fingerprint_depends_on_the_content_and_not_on_the_path(tmp_path):
    docs = documents()
    write(tmp_path / "a", docs)
    write(tmp_path / "b", docs)
    write(tmp_path / "c", docs, fingerprint="another tokenizer")
    write(tmp_path / "d", documents(seed=1))
    prints = [TokenFile(tmp_path / name).fingerprint() for name in "abcd"]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    with open(tmp_path / "b.bin", "r+b") as file:  # unknown to the sidecar
        file.write(b"\x09")
    assert TokenFile(tmp_path / "b").fingerprint() != prints[0]


# ---------------------------------------------------------------- damage


def test_an_index_cut_at_any_length_is_refused_with_both_sizes(tmp_path):
    write(tmp_path / "a")
    complete = (tmp_path / "a.idx").read_bytes()
    for length in range(len(complete)):
        (tmp_path / "a.idx").write_bytes(complete[:length])
        with pytest.raises(DataError, match=rf"a\.idx: {length} bytes.* (34|182) "):
            TokenFile(tmp_path / "a")


@pytest.mark.parametrize("size", [0, 1, 2, 70, 138, 139, 141, 142, 280])
def test_a_bin_of_another_length_is_refused_with_both_sizes(tmp_path, size):
    write(tmp_path / "a")
    os.truncate(tmp_path / "a.bin", size)
    with pytest.raises(DataError, match=rf"a\.bin: {size} bytes.* 140 "):
        TokenFile(tmp_path / "a")


@pytest.mark.parametrize(
    ("offset", "data", "what"),
    [
        (0, b"PK", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x06", "dtype code 6"),
        (17, b"\x00", "dtype code 0"),
        (17, b"\x04", "140 bytes|contradict"),
        (18, struct.pack("<Q", 2**31), "182 bytes.* 25,769,803,874"),
        (18, struct.pack("<Q", 2**64 - 1), "182 bytes"),
        (26, struct.pack("<Q", 2**63), "182 bytes"),
        (34 + 28, struct.pack("<q", 2), "contradict"),
        (34 + 84, struct.pack("<q", 1), "contradict"),
        (34 + 84 + 56, struct.pack("<q", 6), "contradict"),
        (34 + 24, struct.pack("<i", -1), "contradict"),
        (34 + 28 + 48, struct.pack("<q", -8), "bytes found"),
    ],
)
def test_an_index_that_contradicts_itself_or_the_tokens_is_refused(tmp_path, offset, data, what):
    write(tmp_path / "a")
    with open(tmp_path / "a.idx", "r+b") as file:
        file.seek(offset)
        file.write(data)
    with pytest.raises(DataError, match=what):
        TokenFile(tmp_path / "a")


def test_a_damaged_pointer_in_the_middle_is_refused_when_it_is_used(tmp_path):
    write(tmp_path / "a")
    with open(tmp_path / "a.idx", "r+b") as file:
        file.seek(34 + 28 + 16)
        file.write(struct.pack("<q", 10**9))
    with pytest.raises(DataError, match=r"a\.idx: document 1 "):
        TokenFile(tmp_path / "a").document(1)


def test_sets_without_documents_or_tokens_and_multimodal_sets_are_refused(tmp_path):
    write_megatron(tmp_path / "none", [])
    with pytest.raises(DataError, match="no documents"):
        TokenFile(tmp_path / "none")
    write_megatron(tmp_path / "empty", [[], []])
    with pytest.raises(DataError, match="no tokens"):
        TokenFile(tmp_path / "empty")
    write_megatron(tmp_path / "modes", documents())
    with open(tmp_path / "modes.idx", "ab") as file:
        file.write(bytes(7))
    with pytest.raises(DataError, match="multimodal sets are not supported"):
        TokenFile(tmp_path / "modes")


def test_missing_files_are_reported_with_the_names_that_exist(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.bin.*nothing\.idx.*tools/tokenize_corpus\.py"):
        TokenFile(tmp_path / "nothing")
    write(tmp_path / "text_train")
    with pytest.raises(DataError, match="text_train"):
        TokenFile(tmp_path / "text")
    os.remove(tmp_path / "text_train.idx")  # left by an interrupted replacement: not a flat file
    for name in ("text_train", "text_train.bin"):
        with pytest.raises(DataError, match=r"text_train\.idx"):
            TokenFile(tmp_path / name)


# ---------------------------------------------------------------- flat files


def test_flat_files_are_read(tmp_path):
    tokens = np.arange(1000, dtype="<u2")
    tokens.tofile(tmp_path / "flat.bin")
    file = TokenFile(tmp_path / "flat.bin")
    assert (file.num_tokens, file.num_documents, file.sidecar) == (1000, None, None)
    assert np.array_equal(file.read([10], [5]), tokens[10:15]) and np.array_equal(all_tokens(file), tokens)
    with pytest.raises(DataError, match="no document index"):
        file.document(0)


def test_flat_files_of_llm_c_are_read_after_their_header(tmp_path):
    header, tokens = np.zeros(256, dtype="<i4"), np.arange(1000, dtype="<u2")
    header[:3] = 20240520, 1, 1000
    (tmp_path / "shard.bin").write_bytes(header.tobytes() + tokens.tobytes())
    file = TokenFile(tmp_path / "shard.bin")
    assert np.array_equal(all_tokens(file), tokens) and np.array_equal(
        file.read([0, 990], [3, 10]), [0, 1, 2, *range(990, 1000)]
    )
    with open(tmp_path / "shard.bin", "ab") as shard:
        shard.write(bytes(2))
    with pytest.raises(DataError, match=r"3,026 .*3,024"):
        TokenFile(tmp_path / "shard.bin")


def test_flat_files_of_32_bits_are_told_from_those_of_16_bits(tmp_path):
    header, rng = np.zeros(256, dtype="<i4"), np.random.default_rng(0)
    for vocab_size in (300, 65536, 128_256, 262_144):
        tokens = rng.integers(0, vocab_size, 50_000).astype("<u4")
        header[:3] = 20240801, 7, len(tokens)
        (tmp_path / "flat.bin").write_bytes(tokens.tobytes())
        (tmp_path / "shard.bin").write_bytes(header.tobytes() + tokens.tobytes())
        for name in ("flat.bin", "shard.bin"):
            assert np.array_equal(
                TokenFile(tmp_path / name).read([7, 49_000], [5, 1000]), tokens[[*range(7, 12), *range(49_000, 50_000)]]
            )
    few = np.tile(np.array([1, 0, 2, 0], dtype="<u2"), 100)  # 16 bits: a tiny vocabulary, and a file that is mostly a hole
    hole = np.zeros(1000, "<u2")
    hole[100] = 7
    for tokens in (few, hole, rng.integers(0, 50, 1000).astype("<u2")):
        tokens.tofile(tmp_path / "flat.bin")
        assert TokenFile(tmp_path / "flat.bin").dtype == np.uint16
    with open(tmp_path / "saved.bin", "wb") as file:
        np.save(file, tokens)
    with pytest.raises(DataError, match=r"saved\.bin.*numpy\.save"):
        TokenFile(tmp_path / "saved.bin")


def zipf(vocab_size: int, count: int = 20_000, seed: int = 0) -> np.ndarray:
    """Ids as frequent as in text."""
    shares = 1 / np.arange(1, vocab_size + 1)
    return np.random.default_rng(seed).choice(vocab_size, count, p=shares / shares.sum())


RARE = {
    "two ids": lambda rng: rng.integers(0, 2, 20_000),
    "four ids": lambda rng: rng.integers(0, 4, 20_000),
    "sixteen ids": lambda rng: rng.integers(0, 16, 20_000),
    "mostly small": lambda rng: np.where(rng.random(20_000) < 0.95, rng.integers(0, 4, 20_000), rng.integers(0, 999, 20_000)),
    "mostly padding": lambda rng: np.where(rng.random(20_000) < 0.97, 0, rng.integers(1, 999, 20_000)),
    "long runs": lambda rng: np.repeat(rng.integers(0, 999, 200), 100),
    "ascending": lambda rng: np.arange(20_000),
    "every second at most 3": lambda rng: np.stack([rng.integers(4, 999, 10_000), rng.integers(0, 4, 10_000)], 1).ravel(),
    "bytes as ids": lambda rng: np.frombuffer(b"The quick brown fox jumps over the lazy dog. " * 400, np.uint8),
    "all large": lambda rng: rng.integers(40_000, 50_000, 20_000),
    "short": lambda rng: rng.integers(0, 999, 40),
}


@pytest.mark.parametrize("kind", RARE)
def test_16_bit_files_of_rare_kinds_are_read_as_16_bits(tmp_path, kind):
    tokens = RARE[kind](np.random.default_rng(1)).astype("<u2")
    tokens.tofile(tmp_path / "flat.bin")
    file = TokenFile(tmp_path / "flat.bin", vocab_size=int(tokens.max()) + 1)
    assert file.dtype == np.uint16 and np.array_equal(all_tokens(file), tokens)


@pytest.mark.parametrize("vocab_size", [2, 5, 65, 256, 4096, 32_000, 50_257, 65_536, 100_277, 151_936, 262_144, 1_000_000])
@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8", "<u8"])
@pytest.mark.parametrize("ids", ["frequent", "even"])
def test_the_width_of_a_flat_file_is_judged_by_its_data(tmp_path, vocab_size, dtype, ids):
    if dtype == "<u2" and vocab_size > 65_536:
        return
    tokens = zipf(vocab_size) if ids == "frequent" else np.random.default_rng(2).integers(0, vocab_size, 20_000)
    tokens.astype(dtype).tofile(tmp_path / "flat.bin")
    for known in (None, vocab_size):
        file = TokenFile(tmp_path / "flat.bin", vocab_size=known)
        assert file.dtype.itemsize == int(dtype[2:]) and np.array_equal(all_tokens(file), tokens)


@pytest.mark.parametrize("vocab_size", [65, 4096, 50_257, 151_936])
@pytest.mark.parametrize("dtype", [">u2", ">u4", ">i8", "<f4", "<f8"])
def test_flat_files_of_other_types_are_refused_by_name(tmp_path, vocab_size, dtype):
    if dtype == ">u2" and vocab_size > 65_536:
        return
    zipf(vocab_size).astype(dtype).tofile(tmp_path / "flat.bin")
    with pytest.raises(DataError, match="big-endian" if dtype.startswith(">") else "float") as error:
        TokenFile(tmp_path / "flat.bin", vocab_size=vocab_size)
    assert "dtype" in str(error.value)


def test_flat_files_that_are_not_tokens_are_refused_by_name(tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = 20230101, 1, 1000
    text = "".join(f"Line {i} of a text. 一些中文。\n" for i in range(3000))
    for content, what in (
        (text.encode(), "is text"),
        (text.encode("utf-16"), "UTF-16"),
        (gzip.compress(text.encode()), "gzip"),
        (b"PK\x03\x04" + bytes(2000), "zip"),
        (header.tobytes() + zipf(999, 1000).astype("<u2").tobytes(), "unknown magic 20230101"),
        (
            np.array([20240522, 1, 99, 300, *[0] * 252], "<i4").tobytes() + bytes(9000),
            "file of llm.c .* questions for an evaluation",
        ),
        (zipf(999).astype("<u4").tobytes() + b"ab", "no multiple of 4"),
        (zipf(999).astype("<i8").tobytes()[:-4], "no multiple of 8"),
    ):
        (tmp_path / "flat.bin").write_bytes(content)
        with pytest.raises(DataError, match=what):
            TokenFile(tmp_path / "flat.bin")


def test_a_named_type_is_taken_without_judgement(tmp_path):
    tokens = np.stack([zipf(999), np.zeros(20_000, int)], 1).ravel().astype("<u2")  # every second token is 0
    tokens.tofile(tmp_path / "flat.bin")
    assert TokenFile(tmp_path / "flat.bin", vocab_size=999).dtype == np.uint32
    assert np.array_equal(all_tokens(TokenFile(tmp_path / "flat.bin", "uint16")), tokens)
    write(tmp_path / "pair")
    assert TokenFile(tmp_path / "pair", "uint16").dtype == np.uint16
    with pytest.raises(DataError, match=r"uint16, not int32; leave dtype out"):
        TokenFile(tmp_path / "pair", "int32")


@pytest.mark.parametrize(("size", "what"), [(0, "no tokens"), (1, "1 bytes"), (2001, "2,001 bytes")])
def test_impossible_flat_files_are_refused(tmp_path, size, what):
    (tmp_path / "flat.bin").write_bytes(bytes(size))
    with pytest.raises(DataError, match=what):
        TokenFile(tmp_path / "flat.bin")


# ---------------------------------------------------------------- the writer


def open_writer(prefix, **options) -> TokenWriter:
    about = dict(tokenizer_fingerprint="f", tokenizer_path="t", shuffled=False) | options
    return TokenWriter(prefix, vocab_size=100, end_of_document_id=END, **about)


def test_no_file_has_its_final_name_before_the_end(tmp_path):
    with open_writer(tmp_path / "a") as writer:
        writer.add([5, END], [2], 1)
        assert {path.suffix for path in tmp_path.iterdir()} <= {".tmp"} | {""}
        writer.finish({})
        assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx", "a.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx", "a.json"}


@pytest.mark.parametrize("fails", [True, False])
def test_a_writer_that_is_not_finished_leaves_nothing(tmp_path, fails):
    with pytest.raises(KeyboardInterrupt) if fails else open_writer(tmp_path / "b"), open_writer(tmp_path / "a") as writer:
        writer.add([5, END], [2], 1)
        if fails:
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_replaced_only_with_overwrite(tmp_path):
    write(tmp_path / "a")
    before = (tmp_path / "a.bin").read_bytes()
    with pytest.raises(DataError, match=r"a\.json.*--overwrite"):
        write(tmp_path / "a", documents(seed=1))
    assert (tmp_path / "a.bin").read_bytes() == before
    write(tmp_path / "a", documents(seed=1), overwrite=True)
    assert (tmp_path / "a.bin").read_bytes() != before


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_replacement_that_fails_between_two_files_never_leaves_a_mixed_pair(tmp_path, monkeypatch, survivors):
    """The sizes do not change, so only the missing index reveals it."""
    write(tmp_path / "a")
    replace, calls = os.replace, iter(range(10))

    def fail(*paths):
        if next(calls) == survivors:
            raise OSError(errno.EIO, "planted")
        replace(*paths)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="planted"):
        write(tmp_path / "a", documents(seed=1), overwrite=True)
    with pytest.raises(DataError, match=r"a\.idx"):
        TokenFile(tmp_path / "a")


def test_a_second_writer_of_the_same_output_is_refused(tmp_path):
    with open_writer(tmp_path / "a") as writer:
        writer.add([5, END], [2], 1)
        with pytest.raises(DataError, match="another process"):
            open_writer(tmp_path / "a")
        writer.finish({})
    assert TokenFile(tmp_path / "a").num_tokens == 2


@pytest.mark.parametrize(
    ("tokens", "lengths", "what"),
    [
        ([5, 6], [2], "every document"),
        ([5, END, 6, END], [4], "every document"),
        ([5, END], [3], "every document"),
        ([5, END, END], [2], "every document"),
        ([100, END], [2], "2 to 100"),
        ([-1, END], [2], "-1 to 2"),
    ],
)
def test_invalid_documents_are_refused(tmp_path, tokens, lengths, what):
    with open_writer(tmp_path / "a") as writer, pytest.raises(DataError, match=what):
        writer.add(tokens, lengths, 1)


def test_a_corpus_without_documents_is_refused(tmp_path):
    with open_writer(tmp_path / "a") as writer, pytest.raises(DataError, match="0 documents"):
        writer.finish({})
    assert list(tmp_path.iterdir()) == []
