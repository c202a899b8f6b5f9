"""The five downstream tasks of a very small sample corpus, prepared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RAW = {
    "vqa": "vqa",
    "nlvr2": "nlvr2",
    "retrieval": "flickr30k",
    "imagenet": "imagenet",
    "mnli": "mnli",
}


@dataclass(frozen=True)
class Prepared:
    """Where things are.

    Args:
        folder: of the prepared tasks; the raw ones are in `raw/tasks/`.
    """

    folder: Path

    @property
    def tokenizer(self) -> str:
        """The text tokenizer that all tasks were prepared with."""
        return str(self.folder / "text.model")

    def prefix(self, task: str) -> str:
        """`--task.data` of a task."""
        return str(self.folder / task)


def prepare_all(folder: Path, num_images: int = 20) -> Prepared:
    """Makes the corpus, a tokenizer and all tasks, in this process."""
    from megatron_vlmoe.prepare.readers.tasks.records import TaskInput
    from megatron_vlmoe.prepare.readers.text import read_training_texts
    from megatron_vlmoe.prepare.tasks import TaskOptions, prepare_task
    from megatron_vlmoe.prepare.tool import Run
    from megatron_vlmoe.sample_corpus.writer import SampleCorpus, make_sample_corpus
    from megatron_vlmoe.tokenizers.text import TextTokenizerTraining, train_text_tokenizer

    made, raw = Prepared(folder), folder / "raw"
    make_sample_corpus(SampleCorpus(output=raw, num_images=num_images, seed=3))
    files = (raw / "text" / "train.jsonl", raw / "coco/annotations/captions_train2014.json")
    training = TextTokenizerTraining(vocab_size=200, output_prefix=folder / "text")
    train_text_tokenizer(training, map(str, read_training_texts(tuple(map(str, files)))))
    for task, source in RAW.items():
        options = TaskOptions(tokenizer_model=None if task == "imagenet" else made.tokenizer)
        run = Run(made.prefix(task), 1, "stop", {"command": "", "inputs": []})
        prepare_task(TaskInput(task, str(raw / "tasks" / source)), run, options)
    return made
