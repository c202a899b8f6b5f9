"""`vlmoe check`: what a run would stumble over is found before it is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from commands import Outcome, run
from small_corpus import SMALL_MODEL, Corpus

DATA = """
--data.text text_train --data.images images_train --data.pairs pairs_train
--data.text_tokenizer text.model --data.image_tokenizer image_tokenizer
""".split()


def check(folder: Path, *more: str | Path, ranks: int = 0) -> Outcome:
    words = ["check", "pretrain", *SMALL_MODEL, *DATA, *map(str, more)]
    return run("-m", "megatron_vlmoe", *words, cwd=folder, ranks=ranks)


def levels(outcome: Outcome) -> dict[str, set[str]]:
    """Levels by check."""
    found: dict[str, set[str]] = {}
    for line in outcome.stdout.splitlines():
        level, _, rest = line.partition(" ")
        found.setdefault(rest.strip().partition(":")[0], set()).add(level)
    return found


def test_several_ranks_check_a_sound_run(corpus: Corpus, tmp_path: Path) -> None:
    outcome = check(corpus.folder, "--save", tmp_path / "run", ranks=2).succeeded()
    found = levels(outcome)
    assert found.keys() >= {"data", "tokenizer", "checkpoint", "--save", "GPUs", "/dev/shm"}
    assert found["data"] == found["checkpoint"] == found["--save"] == found["network"] == {"ok"}
    assert "2 rank(s) over gloo" in outcome.stdout
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_looked_at_is_a_finding(tmp_path: Path) -> None:
    """Each would be a traceback in the place of all that was found."""
    (tmp_path / "taken").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metadata.json").write_text('{"sharded_backend": ""}')
    lines = {
        ("taken", ""): "--save: taken: run.lock: Not a directory",
        ("foreign", ""): "checkpoint: foreign: not a readable checkpoint",
        ("y" * 300, ""): "File name too long",
        ("run", "node..1"): "network: node..1 has no address (it cannot be a host name)",
    }
    words = ["-m", "megatron_vlmoe", "check", "pretrain-random", "--preset", "tiny-dense"]
    for (save, address), line in lines.items():
        outcome = run(*words, "--save", save, cwd=tmp_path, environ={"MASTER_ADDR": address})
        assert outcome.code == 1 and not outcome.stderr, outcome.text
        assert any(
            found.startswith("error") and line in found for found in outcome.stdout.splitlines()
        ), outcome.text


def test_a_flipped_bit_of_the_data_is_found_before_training(corpus: Corpus, tmp_path: Path) -> None:
    for path in corpus.folder.iterdir():
        if path.name.startswith(("text", "images", "pairs")):
            shutil.copy(path, tmp_path)
    shutil.copytree(corpus.folder / "image_tokenizer", tmp_path / "image_tokenizer")
    damaged = tmp_path / "images_train_image.bin"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    outcome = check(tmp_path)
    assert outcome.code == 1, outcome.text
    assert levels(outcome)["data"] == {"error"} and damaged.name in outcome.stdout
    assert levels(check(tmp_path, "--quick").succeeded())["data"] == {"ok"}
    trained = Corpus(tmp_path).pretrain("run", 2, "--data.verify", "full")
    trained.refused(damaged.name, "than its manifest says", code=1)
    weights = tmp_path / "image_tokenizer" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    size = int.from_bytes(content[:8], "little")
    codebook = json.loads(content[8 : 8 + size])["quantizer.codebook"]["data_offsets"][0]
    content[8 + size + codebook + 2] ^= 1
    weights.write_bytes(content)
    lines = check(tmp_path, "--quick").stdout
    assert "image_tokenizer: damaged" in lines
