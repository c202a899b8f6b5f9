"""The rows of tasks, and the packages that add one: what is found, and what is wrong with it in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmoe.commands.predict import parse_arguments
from megatron_vlmoe.config import tasks
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import apply_recipe, default_recipe, recipe_names
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import TaskConfig
from megatron_vlmoe.config.tasks import PAIR_HEAD, TASKS, TaskSpec, find_task, load_code, task_names
from megatron_vlmoe.convert.hf_config import architecture
from megatron_vlmoe.finetune.options import parse_finetune

CODE = """
from dataclasses import replace
from megatron_vlmoe.config.tasks import Head, TaskSpec

HEAD = Head(build="birds:Heads", shapes="birds:shapes")
ROW = TaskSpec(name="birds", images=("image",), reader="birds:Reader", splits=("val",), head=HEAD)
NOTHING = {}

def make():
    return replace(ROW, name="fish", recipe="imagenet")

def broken():
    return replace(ROW, name="no name")

def clashing():
    return replace(ROW, texts=("output",))

def coco():
    return replace(ROW, name="coco")

def careless():
    return replace(ROW, name="careless", recipe="birds:unchanged")

def unchanged(pretrained):
    return pretrained
"""
Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Leaves what pip would leave of a package that has the module `birds` and one entry point."""

    def forget() -> None:
        for cached in (find_task, tasks._plug_ins):
            cached.cache_clear()
        sys.modules.pop("birds", None)

    def make(package: str, line: str) -> None:
        metadata = tmp_path / f"{package}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        (metadata / "entry_points.txt").write_text(f"[megatron_vlmoe.tasks]\n{line}\n")
        forget()

    (tmp_path / "birds.py").write_text(CODE)
    (tmp_path / "leaving.py").write_text("raise SystemExit(5)\n")
    (tmp_path / "unfinished.py").write_text("def (\n")
    (tmp_path / "lacking.py").write_text("from os import nothing_such\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield make
    forget()


@pytest.mark.parametrize("name", TASKS)
def test_what_a_row_names_is_there(name: str) -> None:
    spec = find_task(name)
    code = (spec.reader, spec.objective, spec.scores, spec.guess, spec.submission)
    for path in (*filter(None, code), spec.head.build, spec.head.shapes):
        assert callable(load_code(path, name)), path
    assert spec.recipe in recipe_names()
    assert (spec.table_split or spec.splits[0]) in spec.splits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "no name"}, "cannot be named 'no name'"),
        # The name of another kind of prepared dataset.
        ({"name": "pairs"}, "cannot be named 'pairs'"),
        ({"images": ()}, "needs images or texts"),
        ({"splits": ()}, "and splits"),
        ({"images": ("left", "right")}, "several images need a text"),
        ({"images": ("an image",)}, "'an image' cannot be the name of an argument"),
        ({"texts": ("class",)}, "'class' cannot be the name of an argument"),
        ({"texts": ("self",)}, "'self' cannot be the name of an argument"),
        ({"texts": ("output",)}, "input 'output' is named as an option of predict"),
        ({"images": ("top_k",)}, "input 'top_k' is named as an option of predict"),
        ({"texts": ("score",)}, "input 'score' is named as a part of a prediction"),
        ({"texts": ("image",)}, "'image' is the name of an image and of a text"),
        ({"texts": ("a", "a")}, "texts .*: one name twice"),
        ({"texts": "line"}, "texts 'line': must be of type tuple"),
        ({"splits": "val"}, "splits 'val': must be of type tuple"),
        ({"splits": ("val", 7)}, "splits .*: must hold names"),
        ({"table_split": "test"}, "table_split 'test': none of its splits"),
        ({"target": "klass"}, "target 'klass': must be one of class, answers, match"),
        ({"target": "match"}, "target 'match' needs one image and one text"),
        ({"head": "birds:Heads"}, "head 'birds:Heads': must be of type Head"),
        ({"decides": "no"}, "decides 'no': must be of type bool"),
        ({"reader": "birds"}, "reader 'birds': must be module:name"),
        ({"reader": ":Reader"}, "reader ':Reader': must be module:name"),
        ({"objective": ""}, "objective '': must be module:name"),
        ({"name": 7}, "cannot be named 7"),
    ],
)
def test_a_row_that_contradicts_itself(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"name": "birds", "images": ("image",), "splits": ("val",)}
    with pytest.raises(ValueError, match=message):
        TaskSpec(**{**fields, "reader": "birds:Reader", "head": PAIR_HEAD, **change})


