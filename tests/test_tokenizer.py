"""Our tokenizers are lossless, no text becomes a special id, and transformers gives the same ids."""

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.corpus import Corpus
from pretrain.data.indexed import DataError
from pretrain.data.tokenizer import Tokenizer, _cut
from pretrain.data.tokenizer_training import chunks, train

VOCABULARY = 1000
TRICKY = [
    "",
    " ",
    "\n",
    "\r\n\t\x00\x7f",
    "  leading and trailing   ",
    "\ufeffbyte order mark",
    "\u2581",
    "a\u2581b \u2581\u2581 c",
    "e\u0301 combining",
    "🏳️‍🌈 \U0010ffff \ue000 \ufffd",
    "中文，没有空格。",
    "<|endoftext|><|bos|><|unk|><|pad|><|im_start|><|im_end|></s><unk><0x0A>",
    "1234567890 3.14159",
    "    if x:\n        return {}\n",
    "x" * 10_000 + " " + "y " * 5_000 + " " * 5_000,
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for _, text in islice(Corpus(["stdlib"]).documents(), 140)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tokenizers") / "ours"
    train(texts, folder, vocab_size=VOCABULARY, describe=lambda: {"inputs": ["stdlib"]})
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    return load_hugging_face(folder, tmp_path_factory.mktemp("tokenizers") / "converted")


def load_hugging_face(folder: Path, copy: Path) -> Tokenizer:
    """The same tokenizer, from a copy of its Hugging Face files alone."""
    copy.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, copy)
    return Tokenizer.load(copy)


def test_an_id_of_a_larger_model_has_no_text(tokenizer, converted):
    """A model may have more ids than its tokenizer, and may generate them."""
    ids = tokenizer.encode("a text")
    for each in (tokenizer, converted):
        assert each.decode([*ids, VOCABULARY + 3, *ids]) == "a texta text"


