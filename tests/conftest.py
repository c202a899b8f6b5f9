"""Fixtures shared by all tests, and what a test is marked with: tests/README.md."""

from __future__ import annotations

import multiprocessing.process
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_files import write_tokenizer
from helpers import Workers
from prepared_tasks import Prepared, prepare_all
from raw_tasks import Desk

# They have commands of their own, which fetch what they need, parts of: bash tests/run.sh nightly.
collect_ignore = ["transformers_suite", "python_versions"]

# Before torch is imported anywhere: several processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

STARTED = pytest.StashKey[list[str]]()
"""Processes that the running test has started."""


# Side by side, a file stays in one pytest process, and so do those that share what takes long to make.
SHARED = {
    "corpus": "e2e/test_e2e_signals.py e2e/test_e2e_pretrain.py e2e/test_e2e_bad_input.py e2e/test_e2e_docs.py"
    " e2e/test_e2e_layouts.py e2e/test_e2e_baselines.py e2e/test_e2e_study.py e2e/test_e2e_check.py"
    " e2e/test_e2e_drills.py",
    "prepared": "e2e/test_e2e_finetune.py e2e/test_e2e_inference.py distributed/test_resume.py"
    " distributed/test_finetune_parity.py unit/test_devices.py",
}
# What takes longest goes first, so that no process has long work left when the others are done.
FIRST = ("corpus", "prepared", "distributed/", "e2e/")


def group_of(nodeid: str) -> str:
    """The group of a test: its file, from the folder of tests on, or what files are gathered under in `SHARED`."""
    file = nodeid.partition("::")[0].rpartition("tests/")[2]
    return next((name for name, files in SHARED.items() if file in files.split()), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives whole groups to the processes: `--dist loadgroup` of pytest-xdist 3.8 does nothing under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    # The order is that of the tests.
    config.option.loadscopereorder = False
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by folder and fixtures, and puts the longest groups first."""
    for item in items:
        fixtures, folder = getattr(item, "fixturenames", ()), item.path.parent.name
        if folder == "e2e":
            item.add_marker("e2e")
        if folder == "distributed" or "workers" in fixtures:
            item.add_marker("dist")
        for name in {"corpus", "prepared"} & set(fixtures) if folder != "unit" else ():
            if group_of(item.nodeid) != name:
                raise pytest.UsageError(f"{item.path}: uses `{name}`: add it to SHARED, {__file__}")

    def rank(item: pytest.Item) -> int:
        group = group_of(item.nodeid)
        return next((i for i, name in enumerate(FIRST) if group.startswith(name)), len(FIRST))

    items.sort(key=rank)


def pytest_configure(config: pytest.Config) -> None:
    """Notices every process that starts."""
    started = config.stash.setdefault(STARTED, [])

    # Libraries ask `uname` and the like once, when they are imported: what counts are these.
    programs = ("python", "bash", "sh", "torchrun", "vlmoe")

    def notice(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.fork":
            started.append("a fork")
        elif event == "subprocess.Popen":
            name = os.path.basename(os.fsdecode(arguments[0]))
            if name.startswith(programs):
                started.append(name)

    sys.addaudithook(notice)
    base = multiprocessing.process.BaseProcess
    start = base.start

    # The servers of `spawn` and `forkserver` are started without an audit event.
    def start_and_notice(process: multiprocessing.process.BaseProcess) -> None:
        started.append(f"multiprocessing {process.name}")
        start(process)

    base.start = start_and_notice  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def no_unmarked_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that starts a process says so; what makes its fixtures counts."""
    started = request.config.stash[STARTED]
    yield
    found = list(started)
    started.clear()
    if found and not any(request.node.get_closest_marker(m) for m in ("process", "dist", "e2e")):
        pytest.fail(f"it starts a process ({found[0]}): mark it with `process`, tests/README.md")


@pytest.fixture(scope="session")
def workers() -> Workers:
    """Four processes that tests run layouts on."""
    return Workers(4)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The downstream tasks of a very small sample corpus."""
    return prepare_all(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of a few words."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image tokenizer of random weights: 30 codes for 4 x 4 patches."""
    import torch

    from megatron_vlmoe.tokenizers.vqkd.config import build_preset
    from megatron_vlmoe.tokenizers.vqkd.model import save_vqkd
    from megatron_vlmoe.tokenizers.vqkd.training import build_model

    config = build_preset(
        "tiny", image_size=16, patch_size=4, width=16, num_heads=2, num_codes=30, code_dim=4
    )
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        codebook = torch.randn(30, 4, generator=generator)
        model.quantizer.codebook.copy_(torch.nn.functional.normalize(codebook, dim=1))
    folder = tmp_path_factory.mktemp("tokenizer")
    save_vqkd(folder, model, training={})
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of ours for imports of public checkpoints."""
    from public_states import write_text_model

    return write_text_model(tmp_path_factory.mktemp("text_model"))


@pytest.fixture(scope="session")
def vocab_txt(text_model: Path) -> Path:
    """A WordPiece vocabulary beside it."""
    from public_states import write_wordpiece

    return write_wordpiece(text_model.with_name("vocab.txt"))


@pytest.fixture
def desk(tmp_path: Path, tiny_tokenizer: str, capfd: pytest.CaptureFixture[str]) -> Desk:
    """An empty folder for the raw data of a task."""
    (tmp_path / "raw").mkdir()
    return Desk(tmp_path / "raw", tmp_path / "out" / "p", tiny_tokenizer, capfd)
