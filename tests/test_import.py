"""`ratchet import` and daemon.history: decided cases become events, each one once, and every refused row is named."""

import csv
import gzip
import hashlib
import json
import re
import tracemalloc

import pytest

from consumers import handlers
from daemon import history, policies, rowfiles
from daemon.cli import context
from storage import events, labels, ledger, tokens

pytest_plugins = ["tests.cli_fixtures"]


def make_case(number, **changes):
    """One line of a history file."""
    case = {
        "claim_id": f"h{number}",
        "group": f"member-{number % 7}",
        "occurred_at": f"2020-01-{number % 28 + 1:02d}T09:00:00+00:00",
        "input": {"diagnosis": "I10", "treatment": f"treatment {number}"},
        "attributes": {"plan": "HMO"},
        "answer": "APPROVED" if number % 2 else "DENIED",
    }
    return {**case, **changes}


def write_jsonl(path, cases):
    path.write_text("".join(json.dumps(case) + "\n" for case in cases))
    return path


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def configure(home, text):
    """Put lines into the agent's `columns` table."""
    place = home / "ratchet.toml"
    place.write_text(place.read_text().replace("[agents.adjudication.columns]", f"[agents.adjudication.columns]\n{text}"))


def read_cases(opened):
    with opened.reading() as connection:
        settled = labels.read_settled(connection, "adjudication")
        cases = labels.read_cases(connection, settled)
        return {case["claim_id"]: (one.truth.answer, {**case, "answered_at": one.answered_at}) for one, case in cases}


def test_every_case_becomes_a_settled_label_of_origin_import(home, ask, opened):
    file = write_jsonl(home / "old.jsonl", [make_case(number, rationale="as the guideline says") for number in range(1203)])
    summary = ask("import", file, "--agent", "adjudication")
    assert (summary["rows"], summary["imported"], summary["known"], summary["refused"]) == (1203, 1203, 0, 0)
    cases = read_cases(opened)
    assert len(cases) == 1203
    answer, case = cases["h8"]
    assert answer == "DENIED"
    assert case["group_key"] == "member-1"
    assert case["input"] == {"diagnosis": "I10", "treatment": "treatment 8"}
    assert case["attributes"] == {"plan": "HMO"}
    assert case["rationale"] == "as the guideline says"
    with opened.reading() as connection:
        assert events.count_by_state(connection) == {"received": 0, "waiting": 0, "unsent": 0}


def test_importing_again_adds_nothing(home, ask, opened):
    cases = [make_case(number) for number in range(20)]
    ask("import", write_jsonl(home / "old.jsonl", [*cases, cases[3]]))
    again = ask("import", write_jsonl(home / "more.jsonl", [*reversed(cases), make_case(99)]))
    assert (again["rows"], again["imported"], again["known"]) == (21, 1, 20)
    assert len(read_cases(opened)) == 21