def test_ids_of_special_tokens_are_fixed(tokenizer):
    assert tokenizer.vocab_size == VOCABULARY
    assert (tokenizer.bos_id, tokenizer.end_of_document_id) == (1, 2)
    assert tokenizer.decode([2, 1, 5, *tokenizer.encode("a b"), 2]) == "a b"


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_survives_without_special_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=6) >= 6 and max(ids, default=0) < VOCABULARY


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_space_survives_a_tokenizer_that_was_trained_on_text_without_one(tmp_path):
    """Such as Chinese, Japanese or Thai."""
    train(["今天天气很好，我们去公园玩。" * 50] * 20, tmp_path / "t", vocab_size=290, describe=dict)
    for tokenizer in (Tokenizer.load(tmp_path / "t"), load_hugging_face(tmp_path / "t", tmp_path / "converted")):
        for text in ("def f(): return '好 天'", " ", "  "):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_more_characters_than_ids_leave_room_for_longer_pieces(tmp_path):
    """Chinese has many: frequent characters become pieces, the others bytes."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, 0x4E00 + (2500 ** (rng.random(2) ** 2)).astype(int))) for _ in range(4000)]
    written = ["".join(words[int(i)] for i in 4000 ** (rng.random(1000) ** 0.7)) for _ in range(40)]
    assert len(set("".join(written))) + 262 > 1200
    tokenizer = train(written, tmp_path / "t", vocab_size=1200, describe=dict)
    text = written[0] + " \U00020000"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text)  # longer pieces save more than rare characters cost


def test_real_documents_survive_in_batches_and_alone(tokenizer, texts):
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids.tolist()) for ids in batch] == texts
    assert batch[7].tolist() == tokenizer.encode(texts[7])
    assert sum(map(len, texts)) / sum(map(len, batch)) > 2.5  # characters per token: the pieces fit the text


@pytest.mark.parametrize("length", [1, 50, 333, 2000])
def test_cutting_long_texts_changes_no_id(tokenizer, texts, length):
    for text in texts[:40]:
        pieces = list(_cut(text, length))
        assert "".join(pieces) == text and max(map(len, pieces)) < length + 5_000
        assert [i for piece in pieces for i in tokenizer._model.encode(piece)] == tokenizer._model.encode(text)


LIBRARY_TOKENIZERS = ["ours", "bytes", "fused", "single", "dropping", "words"]


@pytest.fixture(scope="module")
def library_folders(tmp_path_factory, texts, folder) -> dict[str, Path]:
    """Ours, a complete byte-level one, and four that cannot represent all text: by unknown ids, or by leaving it out."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    folders = {"ours": folder}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<eos>"]
    common = dict(vocab_size=600, special_tokens=special, show_progress=False)
    for name, model, trainer in (
        ("bytes", models.BPE(), trainers.BpeTrainer(initial_alphabet=alphabet, **common)),
        ("fused", models.BPE(unk_token="<unk>", fuse_unk=True), trainers.BpeTrainer(limit_alphabet=90, **common)),
        ("single", models.BPE(unk_token="<unk>"), trainers.BpeTrainer(limit_alphabet=90, **common)),
        ("dropping", models.BPE(), trainers.BpeTrainer(limit_alphabet=90, **common)),
        ("words", models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(limit_alphabet=90, **common)),
    ):
        library = Library(model)
        if name == "bytes":
            library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        elif name == "words":
            library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        else:
            library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        library.train_from_iterator(texts[:20], trainer)
        folders[name] = tmp_path_factory.mktemp(name)
        library.save(str(folders[name] / "tokenizer.json"))
        (folders[name] / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return folders


@pytest.mark.parametrize("name", LIBRARY_TOKENIZERS)
def test_all_text_without_ids_is_found_whether_it_became_unknown_ids_or_nothing(library_folders, name):
    tokenizer = Tokenizer.load(library_folders[name])
    written = ["plain text", "今天 天气", "a text <unk> that 今 says unk", "\n  "]
    lost = dict(tokenizer.lost(written, tokenizer.encode_batch(written)))
    if name in ("ours", "bytes"):
        assert lost == {}
    else:
        assert lost == {1: {"今": 1, "天": 2, "气": 1}, 2: {"今": 1}}


@pytest.mark.parametrize("name", LIBRARY_TOKENIZERS)
def test_long_texts_in_parts_have_the_same_ids(library_folders, texts, name, monkeypatch):
    tokenizer = Tokenizer.load(library_folders[name])
    monkeypatch.setattr("pretrain.data.tokenizer._PART_CHARACTERS", 2000)
    for text in ("".join(texts[:4])[:50_000], "今天天气很好，我们去公园玩。" * 500 + " and words\u2581" * 400):
        parts = list(tokenizer.encode_parts(text))
        assert len(parts) > 3 and max(len(part) for part, _ in parts) < 4000
        assert [i for _, ids in parts for i in ids.tolist()] == tokenizer.encode(text)


def test_a_single_endless_word_is_cut_too(tokenizer, monkeypatch):
    monkeypatch.setattr("pretrain.data.tokenizer._PART_CHARACTERS", 2000)
    parts = list(tokenizer.encode_parts("x" * 20_000))
    assert max(len(part) for part, _ in parts) <= 3000
    assert tokenizer.decode([i for _, ids in parts for i in ids.tolist()]) == "x" * 20_000


def test_text_that_is_not_unicode_is_refused(tokenizer, converted):
    for one in (tokenizer, converted):
        with pytest.raises(DataError, match="position 1"):
            one.encode("a\ud800")


def test_training_gives_the_same_tokenizer_on_any_number_of_threads(tokenizer, texts, tmp_path):
    again = train(iter(texts), tmp_path / "t", vocab_size=VOCABULARY, describe=dict, num_threads=2)
    assert again.fingerprint == tokenizer.fingerprint
    other = train(texts[:100], tmp_path / "u", vocab_size=VOCABULARY, describe=dict)
    assert other.fingerprint != tokenizer.fingerprint


def test_training_text_is_cut_at_lines_without_losing_any(texts):
    long_line = "word " * 5000
    for text in [*texts[:50], long_line, "a\n" * 3000, "", "no end"]:
        pieces = chunks(text)
        assert "".join(pieces) == text and all(len(piece) <= 10_000 for piece in pieces)
        assert all(chunks(piece) == [piece] for piece in pieces)
        assert all(piece.endswith("\n") or len(piece) == 10_000 for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("vocab_size", "text", "what"),
    [
        (100, "some text", r" 2\d\d;.*--vocab-size"),
        (5000, "some text " * 50, r" \d+;.*--vocab-size"),
        (300, "", "no text"),
    ],
)
def test_impossible_vocabularies_are_refused_with_the_limit(tmp_path, vocab_size, text, what):
    with pytest.raises(DataError, match=f"{vocab_size}: .*{what}"):
        train([text], tmp_path / "t", vocab_size=vocab_size, describe=dict)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_not_overwritten(folder, texts):
    with pytest.raises(DataError, match=str(folder)):
        train(texts[:1], folder, vocab_size=300, describe=dict)


def test_the_fingerprint_depends_on_the_content_and_not_on_the_path(folder, tokenizer, converted, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    assert Tokenizer.load(tmp_path / "moved").fingerprint == tokenizer.fingerprint
    shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("tokenizer_info.json"))
    assert Tokenizer.load(tmp_path / "other").fingerprint == converted.fingerprint
    path = tmp_path / "other" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"][0], values["model"]["merges"][1] = values["model"]["merges"][1], values["model"]["merges"][0]
    path.write_text(json.dumps(values))
    assert Tokenizer.load(tmp_path / "other").fingerprint != converted.fingerprint


def test_damaged_and_foreign_folders_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"tools/train_tokenizer\.py"):
        Tokenizer.load(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = (folder / "tokenizer.model").read_bytes()
    (copy / "tokenizer.model").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="copy"):
        Tokenizer.load(copy)
    (copy / "tokenizer_info.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        Tokenizer.load(copy)
    (copy / "tokenizer_info.json").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="no eos_token"):
        Tokenizer.load(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(copy)


# ---------------------------------------------------------------- Hugging Face


def random_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    alphabet = np.array([*"abcdefgh ABC.,;:(){}=\n\t0123456789éß中文\U0001f600\u0301\ue000", " ", " ", " ", "\n"])
    return ["".join(rng.choice(alphabet, rng.integers(0, 80))) for _ in range(count)]


def test_the_converted_tokenizer_gives_the_same_ids(tokenizer, converted, texts):
    for text in [*texts, *random_texts(1000), *(text for text in TRICKY if "\u2581" not in text)]:
        ids = converted.encode(text)
        assert ids == tokenizer.encode(text), text
        assert converted.decode(ids) == text
    assert (converted.vocab_size, converted.end_of_document_id, converted.bos_id) == (VOCABULARY, 2, 1)


def test_transformers_gives_the_same_ids(tokenizer, folder, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for theirs in (loaded, saved):
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 2, 3, VOCABULARY)
        for text in [*texts[:60], *random_texts(200), TRICKY[11]]:
            ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert ids == tokenizer.encode(text)
            assert theirs.decode(ids) == text
        assert theirs.encode("<|im_start|>") == [4]


def test_a_byte_level_hugging_face_tokenizer_is_loaded(tmp_path):
    """With truncation enabled, and with an eos_token written as an object."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(["some text to learn from, some more text"] * 5, trainer)
    library.enable_truncation(4)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.end_of_document_id, tokenizer.bos_id) == (0, None)
    text = "some text that is <eos> longer than four tokens \u2581"
    ids = tokenizer.encode(text)
    assert 0 not in ids and tokenizer.decode(ids) == text and tokenizer.vocab_size == library.get_vocab_size()


def test_no_text_becomes_a_special_id_even_if_a_hugging_face_tokenizer_has_it_as_a_piece(tmp_path):
    """In a unigram model "</s>" is a piece like others, and an added token that is not special is matched in text."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.Unigram())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(["a tag is <b>bold</b> or <s>struck</s> out", "some more text"] * 5, trainer)
    library.add_tokens(["<|end|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    for name in ("</s>", "<|end|>"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name, "bos_token": "<s>"}))
        tokenizer = Tokenizer.load(tmp_path)
        special = {tokenizer.end_of_document_id, tokenizer.bos_id, library.token_to_id("</s>")}
        assert tokenizer.encode("some \u4e2d")[-1] == library.token_to_id("<unk>")  # which is special, but correct here
        for text in ("a </s> b", "</s>", "some<s>more</s>text", "some <|end|>"):
            ids = tokenizer.encode(text)
            assert special.isdisjoint(ids) and tokenizer.decode(tokenizer.encode("some text")) == "some text"
            assert "|" in text or tokenizer.decode(ids) == text


def test_a_character_without_an_id_is_refused(tmp_path):
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    library = Library(models.WordLevel({"word": 0, "<eos>": 1}, unk_token="<unk>"))
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(DataError, match=str(tmp_path)):
        Tokenizer.load(tmp_path).encode("other")


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"tokenizer_config.json": "{oops"}, "tokenizer_config.json"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json"),
        ({"tokenizer_config.json": "{}"}, "no eos_token"),
        ({"tokenizer_config.json": '{"eos_token": "</s>"}'}, "'</s>'.*tokenizer.json"),
        ({"special_tokens_map.json": '{"eos_token": "<|endoftext|>"}', "tokenizer_config.json": "{}"}, None),
    ],
)
def test_a_wrong_eos_token_of_a_hugging_face_folder_is_refused(folder, tmp_path, files, what):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if what is None:
        assert Tokenizer.load(tmp_path).end_of_document_id == 2
    else:
        with pytest.raises(DataError, match=what):
            Tokenizer.load(tmp_path)
