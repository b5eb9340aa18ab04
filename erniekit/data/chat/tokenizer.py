"""Tokenizers, from a model directory's tokenizer.json (`tokenizers`) or tokenizer.model (`sentencepiece`).

If both exist, tokenizer.json is used, since transformers and servers based on it read that file. Both follow ERNIE
4.5's conventions: no bos or eos is added, no space is added before the text or removed, digits are single tokens (by
the vocabulary itself), and text outside the vocabulary is spelled in bytes.

There are two ways to encode: `encode` recognises special tokens in the text and is for text that a template has made;
`encode_plain` does not, and is for text from users. U+2581, which sentencepiece uses for a space and would decode to
one, is spelled in bytes if the vocabulary has byte pieces, so that encoding and decoding keeps every text unchanged.
"""

import hashlib
import re
from collections.abc import Container, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from erniekit.data.chat.long_text import PIECE, encode_long
from erniekit.data.chat.tokenizer_files import (
    COPY,
    LONGEST,
    MARKUP,
    MAX_IDS,
    ROLES,
    Added,
    ChatTemplate,
    check_roles,
    declared_tokens,
    read_chat_template,
    read_optional,
    special_tokens,
)
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, DataError
from erniekit.utils.user_files import read_bytes, read_text

SPACE = "\u2581"  # the character by which sentencepiece represents a space
REPLACEMENT = "\ufffd"  # the character that replaces undecodable bytes
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# protobuf merges concatenated messages, so these bytes behind a sentencepiece model set
# normalizer_spec.add_dummy_prefix and .remove_extra_whitespaces to false
_KEEP_SPACES = b"\x1a\x04\x18\x00\x20\x00"
MAX_FILE_BYTES = 512 << 20  # the largest tokenizer.json or tokenizer.model


class _Engine(Protocol):
    added: list[Added]
    size: int  # every id is less than this

    def find(self, piece: str) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip: bool) -> str: ...

    def described(self) -> str | list[bytes]: ...


class _SentencePiece:
    """A tokenizer.model: sentencepiece splits ordinary text, after added tokens were separated, longest first, as in
    transformers.
    """

    def __init__(self, path: Path, declared: list[Added]):
        self._model, pieces = _read_sentencepiece(path)
        count = len(pieces)
        added = {item.id: item for item in declared}
        self._bytes: list[bytes] = []
        for i, piece in enumerate(pieces):
            if self._model.is_byte(i):
                self._bytes.append(_byte_of(piece, path))
                continue
            self._bytes.append(piece.replace(SPACE, " ").encode())
            if self._model.is_control(i) or self._model.is_unknown(i):
                added.setdefault(i, Added(piece, i, special=True))
            elif len(piece) > 1 and str(self._model.get_score(i)) == "0.0":
                # User-defined pieces have score 0. So does the first merge (-0.0), but separated like them it could not
                # be merged further.
                added.setdefault(i, Added(piece, i, special=bool(MARKUP.fullmatch(piece))))
        _check_same(declared, pieces, path)
        self.added = sorted(added.values(), key=lambda item: item.id)
        self.size = max([count, *(item.id + 1 for item in self.added)])
        self._bytes += [REPLACEMENT.encode()] * (self.size - count)
        for item in self.added:
            self._bytes[item.id] = item.text.encode()
        self._by_text = {item.text: item.id for item in self.added}
        self._special = {item.id for item in self.added if item.special}
        self._cut = _alternatives(self._by_text, path)

    def find(self, piece: str) -> int | None:
        if piece in self._by_text:
            return self._by_text[piece]
        i = self._model.piece_to_id(piece)
        return i if self._model.id_to_piece(i) == piece else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._cut.split(text)):
            if number % 2:
                ids.append(self._by_text[part])
            elif part:
                ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int], skip: bool) -> str:
        unknown = REPLACEMENT.encode()
        parts = (self._bytes[i] if 0 <= i < self.size else unknown for i in ids if not (skip and i in self._special))
        return b"".join(parts).decode(errors="replace")

    def described(self) -> list[bytes]:
        return self._bytes


