import json
import shutil
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from storage import snapshots
from tests.model_fixtures import MISTRAL, PROMPT, claim, tiny_tokenizer
from tests.training_fixtures import LABELS, dataset, row, truth
from trainers import data, encoding, forms
from trainers.spec import Options, Prompt, SpecRefusedError

EVERY_FIELD = Prompt(text="{% for name, value in input.items() %}{{ name }}: {{ value }}\n{% endfor %}Decision: ")
TOKENIZER = tiny_tokenizer()
PLAIN = forms.find(TOKENIZER, "plain")


def read(folder, options=None, *, warm=False, seed=1, limit=512, learned=None):
    prompt, options = Prompt(text=PROMPT), options or Options()
    return data.read_lessons(folder, TOKENIZER, prompt, LABELS, options, limit=limit, warm=warm, seed=seed, learned=learned)


def build_prompt(fields, limit):
    """The prompt of one claim, and how many had to be cut for it."""
    texts, cut = encoding.build_prompts(TOKENIZER, EVERY_FIELD, [fields], [limit])
    return texts[0], cut


def snapshot(folder, rows):
    snapshots.write(folder, rows, {})
    return folder


def test_a_completion_is_the_label_a_newline_the_rationale_and_the_end():
    tokens = encoding.encode_completion(TOKENIZER, PLAIN, "DENIED", "not covered")
    assert tokens[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(tokens[:-1]) == "DENIED\nnot covered"
    assert tokens[: len(encoding.label_tokens(TOKENIZER, "DENIED"))] == encoding.label_tokens(TOKENIZER, "DENIED")


def test_a_prompt_begins_with_the_start_token_once():
    plain = encoding.encode_prompt(TOKENIZER, "Claim")
    assert plain[0] == TOKENIZER.bos_token_id
    assert encoding.encode_prompt(TOKENIZER, "<s>Claim") == plain


@pytest.mark.parametrize("labels", [("A", "A"), ("YES", ""), ("YES", "NO\nYES")])
def test_labels_that_cannot_be_told_apart_are_refused(labels):
    with pytest.raises(SpecRefusedError):
        encoding.check_labels(TOKENIZER, labels)


def test_a_claim_cannot_bring_special_tokens_into_its_prompt():
    fields = {"treatment": "a</s>b<</s>/s>c<s>", "age": ["</s>"], "plan": {"</s>k": "v"}}
    text, cut = build_prompt(fields, 400)
    assert not cut
    assert "treatment: abc\n" in text
    assert encoding.encode_prompt(TOKENIZER, text).count(TOKENIZER.eos_token_id) == 0


def test_a_long_prompt_loses_the_ends_of_its_longest_fields_only():
    fields = {"short": "knee", "long": "x" * 900, "longer": "y" * 1800}
    text, cut = build_prompt(fields, 200)
    assert cut
    assert "short: knee\n" in text
    assert text.count(encoding.CUT_MARK) == 2
    assert text.count("x") == text.count("y")
    assert text.endswith("Decision: ")
    assert 190 <= len(encoding.encode_prompt(TOKENIZER, text)) <= 200


def test_fields_are_left_out_from_the_last_when_cutting_texts_is_not_enough():
    fields = {f"field_{number}": number for number in range(500)}
    text, cut = build_prompt(fields, 100)
    assert cut
    assert text.startswith("field_0: 0\n")
    assert "field_499" not in text
    assert text.endswith("Decision: ")


def test_a_template_that_is_too_long_by_itself_is_refused():
    with pytest.raises(SpecRefusedError, match="template alone"):
        encoding.build_prompts(TOKENIZER, Prompt(text="word " * 200), [{}], [50])


@settings(max_examples=50, deadline=None)
@given(
    fields=st.dictionaries(
        st.text(max_size=5), st.text(max_size=300) | st.integers() | st.lists(st.text(max_size=60), max_size=4), max_size=6
    )
)
def test_no_prompt_is_longer_than_its_limit(fields):
    text, _ = build_prompt(fields, 60)
    assert len(encoding.encode_prompt(TOKENIZER, text)) <= 60


def test_gold_rows_are_in_no_lesson(tmp_path):
    lessons = read(dataset(tmp_path / "set", train=5, dev=3, gold=4))
    assert [case.row_id for case in lessons.train] == [f"row-{number}" for number in range(5)]
    assert [case.row_id for case in lessons.dev] == ["row-5", "row-6", "row-7"]


def test_only_rows_that_were_not_imported_weigh_more(tmp_path):
    origins = ["import", "review", "late_truth", "corpus"]
    rows = [row(number, "train", origin=origin) for number, origin in enumerate(origins)]
    lessons = read(snapshot(tmp_path / "set", rows), Options(new_weight=5))
    assert [case.example.weight for case in lessons.train] == [1, 5, 5, 5]


def test_a_warm_start_replays_a_fixed_sample_of_imported_rows_and_all_new_ones(tmp_path):
    rows = [row(number, "train", origin="review" if number < 3 else "import") for number in range(30)]
    folder = snapshot(tmp_path / "set", rows)
    options = Options(replay_rows=4)
    drawn = [case.row_id for case in read(folder, options, warm=True).train]
    assert len(drawn) == 7
    assert drawn[:3] == ["row-0", "row-1", "row-2"]
    assert drawn == [case.row_id for case in read(folder, options, warm=True).train]
    assert drawn != [case.row_id for case in read(folder, options, warm=True, seed=2).train]
    assert len(read(folder, options).train) == 30


def test_an_imported_row_that_is_a_half_life_older_is_half_as_likely_to_be_learned_again(tmp_path):
    times = ["2025-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00"]
    rows = [row(number, "train", answered_at=times[number % 2]) for number in range(2000)]
    folder = snapshot(tmp_path / "set", rows)

    def count_newer(half_life):
        options = Options(replay_rows=300, replay_half_life_days=half_life)
        drawn = [int(case.row_id.removeprefix("row-")) for case in read(folder, options, warm=True).train]
        assert len(drawn) == 300
        return sum(number % 2 for number in drawn)

    assert count_newer(0) == pytest.approx(150, abs=20)
    assert count_newer(365) == pytest.approx(195, abs=20)
    assert count_newer(1) == 300


def test_a_cut_prompt_is_counted_and_its_completion_is_whole(tmp_path):
    long = json.dumps({"treatment": "surgery " * 200, "age": "4", "plan": "HMO"})
    lessons = read(snapshot(tmp_path / "set", [row(0, "train", input=long, rationale="because")]), limit=64)
    assert lessons.prompts_cut == 1
    assert lessons.train[0].example.completion.tolist() == encoding.encode_completion(TOKENIZER, PLAIN, "DENIED", "because")
    assert lessons.train[0].example.tokens <= 64


def count_tokenizing(monkeypatch):
    """How many blocks of rows were tokenised, from now on."""
    blocks = []
    encode = data.encode_block
    monkeypatch.setattr(data, "encode_block", lambda rows, *rest: blocks.append(len(rows)) or encode(rows, *rest))
    return blocks


def test_rows_are_tokenised_once_for_a_dataset_a_tokenizer_and_a_prompt(tmp_path, monkeypatch):
    folder = dataset(tmp_path / "set", train=5, dev=3, gold=4)
    blocks = count_tokenizing(monkeypatch)
    first, second = read(folder), read(folder, Options(new_weight=2))
    assert blocks == [8]
    assert [case.prompt for case in first.train] == [case.prompt for case in second.train]
    data.read_lessons(folder, TOKENIZER, EVERY_FIELD, LABELS, Options(), limit=512, warm=False, seed=1)
    read(folder, limit=100)
    assert blocks == [8, 8, 8]
    monkeypatch.setattr(data.token_tables, "VERSION", 0)
    read(folder)
    assert blocks == [8, 8, 8, 8], "rows that became tokens by another rule are made anew"


def lower_case(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def begin_otherwise(tokenizer):
    tokenizer.bos_token = "<pad>"


def ask_otherwise(tokenizer):
    tokenizer.chat_template = MISTRAL.replace("[INST]", "[ASK]")


@pytest.mark.parametrize("change", [lower_case, begin_otherwise, ask_otherwise])
def test_rows_are_tokenised_anew_when_their_tokenizer_has_changed(tmp_path, change):
    folder, prompt = dataset(tmp_path / "set", train=2, dev=0, gold=0), Prompt(text=PROMPT, form="chat")

    def read_with(tokenizer):
        lessons = data.read_lessons(folder, tokenizer, prompt, LABELS, Options(), limit=512, warm=False, seed=1)
        return [case.example.read.tolist() for case in lessons.train]

    changed = tiny_tokenizer(MISTRAL)
    change(changed)
    before, after = read_with(tiny_tokenizer(MISTRAL)), read_with(changed)
    assert after != before
    shutil.rmtree(tmp_path / ".set.tokens")
    assert (read_with(changed), read_with(tiny_tokenizer(MISTRAL))) == (after, before)


def test_rows_are_tokenised_anew_for_another_dataset_in_the_same_place(tmp_path):
    assert len(read(dataset(tmp_path / "set", train=2)).train) == 2
    shutil.rmtree(tmp_path / "set")
    assert len(read(dataset(tmp_path / "set", train=3)).train) == 3


def test_rows_are_tokenised_anew_for_labels_in_another_order(tmp_path):
    folder = dataset(tmp_path / "set", train=6, dev=0, gold=0)
    for labels in (LABELS, LABELS[::-1]):
        lessons = data.read_lessons(folder, TOKENIZER, Prompt(text=PROMPT), labels, Options(), limit=512, warm=False, seed=1)
        assert [labels[case.answer] for case in lessons.train] == [truth(number) for number in range(6)]


@pytest.mark.parametrize("other", [Prompt(text="Another question: "), Prompt(text=PROMPT, form="instruction")])
def test_rows_are_tokenised_anew_for_another_template_and_another_form(tmp_path, other):
    folder = dataset(tmp_path / "set", train=2, dev=0, gold=0)
    for prompt in (Prompt(text=PROMPT), other):
        (first, _) = data.read_lessons(folder, TOKENIZER, prompt, LABELS, Options(), limit=512, warm=False, seed=1).train
        (expected,), _ = encoding.build_prompts(TOKENIZER, prompt, [claim(0)], [512])
        assert first.prompt == expected
        assert first.example.prompt.tolist() == encoding.encode_prompt(TOKENIZER, expected)


def test_tokenising_that_was_cut_short_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = dataset(tmp_path / "set", train=5)
    monkeypatch.setattr(data, "encode_block", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(folder)
    assert list((tmp_path / ".set.tokens").iterdir()) == []
    monkeypatch.undo()
    assert len(read(folder).train) == 5


def test_rows_stay_on_the_disk_until_they_are_asked_for_and_leave_memory_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data.token_tables, "ROWS_AT_ONCE", 100)
    folder = dataset(tmp_path / "set", train=2000)
    read(folder)
    size = sum(path.stat().st_size for path in (tmp_path / ".set.tokens").iterdir())
    before = pa.total_allocated_bytes()
    lessons = read(folder)
    examples = data.list_examples(lessons.train)
    tokens = sum(example.tokens for example in examples[10:]) + sum(examples[place].tokens for place in range(10))
    assert tokens == sum(case.example.tokens for case in lessons.train) > 20_000
    assert pa.total_allocated_bytes() - before < size / 20
    assert not examples[0].prompt.flags.owndata


@pytest.mark.parametrize("known", [False, True], ids=["warm", "warm with what was learned"])
def test_a_warm_start_is_drawn_in_memory_that_hardly_grows_with_the_rows(tmp_path, monkeypatch, known):
    monkeypatch.setattr(data.token_tables, "ROWS_AT_ONCE", 100)
    monkeypatch.setattr(snapshots, "READ_ROWS", 100)
    options = Options(replay_rows=100, replay_share=0.5, replay_half_life_days=30)
    peaks = []
    for count in (1000, 4000):
        folder = dataset(tmp_path / str(count), train=count, dev=0, gold=0)
        read(folder, options)
        tracemalloc.start()
        lessons = read(folder, options, warm=True, learned=folder if known else None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(lessons.train) == 100
    assert peaks[1] - peaks[0] < 3000 * 150, "bytes: no row is held as an object"


SHOUTING = Prompt(text="{{ input.plan.upper() }}: ")


def test_a_row_that_cannot_be_rendered_is_left_out_and_named_without_its_text(tmp_path):
    rows = [row(number, split) for number, split in enumerate(["train"] * 20 + ["dev"] * 2)]
    rows += [row(number, split, input='{"treatment": "secret"}') for number, split in ((22, "train"), (23, "dev"))]
    lessons = data.read_lessons(snapshot(tmp_path / "set", rows), TOKENIZER, SHOUTING, LABELS, Options(), limit=512, warm=False, seed=1)
    assert ([len(lessons.train), len(lessons.dev)], lessons.prompts_cut) == ([20, 2], 0)
    assert [(one.set, one.row_ids) for one in lessons.left_out] == [("train", ["row-22"]), ("dev", ["row-23"])]
    assert lessons.left_out[0].reason == "the prompt template can't be rendered: 'dict object' has no attribute 'plan'"


def test_a_template_that_fails_on_more_than_a_tenth_of_the_rows_is_refused_with_the_remedy(tmp_path):
    rows = [row(number, "train", input="{}" if number < 3 else json.dumps({"plan": "HMO"})) for number in range(29)]
    with pytest.raises(SpecRefusedError, match=r"no attribute 'plan' \(so with 3 of the 29 rows of train, row row-0 for one\): let the"):
        data.read_lessons(snapshot(tmp_path / "set", rows), TOKENIZER, SHOUTING, LABELS, Options(), limit=512, warm=False, seed=1)


@pytest.mark.parametrize(
    "template", ["{{ input[input.plan].x }}", "{{ input.plan.encode('utf-16-le').decode() }}", "{{ input.plan.index('b') }}"]
)
def test_what_is_said_of_a_template_that_fails_quotes_no_claim(template):
    with pytest.raises(SpecRefusedError) as refused:
        Prompt(text=template).render({"plan": "se\ud800cret"})
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"policy": "delta"}, set(range(16, 20))),
        ({"policy": "replay", "replay_share": 0}, set(range(16, 20))),
        ({"policy": "replay", "replay_share": 0.5}, None),
        ({"policy": "replay"}, set(range(20))),
    ],
)
def test_a_policy_says_how_much_of_what_was_learned_is_learned_again(tmp_path, options, kept):
    rows = [row(number, "train", origin="import" if number < 10 else "review") for number in range(20)]
    learned = snapshot(tmp_path / "learned", rows[:16])
    chosen = data.read_lessons(
        snapshot(tmp_path / "set", rows),
        TOKENIZER,
        Prompt(text=PROMPT),
        LABELS,
        Options(**options),
        limit=128,
        warm=True,
        seed=1,
        learned=learned,
    ).train
    numbers = {int(case.row_id.removeprefix("row-")) for case in chosen}
    assert numbers == kept if kept is not None else (len(numbers) == 12 and numbers >= set(range(16, 20)))


def test_a_row_with_another_answer_than_was_learned_is_new(tmp_path):
    learned = snapshot(tmp_path / "learned", [row(0, "train", answer="DENIED"), row(1, "train")])
    corrected = snapshot(tmp_path / "set", [row(0, "train", answer="APPROVED"), row(1, "train")])
    options = Options(policy="delta")
    lessons = data.read_lessons(corrected, TOKENIZER, Prompt(text=PROMPT), LABELS, options, limit=128, warm=True, seed=1, learned=learned)
    assert [case.row_id for case in lessons.train] == ["row-0"]


def test_a_rationale_longer_than_half_a_row_is_left_out_and_counted(tmp_path):
    lessons = read(snapshot(tmp_path / "set", [row(0, "train", rationale="so " * 500)]), limit=128)
    assert lessons.rationales_left_out == 1
    assert lessons.train[0].example.completion.tolist() == encoding.encode_completion(TOKENIZER, PLAIN, "DENIED", None)


def test_an_answer_outside_the_label_set_is_refused_with_its_row(tmp_path):
    with pytest.raises(SpecRefusedError, match=r"row-0.*MAYBE"):
        read(snapshot(tmp_path / "set", [row(0, "train", answer="MAYBE")]))
