"""The scripts of examples/prepare on tiny corpora: what is there is read, what is not is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from data_files import ROOT, sentence

from megatron_vlmoe.data.manifest import load_manifest

pytestmark = pytest.mark.process


def run(script: str, raw: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a script or a line of bash with these variables and none of ours."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    fixed = {"PATH": path, "PYTHONPATH": str(ROOT), "VIRTUAL_ENV": "x", "WORKERS": "1"}
    folders = {"RAW": str(raw), "DATA": str(raw / "out"), "TEXT_TOKENIZER": str(raw / "t.model")}
    return subprocess.run(
        ["bash", *script.split()] if script.startswith("examples/") else ["bash", "-c", script],
        cwd=ROOT,
        env={**fixed, **folders, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_the_text_tokenizer_knows_a_word_of_every_corpus(tmp_path: Path) -> None:
    wiki = [{"id": str(i), "revid": "9", "text": "the anarchist reads"} for i in range(20)]
    put(tmp_path / "wikipedia/AA/wiki_00", "\n".join(map(json.dumps, wiki[:10])))
    put(tmp_path / "wikipedia/AB/wiki_07", "\n".join(map(json.dumps, wiki[10:])))
    put(tmp_path / "bookcorpus/a.txt", "never read\n")
    table = pyarrow.table({"text": ["the captain sailed ."] * 20})
    pyarrow.parquet.write_table(table, tmp_path / "bookcorpus" / "train-00000.parquet")
    images = [{"sentences": [{"raw": "the zebra grazes"}] * 20}]
    put(tmp_path / "coco/dataset_coco.json", json.dumps({"images": images}))
    put(tmp_path / "vg/annotations/region_descriptions.json", '[{"id": 1}]')
    done = run("examples/prepare/tokenizers.sh text", tmp_path, VOCAB_SIZE="120")
    # Annotations without a phrase are an error, whatever the other corpora hold.
    assert done.returncode == 1 and "region_descriptions.json holds no text" in done.stderr
    (tmp_path / "vg/annotations/region_descriptions.json").unlink()
    done = run("examples/prepare/tokenizers.sh text", tmp_path, VOCAB_SIZE="120")
    assert done.returncode == 0, done.stderr
    pieces = {line.split("\t")[0] for line in (tmp_path / "t.vocab").read_text().splitlines()}
    assert {"▁anarchist", "▁captain", "▁zebra"} <= pieces
    assert not {"▁revid", "revid", "▁never"} & pieces
    assert f"wikipedia: reads 2 of {tmp_path}/wikipedia/*/wiki_*" in done.stdout
    assert f"bookcorpus: leaves out 1 of {tmp_path}/bookcorpus/*.txt" in done.stdout
    missing = f"warning: not below {tmp_path}, so not in the tokenizer: vg sbu cc3m"
    assert missing in done.stderr.splitlines()


def test_named_files_are_all_read_or_missed(tmp_path: Path) -> None:
    put(tmp_path / "one.txt", "alphabet\n" * 9)
    put(tmp_path / "b/two.txt", "bathtub\n" * 9)
    names = f"{tmp_path}/one.txt\n {tmp_path}/b/*.txt\n"
    script = "examples/prepare/tokenizers.sh text"
    done = run(script, tmp_path, TEXT_FILES=f"{names} {tmp_path}/c/*.txt", VOCAB_SIZE="60")
    assert done.returncode == 1 and f"error: {tmp_path}/c/*.txt: not found" in done.stderr
    done = run(script, tmp_path, TEXT_FILES=names, VOCAB_SIZE="60")
    assert done.returncode == 0, done.stderr
    vocabulary = (tmp_path / "t.vocab").read_text()
    assert "▁alphabet" in vocabulary and "▁bathtub" in vocabulary


@pytest.mark.parametrize(
    ("name", "variables", "documents"),
    [
        ("books_large_p1.txt", {}, 3),
        ("a.txt", {}, 1),
        ("a.txt", {"DOCUMENTS": "lines:50"}, 5),
        ("data-00000-of-00001.arrow", {"DOCUMENTS": "lines:100"}, 3),
    ],
)
def test_bookcorpus(
    tmp_path: Path, tiny_tokenizer: str, name: str, variables: dict[str, str], documents: int
) -> None:
    sentences = [sentence(i) for i in range(250)]
    path = tmp_path / "bookcorpus" / name
    put(path, "\n".join(sentences))
    if name.endswith(".arrow"):
        table = pyarrow.table({"text": sentences})
        with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as w:
            w.write_table(table)
        put(path.parent / "cache-1f.arrow", "of a filter")
    done = run(
        "examples/prepare/bookcorpus.sh", tmp_path, TEXT_TOKENIZER=tiny_tokenizer, **variables
    )
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(tmp_path / "out" / "bookcorpus_train")
    assert (manifest.documents, manifest.rejects) == (documents, 0)


def test_lists_over_several_lines_are_taken_whole(tmp_path: Path) -> None:
    line = "source examples/launch_common.sh; OPTIONS=(); take --data.text TEXT; echo ${OPTIONS[@]}"
    done = run(f"set -euo pipefail; {line}", tmp_path, TEXT="0.7 a\n 0.3 b\n")
    assert done.stdout.split() == ["--data.text", "0.7", "a", "0.3", "b"], done.stderr