class _Fast:
    """A tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, path: Path, declared: list[Added]):
        text = read_text(path, CheckpointError, MAX_FILE_BYTES)
        try:
            self._model = tokenizers.Tokenizer.from_str(text)
            self._model.encode("a b")
        except (KeyboardInterrupt, SystemExit):
            raise
        # the package raises plain Exception, and its panics only derive from BaseException
        except BaseException as error:
            raise CheckpointError(
                f"{path}: not a readable tokenizer.json ({error}). Copy it again from the model's source."
            ) from None
        self._model.no_truncation()
        self._model.no_padding()
        for item in declared:
            if self._model.token_to_id(item.text) is None:
                self._model.add_tokens([tokenizers.AddedToken(item.text, normalized=False, special=item.special)])
            if self._model.token_to_id(item.text) != item.id:
                raise CheckpointError(
                    f"{path}: token {item.text!r} has id {self._model.token_to_id(item.text)} here, but "
                    f"tokenizer_config.json gives it {item.id}. "
                    "The files belong to different tokenizers: copy all of them from one model."
                )
        self.added = [
            Added(token.content, i, token.special)
            for i, token in sorted(self._model.get_added_tokens_decoder().items())
        ]
        ids = list(self._model.get_vocab(with_added_tokens=True).values())
        if not ids:
            raise CheckpointError(f"{path}: the vocabulary is empty. Copy it again from the model's source.")
        if len(set(ids)) < len(ids):
            raise CheckpointError(f"{path}: two tokens have the same id. Copy it again from the model's source.")
        self.size = max(ids) + 1
        if self.size > MAX_IDS:
            raise CheckpointError(f"{path}: it has the id {self.size - 1}; ids are below {MAX_IDS}. Is the file whole?")

    def find(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip: bool) -> str:
        """Decode ids; unknown ids become REPLACEMENT, while `tokenizers` would leave them out."""
        text, run = "", []
        for i in ids:
            if i >= 0 and self._model.id_to_token(i) is not None:
                run.append(i)
                continue
            text += self._model.decode(run, skip_special_tokens=skip) + REPLACEMENT
            run = []
        return text + self._model.decode(run, skip_special_tokens=skip)

    def described(self) -> str:
        return self._model.to_str()


def _read_sentencepiece(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, list[str]]:
    """The sentencepiece model in a file, and its pieces."""
    data = read_bytes(path, CheckpointError, MAX_FILE_BYTES)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data + _KEEP_SPACES)
        vocabulary = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        model.encode("a b")  # a model without its mandatory pieces raises an error only here
    except (RuntimeError, ValueError, LookupError, TypeError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(
            f"{path}: not a readable sentencepiece model ({error}). Copy it again from the model's source."
        ) from None
    if not vocabulary:
        raise CheckpointError(f"{path}: the sentencepiece model is empty. Copy it again from the model's source.")
    return model, vocabulary


def _check_same(declared: list[Added], pieces: list[str], path: Path) -> None:
    """Raise CheckpointError if an added token has the id of another piece of the vocabulary."""
    for item in declared:
        if item.id < len(pieces) and pieces[item.id] != item.text:
            raise CheckpointError(
                f"{path}: id {item.id} is {pieces[item.id]!r} here, but tokenizer_config.json or added_tokens.json "
                f"says {item.text!r}. "
                "The files belong to different tokenizers: copy all of them from one model."
            )


def _byte_of(piece: str, path: Path) -> bytes:
    """The byte that a piece such as <0x0A> stands for."""
    if not re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        raise CheckpointError(f"{path}: the byte piece {piece!r} names no byte. Copy it again from the model's source.")
    return bytes([int(piece[1:-1], 16)])


def _space_bytes(engine: _Engine) -> list[int] | None:
    """The byte pieces that spell the visible space; None if the vocabulary has no byte pieces."""
    tokens = [engine.find(f"<0x{byte:02X}>") for byte in SPACE.encode()]
    return None if None in tokens else [i for i in tokens if i is not None]


class Tokenizer:
    """A tokenizer and the ids of its roles, made by load_tokenizer. A role that the vocabulary does not have is None;
    eos and pad always exist.
    """

    def __init__(self, directory: Path, engine: _Engine, settings: dict[str, Any], chat_template: ChatTemplate | None):
        self.directory = directory
        self.chat_template = chat_template
        self.files = [directory / name for name in FILES if (directory / name).is_file()]
        self.vocab_size = engine.size
        self._engine = engine
        roles = {role: self._role(role, settings) for role in ROLES}
        self.role_tokens = {role: engine.decode([i], skip=False) for role, i in roles.items() if i is not None}
        eos = roles["eos_token"]
        if eos is None:
            raise CheckpointError(
                f"{directory}: the tokenizer has no end token </s>. Name one as eos_token in tokenizer_config.json."
            )
        self.eos_id: int = eos
        self.unk_id, self.bos_id, self.mask_id = roles["unk_token"], roles["bos_token"], roles["mask_token"]
        self.cls_id, self.sep_id = roles["cls_token"], roles["sep_token"]
        self.pad_id: int = next(i for i in (roles["pad_token"], self.unk_id, eos) if i is not None)
        self.special_tokens = {
            item.text: item.id for item in engine.added if item.special or MARKUP.fullmatch(item.text)
        }
        self._special_start = _alternatives(self.special_tokens, directory, ahead=True)
        self._space_bytes = _space_bytes(engine)

    def _role(self, role: str, settings: dict[str, Any]) -> int | None:
        named = settings.get(role)
        text = named.get("content") if isinstance(named, dict) else named
        token_id = self._engine.find(text or ROLES[role])
        if text and token_id is None:
            raise CheckpointError(
                f"{self.directory}: tokenizer_config.json or special_tokens_map.json names {text!r} as {role}, "
                "but the vocabulary does not have it. "
                "Copy all tokenizer files from one model."
            )
        return token_id

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the tokenizer's files; tokenizers with equal ids have equal hashes."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens in it become one id each. Nothing is added at the beginning or end."""
        return self.encode_parts([text])

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text`, in which special tokens are encoded as ordinary characters, so that text from users cannot
        imitate the template's structure.
        """
        return self.encode_parts(self.split_special(text))

    def split_special(self, text: str, keep: Container[str] = ()) -> list[str]:
        """Splits `text` so that no part has a special token, except those in `keep`. The parts joined are `text`."""
        cuts = [match.start() + 1 for match in self._special_start.finditer(text) if match.group(1) not in keep]
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def encode_parts(self, parts: Iterable[str]) -> list[int]:
        """The concatenated ids of the parts; special tokens inside a part become one id each."""
        ids: list[int] = []
        try:
            for part in parts:
                if self._space_bytes is None or SPACE not in part:
                    ids += self._encode(part)
                    continue
                for number, text in enumerate(part.split(SPACE)):
                    ids += self._space_bytes if number else []
                    ids += self._encode(text)
        except (TypeError, RuntimeError, UnicodeEncodeError):
            raise DataError(
                f"text that is not valid Unicode (half of a surrogate pair?) near {part[:40]!a}: "
                "repair the file that it came from"
            ) from None
        return ids

    def _encode(self, text: str) -> list[int]:
        if len(text) <= PIECE:
            return self._engine.encode(text)
        return [i for piece in encode_long(self._engine.encode, text) for i in piece]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`. Bytes that are not UTF-8 and ids outside the vocabulary become U+FFFD."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens)

    def described(self) -> str | list[bytes]:
        """The whole tokenizer as the text of a tokenizer.json, or the bytes of each id."""
        return self._engine.described()

    def find_id(self, token: str) -> int | None:
        """Id of a piece of the vocabulary, given exactly; None if there is no such piece."""
        return self._engine.find(token)

    def token_id(self, token: str) -> int:
        """Id of a piece that must be there."""
        token_id = self.find_id(token)
        if token_id is None:
            raise CheckpointError(
                f"{self.directory}: the tokenizer has no token {token!r}. Use the tokenizer of the model that needs it."
            )
        return token_id


