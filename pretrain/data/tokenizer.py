"""Text to ids and back: one class for our SentencePiece folders and for Hugging Face folders. No torch.

Guarantees for our own tokenizers (`train`): any valid text decodes to exactly the text that was encoded; no text, whatever
it spells, becomes a special id; `tokenizer.json` in the same folder gives `transformers` the same ids. For a Hugging Face
tokenizer the second holds, and the first as far as its normalizer allows.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pretrain.files import sync_folder, write_atomically

from .indexed import DataError

_UNKNOWN, _BOS, _END_OF_DOCUMENT, _PAD = "<|unk|>", "<|bos|>", "<|endoftext|>", "<|pad|>"
_CHAT = ["<|im_start|>", "<|im_end|>"]  # reserved for fine-tuning
_NUM_FIXED = 256 + 4 + len(_CHAT)  # ids of bytes and special tokens
_SPACE = "\u2581"  # SentencePiece's symbol for a space
_CUT = re.compile("[^ ](?= )")
_CHUNK = re.compile(r"(?s).{2000,10000}?\n|.{1,10000}")
_INFO = "tokenizer_info.json"


class Tokenizer:
    """`vocab_size`, `end_of_document_id`, `bos_id` (None: none), `fingerprint` (hash of the content, not of the path)."""

    vocab_size: int
    end_of_document_id: int
    bos_id: int | None
    fingerprint: str

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """The tokenizer in `folder`, written by `train` or a Hugging Face folder with a tokenizer.json. Raises DataError."""
        folder = Path(folder)
        if (folder / _INFO).is_file():
            return _SentencePiece(folder)
        if (folder / "tokenizer.json").is_file():
            return _HuggingFace(folder)
        raise DataError(
            f"{folder}: no tokenizer here ({_INFO} or tokenizer.json not found); train one with tools/train_tokenizer.py,"
            " or save a Hugging Face tokenizer with save_pretrained"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special ids. Raises DataError for text that is not valid Unicode (lone surrogates)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on one thread; use processes for more cores. Raises like `encode`."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"text that is not valid Unicode: {error}") from None
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`. Special ids, and ids >= vocab_size, decode to nothing; bytes that are not UTF-8 to U+FFFD."""
        raise NotImplementedError


class _SentencePiece(Tokenizer):
    def __init__(self, folder: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
            recorded = info["fingerprint"]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: damaged tokenizer ({error}); restore the folder or train it again") from None
        self.vocab_size = self._model.vocab_size()
        self.end_of_document_id, self.bos_id = self._model.eos_id(), self._model.bos_id()
        self.fingerprint = _fingerprint(_pieces(self._model))
        if self.fingerprint != recorded:
            raise DataError(f"{folder}: tokenizer.model and {_INFO} do not belong together; restore the folder or train again")
        self._space_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # SentencePiece would turn U+2581 into a space: encode its three bytes instead. Cut long texts before spaces, which no
        # piece spans: the ids are the same, in 0.7 of the time and with bounded memory.
        parts = [[list(_cut(part)) for part in text.split(_SPACE)] for text in texts]
        flat = [piece for text in parts for part in text for piece in part]
        encoded = iter(self._model.encode(flat, num_threads=1))
        result = []
        for text in parts:
            ids: list[int] = []
            for number, part in enumerate(text):
                if number:
                    ids += self._space_ids
                for piece_ids in itertools.islice(encoded, len(part)):
                    ids += piece_ids
            result.append(ids)
        return result

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([token for token in ids if token < self.vocab_size])  # it raises for larger ids


class _HuggingFace(Tokenizer):
    def __init__(self, folder: Path):
        import tokenizers

        self._folder = folder
        try:
            self._model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception for everything
            raise DataError(f"{folder / 'tokenizer.json'}: not a tokenizer ({error}); save it again") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # "</s>" in a text is text
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        special = self._special_ids(folder)
        self.end_of_document_id, self.bos_id = special["eos_token"], special["bos_token"]
        content = json.loads(self._model.to_str())
        self.fingerprint = _fingerprint([content, self.end_of_document_id])
        # Special tokens can also be pieces (</s>, as in HTML); _encode replaces them by their characters.
        unknown = {content["model"].get("unk_id"), self._model.token_to_id(content["model"].get("unk_token") or "")}
        added = {token["id"] for token in content["added_tokens"] if token["special"]}
        self._reserved = (added | set(special.values())) - unknown

    def _special_ids(self, folder: Path) -> dict[str, int | None]:
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second has priority
            try:
                if (folder / name).is_file():
                    config |= json.loads((folder / name).read_text(encoding="utf-8")).items()
            except (ValueError, AttributeError) as error:
                raise DataError(f"{folder / name}: damaged ({error}); save the tokenizer again") from None
        ids = {}
        for name in ("eos_token", "bos_token"):
            token = config.get(name)
            token = token["content"] if isinstance(token, dict) else token
            ids[name] = None if token is None else self._model.token_to_id(token)
            if name == "eos_token" and ids[name] is None:
                what = (
                    "has no eos_token" if token is None else f"has the eos_token {token!r}, which is missing in tokenizer.json"
                )
                raise DataError(f"{folder}: tokenizer_config.json {what}: documents cannot be ended; correct it and save again")
        return ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [ids if self._reserved.isdisjoint(ids) else self._spelled(ids) for ids in map(self._ids, texts)]

    def _ids(self, text: str) -> list[int]:
        try:  # "fast" leaves out offsets, 1.1 to 1.4 times; one text at a time stays on one thread
            return self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # see above
            reason = f"{self._folder}: cannot encode a text ({error})"
            raise DataError(f"{reason}; choose a tokenizer with an unknown token or with byte fallback") from None

    def _spelled(self, ids: list[int]) -> list[int]:
        """`ids` with special tokens replaced by their characters; characters without a piece are encoded one by one."""
        spelled: list[int] = []
        for id in ids:
            for character in self._model.id_to_token(id) if id in self._reserved else ():
                piece = self._model.token_to_id(character)
                spelled += self._ids(character) if piece is None else [piece]
            spelled += [id] if id not in self._reserved else []
        return spelled

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)