def test_an_import_that_was_killed_goes_on_where_it_was(home, ask, opened, monkeypatch):
    file = write_jsonl(home / "old.jsonl", [make_case(number) for number in range(1100)])
    handle, batches = handlers.handle_batch, []

    def die_in_the_second(*arguments):
        batches.append(1)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return handle(*arguments)

    monkeypatch.setattr(handlers, "handle_batch", die_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        history.Importer(opened.engine, opened.pick_agent(None), *_parts(opened)).import_file(file)
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert len(read_cases(opened)) == 500
    summary = ask("import", file)
    assert (summary["imported"], summary["known"]) == (600, 500)


def _parts(opened):
    with opened.writing() as connection:
        handler = policies.record(connection, opened.settings.agents, context.read_clock())["adjudication"]
    return handler, tokens.Principal("me", "operator"), context.read_clock, lambda _: None, lambda _: None


def test_every_refused_row_is_named_with_its_line_and_the_others_are_imported(home, run, opened):
    lines = [
        json.dumps(make_case(1)),
        "{not json",
        "",
        "[1]",
        json.dumps(make_case(2, answer="MAYBE")),
        json.dumps(make_case(3, occurred_at="2020-01-01T09:00:00")),
        json.dumps(make_case(4, occurred_at="yesterday")),
        json.dumps(make_case(5, input={})),
        json.dumps(make_case(6, claim_id=True)),
        json.dumps(make_case(7))[:-1] + ', "x": NaN}',
        json.dumps({key: value for key, value in make_case(8).items() if key != "answer"}),
        json.dumps(make_case(9, rationale="x\0y")),
        json.dumps(make_case(10, input={"text": "x" * 300_000})),
        json.dumps(make_case(11, claim_id=11, extra="ignored")),
    ]
    (home / "old.jsonl").write_text("\n".join(lines))
    status, out, err = run("import", home / "old.jsonl")
    assert status == 1
    refused = {int(line.split(":")[0].removeprefix("line ")): line for line in err.splitlines()}
    assert list(refused) == [2, 4, 5, 6, 7, 8, 9, 10, 11, 12], "in the order of the file, whoever refused them"
    assert "use one of APPROVED, DENIED, PENDING" in refused[5]
    assert "write 2020-01-01T09:00:00Z" in refused[6]
    assert "columns.zone" in refused[6]
    assert "isn't ISO 8601" in refused[7]
    assert "column 'answer' is missing" in refused[11]
    assert out.startswith("13 rows: 3 imported, 0 known before, 10 refused")
    assert set(read_cases(opened)) == {"h1", "h10", "11"}


def test_a_row_that_its_handler_can_t_take_is_a_dead_letter_and_refused(home, run, ask, monkeypatch):
    insert = labels.insert_imported

    def fail(connection, rows):
        if any(row["claim_id"] == "h3" for row in rows):
            raise ValueError("no such thing")
        insert(connection, rows)

    monkeypatch.setattr(labels, "insert_imported", fail)
    file = write_jsonl(home / "old.jsonl", [make_case(number) for number in range(6)])
    status, out, err = run("import", file)
    assert (status, err) == (1, "line 4: parked as a dead letter: ValueError in the handler (test_import.py:145)\n")
    assert "6 rows: 5 imported, 0 known before, 1 refused" in out
    assert len(ask("dead-letters", "list")) == 1


def test_a_csv_with_its_own_columns_answers_and_zone_is_imported(home, ask, opened):
    configure(
        home,
        'claim_id = "Case"\ngroup = "Member"\noccurred_at = "Decided"\nanswer = "Outcome"\ninput = ["Age", "Treatment"]\n'
        'attributes = ["Plan"]\nanswers = { Upheld = "DENIED", Overturned = "APPROVED" }\nzone = "America/Los_Angeles"\n',
    )
    rows = [
        {"Case": "7", "Member": "", "Decided": "2012-07-01", "Outcome": "Upheld", "Age": "41", "Treatment": "dialysis, twice", "Plan": ""},
        {
            "Case": "8",
            "Member": "m",
            "Decided": "2012-01-01T10:00",
            "Outcome": "Overturned",
            "Age": "",
            "Treatment": 'a "b"',
            "Plan": "PPO",
        },
    ]
    assert ask("import", write_csv(home / "old.csv", rows))["imported"] == 2
    cases = read_cases(opened)
    assert cases["7"][0] == "DENIED"
    assert cases["7"][1]["input"] == {"Age": "41", "Treatment": "dialysis, twice"}
    assert cases["7"][1]["group_key"] == "7"
    assert cases["7"][1]["attributes"] == {}
    assert cases["7"][1]["answered_at"].isoformat() == "2012-07-01T07:00:00+00:00"
    assert cases["8"][1]["answered_at"].isoformat() == "2012-01-01T18:00:00+00:00"
    assert cases["8"][1]["attributes"] == {"Plan": "PPO"}


def test_bad_csv_rows_are_refused_by_line_and_the_rest_is_imported(home, run):
    header = "claim_id,group,occurred_at,answer,input\n"
    good = '{},m,2020-01-01T00:00:00Z,DENIED,"{{""a"": 1}}"\n'
    content = (header + good.format("a") + "b,m\n" + good.format("c") + 'd,m,2020-01-01T00:00:00Z,DENIED,"x" y\n').encode()
    content += b"e,m,2020-01-01T00:00:00Z,DENIED,\xff\n" + good.format("\xe9").encode("latin-1") + good.format("f").encode()
    (home / "old.csv").write_bytes(content)
    status, out, err = run("import", home / "old.csv")
    assert status == 1
    assert [line.split(":")[0] for line in err.splitlines()] == ["line 3", "line 5", "line 6", "line 7"]
    assert "2 cells, the header 5" in err
    assert "7 rows: 3 imported" in out


@pytest.mark.parametrize("name", ["old.jsonl.gz", "old.csv.gz"])
def test_a_compressed_file_is_read_as_it_is(home, ask, name):
    cases = [make_case(number) for number in range(3)]
    plain = home / name.removesuffix(".gz")
    if ".csv" in name:
        write_csv(plain, [{**case, "input": json.dumps(case["input"]), "attributes": ""} for case in cases])
    else:
        write_jsonl(plain, cases)
    (home / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert ask("import", home / name)["imported"] == 3
    assert ask("import", plain)["known"] == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("old.xlsx", b"", "isn't .csv, .jsonl, .ndjson"),
        ("old.csv", b"claim_id,answer\n", "the file has no column input, occurred_at"),
        ("old.csv", b"claim_id,occurred_at,answer,input,input\n", "more than one column input"),
        ("old.jsonl.gz", b"no gzip", "isn't a whole gzip file from here on (Not a gzipped file"),
        ("old.csv.gz", b"no gzip", "import a whole copy"),
    ],
)
def test_a_file_that_can_t_be_imported_is_refused_as_a_whole(home, run, name, content, message):
    (home / name).write_bytes(content)
    status, _, err = run("import", home / name)
    assert status == 1
    assert message in err