class StreamDecoder:
    """Decodes ids one after another. `push` returns the text that the id completes, which may be empty but never ends
    within a character; `flush` returns the rest.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # the last ids whose text was returned, as context, and the pending ones
        self._shown = 0  # the number of ids whose text was returned

    def push(self, token_id: int) -> str:
        self._ids.append(int(token_id))
        return self._take(final=False)

    def flush(self) -> str:
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        text = self._tokenizer.decode(self._ids, self._skip)
        if text.endswith(REPLACEMENT) and not final:
            return ""
        before = self._tokenizer.decode(self._ids[: self._shown], self._skip)
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a local model directory.

    It reads tokenizer.json, else tokenizer.model; the roles and added tokens of tokenizer_config.json,
    special_tokens_map.json and added_tokens.json; and the chat template (see read_chat_template). Raises
    CheckpointError for a missing, unreadable or contradictory file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory to load a tokenizer from. Check model_name_or_path.")
    config, older = (read_optional(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    for file in (older, config):
        check_roles(file)
    declared = declared_tokens(directory, config)
    engine: _Engine
    if (directory / "tokenizer.json").exists():
        engine = _Fast(directory / "tokenizer.json", declared)
    elif (directory / "tokenizer.model").exists():
        engine = _SentencePiece(directory / "tokenizer.model", declared)
    else:
        raise CheckpointError(
            f"{directory}: neither tokenizer.json nor tokenizer.model is here. "
            "Copy the tokenizer files from the model's source."
        )
    for file in (older, config):
        missing = sorted({text for text in special_tokens(file) if engine.find(text) is None})
        if missing:
            log.once(
                f"{file.where}: {len(missing)} of its special tokens are not in the vocabulary, and are split like "
                f"other text: {', '.join(missing[:5])}{', ...' if missing[5:] else ''}"
            )
    settings = {**older.values, **config.values}
    return Tokenizer(directory, engine, settings, read_chat_template(directory))


def check_fits(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Raise CheckpointError unless every id of the tokenizer has a row in a model of `vocab_size`; `where` names the
    model. A larger model (padded) is fine.
    """
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer in {tokenizer.directory} has ids up to {tokenizer.vocab_size - 1}, "
            f"but the model's vocab_size is {vocab_size}. Use the tokenizer that belongs to this model."
        )
    if tokenizer.vocab_size * 2 < vocab_size:
        log.warning(
            f"{where}: the model has {vocab_size} token ids and the tokenizer in {tokenizer.directory} uses "
            f"{tokenizer.vocab_size}; do they belong together?"
        )


def _alternatives(texts: Iterable[str], where: Path, ahead: bool = False) -> re.Pattern[str]:
    """A pattern whose group 1 matches the longest possible of `texts`. With `ahead` it is a lookahead, so that matches
    may overlap. The alternatives share their prefixes (a trie), since ERNIE has over a thousand of them.
    """
    root: dict[str, Any] = {}
    for text in filter(None, texts):
        if len(text) > LONGEST:
            raise CheckpointError(f"{where}: a token of {len(text):,} characters; at most {LONGEST}. {COPY}")
        node = root
        for character in text:
            node = node.setdefault(character, {})
        node[""] = None  # a text ends here

    def pattern(node: dict[str, Any]) -> str:
        branches = [re.escape(character) + pattern(child) for character, child in node.items() if character]
        return ("(?:" + "|".join(branches) + ")" + ("?" if "" in node else "")) if branches else ""

    choices = pattern(root) or "(?!)"
    return re.compile(f"(?=({choices}))" if ahead else f"({choices})")
