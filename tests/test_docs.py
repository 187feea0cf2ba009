"""The documentation keeps up with the code: every setting and every command has a heading, and generated pages are fresh."""

import json
import re
import runpy
from pathlib import Path

import pytest
import typer

from consumers import schemas
from daemon import cli, settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = runpy.run_path(str(ROOT / "scripts" / "write_docs.py"))["PAGES"]


def headings(page):
    return set(re.findall(r"^#+ (.+)$", (DOCS / page).read_text(), flags=re.MULTILINE))


def command_names(command, prefix="ratchet"):
    yield prefix
    for name, inner in getattr(command, "commands", {}).items():
        yield from command_names(inner, f"{prefix} {name}")


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_what_the_code_says(page):
    assert (DOCS / page).read_text() == PAGES[page](), f"docs/{page} is out of date: run `make docs`"


def test_every_setting_has_a_heading_and_a_description():
    described = headings("configuration.md")
    for path, field in settings.describe():
        assert ".".join(part for part in path if part != "N") in described
        assert field.description, f"{'.'.join(path)} has no description"


def test_every_command_has_a_heading_and_a_help_text():
    described = {heading.strip("`") for heading in headings("cli.md")} | {"ratchet"}
    assert set(command_names(typer.main.get_command(cli.app))) <= described


def events_in(page):
    return [json.loads(block) for block in re.findall(r"^```json\n(.+?)^```$", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)]


@pytest.mark.parametrize("event", events_in("events.md"), ids=lambda event: event["type"])
def test_an_event_that_the_docs_show_would_be_taken(event):
    parsed = schemas.parse(json.dumps([event]).encode(), event["type"])[0]
    assert not isinstance(parsed, schemas.Refusal), str(parsed)
    assert schemas.check(parsed, {"adjudication": ["APPROVED", "DENIED", "PENDING"]}) is None


def test_the_docs_show_an_event_of_every_type():
    assert {event["type"] for event in events_in("events.md")} == set(schemas.json_schemas())


def prose():
    """Every page written by hand, and the code in it: spans and indented or fenced blocks."""
    pages = [*ROOT.glob("*.md"), ROOT / "deploy" / "README.md", *(page for page in DOCS.rglob("*.md") if page.name not in PAGES)]
    for page in pages:
        text = page.read_text()
        code = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
        code += re.findall(r"^ {4,}(\S.*)$", text, flags=re.MULTILINE)
        yield str(page.relative_to(ROOT)), [" ".join(one.split()) for one in code]


def commands_in(code):
    """Every `ratchet …` in code, as words; `list | show` names two commands."""
    for found in re.findall(r"(?:^|\s|bin/)ratchet((?: (?:[a-z][a-z-]*(?![\w.])|\|))+)", code):
        first, *rest = found.replace("|", " ").split()
        yield from ((first, each) for each in (rest if "|" in found else rest[:1]) or [""])


def test_every_command_that_a_page_names_is_there():
    group = typer.main.get_command(cli.app)
    unknown = []
    for page, spans in prose():
        for first, second in (words for code in spans for words in commands_in(code)):
            command = group.commands.get(first)
            inner = getattr(command, "commands", None)
            if command is None or (inner is not None and second and second not in inner):
                unknown.append(f"{page}: ratchet {first} {second}".strip())
    assert unknown == []


def test_every_module_and_file_that_a_page_names_is_there():
    missing = []
    for page, spans in prose():
        for code in spans:
            path = re.fullmatch(r"((?:storage|consumers|trainers|daemon|deploy|scripts|benchmarks|tests|data|docs)/[\w./-]*)(?::.*)?", code)
            module = re.fullmatch(r"(storage|consumers|trainers|daemon)\.([a-z_]+)(?:\.\w+)*(?:\(.*)?", code)
            if path and "<" not in code and not (ROOT / path[1]).exists():
                missing.append(f"{page}: {code}")
            if module and not any((ROOT / module[1] / f"{module[2]}{end}").exists() for end in (".py", "/")):
                missing.append(f"{page}: {code}")
    assert missing == []


def test_every_setting_that_a_page_names_is_there():
    known = {".".join(part for part in path if part not in {"agents", "NAME", "N"}) for path, _ in settings.describe()}
    sections = {key.partition(".")[0] for key in known if "." in key} - {"storage"}
    named = re.compile(rf"((?:{'|'.join(sections)})\.[a-z_]+)(?: = .*)?")
    unknown = [
        f"{page}: {code}"
        for page, spans in prose()
        for code in spans
        if (match := named.fullmatch(code)) and match[1] not in known and not code.endswith((".py", ".md", ".db", ".json"))
    ]
    assert unknown == []


def test_every_link_between_pages_leads_somewhere():
    for page in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"


def test_the_glossary_is_in_order_and_names_each_word_once():
    words = re.findall(r"^\| \*\*(.+?)\*\*", (DOCS / "glossary.md").read_text(), flags=re.MULTILINE)
    assert words == sorted(set(words))


def test_every_decision_has_a_number_of_its_own_and_says_it():
    numbers: dict[int, str] = {}
    for note in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        number = int(note.name[:4])
        assert note.read_text().startswith(f"# {number}. "), note.name
        assert numbers.setdefault(number, note.name) == note.name
