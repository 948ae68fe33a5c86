"""The figures of a tokenizer's report are those of an independent count, for our tokenizers and for Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pretrain.data.tokenizer import Tokenizer
from pretrain.data.tokenizer_report import ranges
from pretrain.data.tokenizer_training import train
from tests.test_tools_data import make_texts, tool

STRANGE = "héllo wörld — 今天 天气 很好  🙂\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two sources, of plain words and of characters that the tokenizers have not seen; `ours` and `theirs`."""
    folder = tmp_path_factory.mktemp("report")
    texts = make_texts(400, 60)
    train(texts, folder / "ours", vocab_size=400, describe=dict)
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=350, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False, min_frequency=1
        ),
    )
    (folder / "theirs").mkdir()
    model.save(str(folder / "theirs" / "tokenizer.json"))
    (folder / "theirs" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    rows = texts[:120], [f"{text} {STRANGE}" for text in texts[:50]]
    for name, of_name in zip(("plain", "strange"), rows, strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in of_name))
    return folder


def report(folder: Path, *flags) -> tuple[str, list[dict]]:
    flags = ["--tokenizer", folder / "ours", "--text-key", "content", "--json", folder / "report.json", "--workers", 1, *flags]
    out = tool("inspect_data", "--text", folder / "plain.jsonl", folder / "strange.jsonl", *flags).stdout
    return out, json.loads((folder / "report.json").read_text())


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["content"] for line in path.read_text().splitlines()]


def test_the_figures_of_each_source_are_those_of_an_independent_count(folder):
    _, (ours, theirs) = report(folder, "--against", folder / "theirs")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ours" / "tokenizer.model"))
    other = tokenizers.Tokenizer.from_file(str(folder / "theirs" / "tokenizer.json"))
    byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    for name in ("plain", "strange"):
        texts = texts_of(folder / f"{name}.jsonl")
        ids = [id for text in texts for id in model.encode(text)]
        their_pieces = [piece for text in texts for piece in other.encode(text).tokens]
        parts = [piece for piece in their_pieces if _is_broken(bytes(byte_of[letter] for letter in piece))]
        expected = {
            "documents": len(texts),
            "utf8_bytes": sum(len(text.encode()) for text in texts),
            "characters": sum(map(len, texts)),
            "words": sum(len(text.split()) for text in texts),
        }
        for fit, tokens, pieces in ((ours, ids, [id for id in ids if model.is_byte(id)]), (theirs, their_pieces, parts)):
            found = fit["sources"][str(folder / f"{name}.jsonl")]
            assert {key: found[key] for key in expected} == expected and found["tokens"] == len(tokens)
            assert found["bytes_per_token"] == pytest.approx(expected["utf8_bytes"] / len(tokens))
            assert found["characters_per_token"] == pytest.approx(expected["characters"] / len(tokens))
            assert found["tokens_per_word"] == pytest.approx(len(tokens) / expected["words"])
            assert found["byte_fraction"] == pytest.approx(len(pieces) / len(tokens))
            assert found["unknown_fraction"] == found["changed_fraction"] == 0
            assert (found["byte_fraction"] > 0.1) == (name == "strange")