def test_the_last_suffix_before_gz_says_what_a_file_is(home, ask):
    write_jsonl(home / "old.csv.jsonl", [make_case(1)])
    assert ask("import", home / "old.csv.jsonl")["imported"] == 1


def spoil_the_end(packed):
    return packed[:-8] + b"12345678"


def append_nonsense(packed):
    return packed + packed[:10] + b"\xff" * 100


def cut_in_the_middle(packed):
    return packed[: len(packed) // 2]


@pytest.mark.parametrize("name", ["old.jsonl.gz", "old.csv.gz"])
@pytest.mark.parametrize(("damage", "least"), [(cut_in_the_middle, 200), (append_nonsense, 1300), (spoil_the_end, 1300)])
def test_all_rows_before_a_damage_are_imported_and_the_damage_is_told(home, run, opened, name, damage, least):
    cases = [make_case(number, rationale=hashlib.sha256(str(number).encode()).hexdigest()) for number in range(1300)]
    if ".csv" in name:
        rows = [{**case, "input": json.dumps(case["input"]), "attributes": ""} for case in cases]
        plain = write_csv(home / "plain", rows).read_bytes()
    else:
        plain = write_jsonl(home / "plain", cases).read_bytes()
    (home / name).write_bytes(damage(gzip.compress(plain)))
    status, out, err = run("import", home / name)
    imported = len(read_cases(opened))
    assert status == 1
    assert imported >= least
    assert f"{imported + 1} rows: {imported} imported, 0 known before, 1 refused" in out
    assert f"line {imported + 1 + ('.csv' in name)}: " in err
    assert "isn't a whole gzip file from here on" in err


JSON_VALUES = [None, True, 0, 5, 1.5, "", "text", "5", "[1]", [], [1, 2], {}, {"a": 1}, {"a": {"b": [None]}}]


@pytest.mark.parametrize("column", ["claim_id", "group", "occurred_at", "answer", "rationale", "input", "attributes"])
def test_no_value_of_a_column_ends_the_import(home, run, opened, column):
    """Every JSON type in every column: its row is taken or refused, and those around it are imported."""
    cases = [make_case(number, **{column: value}) for number, value in enumerate(JSON_VALUES)]
    status, out, err = run("import", write_jsonl(home / "old.jsonl", [make_case(100), *cases, make_case(101)]))
    refused = err.splitlines()
    assert status == int(bool(refused))
    assert all(re.match(r"line \d+: .*", line) for line in refused)
    assert f"{len(cases) + 2} rows: {len(cases) + 2 - len(refused)} imported" in out
    assert {"h100", "h101"} <= set(read_cases(opened))


@pytest.mark.parametrize("value", [0, False, 5, "5", "text", [], [1, 2]])
@pytest.mark.parametrize("column", ["input", "attributes"])
def test_fields_that_are_no_object_are_refused_by_value(home, run, column, value):
    status, _, err = run("import", write_jsonl(home / "old.jsonl", [make_case(1, **{column: value})]))
    assert status == 1
    assert err == f"line 1: {column}: {json.dumps(value)} isn't a JSON object: list the columns that are the fields\n"


@pytest.mark.parametrize(
    ("columns", "row", "named"),
    [
        ("", {"input": {}}, "input"),
        ("", {"input": None}, "input"),
        ('input = ["Age", "Treatment"]\n', {}, "Age, Treatment"),
    ],
)
def test_a_row_without_input_is_refused_with_the_column_and_its_setting(home, run, columns, row, named):
    configure(home, columns)
    status, _, err = run("import", write_jsonl(home / "old.jsonl", [make_case(1, **row)]))
    remedy = "put an object there, or name the right columns in `columns.input`"
    assert (status, err) == (1, f"line 1: no input in column {named}: {remedy}\n")


def test_which_agent_is_meant_must_be_clear(home, run):
    file = write_jsonl(home / "old.jsonl", [make_case(1)])
    status, _, err = run("import", file, "--agent", "scribe")
    assert (status, "there is no agent 'scribe'" in err) == (1, True)
    place = home / "ratchet.toml"
    place.write_text(place.read_text() + '\n[agents.second]\nlabels = ["A", "B"]\nprompt = "prompts/adjudication.j2"\n')
    status, _, err = run("import", file)
    assert (status, "say which agent with --agent: the configuration has adjudication, second" in err) == (1, True)


def test_the_ledger_names_the_file_by_digest_and_no_claim(home, ask, opened):
    ask("import", write_jsonl(home / "old.jsonl", [make_case(1)]))
    with opened.reading() as connection:
        entry = next(row for row in ledger.show(connection) if row["kind"] == "import")
        assert not ledger.verify(connection)
    body = json.loads(entry["body"])
    assert (body["file"], body["imported"], len(body["sha256"])) == ("old.jsonl", 1, 64)
    assert "h1" not in entry["body"]


def test_memory_stays_flat_however_long_the_file_is(home, opened, monkeypatch):
    monkeypatch.setattr(history, "BATCH", 10)
    cases = (make_case(number, input={"note": f"{number} " * 5000}) for number in range(500))
    file = write_jsonl(home / "long.jsonl", cases)
    importer = history.Importer(opened.engine, opened.pick_agent(None), *_parts(opened))
    tracemalloc.start()
    importer.import_file(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < file.stat().st_size * 0.6


def test_a_line_without_an_end_is_refused_and_not_kept(home, run, monkeypatch):
    monkeypatch.setattr(rowfiles, "MAX_LINE", 1000)
    (home / "old.jsonl").write_text("x" * 5000 + "\n" + json.dumps(make_case(1)) + "\n")
    status, out, err = run("import", home / "old.jsonl")
    assert (status, err) == (1, "line 1: the line is longer than 1000 bytes\n")
    assert "1 imported" in out
