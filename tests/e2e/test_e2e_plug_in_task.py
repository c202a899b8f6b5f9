"""A sixth task that an installed package adds: the whole way from raw data to predictions and an export."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import REPOSITORY, Outcome, run
from data_files import encoded, picture, sentence, write_tokenizer

# What `pip install` would put on the path: a module, and beside it the metadata that names its entry point.
PLUG_INS = REPOSITORY / "tests" / "plug_ins"
CLASSES = ("entailment", "neutral", "contradiction")
SMALL = """
--task.architecture tiny-8e --model.num_layers 4 --model.hidden_size 32 --model.num_attention_heads 4
--model.ffn_hidden_size 64 --model.num_vl_layers 1 --model.image_size 32 --model.patch_size 8
--model.text_length 16 --model.pair_text_length 16 --moe.layers 2 3 --moe.num_vision_experts 4
--moe.num_text_experts 2 --moe.capacity_factor 0 --moe.eval_capacity_factor 0 --model.layer_scale_init 1
--task.micro_batch_size 2 --task.global_batch_size 4 --train.steps 2 --data.num_workers 0 --log.interval 1
""".split()
# A script of a user, with the plug-in installed; transformers knows nothing of it.
ASK = """
import json, sys
from megatron_vlmoe.inference import VLMoE
from transformers import pipeline

run, export, image, sentence = sys.argv[1:]
model = VLMoE.from_checkpoint(run)
found = {
    "decision": model.decide(image=image, sentence=sentence).scores,
    "many": [row[0].label for row in model.rank(1, image=[image, image], sentence=sentence)],
    "export": VLMoE.from_checkpoint(export).decide(image=image, sentence=sentence).scores,
}
for what, ask in {
    "other method": lambda: model.answer(image, sentence),
    "other input": lambda: model.decide(image=image, question=sentence),
}.items():
    try:
        ask()
    except ValueError as error:
        found[what] = str(error)
