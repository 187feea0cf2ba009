"""What is installed beside us, what the requirement files hold, and what the package ships."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from importlinter import cli

ROOT = Path(__file__).parents[1]
ROOMS = {"consumers", "daemon", "storage", "trainers"}
REQUIREMENTS = ["requirements.txt", "requirements-dev.txt", "requirements-setup.txt"]


def test_no_installed_package_ships_a_folder_of_our_name():
    """python-daemon's import name, for one, is `daemon`."""
    owners = metadata.packages_distributions()
    assert {room: set(owners.get(room, [])) - {"ratchet-daemon"} for room in ROOMS} == {room: set() for room in ROOMS}


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_requirements_name_no_index_and_no_path_of_a_machine(name):
    for line in (ROOT / name).read_text().splitlines():
        assert not re.search(r"://|--(extra-)?index-url|--find-links|(?<![\w.\-(])/\w|@ file", line), f"{name}: {line}"


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_is_pinned_and_hashed(name):
    text = re.sub(r"\\\n", " ", (ROOT / name).read_text())
    requirements = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert requirements
    for line in requirements:
        assert re.match(r"[\w.\-\[\],]+==\S+", line), f"{name}: {line[:80]} is not pinned"
        assert "--hash=sha256:" in line, f"{name}: {line[:80]} has no hash"


def test_the_demo_installs_the_versions_that_are_tested():
    pins = [dict(re.findall(r"^([\w.\-]+)(?:\[\S+\])?==(\S+)", (ROOT / name).read_text(), flags=re.MULTILINE)) for name in REQUIREMENTS[:2]]
    assert pins[0].items() <= pins[1].items()


def test_without_extras_no_torch_is_asked_for():
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in core}
    assert not names & {"torch", "transformers", "peft", "bitsandbytes", "datasets", "scikit-learn", "faust-streaming", "kafka-python"}


def test_every_file_that_is_no_module_is_shipped():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {path for room in ROOMS for pattern in packaged.get(room, []) for path in (ROOT / room).glob(pattern)}
    files = {path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    modules = {path for path in files if path.suffix == ".py" and (path.parent / "__init__.py").exists()}
    assert files - modules - shipped == set()


def test_the_four_packages_start_empty():
    assert [room for room in sorted(ROOMS) if (ROOT / room / "__init__.py").read_text()] == []


def test_the_import_contracts_hold():
    assert cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == cli.EXIT_STATUS_SUCCESS


def test_the_demo_without_kafka_needs_none_of_its_packages():
    block = "import sys; sys.modules.update(dict.fromkeys(['kafka', 'faust', 'aiokafka']))"
    subprocess.run([sys.executable, "-c", f"{block}; import daemon.demo.__main__, daemon.service"], check=True, cwd=ROOT)