def _cut(text: str, length: int = 2000) -> Iterator[str]:
    """`text` in pieces of about `length` characters; all but the first start with a space that follows a non-space."""
    start = 0
    while cut := _CUT.search(text, start + length):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def chunks(text: str) -> list[str]:
    """`text` in pieces for training: complete lines, at least 2000 characters where possible, at most 10,000."""
    return _CHUNK.findall(text)


def train(
    texts: Iterable[str], folder: str | Path, *, vocab_size: int, describe: Callable[[], dict], num_threads: int = 1
) -> Tokenizer:
    """Trains a byte-pair encoding on `texts` and writes it to the new folder `folder`.

    Writes tokenizer.model (SentencePiece), tokenizer.json and tokenizer_config.json (Hugging Face, with the same ids), and
    tokenizer_info.json with the fingerprint and the result of `describe()`, a description of the text that is called after
    the last text. Raises DataError if the folder is in use or the text is too small for `vocab_size`.

    Byte fallback and the identity normalizer make it lossless. Each digit is a token; runs of spaces and line ends may merge,
    which shortens code (3.3 bytes per token instead of 3.1 with training on single lines). All texts are held in memory.
    """
    from sentencepiece import SentencePieceProcessor

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists already; choose another output or remove it first")
    model = _train_model([chunk for text in texts for chunk in chunks(text)], vocab_size, num_threads)
    processor = SentencePieceProcessor(model_proto=model)
    info = {
        "format_version": 1,
        "fingerprint": _fingerprint(_pieces(processor)),
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
        write_atomically(temporary / _INFO, json.dumps(info, indent=1, ensure_ascii=False) + "\n")
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    return Tokenizer.load(folder)


def _train_model(pieces: list[str], vocab_size: int, num_threads: int) -> bytes:
    """A SentencePiece model. Raises DataError if the text does not fit `vocab_size`."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type="bpe",  # unigram takes 20 times as long to train and has no Hugging Face conversion with equal ids
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=_coverage(pieces, vocab_size),
            required_chars=_SPACE,  # Chinese has no spaces: without a piece, one would decode from its bytes to U+2581
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


def _pieces(processor) -> list:
    kinds = (processor.is_unknown, processor.is_control, processor.is_byte, processor.is_unused)
    return [
        (processor.id_to_piece(i), processor.get_score(i), [kind(i) for kind in kinds]) for i in range(processor.vocab_size())
    ]


def _fingerprint(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _hugging_face(processor) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, with the ids of the SentencePiece model.

    Every split of a piece into two pieces needs a merge, in the order of the pieces' ranks. The class name keeps
    transformers from rebuilding normalizer and decoder, as its Llama class does.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    normal = {
        piece: i
        for piece, i in ids.items()
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i))
    }
    merges = []
    for piece, i in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                merges.append((-processor.get_score(i), normal[left], normal[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(merges)]
    model = models.BPE(vocab=ids, merges=merges, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{_SPACE}+[^{_SPACE}]*|[^{_SPACE}]+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [_UNKNOWN, _BOS, _END_OF_DOCUMENT, _PAD, *_CHAT]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _UNKNOWN,
        "bos_token": _BOS,
        "eos_token": _END_OF_DOCUMENT,
        "pad_token": _PAD,
        "extra_special_tokens": _CHAT,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=1) + "\n"}