def _byte_letters() -> list[str]:
    """GPT-2's letter of each byte: printable ones stand for themselves, the others follow from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


def _is_broken(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


def test_token_files_are_sources_like_the_texts_that_they_were_made_from(folder, tmp_path):
    for name, prefix in (("plain", "plain"), ("strange", "more/a-1")):
        flags = ["--tokenizer", folder / "ours", "--text-key", "content", "--output", tmp_path / prefix]
        tool("tokenize_corpus", "--input", folder / f"{name}.jsonl", *flags)
    _, of_texts = report(folder, "--against", folder / "theirs")
    for second in ("more", "more/a-*", "more/a-1.idx"):
        flags = ["--against", folder / "theirs", "--json", tmp_path / "report.json", "--workers", 1]
        tool("inspect_data", "--text", tmp_path / "plain", tmp_path / second, *flags)
        of_tokens = json.loads((tmp_path / "report.json").read_text())
        for one, other in zip(of_texts, of_tokens, strict=True):
            assert list(one["sources"].values()) == list(other["sources"].values()) and one["all"] == other["all"]
    assert "--text needs --tokenizer" in tool("inspect_data", "--text", folder / "plain.jsonl", status=2).stderr


def test_each_training_source_of_settings_has_a_row_whatever_its_format_and_stage(folder, tmp_path):
    for name in ("plain", "strange"):
        flags = ["--tokenizer", folder / "ours", "--text-key", "content", "--output", tmp_path / name]
        tool("tokenize_corpus", "--input", folder / f"{name}.jsonl", *flags)
    (tmp_path / "strange.json").unlink()  # as a pair of another program: it does not say which tokenizer made it
    sources = {"data": {"train": [{"path": str(tmp_path / "plain")}]}, "tokenizer": {"path": str(folder / "ours")}}
    later = {"after_steps": 5, "sources": [{"path": str(tmp_path / name)} for name in ("strange", "plain")]}
    (tmp_path / "run.yaml").write_text(json.dumps(sources | {"train": {"stages": [later], "max_steps": 9}}))
    flags = ["--against", folder / "theirs", "--json", tmp_path / "report.json", "--workers", 1]
    out = tool("inspect_data", "--config", tmp_path / "run.yaml", *flags, "--picture", tmp_path / "p.png").stdout
    _, of_texts = report(folder, "--against", folder / "theirs")
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found[0]["sources"]) == [str(tmp_path / "plain"), str(tmp_path / "strange")]
    for one, other in zip(of_texts, found, strict=True):
        assert list(one["sources"].values()) == list(other["sources"].values()) and one["all"] == other["all"]
    assert f"{folder / 'ours'} makes" in out and (tmp_path / "p.png").stat().st_size
    refusal = tool("inspect_data", "--text", tmp_path / "strange", status=2).stderr
    assert f"{tmp_path / 'strange'}: its tokenizer is unknown" in refusal


def test_unused_ids_and_totals_are_those_of_all_sources(folder):
    _, (ours,) = report(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ours" / "tokenizer.model"))
    texts = [text for name in ("plain", "strange") for text in texts_of(folder / f"{name}.jsonl")]
    used = {id for text in texts for id in model.encode(text)}
    listed = [id for first, last in ours["unused_ids"] for id in range(first, last + 1)]
    assert listed == sorted(set(range(400)) - used) and 2 in listed  # the end of documents is not text
    for key in ("documents", "tokens", "utf8_bytes", "characters", "words"):
        assert ours["all"][key] == sum(figures[key] for figures in ours["sources"].values())


def test_the_lines_name_the_longest_and_most_frequent_tokens_with_their_counts(folder):
    out, _ = report(folder)
    tokenizer = Tokenizer.load(folder / "ours")
    texts = [text for name in ("plain", "strange") for text in texts_of(folder / f"{name}.jsonl")]
    counts_V = np.bincount(np.concatenate(tokenizer.encode_batch(texts)), minlength=400)
    top, longest = int(counts_V.argmax()), max(range(400), key=lambda id: len(tokenizer.decode([id])))
    frequent = next(line for line in out.splitlines() if "most frequent" in line)
    assert f"counts: {json.dumps(tokenizer.decode([top]))} {counts_V[top]:,}," in frequent
    assert f"longest, with counts: {json.dumps(tokenizer.decode([longest]))} {counts_V[longest]:,}," in out


def test_a_byte_piece_among_the_most_frequent_is_named_by_its_id(folder, tmp_path):
    (tmp_path / "text.txt").write_text("\u4e00" * 9)
    flags = ["--text", tmp_path / "text.txt", "--tokenizer", folder / "ours", "--workers", 1]
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ours" / "tokenizer.model"))
    ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in sorted("\u4e00".encode())]
    expected = ", ".join(f"id {id} 9" for id in ids)
    assert f"most frequent, with counts: {expected}," in tool("inspect_data", *flags).stdout


@pytest.mark.parametrize(("text", "fraction"), [("ab ab cd  ab", 1 / 4), ("ab ab abcdefghij  ab", 10 / 20)])
def test_text_without_ids_and_text_that_changes_are_counted(tmp_path, text, fraction):
    model = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "ab": 2}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (tmp_path / "text.txt").write_text(text)
    flags = ["--text", tmp_path / "text.txt", "--tokenizer", tmp_path, "--json", tmp_path / "report.json", "--workers", 1]
    out = tool("inspect_data", *flags).stdout
    (fit,) = json.loads((tmp_path / "report.json").read_text())
    found = fit["sources"][str(tmp_path / "text.txt")]
    assert found["tokens"] == 4 and found["unknown_fraction"] == fraction and found["changed_fraction"] == 1
    assert "1 of 1 compared documents decode to another text" in out


def test_the_picture_is_written_and_missing_or_empty_input_is_refused(folder, tmp_path):
    report(folder, "--against", folder / "theirs", "--picture", tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty.txt").write_text("")
    for flags in (
        ["--text", folder / "plain.jsonl"],
        ["--text", tmp_path / "empty.txt", "--tokenizer", folder / "ours"],
        ["--text", tmp_path / "none.txt", "--tokenizer", folder / "ours"],
        ["--data", tmp_path / "x", "--against", folder / "ours"],
    ):
        tool("inspect_data", *flags, status=2)


def test_ranges_join_neighbours():
    assert ranges([0, 1, 2, 5, 7, 8]) == [(0, 2), (5, 5), (7, 8)] and ranges([]) == []
