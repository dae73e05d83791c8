"""Python source text as training data: the standard library, split by file, as byte-level BPE tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sysconfig
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
_SUFFIXES = (".py", ".rst", ".txt")
_EXCLUDED = ("site-packages", "dist-packages", "__pycache__", "encodings", "idlelib", "lib2to3")
_HELD_OUT_PERCENT = 4
_DISTINCTIVE_LINE = 30  # characters; shorter lines repeat everywhere in Python
_COPIED_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The texts of files, training and held-out."""

    train: list[str]
    held_out: list[str]


def read_corpus(sources: Sequence[str | pathlib.Path] = ()) -> Corpus:
    """Reads the sources and documentation of one or several standard libraries, split by file.

    A file is held out when the hash of its path inside its library says so; held-out text comes from the first
    library only. A training file of which a fifth of the distinctive lines also stand in the held-out text (a copy,
    moved or renamed in another version) is dropped.

    Args:
        sources: folders; default the standard library of the running Python.

    Returns:
        The distinct texts of both sides, in the order of their paths.

    Raises:
        ValueError: a folder without any such text, or too few files for a split.
    """
    roots = [pathlib.Path(source) for source in sources] or [pathlib.Path(sysconfig.get_path("stdlib"))]
    train: dict[str, None] = {}
    held_out: dict[str, None] = {}
    for number, root in enumerate(roots):
        texts = _read_folder(root)
        if not texts:
            raise ValueError(f"sources: {root} holds no {'/'.join(_SUFFIXES)} files")
        for path, text in texts.items():
            if not _is_held_out(path):
                train.setdefault(text)
            elif number == 0:
                held_out.setdefault(text)
    seen = {line for text in held_out for line in _distinctive(text)}
    kept = [text for text in train if not _copies(text, seen)]
    if not kept or not held_out:
        raise ValueError(f"sources: {roots} hold too few files to hold some out")
    return Corpus(kept, list(held_out))


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer of `vocab_size` tokens, of which `END_OF_TEXT` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Returns all texts as one uint16 array, `END_OF_TEXT` before each."""
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], np.uint16)
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return np.concatenate([part for one in encoded for part in (end, np.array(one.ids, np.uint16))])


def sample_windows(tokens: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """Returns uint16 [count, length]: windows of the tokens that do not overlap, drawn without replacement."""
    available = len(tokens) // length
    if available < count:
        raise ValueError(f"tokens: {len(tokens)} hold {available} windows of {length}, {count} asked for")
    chosen = np.random.default_rng(seed).choice(available, count, replace=False)
    return tokens[: available * length].reshape(available, length)[np.sort(chosen)]


def _read_folder(root: pathlib.Path) -> dict[str, str]:
    texts = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix not in _SUFFIXES or not path.is_file() or set(relative.parts) & set(_EXCLUDED):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a test file in an old encoding
        if text.strip():
            texts[relative.as_posix()] = text
    return texts


def _is_held_out(path: str) -> bool:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4]) % 100 < _HELD_OUT_PERCENT


def _distinctive(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= _DISTINCTIVE_LINE]


def _copies(text: str, seen: set[str]) -> bool:
    lines = _distinctive(text)
    return bool(lines) and sum(line in seen for line in lines) > _COPIED_SHARE * len(lines)
