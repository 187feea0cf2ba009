import json
import tracemalloc

import pytest
import torch

from storage import artifacts
from tests.model_fixtures import tiny_tokenizer
from trainers import encoding, texts
from trainers.spec import SpecRefusedError

TOKENIZER = tiny_tokenizer()


def tokenize(path, limit=32):
    return texts.tokenize(path, TOKENIZER, limit, path.parent / "cache", "base")


def write_lines(path, some):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    return path


def read_back(examples):
    return TOKENIZER.decode([token for example in examples for token in example.prompt + example.completion])


def read_one(example):
    return read_back([example])


def test_a_long_text_is_learned_in_pieces(tmp_path):
    examples = tokenize(write_lines(tmp_path / "texts.jsonl", ["knee " * 100]))
    assert all(example.tokens < 32 for example in examples)
    assert read_back(examples) == "<s>" + "knee " * 100 + "</s>"


def test_a_file_that_is_no_jsonl_is_one_text_however_many_blocks_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK", 64)
    path = tmp_path / "notes.txt"
    path.write_text("The knee\nhurts since Monday.\n" * 40 + "x" * 200)
    assert read_back(tokenize(path)) == "<s>" + path.read_text() + "</s>"


def test_a_long_line_is_tokenised_in_blocks_as_a_file_of_its_own_would_be(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK", 64)
    text = "The knee hurts since Monday. " * 300 + "x" * 200
    (tmp_path / "text.txt").write_text(text)
    handed, encode = [], encoding.encode_texts
    monkeypatch.setattr(encoding, "encode_texts", lambda tokenizer, some: handed.extend(map(len, some)) or encode(tokenizer, some))
    line = tokenize(write_lines(tmp_path / "text.jsonl", [text]))
    assert sum(handed) == len(text)
    assert max(handed) <= 2 * 64, "so no list ever holds all its tokens"
    file = tokenize(tmp_path / "text.txt")
    assert [(one.prompt, one.completion) for one in line] == [(one.prompt, one.completion) for one in file]
    assert {1 + len(one.completion) for one in line[:-1]} == {32}


def test_a_line_that_is_no_longer_than_a_block_is_tokenised_whole(tmp_path):
    (piece,) = tokenize(write_lines(tmp_path / "texts.jsonl", ["two words"]))
    assert piece.prompt + piece.completion == [TOKENIZER.bos_token_id, *TOKENIZER("two words")["input_ids"], TOKENIZER.eos_token_id]


def test_a_folder_stands_for_its_text_files_in_their_order(tmp_path):
    (tmp_path / "notes" / "more").mkdir(parents=True)
    (tmp_path / "notes" / "b.txt").write_text("second")
    (tmp_path / "notes" / "readme.pdf").write_text("never")
    write_lines(tmp_path / "notes" / "a.jsonl", ["first"])
    (tmp_path / "notes" / "more" / "c.txt").write_text("third")
    assert read_back(tokenize(tmp_path / "notes")) == "<s>first</s><s>second</s><s>third</s>"


@pytest.mark.parametrize("line", ["no json", '"text"', '{"txt": 1}', '{"text": 1}'])
def test_a_bad_line_of_texts_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(SpecRefusedError, match="line 2"):
        tokenize(path)
    assert not list((tmp_path / "cache").iterdir()), "nothing half-written is left"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none", None, "no such file"),
        ("a.txt", b"\xff", "a.txt isn't UTF-8 text"),
        ("b.jsonl", b"", "no texts"),
        ("c.jsonl", '{"text": "Größe"}'.encode("latin-1"), "c.jsonl isn't UTF-8 text.*convert it, as with iconv"),
        ("d.jsonl", b'{"text": "a \\ud83d b"}', "line 1: text holds half a character"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecRefusedError, match=says):
        tokenize(tmp_path / name)


def test_a_corpus_is_tokenised_once(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "texts.jsonl", ["a text"])
    first = read_back(tokenize(path))
    monkeypatch.setattr(texts, "cut_pieces", None)
    assert read_back(tokenize(path)) == first


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for thousand_lines in (8, 32):
        path = tmp_path / f"{thousand_lines}.txt"
        path.write_text("speech therapy for a child, denied as not medically necessary\n" * (1000 * thousand_lines))
        tracemalloc.start()
        corpus = tokenize(path, 512)
        for index in torch.randperm(len(corpus))[:50].tolist():
            assert len(corpus[index].completion) < 512
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_general_text_has_its_share_of_the_tokens_and_the_seed_draws_it(tmp_path):
    corpus = tokenize(write_lines(tmp_path / "corpus.jsonl", [f"claim {number}" for number in range(300)]))
    general = tokenize(write_lines(tmp_path / "general.jsonl", [f"story {number}" for number in range(300)]))
    mixture = texts.Mixture(corpus, general, 0.25, seed=1)
    told = [TOKENIZER.decode(example.completion) for example in mixture]
    tokens = [1 + len(example.completion) for example in mixture]
    share = sum(count for text, count in zip(told, tokens, strict=True) if "story" in text) / sum(tokens)
    assert share == pytest.approx(0.25, abs=0.01) == mixture.general_share
    assert told[:300] == [TOKENIZER.decode(example.completion) for example in corpus]
    assert told[300:] != [TOKENIZER.decode(example.completion) for example in texts.Mixture(corpus, general, 0.25, seed=2)][300:]
    assert len(texts.Mixture(corpus, general, 0, seed=1)) == 300
    assert len(texts.Mixture(corpus, general, 0.9, seed=1)) == 450, "there is no more than the half that is not held out"


@pytest.mark.parametrize(("share", "drawn"), [(0.05, 0), (0.2, 0), (0.25, 1), (0.45, 1), (0.5, 2)])
def test_a_piece_that_would_overshoot_the_share_by_more_than_it_helps_is_not_drawn(tmp_path, share, drawn):
    corpus = tokenize(write_lines(tmp_path / "corpus.jsonl", ["knee " * 20]), limit=200)
    general = tokenize(write_lines(tmp_path / "general.jsonl", ["hand " * 14] * 10), limit=200)
    mixture = texts.Mixture(corpus, general, share, seed=1)
    assert len(mixture) == 1 + drawn
    piece = general.count_tokens() / 10 / corpus.count_tokens()
    assert piece == pytest.approx(0.57, abs=0.01)
    assert mixture.general_share == pytest.approx(drawn * piece / (1 + drawn * piece))


@pytest.mark.parametrize(("lines", "held_out"), [(1, 1), (2, 1), (9, 4), (40, 5)])
def test_what_forgetting_is_measured_on_is_never_drawn(tmp_path, monkeypatch, lines, held_out):
    general = tokenize(write_lines(tmp_path / "general.jsonl", [f"story {number:02}" for number in range(lines)]))
    monkeypatch.setattr(texts, "HELD_OUT_TOKENS", 5 * (general.count_tokens() // lines))
    assert read_back(general.held_out) == "".join(f"<s>story {number:02}</s>" for number in range(held_out))
    if lines == held_out:
        with pytest.raises(SpecRefusedError, match=r"are one piece of \d+ tokens, on which forgetting is measured.*general_share = 0"):
            texts.Mixture(general, general, 0.9, seed=1)
        return
    drawn = list(texts.Mixture(general, general, 0.9, seed=1))[lines:]
    assert sorted(map(read_one, drawn)) == [f"<s>story {number:02}</s>" for number in range(held_out, lines)]


def test_the_digest_of_texts_is_known_without_reading_them_again_until_one_changes(tmp_path, monkeypatch):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("one")
    second.write_text("two")
    before = texts.digest_texts(tmp_path)
    with monkeypatch.context() as patched:
        patched.delattr(artifacts, "digest_file")
        assert texts.digest_texts(tmp_path) == before
    second.write_text("three")
    assert texts.digest_texts(tmp_path) != before
