"""The installed package does everything from any folder: `pip install .`, then `vlmoe`, with no repository in sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY

pytestmark = pytest.mark.timeout(1200)

SMALL = """
--preset tiny-8e --model.num_layers 2 --model.num_vl_layers 1 --model.hidden_size 16
--model.num_attention_heads 2 --model.image_size 32 --model.patch_size 8 --moe.layers 1
--data.global_texts 4 --data.global_images 4 --data.global_pairs 4
--data.micro_texts 4 --data.micro_images 4 --data.micro_pairs 4 --data.num_workers 0
--train.eval_steps 0 --train.steps 2 --optim.lr_warmup_steps 1
"""
COCO = "--format coco --annotations raw/coco/annotations/captions_train2014.json --images raw/coco/train2014"
STEPS = f"""
sample-corpus --output raw --num-images 8 --workers 1
train-text-tokenizer --input raw/text/train.jsonl --vocab-size 150 --output text
index-text --input raw/text/train.jsonl --output text_train --text-tokenizer text.model
index-images --input raw/images/train --output images_train
index-pairs {COCO} --output pairs_train --text-tokenizer text.model
train-image-tokenizer --images images_train --output codes --preset tiny --image-size 32 --patch-size 8 --num-codes 16 --steps 2 --batch-size 4
pretrain {" ".join(SMALL.split())} --data.text text_train --data.images images_train --data.pairs pairs_train --data.text_tokenizer text.model --data.image_tokenizer codes --save run
export --load run --output hf
inspect-checkpoint hf
import --load hf --output back
compare-checkpoints run back
"""  # noqa: E501 (command lines)


def environment(site: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the package into, from a copy: a build leaves files in its source."""
    source, target = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("site")
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "megatron_vlmoe", source / "megatron_vlmoe", ignore=ignore)
    command = [sys.executable, *"-m pip install --quiet --no-deps --no-build-isolation".split()]
    command += ["--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=target)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return target


def test_indexing_pretraining_and_export_without_the_repository(site: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [sys.executable, "-c", "import megatron_vlmoe; print(megatron_vlmoe.__file__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(site),
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    for line in STEPS.strip().splitlines():
        done = subprocess.run(
            [site / "bin" / "vlmoe", *line.split()],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(site),
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "hf" / "modeling_vlmoe.py").is_file()
