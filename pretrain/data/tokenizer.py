"""Text to ids and back: one class for our SentencePiece folders and for Hugging Face folders. No torch.

Guarantees for our own tokenizers (tokenizer_training.py): any valid text decodes to exactly the text that was encoded; no
text, whatever it spells, becomes a special id; `tokenizer.json` in the same folder gives `transformers` the same ids. For a
Hugging Face tokenizer the second holds, and the first as far as its normalizer and its vocabulary allow: `Tokenizer.lost`
finds the text that its ids do not represent.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .errors import DataError
from .remote import is_url
from .store import Store

SPACE = "\u2581"
"""SentencePiece's symbol for a space."""
INFO = "tokenizer_info.json"
"""The file that marks a folder written by `tokenizer_training.train`."""
_CUT = re.compile("[^ ](?= )")
# Not inside a word, a number or a run of spaces: pre-tokenizers look far back there (digits in groups of three).
_BOUNDARY = re.compile(r"[^\s](?=[^A-Za-z0-9])|[^A-Za-z0-9\s](?=\S)")
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_PART_CHARACTERS = 1 << 20
_CONTEXT, _CUTS_TRIED = 1000, 100  # characters compared on both sides of a cut
_UNTESTED, _REPRESENTED, _LOST = range(3)


class Tokenizer:
    """`vocab_size`, `end_of_document_id`, `bos_id` (None: none), `fingerprint` (hash of the content, not of the path).

    `unknown_ids`: ids that stand for any text without an id of its own; empty for most tokenizers.
    """

    vocab_size: int
    end_of_document_id: int
    bos_id: int | None
    fingerprint: str
    unknown_ids: frozenset[int] = frozenset()
    _folder: Path
    _status: np.ndarray | None = None  # of every character, once needed
    _represented_ascii = b""

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """The tokenizer in `folder`, written by `train` or a Hugging Face folder with a tokenizer.json; or at the URL of one.
        Raises DataError, OSError."""
        folder = local_folder(folder)
        if (folder / INFO).is_file():
            return _SentencePiece(folder)
        if (folder / "tokenizer.json").is_file():
            return _HuggingFace(folder)
        raise DataError(
            f"{folder}: no tokenizer here ({INFO} or tokenizer.json not found); train one with tools/train_tokenizer.py,"
            " or save a Hugging Face tokenizer with save_pretrained"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special ids. Raises DataError for text that is not valid Unicode (lone surrogates)."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, uint32, on one thread; use processes for more cores. Raises like `encode`."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"text that is not valid Unicode: {error}") from None
        return self._encode_arrays(texts)

    def _encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [_array(ids) for ids in self._encode(texts)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`. Special ids, and ids >= vocab_size, decode to nothing; bytes that are not UTF-8 to U+FFFD."""
        raise NotImplementedError

    @property
    def prefix_id(self) -> int:
        """The id that stands before a text without a context when a converted model is measured: bos_token, else eos_token.
        Our own tokenizers export the end of a document as both (`interop/convert.py`)."""
        return self.end_of_document_id if self.bos_id is None else self.bos_id

    def encode_as_transformers(self, text: str, special: bool) -> list[int]:
        """Ids as `transformers` and lm-eval give them for a converted model: a special token that the text spells becomes its
        id, and with `special` the tokens that tokenizer.json puts around each text are added, unless the text begins with one.

        Raises DataError."""
        special = special and not text.startswith(self._as_transformers.id_to_token(self.prefix_id))
        try:
            return self._as_transformers.encode(text, add_special_tokens=special).ids
        except Exception as error:  # the library raises plain Exception for everything
            raise DataError(f"{self._folder}: cannot encode a text ({error})") from None

    @functools.cached_property
    def _as_transformers(self):
        import tokenizers

        try:
            found = tokenizers.Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        except Exception as error:
            raise DataError(f"{self._folder / 'tokenizer.json'}: not a tokenizer ({error}); save it again") from None
        found.no_truncation()
        found.no_padding()
        return found

    def encode_parts(self, text: str) -> Iterator[tuple[str, np.ndarray]]:
        """(part of `text`, its ids, uint32), about a million characters at a time: together the ids of `encode(text)`.

        Bounds memory: while a tokenizer works, it holds 30 to 200 bytes per byte of text. A text without a place where the
        ids of both sides are known to stay the same (megabytes of one word) is cut all the same.
        """
        start = skipped = 0
        while len(text) - start > 3 * _PART_CHARACTERS // 2:
            end, characters, ids = self._place_to_cut(text, start + _PART_CHARACTERS)
            yield text[start:end], self.encode_batch([text[start:end]])[0][skipped:]
            start, skipped = end + characters, ids
        yield text[start:], self.encode_batch([text[start:]])[0][skipped:]

    def _place_to_cut(self, text: str, near: int) -> tuple[int, int, int]:
        """(end of the left part, characters and ids to leave out at the start of the right part).

        Many tokenizers put a space in front of a text: it replaces the space at the cut, or its id is left out.
        """
        for match in itertools.islice(_BOUNDARY.finditer(text, near, near + _PART_CHARACTERS // 4), _CUTS_TRIED):
            at = match.end()
            left, right = text[at - _CONTEXT : at], text[at : at + _CONTEXT]
            together, first, second = self._encode([left + right, left, right])
            if first + second == together:
                return at, 0, 0
            if right[0] == " " and first + self._encode([right[1:]])[0] == together:
                return at, 1, 0
            for skipped in (1, 2):  # the space, and an unknown id that continues one of the left part
                if first + second[skipped:] == together:
                    return at, 0, skipped
        return near, 0, 0

    def byte_ids(self) -> list[int]:
        """Ids that stand for one byte of any text, or for a part of a character: they spell what has no id of its own."""
        return [id for id in range(self.vocab_size) if "\ufffd" in self.decode([id])]

    def lost(self, texts: list[str], ids: list[np.ndarray]) -> list[tuple[int, Counter[str]]]:
        """(number of a text, how often it contains each character or word that its `ids` do not represent).

        Such text has become an unknown id, or nothing at all. Texts without a loss are left out. Text that a normalizer
        changes or removes on purpose is not lost.
        """
        if self._status is None:
            self._status = np.zeros(0x110000, np.uint8)
        suspect = "".join(texts).encode().translate(None, self._represented_ascii).decode()
        if not (self._status_of(suspect) == _LOST).any():
            return []
        found = []
        for number, text in enumerate(texts):
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            characters, counts = np.unique(codes[self._status[codes] == _LOST], return_counts=True)
            if len(characters):
                found.append((number, Counter(dict(zip(map(chr, characters.tolist()), counts.tolist(), strict=True)))))
        return found

    def _status_of(self, text: str) -> np.ndarray:
        """The status of each character; each is tested when it is first seen."""
        ascii = text.isascii()
        codes = np.frombuffer(text.encode("ascii" if ascii else "utf-32-le"), np.uint8 if ascii else np.uint32)
        status = self._status[codes]
        if (untested := status == _UNTESTED).any():
            for code in np.unique(codes[untested]).tolist():
                self._status[code] = _LOST if self._is_lost(chr(code)) else _REPRESENTED
            self._represented_ascii = np.flatnonzero(self._status[:128] == _REPRESENTED).astype(np.uint8).tobytes()
            status = self._status[codes]
        return status

    def _is_lost(self, character: str) -> bool:
        ids = self._encode([character])[0]
        text = self.decode(ids)
        return not self.unknown_ids.isdisjoint(ids) or not text or ("\ufffd" in text and character != "\ufffd")


def local_folder(path: str | Path) -> Path:
    """The folder of a tokenizer on this machine: for a URL, that of a copy. Raises DataError, OSError."""
    return Store().tokenizer(path) if isinstance(path, str) and is_url(path) else Path(path)


class _SentencePiece(Tokenizer):
    def __init__(self, folder: Path):
        from sentencepiece import SentencePieceProcessor

        self._folder = folder
        try:
            self._model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            recorded = info["fingerprint"]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: damaged tokenizer ({error}); restore the folder or train it again") from None
        self.vocab_size = self._model.vocab_size()
        self.end_of_document_id, self.bos_id = self._model.eos_id(), self._model.bos_id()
        self.fingerprint = fingerprint_of(pieces(self._model))
        if self.fingerprint != recorded:
            raise DataError(f"{folder}: tokenizer.model and {INFO} do not belong together; restore the folder or train again")
        self.unknown_ids = frozenset({self._model.unk_id()})
        self._space_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # SentencePiece would turn U+2581 into a space: encode its three bytes instead. Cut long texts before spaces, which no
        # piece spans: the ids are the same, in 0.7 of the time and with bounded memory.
        parts = [[list(_cut(part)) for part in text.split(SPACE)] for text in texts]
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

    @property
    def prefix_id(self) -> int:
        return self.end_of_document_id

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([token for token in ids if token < self.vocab_size])  # it raises for larger ids

    def byte_ids(self) -> list[int]:
        return [id for id in range(self.vocab_size) if self._model.is_byte(id)]


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
        self.fingerprint = fingerprint_of([content, self.end_of_document_id])
        # Special tokens can also be pieces (</s>, as in HTML); _encode replaces them by their characters.
        unknown = {content["model"].get("unk_id"), self._model.token_to_id(content["model"].get("unk_token") or "")}
        added = {token["id"] for token in content["added_tokens"] if token["special"]}
        self._reserved = (added | set(special.values())) - unknown
        self._is_reserved_V = np.isin(np.arange(self.vocab_size), [id for id in self._reserved if id is not None])
        self.unknown_ids = frozenset(unknown - {None})
        self._knows_words = content["model"].get("type") in ("WordLevel", "WordPiece")

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
        return [ids.tolist() for ids in self._encode_arrays(texts)]

    def _encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        arrays = []
        for text in texts:
            ids = _array(self._ids(text))
            arrays.append(_array(self._spelled(ids.tolist())) if self._is_reserved_V[ids].any() else ids)
        return arrays

    def _ids(self, text: str) -> list[int]:
        try:  # "fast" leaves out offsets, 1.1 to 1.4 times; one text at a time stays on one thread
            return self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # the library raises plain Exception here, too
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

    def byte_ids(self) -> list[int]:
        pieces = [self._model.id_to_token(id) or "" for id in range(self.vocab_size)]
        return sorted({*super().byte_ids(), *(id for id, piece in enumerate(pieces) if _BYTE_PIECE.fullmatch(piece))})

    def lost(self, texts: list[str], ids: list[np.ndarray]) -> list[tuple[int, Counter[str]]]:
        if not self._knows_words:
            return super().lost(texts, ids)
        found, unknown = [], list(self.unknown_ids)
        for number, text in enumerate(texts):  # a word can be unknown although its characters are not: ask for its place
            if np.isin(ids[number], unknown).any():
                encoding = self._model.encode(text, add_special_tokens=False)
                places = zip(encoding.ids, encoding.offsets, strict=True)
                words = Counter(text[start:end] for id, (start, end) in places if id in self.unknown_ids)
                for id in self.unknown_ids:
                    words.pop(self._model.id_to_token(id), None)  # the text says "<unk>"
                if words:
                    found.append((number, words))
        return found

    def _is_lost(self, character: str) -> bool:
        text = self._model.normalizer.normalize_str(character) if self._model.normalizer else character
        if self._model.pre_tokenizer:
            text = "".join(piece for piece, _ in self._model.pre_tokenizer.pre_tokenize_str(text))
        return bool(text.replace(SPACE, "").strip(" ")) and super()._is_lost(character)


def _array(ids: list[int]) -> np.ndarray:
    return np.fromiter(ids, np.uint32, len(ids))


def _cut(text: str, length: int = 2000) -> Iterator[str]:
    """`text` in pieces of about `length` characters; all but the first start with a space that follows a non-space."""
    start = 0
    while cut := _CUT.search(text, start + length):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def pieces(processor) -> list:
    """The content of a SentencePiece model: (piece, score, kinds) of every id."""
    kinds = (processor.is_unknown, processor.is_control, processor.is_byte, processor.is_unused)
    return [
        (processor.id_to_piece(i), processor.get_score(i), [kind(i) for kind in kinds]) for i in range(processor.vocab_size())
    ]


def fingerprint_of(content) -> str:
    """Hash of a tokenizer's content, a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
