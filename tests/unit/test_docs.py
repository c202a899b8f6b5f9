"""What the documents tell a reader to type: every command is parsed by the program that it starts."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from command_parsers import parser_of
from commands import REPOSITORY
from document_commands import (
    DOCUMENTS,
    NOT_RUN,
    RUN,
    DocumentCommand,
    all_commands,
    commands_of,
)

from megatron_vlmoe.commands.pretrain import check_options
from megatron_vlmoe.commands.study import options_apart
from megatron_vlmoe.commands.table import COMMANDS
from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import preset

TRAINING = ("pretrain", "pretrain-random", "finetune", "evaluate")
# These hand on what they do not know to `pretrain`.
PASSES_ON = ("compare-layouts", "plan", "upcycle", "study")
FOUND = all_commands()


def started(words: list[str]) -> tuple[str, list[str], int]:
    """Command, its words and the number of processes, of a line that starts this program."""
    processes = 1
    if words[0] == "torchrun":
        if "--nproc-per-node" in words:
            processes = int(words[words.index("--nproc-per-node") + 1])
        words = words[words.index("-m") :]
    elif words[0] == "python" and words[1].startswith("tools/"):
        text = (REPOSITORY / words[1]).read_text()
        named = [name for name in re.findall(r'"([a-z-]+)"', text) if name in COMMANDS]
        return (named[0], words[2:], 1) if len(named) == 1 else (words[2], words[3:], 1)
    elif words[0] == "python":
        words = words[1:]
    if words[:2] == ["-m", "megatron_vlmoe"]:
        words = ["vlmoe", *words[2:]]
    assert words[0] == "vlmoe", f"not a command of this program: {words}"
    return words[1], words[2:], processes


def parse(command: DocumentCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises ConfigError, as the command itself would."""
    name, words, processes = started(command.words)
    assert name in COMMANDS, f"no command {name}"
    if "--help" in words:
        return
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if name == "check":
        name, words = words[0], [word for word in words[1:] if word != "--quick"]
    if name in TRAINING:
        check_options([name, *words])
        return
    chosen = [words.pop(0)] if name == "bench" and not words[0].startswith("-") else []
    parser = parser_of(name, *chosen) if name != "predict" else None
    if parser is None:
        importlib.import_module("megatron_vlmoe.commands.predict").parse_arguments(words)
    elif name in PASSES_ON and chosen in ([], ["step"]):
        words, finetune = options_apart(words)
        _, others = parser.parse_known_args(words)
        check_options(["pretrain", *others])
        check_options(["finetune", *finetune])
    else:
        parser.parse_args(words)


def is_script(command: DocumentCommand) -> bool:
    return command.words[0] in ("bash", "sbatch")


PARSED = [
    command
    for command in FOUND
    if not command.reason and not is_script(command) and "[" not in command.text
]


@pytest.mark.parametrize(
    "command", PARSED, ids=lambda command: f"{command.document}: {command.text[:60]}"
)
def test_commands_of_documents_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("RUN", "runs/vlmo"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.yaml").write_text(to_yaml(preset("tiny-8e")))
    parse(command, monkeypatch)


def test_a_wrong_command_is_found(monkeypatch):
    for text in (
        "vlmoe index-text --inptu a --output b",
        "vlmoe pretrain --preset tiny-8e --train.stepz 2",
        "torchrun --nproc-per-node 3 -m megatron_vlmoe pretrain --preset tiny-8e",
        "vlmoe upcycle --load a --output b --moe.topkk 2",
        "python tools/merge_datasets.py --inputs A --output B",
    ):
        with pytest.raises(ConfigError):
            parse(DocumentCommand("", text), monkeypatch)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_take_the_variables(path):
    """A script that a document names is there, and reads the variables that are set in front of it."""
    for command in filter(is_script, commands_of(path)):
        script = REPOSITORY / command.words[1]
        assert script.is_file(), command.text
        text = script.read_text() + "".join(
            common.read_text() for common in script.parent.glob("*_common.sh")
        )
        unread = [name for name in command.variables if not re.search(rf"\b{name}\b", text)]
        assert not unread, f"{command.text}: {unread}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_sentences_exist(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`vlmoe ([a-z][a-z-]+)", text)
    assert not [name for name in named if name not in COMMANDS]


def test_every_command_is_run_parsed_or_has_a_reason():
    """No row of the tables is left over, and none of the commands that are run has gone from the documents."""
    texts = {command.text for command in FOUND}
    assert not [line for line in RUN if line not in texts]
    assert not [start for start in NOT_RUN if not any(text.startswith(start) for text in texts)]


def said_by_the_program() -> str:
    """Every piece of text in the package and the example scripts, adjacent pieces of one string joined."""
    texts = []
    for path in sorted((REPOSITORY / "megatron_vlmoe").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(
                        part.value if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    )
                )
    scripts = [path.read_text() for path in sorted((REPOSITORY / "examples").glob("*.sh"))]
    return "\n".join([*texts, *scripts])


def test_messages_of_the_troubleshooting_page_exist():
    """Of each message in its tables, the longest piece without values."""
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 25
    said = said_by_the_program()
    unknown = []
    for message in messages:
        values = (
            r"\.\.\.|\d+x\d+|\d+|--\S+|\b[A-Z]\b|=|\b[a-z]+\.\w+|\b\w+_\w+\b|^apex|^transformer-\w+"
        )
        pieces = re.split(values, message)
        longest = max(pieces, key=len).strip()
        if longest not in said:
            unknown.append((message, longest))
    assert not unknown


def pages_of(entry: object) -> list[str]:
    """Files that a part of the site's navigation names."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    assert isinstance(parts, Iterable)
    return [page for part in parts for page in pages_of(part)]


def test_the_site_has_every_page_once() -> None:
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    docs = REPOSITORY / "docs"
    pages = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    # The tables of published results are files beside their pictures.
    assert sorted(pages_of(site["nav"])) == sorted(p for p in pages if not p.startswith("studies/"))
