"""The commands that stand in the documents: where they stand, what they say, and which of them tests run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from commands import REPOSITORY

DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    REPOSITORY / "examples" / "hf_finetune" / "README.md",
]
PROGRAMS = (
    *("vlmoe", "python", "torchrun", "bash", "sbatch", "deepspeed", "pip", "git", "source"),
    *("pre-commit", "export"),
)

# Commands that are run, in this order, in the folder of a small corpus, with the names of the documents adapted by
# ADAPTED. Every other command is only parsed, or stands in NOT_RUN.
RUN = (
    "vlmoe train-text-tokenizer --input wiki.jsonl dataset_coco.json --vocab-size 64000 --output tokenizers/text",
    "vlmoe index-text --input wiki.jsonl books.txt --output data/text --text-tokenizer tokenizers/text.model"
    " --workers 16",
    "vlmoe index-images --input imagenet22k --output data/imagenet22k --resize-short 320 --workers 16",
    "vlmoe index-pairs --format karpathy --annotations dataset_coco.json --images coco --output data/coco"
    " --text-tokenizer tokenizers/text.model --workers 16",
    "vlmoe merge-data --input data/sbu_train data/cc3m_train --output data/web_train",
    "vlmoe inspect-data data/coco --text-tokenizer tokenizers/text.model --png coco.png",
    "vlmoe inspect-data data/coco --checksums",
    "vlmoe encode-images --images data/imagenet22k_train --image-tokenizer tokenizers/image --views 4 --bf16",
    "vlmoe index-task --task vqa --raw raw/vqa --output data/vqa --text-tokenizer tokenizers/text.model"
    " --resize-short 480 --workers 16",
    "vlmoe index-task --task mnli --raw raw/mnli --output data/mnli --text-tokenizer tokenizers/text.model",
    "vlmoe inspect-checkpoint runs/quickstart",
    "vlmoe export --load runs/base-32e --output exports/base-32e",
    "vlmoe import --load exports/base-32e --output runs/imported",
    "vlmoe compare-checkpoints runs/base-32e exports/base-32e",
    "vlmoe upcycle --load runs/base-16e --num-experts 32 --output runs/base-32e-start",
    "vlmoe plot --run runs/quickstart",
    "vlmoe report runs/quickstart runs/dense --output runs/report",
    "vlmoe pretrain --preset base-32e --dry-run",
    "vlmoe pretrain --preset base-32e --dry-run --dry-run-world-size 32 --parallel.expert_model_parallel_size 8",
)
# Words of documents, and what the small corpus has in their place.
ADAPTED = {
    "16": "2",
    "64000": "200",
    "wiki.jsonl": "raw/text/train.jsonl",
    "books.txt": "raw/text/val.jsonl",
    "dataset_coco.json": "raw/tasks/flickr30k/dataset_flickr30k.json",
    "coco": "raw/tasks/flickr30k",
    "imagenet22k": "raw/images/train",
    "raw/vqa": "raw/tasks/vqa",
    "raw/mnli": "raw/tasks/mnli",
    "data/sbu_train": "pairs_train",
    "data/cc3m_train": "pairs_train_too",
    "data/imagenet22k_train": "images_train",
    "tokenizers/text.model": "text.model",
    "tokenizers/image": "image_tokenizer",
    "runs/quickstart": "run",
    "runs/dense": "run",
    "runs/base-16e": "run",
    "runs/base-32e": "run",
}
# Commands that are neither run nor parsed by a test: what they begin with, and why.
NOT_RUN = {
    "pip install": "needs a package registry; the tests' own environment was made so",
    "git clone": "needs a network",
    "source .venv/bin/activate": "of an interactive shell",
    "export ": "sets variables of the commands below it, which test_scripts_take_the_variables checks",
    "pre-commit install": "changes the checkout; continuous integration runs its hooks",
    "python tests/check_plan.py": "takes minutes; tests/distributed/test_plan.py compares the same numbers",
    "deepspeed ": "needs DeepSpeed and GPUs; tests/e2e/test_e2e_hf_finetune.py runs the same script",
    "torchrun --nproc-per-node 8 examples/hf_finetune/train.py": "tests/e2e/test_e2e_hf_finetune.py runs the script",
    "python examples/hf_finetune/train.py": "tests/e2e/test_e2e_hf_finetune.py runs the script",
}
SLURM = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
"""What Slurm sets in a job."""


@dataclass(frozen=True)
class DocumentCommand:
    """A command of a document.

    Args:
        document: the file, from the repository's root.
        text: on one line, without comment and variables.
        variables: set in front of it.
    """

    document: str
    text: str
    variables: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """As a shell of a Slurm job cuts it, without the dots that stand for more."""
        text = re.sub(r"\$\{(SLURM_\w+)\}", lambda name: SLURM[name[1]], self.text)
        return [word for word in shlex.split(text) if word != "..."]

    @property
    def reason(self) -> str:
        """Why no test runs or parses it; empty if one does."""
        return next((why for start, why in NOT_RUN.items() if self.text.startswith(start)), "")


def code_lines(text: str) -> Iterator[str]:
    """Lines of indented blocks and of fenced ones in no other language than a shell's, without what continues them."""
    fence, shell = False, False
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        if line.lstrip().startswith("```"):
            fence = not fence
            shell = line.strip() in ("```", "```bash", "```sh", "```console")
        elif shell if fence else line.startswith("    "):
            yield line.strip()


def commands_of(path: Path) -> list[DocumentCommand]:
    """Every command in the blocks of a document."""
    found = []
    for line in code_lines(path.read_text(encoding="utf-8")):
        variables = []
        rest = re.sub(r"\s#(\s.*)?$", "", line).strip()
        while match := re.match(r"([A-Z_]+)=(\"[^\"]*\"|\S*)\s+", rest):
            variables.append(match[1])
            rest = rest[match.end() :]
        if rest.split(" ")[0] in PROGRAMS:
            name = str(path.relative_to(REPOSITORY))
            found.append(DocumentCommand(name, " ".join(rest.split()), tuple(variables)))
    return found


def all_commands() -> list[DocumentCommand]:
    """Those of all documents, each once per document."""
    return list(dict.fromkeys(command for path in DOCUMENTS for command in commands_of(path)))


def adapted(text: str) -> list[str]:
    """The words after `vlmoe`, for the small corpus."""
    return [ADAPTED.get(word, word) for word in shlex.split(text)[1:]]
