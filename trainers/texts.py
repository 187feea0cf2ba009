"""Plain texts to pre-train on, tokenised once in a stream and read back through a memory map: a corpus of any size trains in flat memory.

A `.jsonl` file holds one text a line, `{"text": "…"}`; any other file is one text. A folder stands for all its `.txt` and `.jsonl` files.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from storage import artifacts
from trainers import encoding
from trainers.data import Example
from trainers.spec import SpecRefusedError
from trainers.views import View

BLOCK = 2**16
"""Characters that are read and tokenised at once."""
VERSION = 2
"""Of how texts become tokens and which general ones are drawn: raised with every change, so that no run goes on by another rule."""
HELD_OUT_TOKENS = 100_000
"""So much of the beginning of general texts is never learned: forgetting is measured there."""
TOKENS, ENDS = "tokens.bin", "ends.bin"
TOKEN, PLACE = np.dtype("<u4"), np.dtype("<u8")
LINES = ".jsonl"
HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can write it, and no tokenizer takes it."""


class TokenFile(View[Example]):
    """The pieces of a corpus as examples in which every token but the first is graded; read from the disk when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.tokens, self.ends = (np.memmap(folder / name, kind, mode="r") for name, kind in ((TOKENS, TOKEN), (ENDS, PLACE)))
        super().__init__(self.read_piece, range(len(self.ends)))

    def read_piece(self, place: int) -> Example:
        """One piece."""
        piece = self.tokens[int(self.ends[place - 1]) if place else 0 : int(self.ends[place])].tolist()
        return Example(piece[:1], piece[1:])

    @property
    def held_out(self) -> View[Example]:
        """The first pieces, of `HELD_OUT_TOKENS` together, and at most half of all."""
        return self[: max(1, min(bisect.bisect_right(self.ends, HELD_OUT_TOKENS), len(self) // 2))]

    def count_tokens(self) -> int:
        """All tokens of the corpus."""
        return len(self.tokens)


class Mixture(View[Example]):
    """All of a corpus, and so many pieces of general text, drawn by the seed, that these come nearest to `share` of the tokens.

    What is held out of the general text is not drawn. Raises `SpecRefusedError` when nothing else is there.
    """

    def __init__(self, corpus: TokenFile, general: TokenFile, share: float, seed: int) -> None:
        self.corpus, self.general = corpus, general
        first = len(general.held_out)
        if share and first == len(general):
            raise SpecRefusedError(
                f"general_texts are one piece of {general.count_tokens()} tokens, on which forgetting is measured, so there is none to "
                "replay: give more of them, or set pretrain.general_share = 0"
            )
        order = first + torch.randperm(len(general) - first, generator=torch.Generator().manual_seed(seed)).numpy()
        lengths = np.diff(general.ends, prepend=np.zeros(1, PLACE))[order]
        totals = np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64)
        count = int(np.abs(totals - share / (1 - share) * corpus.count_tokens()).argmin())
        self.drawn, self.general_tokens = order[:count], int(totals[count])
        super().__init__(self.read_piece, range(len(corpus) + count))

    def read_piece(self, place: int) -> Example:
        """One piece: those of the corpus come first."""
        return self.corpus[place] if place < len(self.corpus) else self.general[int(self.drawn[place - len(self.corpus)])]

    @property
    def general_share(self) -> float:
        """The share of general text among all tokens."""
        return self.general_tokens / (self.general_tokens + self.corpus.count_tokens())


def find_files(path: Path) -> list[Path]:
    """The text files that a path stands for. Raises `SpecRefusedError` when there are none."""
    files = sorted(one for one in path.rglob("*") if one.suffix in {".txt", LINES} and one.is_file()) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise SpecRefusedError(f'texts {path}: there is no such file, and no folder with .txt or .jsonl files (lines of {{"text": "…"}})')
    return files


def digest_texts(path: Path) -> str:
    """The digest of all text files that a path stands for. They are read again only when one of them changed: a run asks several times."""
    return _digest_files(artifacts.take_fingerprint(find_files(path)))


@functools.lru_cache(maxsize=8)
def _digest_files(fingerprint: artifacts.Fingerprint) -> str:
    lines = [f"{file.name}\0{artifacts.digest_file(file)}" for file in (Path(name) for name, _, _ in fingerprint)]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_blocks(path: Path) -> Iterator[tuple[str, bool]]:
    """The texts in blocks of bounded size, each with whether its text ends with it."""
    for file in find_files(path):
        if file.suffix == LINES:
            for text in read_lines(file):
                yield from cut_blocks(text[start : start + BLOCK] for start in range(0, len(text), BLOCK))
        else:
            with open_text(file) as opened:
                yield from cut_blocks(iter(functools.partial(opened.read, BLOCK), ""))


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """The file, open to be read. Raises `SpecRefusedError` as soon as it turns out not to be UTF-8."""
    try:
        with path.open(encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise SpecRefusedError(f"{path} isn't UTF-8 text (byte {error.start} of a block): convert it, as with iconv") from error


def cut_blocks(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """One text, given in parts of `BLOCK` characters, in blocks that end at a line break or a space, wherever there is one."""
    rest = ""
    for part in parts:
        rest += part
        if len(part) < BLOCK:  # the last one
            break
        cut = max(rest.rfind("\n"), rest.rfind(" ")) + 1 or len(rest)
        # What follows the cut may be half a word, and the last block has to be known when it comes.
        yield rest[:cut], False
        rest = rest[cut:]
    yield rest, True


def read_lines(path: Path) -> Iterator[str]:
    """The texts of a JSON lines file. Raises `SpecRefusedError` with the line that is wrong."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise SpecRefusedError(f'{path}, line {number}: each line is {{"text": "…"}} ({type(error).__name__})') from error
            if not isinstance(text, str):
                raise SpecRefusedError(f"{path}, line {number}: text must be a string, not {type(text).__name__}")
            if HALF_CHARACTER.search(text):
                raise SpecRefusedError(
                    f"{path}, line {number}: text holds half a character, which is no UTF-8: correct it, or leave it out"
                )
            yield text


