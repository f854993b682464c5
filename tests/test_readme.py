"""The READMEs beside the code: every option that they name exists, and every option that exists is named in one."""

import os
import re
from collections.abc import Iterator
from typing import Any

import typer
from tiny import REPOSITORY

from ldm.base.options import Key, keys
from ldm.cli import app
from ldm.config import Settings

PAGES = (REPOSITORY / "README.md", *(REPOSITORY / "ldm").rglob("README.md"))
READMES = {path: path.read_text(encoding="utf-8") for path in PAGES}
TEXT = "\n".join(READMES.values())
CODE = set(re.findall(r"`([^`\n]+)`", TEXT))  # what is set in code, within a line
BLOCKS = "\n".join(re.findall(r"^```.*?^```", TEXT, re.M | re.S))
KEYS: dict[str, Key] = {key.name.replace(".0", ""): key for key in keys(Settings)}
SECTIONS = {name for key in KEYS for name in (key, key.rpartition(".")[0], key.split(".")[0])}


def commands(command: Any, path: str = "ldm") -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):  # a group
        for name, inner in command.commands.items():
            yield from commands(inner, f"{path} {name}")
    else:
        yield path, command


COMMANDS = dict(commands(typer.main.get_command(app)))


def flags(command: Any) -> set[str]:
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    return {flag for option in options for flag in option.opts}


def test_every_setting_is_named_in_a_readme():
    assert sorted(KEYS.keys() - CODE) == []


def test_every_kind_is_named_in_a_readme():
    missing = [(name, value) for name, key in KEYS.items() if name.endswith("kind") for value in key.values if value not in CODE]
    assert missing == []


def test_every_setting_that_a_readme_names_exists():
    roots = {name.split(".")[0] for name in KEYS}
    named = {code for code in CODE if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", code) and code.split(".")[0] in roots}
    files = {code for code in named if re.fullmatch(r".*\.(py|csv|json|jsonl|html|md|yaml|png|txt|dvc|safetensors)", code)}
    assert sorted(named - files - SECTIONS) == []
    assigned = re.findall(r"ldm run [^\n]*", BLOCKS)
    assert assigned and all(key in KEYS for line in assigned for key in re.findall(r"--set ([\w.]+)=", line))


def test_every_command_and_its_options_are_named_in_a_readme():
    assert len(COMMANDS) > 15
    for path, command in COMMANDS.items():
        assert path in TEXT, path
        for flag in flags(command):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", TEXT), f"{path} {flag}"


def test_every_command_that_a_readme_names_exists_with_its_options():
    lines = re.findall(r"(?:^|`)(ldm [a-z][^`\n#]*)", TEXT, re.M)
    assert len(lines) > 20
    for line in lines:
        words = line.split()
        path = next((p for p in (" ".join(words[:3]), " ".join(words[:2])) if p in COMMANDS), None)
        group = " ".join(words[:2])
        assert path or any(p.startswith(f"{group} ") for p in COMMANDS), line
        if path:
            assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", line)) <= flags(COMMANDS[path]) | {"--help"}, line


def test_every_option_of_the_flow_is_named_in_a_readme():
    options = re.findall(r'add_argument\("(--[a-z]+)"', (REPOSITORY / "flows/run.py").read_text())
    assert options and all(re.search(rf"(?<![\w-]){option}(?![\w-])", TEXT) for option in options)


def test_environment_variables_are_the_ones_that_the_code_reads():
    sources = "\n".join(path.read_text() for room in ("ldm", "flows") for path in (REPOSITORY / room).rglob("*.py"))
    read = set(re.findall(r"\"(LDM_[A-Z_]+)\"", sources))
    internal = {
        "LDM_OWNER_PIPE",
        "LDM_PARENT_RUN",
        "LDM_RECORDS",
        "LDM_RESULT_FD",
        "LDM_BRANCH",
        "LDM_PYTHON",
        "LDM_ROOT",
        "LDM_POOL",
    }
    internal |= {"LDM_SLOT_BUSY", "LDM_SLOT_REFUSED", "LDM_WORKER_PID"}  # between our own processes
    assert set(re.findall(r"LDM_[A-Z_]+", TEXT)) == read - internal


def test_links_lead_to_files():
    for path, text in READMES.items():
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert os.path.exists(path.parent / link) or link.startswith("reports/"), (path, link)


def test_the_first_page_is_short():
    assert len(READMES[REPOSITORY / "README.md"].splitlines()) <= 180