def test_packages_add_tasks(install: Install) -> None:
    install("first", "birds = birds:ROW")
    install("second", "fish = birds:make")
    assert task_names() == ("vqa", "nlvr2", "retrieval", "imagenet", "mnli", "birds", "fish")
    assert TaskConfig(name="birds").splits == ("val",)
    # One without a recipe has a plain one; the other's is ImageNet's, under its own name.
    assert default_recipe("fish") == "fish" and default_recipe("retrieval") == "coco"
    assert apply_recipe("birds", RunConfig()).task == TaskConfig(name="birds")
    assert apply_recipe("fish", RunConfig()).task == replace(
        apply_recipe("imagenet", RunConfig()).task, name="fish"
    )
    with pytest.raises(
        ConfigError,
        match=r"^--task bird: unknown; choose one of vqa, .*, birds, fish; did you mean birds\?$",
    ):
        parse_finetune(["--task", "bird"])
    with pytest.raises(
        ConfigError, match="^task.name=bird: unknown; choose one of vqa, .*, fish, or"
    ):
        TaskConfig(name="bird")
    with pytest.raises(ValueError, match="^task birds: its head names no class of transformers"):
        architecture("birds")


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        (
            "birds = birds:broken",
            "",
            "plug-in birds:broken of package a does not load: ValueError: a task",
        ),
        (
            "birds = birds:missing",
            "",
            "plug-in birds:missing of package a does not load: AttributeError",
        ),
        (
            "birds = birds:NOTHING",
            "",
            "plug-in birds:NOTHING of package a does not load: TypeError",
        ),
        (
            "birds = nowhere:ROW",
            "",
            "plug-in nowhere:ROW of package a does not load: ModuleNotFoundError",
        ),
        (
            "birds = birds:clashing",
            "",
            "plug-in birds:clashing of package a does not load: ValueError: task birds: input 'output'",
        ),
        (
            "birds = leaving:ROW",
            "",
            "plug-in leaving:ROW of package a does not load: SystemExit: 5",
        ),
        ("birds = birds:ROW", "birds = birds:make", "plug-in birds:"),
        ("vqa = birds:ROW", "", "plug-in birds:ROW of package a takes the name of a built-in task"),
        (
            "fish = birds:ROW",
            "",
            "plug-in birds:ROW of package a gives task birds, not its TaskSpec",
        ),
        ("coco = birds:coco", "", "its plug-in has the name of a built-in recipe"),
        (
            "careless = birds:careless",
            "",
            "its recipe birds:unchanged gives a RunConfig, not a FinetuneConfig",
        ),
    ],
)
def test_a_wrong_package_is_named_in_one_line(
    line: str, other: str, message: str, install: Install
) -> None:
    install("a", line)
    if other:
        install("b", other)
    name = line.split()[0]
    with pytest.raises(ConfigError, match=f"^task {name}: {message}") as caught:
        parse_finetune(["--task", name, "--task.architecture", "tiny-8e"])
    assert "\n" not in str(caught.value)
    if other:
        assert "of package a" in str(caught.value) and "of package b" in str(caught.value)
    # Other tasks are not disturbed by it.
    assert TaskConfig(name="mnli").spec.best_metric == "accuracy"
    assert [spec.name for spec in tasks.working_tasks()].count("mnli") == 1
    assert parse_arguments(["--load", "run", "--premise", "a"]).premise == "a"


def test_no_option_of_predict_can_be_the_name_of_an_input() -> None:
    inputs = {name for spec in TASKS.values() for name in (*spec.images, *spec.texts)}
    options = vars(parse_arguments(["--load", "run"])).keys() - inputs
    # An option that is gone in the result: that of the help, and the former spelling of --text-tokenizer.
    assert options | {"help", "tokenizer"} == set(tasks.PREDICT_OPTIONS)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("birds:Heads", "AttributeError: module 'birds' has no attribute 'Heads'"),
        ("nowhere:Heads", "ModuleNotFoundError: No module named 'nowhere'"),
        ("lacking:Heads", "ImportError: cannot import name 'nothing_such'"),
        ("unfinished:Heads", "SyntaxError: "),
        ("leaving:Heads", "SystemExit: 5"),
    ],
)
def test_code_of_a_plug_in_that_does_not_load_is_named(
    path: str, reason: str, install: Install
) -> None:
    install("a", "birds = birds:ROW")
    with pytest.raises(ConfigError) as caught:
        load_code(path, "birds")
    start = f"task birds: plug-in birds:ROW of package a names {path}, which does not load: "
    assert str(caught.value).startswith(start + reason) and "\n" not in str(caught.value)


def test_a_malformed_list_of_entry_points_hides_no_other(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("a", "this is no entry point")
    install("b", "birds = birds:ROW")
    assert find_task("birds").images == ("image",)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: package a: its tasks are not known, because its entry_points")