def cut_pieces(blocks: Iterable[tuple[str, bool]], tokenizer: Any, limit: int) -> Iterator[list[int]]:
    """The tokens of the texts, from each one's beginning to its end mark, in pieces of at most `limit`."""
    pending: list[int] = []
    is_new = True
    for some in batch(blocks):
        for (_, is_last), tokens in zip(some, encoding.encode_texts(tokenizer, [text for text, _ in some]), strict=True):
            start = encoding.start_of(tokenizer) if is_new and tokens[:1] != encoding.start_of(tokenizer) else []
            pending += [*start, *tokens, *([tokenizer.eos_token_id] if is_last else [])]
            is_new = is_last
            end = len(pending) if is_last else len(pending) - len(pending) % limit
            pieces = (pending[start : start + limit] for start in range(0, end, limit))
            yield from (piece for piece in pieces if len(piece) > 1)  # of a single token nothing can be learned
            del pending[:end]


def batch(blocks: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Blocks in groups of about `BLOCK` characters: a tokenizer works fastest on many at once."""
    group: list[tuple[str, bool]] = []
    for block in blocks:
        group.append(block)
        if sum(len(text) for text, _ in group) >= BLOCK or len(group) >= math.isqrt(BLOCK):
            yield group
            group = []
    if group:
        yield group


def tokenize(path: Path, tokenizer: Any, limit: int, cache: Path, key: str, beat: Callable[[], None] = lambda: None) -> TokenFile:
    """The pieces of the texts at `path`, from `cache` when an attempt made them under the same key by the same rule, whole or not at all.

    `beat` is called after each piece. Raises `SpecRefusedError` when the texts hold nothing.
    """
    place = cache / hashlib.sha256(f"{VERSION}\0{key}\0{digest_texts(path)}\0{limit}".encode()).hexdigest()[:16]
    if not place.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
        try:
            write_pieces(cut_pieces(read_blocks(path), tokenizer, limit), partial, beat)
            artifacts.move_into_place(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if not (place / ENDS).stat().st_size:
        raise SpecRefusedError(f"{path} holds no texts: there is nothing to learn from")
    return TokenFile(place)


def write_pieces(pieces: Iterable[Sequence[int]], folder: Path, beat: Callable[[], None]) -> None:
    """Write the pieces end to end, and where each of them ends."""
    end = 0
    with (folder / TOKENS).open("wb") as tokens, (folder / ENDS).open("wb") as ends:
        for piece in pieces:
            end += len(piece)
            tokens.write(np.asarray(piece, TOKEN).tobytes())
            ends.write(np.asarray([end], PLACE).tobytes())
            beat()
