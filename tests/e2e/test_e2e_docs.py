"""Commands of the documents, run: on a small corpus, and the page with six pictures as it stands."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest
from commands import REPOSITORY, run, run_many
from document_commands import RUN, adapted, commands_of

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(600)
def test_commands_of_the_documents_run(corpus, tmp_path):
    """One after the other, since what one writes another reads."""
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.folder, folder)
    for path in folder.glob("pairs_train*"):
        shutil.copy(path, folder / path.name.replace("pairs_train", "pairs_train_too"))
    (folder / "data").mkdir()
    (folder / "tokenizers").mkdir()
    corpus.pretrain(folder / "run", 2).succeeded()
    for outcome in run_many([adapted(line) for line in RUN], cwd=folder, timeout=500):
        outcome.succeeded()
    assert (folder / "coco.png").exists() and (folder / "run" / "plot.png").exists()
    assert (folder / "runs" / "report" / "report.html").exists()
    assert (folder / "runs" / "base-32e-start").is_dir()


def test_your_own_data_in_ten_lines(tmp_path):
    page = REPOSITORY / "docs" / "own-data.md"
    (pictures,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    run("-c", pictures, cwd=tmp_path).succeeded()
    lines = [shlex.split(command.text)[1:] for command in commands_of(page)]
    outcomes = [outcome.succeeded() for outcome in run_many(lines, cwd=tmp_path)]
    assert "6 kept, 0 rejected" in outcomes[1].stderr
    assert (tmp_path / "run" / "checkpoints" / "iter_0000002").is_dir()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
