"""Rules that hold the whole repository together: imports, state, and what docs and examples say."""

import ast
import dataclasses
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_parsers import parser_of

from megatron_vlmoe.commands.table import COMMANDS
from megatron_vlmoe.config.command_line import ALIASES, flat_options, merge_file
from megatron_vlmoe.config.presets import preset, preset_names, recipe_names
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import TASKS
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.lazy import HEAVY

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_vlmoe"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
CONFIGS = sorted((ROOT / "examples").rglob("*.yaml"))

# What stands right may import what stands left.
ORDER = (
    *("config", "stream", "runtime", "tokenizers", "sample_corpus", "moe", "planning", "model"),
    *("data", "losses", "train", "prepare", "convert", "analysis", "finetune", "inference"),
    *("benchmarks", "commands"),
)
WITHOUT_MEGATRON = (
    *("config", "stream", "tokenizers", "sample_corpus", "planning", "data", "losses"),
    *("prepare", "convert", "analysis"),
)
# Files that travel with an export: nothing of this package is there where they run.
TRAVELLING = PACKAGE / "convert" / "hf"
TRAVELLING_IMPORTS = {"torch", "transformers", "numpy", "PIL", "sentencepiece"}
# Where a task may be called by its name: its row, its readers, recipes, and the corpus that makes a sample of it.
TASK_FILES = ("config/tasks.py", "config/presets.py", "prepare/readers/tasks/", "sample_corpus/")
# The same word for something else: how pixels are normalised.
OTHER_WORDS = {"convert/public/beit2.py": {"imagenet"}, "tools/import_public.py": {"imagenet"}}
MUTATORS = {
    *("append", "extend", "insert", "remove", "pop", "clear", "update", "setdefault"),
    *("popitem", "add", "discard", "appendleft", "popleft"),
}
MUTABLE_TYPES = {"list", "dict", "set", "defaultdict", "OrderedDict", "deque", "Counter"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(tree: ast.AST, relative: bool = False) -> Iterator[str]:
    """Every module that is imported anywhere, inside functions too; relative imports are left out where allowed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if relative and node.level == 1:
                continue
            assert node.level == 0, "relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """The room of a module of this package."""
    parts = module.split(".")
    if parts[0] != "megatron_vlmoe" or len(parts) < 2 or not (PACKAGE / parts[1]).is_dir():
        return None
    if parts[1:3] == ["convert", "hf"]:
        # What travels needs nothing of this package, so that every room may read it.
        return None
    return parts[1]


def room_violations(home: str, tree: ast.AST) -> list[str]:
    allowed = {None, *ORDER[: ORDER.index(home) + 1]}
    return [module for module in imported_modules(tree) if room(module) not in allowed]


def test_every_room_has_a_rule():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(ORDER)


@pytest.mark.parametrize("home", ORDER)
def test_imports_point_one_way(home):
    found = {
        name_of(path): bad
        for path in sorted((PACKAGE / home).rglob("*.py"))
        if path.parent != TRAVELLING and (bad := room_violations(home, parse(path)))
    }
    assert not found


def test_room_check_finds_a_wrong_import():
    late = ast.parse("def f():\n    from megatron_vlmoe.train import step")
    assert room_violations("config", late) == [
        "megatron_vlmoe.train",
        "megatron_vlmoe.train.step",
    ]


@pytest.mark.parametrize("home", WITHOUT_MEGATRON)
def test_rooms_without_megatron_core(home):
    found = [
        name_of(path)
        for path in sorted((PACKAGE / home).rglob("*.py"))
        if path != PACKAGE / "data" / "indexed.py"
        and path.parent != TRAVELLING
        and any(module.split(".")[0] == "megatron" for module in imported_modules(parse(path)))
    ]
    assert not found


def late_imports(tree: ast.AST) -> list[str]:
    """Modules of this package and of megatron-core that are imported inside a function."""
    return [
        module
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for module in imported_modules(function)
        if module.split(".")[0] in ("megatron_vlmoe", "megatron")
    ]


def test_imports_stand_at_the_top():
    found = {
        name_of(path): late
        for path in (*SOURCES, *TOOLS)
        if path.parent != TRAVELLING and (late := late_imports(parse(path)))
    }
    assert not found, "what is slow to import goes through runtime/lazy.py"


def test_check_of_late_imports_finds_them():
    assert late_imports(ast.parse("def f():\n    from megatron_vlmoe.train import step"))
    assert late_imports(ast.parse("class A:\n    def f(self):\n        import megatron.core"))
    assert not late_imports(ast.parse("import megatron.core\ndef f():\n    import transformers"))


def imports_of(path: Path, types_too: bool) -> set[str]:
    """Modules of this package that a file imports when it is imported, or also for its types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types_too:
            node.body = []
    return {name for module in imported_modules(tree, relative=True) if (name := known(module))}


def known(module: str) -> str | None:
    return module if module in MODULES else None


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in SOURCES if path.parent != TRAVELLING}


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Everything that importing a module imports, itself only if it comes back to it."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph.get(waiting.pop(), set()) - found:
            found.add(name)
            waiting.append(name)
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves, through others."""
    return sorted(name for name in graph if name in reachable(name, graph))


def import_graph(types_too: bool) -> dict[str, set[str]]:
    return {
        module_of(path): imports_of(path, types_too) - {module_of(path)}
        for path in SOURCES
        if path.parent != TRAVELLING
    }


def test_no_imports_in_a_circle():
    """Nor in one that is closed by imports for types alone: such files can only be read together."""
    assert not circles(import_graph(types_too=True))


def test_circle_check_finds_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_the_lazy_table_says_what_needs_megatron_core():
    graph = import_graph(types_too=False)
    uses_it = {
        module_of(path)
        for path in SOURCES
        if path.parent != TRAVELLING
        and any(name.split(".")[0] == "megatron" for name in imported_modules(parse(path)))
    }
    assert HEAVY == {
        module: bool((reachable(module, graph) | {module}) & uses_it) for module in HEAVY
    }


@pytest.mark.parametrize("package", ["torchvision", "timm", "apex", "deepspeed"])
def test_packages_that_are_never_imported(package):
    found = [
        name_of(path)
        for path in (*SOURCES, *TOOLS)
        if path.parent != TRAVELLING
        and any(module.split(".")[0] == package for module in imported_modules(parse(path)))
    ]
    assert not found


def test_travelling_files_need_nothing_of_this_package():
    allowed = TRAVELLING_IMPORTS | set(sys.stdlib_module_names)
    found = {
        name_of(path): bad
        for path in sorted(TRAVELLING.glob("*.py"))
        if (
            bad := {module.split(".")[0] for module in imported_modules(parse(path), relative=True)}
            - allowed
        )
    }
    assert not found
    assert list(TRAVELLING.glob("modeling_*.py"))


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)):
        return True
    if isinstance(value, ast.Call):
        function = value.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        return name in MUTABLE_TYPES
    return False


def mutable_names(tree: ast.Module) -> set[str]:
    """Names of lists, dictionaries and sets at module level."""
    names: set[str] = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if targets and _is_mutable(node.value):
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names - {"__all__"}


def changed_names(tree: ast.AST) -> set[str]:
    """Names of which an item is set or deleted, or that a changing method is called on."""
    changed: set[str] = set()
    for node in ast.walk(tree):
        inside: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            inside = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            inside = node.func.value if node.func.attr in MUTATORS else None
        elif isinstance(node, ast.AugAssign):
            inside = node.target
        if isinstance(inside, ast.Name):
            changed.add(inside.id)
    return changed


def state_problems(tree: ast.Module) -> list[str]:
    """Module-level state: `global`, containers that are no constants, constants that are changed."""
    constants = mutable_names(tree)
    problems = [f"global {node.names}" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    problems += [f"{name} is not a constant" for name in constants if not name.isupper()]
    return problems + [f"{name} is changed" for name in sorted(constants & changed_names(tree))]


def test_no_mutable_state_at_module_level():
    found = {
        name_of(path): problems
        for path in (*SOURCES, *TOOLS)
        if path.relative_to(ROOT).parts[1] != "runtime"
        and (problems := state_problems(parse(path)))
    }
    assert not found


def test_state_check_finds_state():
    assert state_problems(ast.parse("cache = {}"))
    assert state_problems(ast.parse("A = []\ndef f():\n    A.append(1)"))
    assert state_problems(ast.parse("A = {}\ndef f():\n    A['x'] = 1"))
    assert state_problems(ast.parse("def f():\n    global n\n    n = 1"))
    assert not state_problems(ast.parse("A = {1: 2}\ndef f():\n    return A[1]"))


def compared_tasks(tree: ast.AST) -> list[str]:
    """Names of tasks that something is compared with, matched with, or looked up by in a table of several tasks."""
    found: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            found += [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            found.append(node.value)
        elif isinstance(node, ast.Dict) and len(node.keys) > 1:
            found += node.keys
    names = []
    for value in found:
        items = value.elts if isinstance(value, (ast.Tuple, ast.List, ast.Set)) else [value]
        names += [item.value for item in items if isinstance(item, ast.Constant)]
    return sorted(name for name in names if isinstance(name, str) and name in TASKS)


def test_no_task_is_called_by_its_name_outside_its_own_files():
    """What tasks differ in stands in their rows (config/tasks.py), so that a package can add one."""
    found = {}
    for path in (*SOURCES, *TOOLS):
        name = name_of(path).removeprefix("megatron_vlmoe/")
        wrong = set(compared_tasks(parse(path))) - OTHER_WORDS.get(name, set())
        if wrong and not name.startswith(TASK_FILES):
            found[name] = wrong
    assert not found


def test_task_check_finds_names():
    for code in (
        "if task.name == 'vqa': pass",
        "x = name in ('nlvr2', 'vqa')",
        "match task:\n    case 'mnli': pass",
        "SHAPES = {'imagenet': 1, 'other': 2}",
    ):
        assert compared_tasks(ast.parse(code)), code
    assert not compared_tasks(ast.parse("usage = load('vqa')\nx = {'task': 'vqa', 'n': 1}"))


@pytest.mark.process
@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_parse(path):
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_there_is_a_script_for_every_row_of_the_paper():
    rows = [
        f"{size}-{count}" for size in ("small", "base") for count in ("dense", "8e", "16e", "32e")
    ]
    for row in rows:
        size, count = row.split("-")
        text = (ROOT / "examples" / f"pretrain_{size}_{count}.sh").read_text()
        assert f"SIZE={size}\n" in text and f"EXPERTS={count}\n" in text
        assert row in preset_names()


def test_there_is_a_script_for_every_task_of_the_paper():
    for recipe in ("vqa", "nlvr2", "coco", "flickr30k", "imagenet", "mnli"):
        text = (ROOT / "examples" / f"finetune_{recipe}.sh").read_text()
        assert f"RECIPE={recipe}\n" in text and recipe in recipe_names()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_example_configs_run(path):
    validate(merge_file(preset("small-32e"), path))


# With the placeholder that texts about the grammar use.
KNOWN_OPTIONS = {f"--{name}" for name in flat_options(dataclasses.asdict(FinetuneConfig()))} | {
    "--section.option"
}
PROGRAM_OPTIONS = {*ALIASES, "--preset", "--config", "--dry-run", "--dry-run-world-size", "--help"}


def commands(text: str) -> Iterator[str]:
    """Lines of a document or script, with continuation lines joined."""
    yield from text.replace("\\\n", " ").splitlines()


def test_no_message_sends_a_wheels_user_to_tools():
    for path in SOURCES:
        assert not re.search(r"tools/\w+\.py", path.read_text(encoding="utf-8")), path


@functools.cache
def options_of_command(name: str) -> set[str]:
    """Options of a command; those of training, and some hand what they do not know on to it."""
    if COMMANDS[name].main.startswith(("pretrain:", "finetune:", "check:")):
        return PROGRAM_OPTIONS | ({"--task"} if name == "finetune" else set())
    passes_on = name in ("compare-layouts", "bench", "plan", "upcycle", "study")
    return {*parser_of(name)._option_string_actions, *(PROGRAM_OPTIONS if passes_on else ())}


def options_of_tool(tool: str) -> set[str]:
    """Options of the commands that a tool runs."""
    names = re.findall(r'"([a-z-]+)"', (ROOT / "tools" / tool).read_text())
    return set().union(*(options_of_command(name) for name in names if name in COMMANDS))


def unknown_options(text: str) -> list[str]:
    """Options in a document or script that neither the program nor the named tool has."""
    found = [
        name
        for name in re.findall(r"--[a-z]+(?:\.[a-z0-9_]+)+(?![\w*])", text)
        # Those that a study gives to its fine-tunings.
        if name.replace("--finetune.", "--") not in {*KNOWN_OPTIONS, "--config"}
    ]
    for line in commands(text):
        for tool, rest in re.findall(r"tools/(\w+\.py)([^`|;&]*)", line):
            if not (ROOT / "tools" / tool).exists():
                found.append(f"tools/{tool}")
                continue
            known = options_of_tool(tool)
            options = re.findall(r"(?<=[\s[])--[a-z][a-z0-9-]*(?=[\s=\]]|$)", rest)
            found += [f"tools/{tool} {name}" for name in options if name not in known]
        for command, rest in re.findall(r"-m megatron_vlmoe ([a-z-]+)([^`|;&]*)", line):
            if command not in COMMANDS:
                found.append(command)
                continue
            options = re.findall(r"(?<=\s)--[a-z][a-z0-9-]*(?=[\s=\]]|$)", rest)
            found += [name for name in options if name not in options_of_command(command)]
    return found


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=name_of)
def test_options_that_are_named_exist(path):
    assert not unknown_options(path.read_text(encoding="utf-8"))


def test_option_check_finds_wrong_options():
    assert unknown_options("--train.stepz 3") == ["--train.stepz"]
    assert unknown_options("python tools/merge_datasets.py --inputs A") == [
        "tools/merge_datasets.py --inputs"
    ]
    assert unknown_options("python -m megatron_vlmoe pretrain --dryrun") == ["--dryrun"]
    assert unknown_options("python -m megatron_vlmoe merge-data --inputs A") == ["--inputs"]
    assert unknown_options("python -m megatron_vlmoe merge-datasets") == ["merge-datasets"]


def broken_references(path: Path) -> list[str]:
    """Relative links, and paths of this repository in backticks, that lead nowhere."""
    text = path.read_text(encoding="utf-8")
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link
    ]
    broken = [link for link in links if link and not (path.parent / link).exists()]
    paths = re.findall(
        r"`((?:megatron_vlmoe|tools|tests|examples|docs)/[\w./-]+)(?![\w./{*-])", text
    )
    return broken + [name for name in paths if not (ROOT / name.rstrip(".")).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_and_paths_exist(path):
    assert not broken_references(path)


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS, *CONFIGS, *SOURCES, *TOOLS], ids=name_of)
def test_nothing_is_left_to_fill_in(path):
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8"))


def run_script(row: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs examples/pretrain_ROW.sh with nothing but the given variables set."""
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "VIRTUAL_ENV") if name in os.environ
    }
    # The interpreter of the tests comes first, wherever it is.
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    command = ["bash", str(ROOT / "examples" / f"pretrain_{row}.sh"), *arguments]
    return subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True)


@pytest.mark.process
@pytest.mark.parametrize(
    ("row", "variables", "layout"),
    [
        (
            "base_32e",
            {"NNODES": "4", "GPUS_PER_NODE": "8"},
            "TP 1 x PP 1 x DP 32; EP 8, expert DP 4",
        ),
        (
            "small_16e",
            {"NPROC": "16", "PP": "2", "TP": "2"},
            "TP 2 x PP 2 x DP 4; EP 8, expert DP 1",
        ),
    ],
)
def test_scripts_choose_expert_parallelism_that_fits(row, variables, layout):
    result = run_script(row, "--dry-run", **variables)
    assert result.returncode == 0, result.stderr
    assert layout in result.stdout


@pytest.mark.process
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "TEXT is not set"),
        ({"NPROC": "4", "TP": "3"}, "cannot hold TP=3"),
        (
            {
                **dict.fromkeys(("TEXT", "IMAGES", "PAIRS", "TEXT_TOKENIZER", "RUN"), "x"),
                "NNODES": "2",
            },
            "MASTER_ADDR (the host name of node 0) is not set",
        ),
    ],
)
def test_scripts_say_what_is_missing(variables, message):
    result = run_script("small_8e", **variables)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
