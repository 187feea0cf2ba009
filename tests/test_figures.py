"""benchmarks.figures and the page made of them: a goal is judged by the ratio where there is a baseline, else by the value."""

import json
import re
import runpy
from pathlib import Path

import pytest

from benchmarks.figures import Figure, finish

ROOT = Path(__file__).parents[1]
WRITE_PAGE = runpy.run_path(str(ROOT / "scripts" / "write_benchmarks.py"))["write_page"]


@pytest.mark.parametrize(
    ("figure", "holds"),
    [
        (Figure("rate", 80, 100, at_least=0.7), True),
        (Figure("rate", 60, 100, at_least=0.7), False),
        (Figure("seconds", 0.4, at_most=1), True),
        (Figure("seconds", 1.4, at_most=1), False),
        (Figure("between", 5, at_least=1, at_most=4), False),
        (Figure("rate", 60, 100), None),
    ],
)
def test_a_goal_holds_by_the_ratio_or_else_by_the_value(figure, holds):
    assert figure.holds is holds
    assert figure.to_json()["holds"] is holds


def test_a_goal_is_written_with_its_unit():
    assert Figure("rate", 60, 100, at_least=0.7).to_json()["goal"] == "≥ 0.7 ×"  # noqa: RUF001
    assert Figure("seconds", 0.4, at_most=1).to_json()["goal"] == "≤ 1"
    assert Figure("between", 5, at_least=1, at_most=4).to_json()["goal"] == "≥ 1 and ≤ 4"


def test_the_closing_line_is_one_line_of_json(capsys):
    finish("ingest", [Figure("rate", 123.456789, 100, at_least=1)])
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told.keys() == {"benchmark", "machine", "figures"}
    assert told["figures"] == [{"name": "rate", "value": 123.5, "baseline": 100.0, "ratio": 1.235, "goal": "≥ 1 ×", "holds": True}]  # noqa: RUF001


def test_the_page_shows_what_the_kept_results_say():
    assert (ROOT / "docs" / "benchmarks.md").read_text() == WRITE_PAGE(), "run scripts/write_benchmarks.py"


def test_the_page_says_what_was_not_measured():
    told = dict(re.findall(r"^## (\w+)\n\n(.+)$", (ROOT / "docs" / "benchmarks.md").read_text(), re.MULTILINE))
    kept = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert {"gpu", "rows", "training"} <= told.keys()
    assert {name for name, line in told.items() if line.startswith("Not measured")} == told.keys() - kept


def test_every_kept_result_has_a_benchmark():
    kept = [json.loads(path.read_text())["benchmark"] for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    assert [name for name in kept if not (ROOT / "benchmarks" / f"{name}.py").exists()] == []