ask = pipeline("visual-question-answering", model=export, trust_remote_code=True)
found["pipeline"] = {row["answer"]: row["score"] for row in ask(image=image, question=sentence)}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Lab:
    """Raw and prepared data of the task, and runs on it."""

    folder: Path

    def python(self, *words: str, timeout: float = 240.0) -> Outcome:
        """Runs `python WORDS...` where the plug-in is installed."""
        path = os.pathsep.join((str(REPOSITORY), str(PLUG_INS)))
        return run(*words, cwd=self.folder, timeout=timeout, environ={"PYTHONPATH": path})

    def finetune(self, save: str, *launcher: str) -> list[dict[str, float]]:
        """Two steps; the rows of the metrics."""
        words = ("finetune", "--task", "snli_ve", *SMALL, "--task.data", "snli_ve", "--save", save)
        program = (*launcher, "-m", "megatron_vlmoe", *words, "--data.text_tokenizer", "text.model")
        self.python(*program).succeeded()
        lines = (self.folder / save / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def metrics(self, run_folder: str) -> dict[str, float]:
        """What an evaluation wrote."""
        content = json.loads((self.folder / run_folder / "metrics.json").read_text())
        assert content["task"] == "snli_ve"
        return content["metrics"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A dozen pictures, prepared and trained on in one process."""
    made = Lab(tmp_path_factory.mktemp("snli_ve"))
    raw = made.folder / "raw"
    (raw / "images").mkdir(parents=True)
    write_tokenizer(made.folder / "text.model")
    for number in range(12):
        (raw / "images" / f"{number}.jpg").write_bytes(encoded(picture(number)))
    for split, numbers in {"train": range(16), "dev": range(5), "test": range(4)}.items():
        rows = [
            {"id": f"{split}-{n}", "image": f"{n % 12}.jpg", "sentence": sentence(n)}
            | {"label": CLASSES[n % 3]}
            for n in numbers
        ]
        (raw / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (raw / "train.jsonl").open("a") as file:
        file.write('{"id": "bad", "image": "0.jpg", "sentence": "a", "label": "maybe"}\n')
    words = "--task snli_ve --raw raw --output-prefix snli_ve --tokenizer-model text.model"
    tool = str(REPOSITORY / "tools" / "prepare_task.py")
    made.python(tool, *words.split(), "--on-error", "skip", "--workers", "1").succeeded()
    made.finetune("alone")
    return made


def test_it_takes_less_than_60_lines() -> None:
    assert len((PLUG_INS / "snli_ve.py").read_text().splitlines()) < 60


def test_its_raw_data_is_prepared_by_its_own_reader(lab: Lab) -> None:
    manifest = json.loads((lab.folder / "snli_ve_train.json").read_text())
    assert manifest["kind"] == "snli_ve" and manifest["samples"] == 16
    # Sixteen samples about twelve pictures, each of which is stored once.
    assert manifest["documents"] == 12
    assert manifest["left_out"] == {}
    (reject,) = (lab.folder / "snli_ve_train.rejects.jsonl").read_text().splitlines()
    assert "class 'maybe' is none of entailment, neutral, contradiction" in reject
    labels = json.loads((lab.folder / "snli_ve_labels.json").read_text())
    assert labels == {"task": "snli_ve", "labels": list(CLASSES)}


def test_two_processes_train_it_as_one_does(lab: Lab) -> None:
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    together = lab.finetune("together", *launcher)
    alone = [json.loads(line) for line in (lab.folder / "alone/metrics.jsonl").open()]
    for name in ("loss/snli_ve", "grad_norm"):
        values = [[row[name] for row in rows if name in row] for rows in (alone, together)]
        assert len(values[0]) == 2 and values[1] == pytest.approx(values[0], rel=1e-4)


def test_it_is_evaluated_predicted_and_exported(lab: Lab) -> None:
    words = "evaluate --load alone --save evaluation --data.num_workers 0".split()
    lab.python("-m", "megatron_vlmoe", *words).succeeded()
    assert lab.metrics("evaluation") == lab.metrics("alone")
    assert set(lab.metrics("alone")) == {
        f"{split}/{name}"
        for split in ("dev", "test")
        for name in ("accuracy", "samples", "unlabelled")
    }
    rows = [json.loads(line) for line in (lab.folder / "evaluation/predictions.jsonl").open()]
    row = next(row for row in rows if row["id"] == "dev-1")
    expected = {item["label"]: item["score"] for item in row["most_likely"]}
    assert row["texts"] == [sentence(1)] and set(expected) == set(CLASSES)
    assert not list((lab.folder / "evaluation").glob("*submission*"))

    image = "raw/images/1.jpg"
    asked = ("predict", "--load", "alone", "--image", image, "--sentence", sentence(1), "--json")
    said = json.loads(lab.python("-m", "megatron_vlmoe", *asked).succeeded().stdout)
    assert {item["label"]: item["score"] for item in said["most_likely"]} == pytest.approx(expected)

    tool = str(REPOSITORY / "tools" / "convert_checkpoint.py")
    lab.python(tool, *"export --load alone --output export".split()).succeeded()
    lab.python(tool, *"import --load export --output imported".split()).succeeded()
    config = json.loads((lab.folder / "export/config.json").read_text())
    assert config["architectures"] == ["VLMoEForVisualQuestionAnswering"]
    assert (config["task"], config["problem_type"]) == ("snli_ve", "single_label_classification")
    card = (lab.folder / "export/README.md").read_text()
    assert "pipeline_tag: visual-question-answering\n" in card
    assert "processor(text=sentence, images=image, return_tensors" in card

    (lab.folder / "ask.py").write_text(ASK)
    answer = lab.python("ask.py", "alone", "export", image, sentence(1)).succeeded()
    found = json.loads(answer.stdout.splitlines()[-1])
    for where in ("decision", "export", "pipeline"):
        assert found[where] == pytest.approx(expected, abs=1e-4), where
    assert found["many"] == [row["prediction"]] * 2
    assert "answer needs a checkpoint of vqa;" in found["other method"]
    assert "snli_ve reads image, sentence; given image, question" in found["other input"]


def test_without_the_package_its_runs_and_data_are_refused_by_name(lab: Lab) -> None:
    words = ["-m", "megatron_vlmoe", "evaluate", "--load", "alone"]
    line = run(*words, cwd=lab.folder).refused("alone", "task.name=snli_ve", "vqa, nlvr2")
    assert "plug-in" in line
    tool = REPOSITORY / "tools" / "inspect_dataset.py"
    refused = run(tool, "snli_ve_dev", cwd=lab.folder)
    refused.refused("snli_ve_dev.json", "'snli_ve'")
