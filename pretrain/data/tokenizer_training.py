"""Training of a tokenizer: a byte-pair encoding with byte fallback, for SentencePiece and, with the same ids, Hugging Face."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from pretrain.files import sync_folder, write_atomically

from .indexed import DataError
from .tokenizer import INFO, SPACE, Tokenizer, fingerprint_of, pieces

_UNKNOWN, _BOS, _END_OF_DOCUMENT, _PAD = "<|unk|>", "<|bos|>", "<|endoftext|>", "<|pad|>"
_RESERVED = "\u2585"  # SentencePiece silently drops pieces of text that contain its own mark for unknown characters
_CHAT = ["<|im_start|>", "<|im_end|>"]  # reserved for fine-tuning
_NUM_FIXED = 256 + 4 + len(_CHAT)  # ids of bytes and special tokens
_CHUNK = re.compile(r"(?s).{2000,10000}?\n|.{1,10000}")


def chunks(text: str) -> list[str]:
    """`text` in pieces for training: complete lines, at least 2000 characters where possible, at most 10,000."""
    return _CHUNK.findall(text)


def train(
    texts: Iterable[str], folder: str | Path, *, vocab_size: int, describe: Callable[[], dict], num_threads: int = 1
) -> Tokenizer:
    """Trains a byte-pair encoding on `texts` and writes it to the new folder `folder`.

    Writes tokenizer.model (SentencePiece), tokenizer.json and tokenizer_config.json (Hugging Face, with the same ids), and
    tokenizer_info.json with the fingerprint and the result of `describe`, which is called after the last text and describes
    the texts. Raises DataError if the folder is in use or the text is too small for `vocab_size`.

    Byte fallback and the identity normalizer make it lossless. Each digit is a token; runs of spaces and line ends may merge,
    which shortens code (3.3 bytes per token instead of 3.1 with training on single lines). All texts are held in memory.
    """
    from sentencepiece import SentencePieceProcessor

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists already; choose another output or remove it first")
    cleaned = (text.replace(_RESERVED, " ") for text in texts)
    model = _train_model([chunk for text in cleaned for chunk in chunks(text)], vocab_size, num_threads)
    processor = SentencePieceProcessor(model_proto=model)
    info = {
        "format_version": 1,
        "fingerprint": fingerprint_of(pieces(processor)),
        "vocab_size": processor.vocab_size(),
        "model_type": "bpe",
        "corpus": describe(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_atomically(temporary / "tokenizer.model", model)
        for name, text in _hugging_face(processor).items():
            write_atomically(temporary / name, text)
        write_atomically(temporary / INFO, json.dumps(info, indent=1, ensure_ascii=False) + "\n")
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    return Tokenizer.load(folder)


def _train_model(texts: list[str], vocab_size: int, num_threads: int) -> bytes:
    """A SentencePiece model. Raises DataError if the text does not fit `vocab_size`."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",  # unigram takes many times as long to train and has no Hugging Face conversion with equal ids
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=_coverage(texts, vocab_size),
            required_chars=SPACE,  # Chinese has no spaces: without a piece, one would decode from its bytes to U+2581
            max_sentence_length=1 << 20,  # longer ones are dropped silently; chunks have at most 10,000 characters
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=_UNKNOWN,
            bos_piece=_BOS,
            eos_piece=_END_OF_DOCUMENT,
            pad_piece=_PAD,
            control_symbols=_CHAT,
            num_threads=num_threads,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"cannot train a vocabulary of {vocab_size}: {_explain(str(error))}") from None
    return model.getvalue()


def _coverage(texts: list[str], vocab_size: int) -> float:
    """Fraction of the text whose characters become pieces; the other characters are spelled in bytes.

    0.99995, or less to keep a quarter of the ids for longer pieces: Chinese has more characters than a small vocabulary.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    most = max(1, 3 * (vocab_size - _NUM_FIXED) // 4)
    covered = sum(count for _, count in counts.most_common(most)) / max(1, sum(counts.values()))
    return min(max(0.98, covered), 0.99995)  # SentencePiece refuses less than 0.98


def _explain(message: str) -> str:
    """SentencePiece's error in plain words; unknown errors unchanged."""
    if found := re.search(r"too high.* <= (\d+)", message, re.DOTALL):
        return f"the text allows at most {found[1]}; use more text or a smaller --vocab-size"
    if found := re.search(r" vs (\d+)", message):
        return f"bytes, special ids and the characters of the text need {found[1]}; use a larger --vocab-size"
    return "the corpus contains no text" if "sentences_.empty()" in message else message


def _hugging_face(processor) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, with the ids of the SentencePiece model.

    Every split of a piece into two pieces needs a merge, in the order of the pieces' ranks. The class name keeps
    transformers from rebuilding normalizer and decoder, as its Llama class does.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    content = pieces(processor)
    ids = {piece: i for i, (piece, *_) in enumerate(content)}
    normal = {piece: ids[piece] for piece, _, kinds in content if not any(kinds)}
    merges = []
    for piece, i in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                merges.append((-processor.get_score(i), normal[left], normal[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(merges)]
    model = models.BPE(vocab=ids, merges=merges, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [_UNKNOWN, _BOS, _END_OF_DOCUMENT, _PAD, *_CHAT]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _UNKNOWN,
        "bos_token": _BOS,
        "eos_token": _END_OF_DOCUMENT,
        "pad_token": _PAD,
        "additional_special_tokens": _CHAT,  # version 5 of transformers writes another name, which version 4 cannot read
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=1) + "\n"}
