"""VQA from hand-made raw files: classes, soft targets, held-out images, bad records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from data_files import ROOT, encoded, files_of, picture, rejects_of, tool
from raw_tasks import Desk, ids, put, put_table, rows, stored_images

from megatron_vlmoe.data.manifest import load_manifest
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, TaskRow, load_labels
from megatron_vlmoe.finetune.metrics import guessing_rate
from megatron_vlmoe.finetune.predictions import vqa_submission
from megatron_vlmoe.finetune.results import Predictions, left_out_lines
from megatron_vlmoe.prepare.readers.tasks.records import chosen


def question(number: int, image: int, text: object = "is it red") -> dict[str, Any]:
    return {"image_id": image, "question": text, "question_id": number}


def annotation(number: int, main_answer: str, answers: dict[str, int]) -> dict[str, Any]:
    said = [{"answer": text} for text, count in answers.items() for _ in range(count)]
    kind = {"answer_type": "yes/no"} if main_answer in ("Yes.", "yes") else {}
    return {"question_id": number, "multiple_choice_answer": main_answer, "answers": said} | kind


def vqa_image(raw: Path, part: str, image: int) -> bytes:
    data = encoded(picture(image))
    put(raw / part / f"COCO_{part}_{image:012d}.jpg", data)
    return data


# Main answers, with the least count 2: "yes" 3 times (once spelled otherwise), "2" twice (once
# as a word), "star" twice, "blue" once; by first appearance 2, yes, star.
TRAIN_QUESTIONS = [
    (question(11, 1, "how many stars"), annotation(11, "two", {"2": 2, "two": 7, "3": 1})),
    (question(12, 1), annotation(12, "Yes.", {"yes": 3, "no": 6, "star": 1})),
    (question(21, 2), annotation(21, "blue", {"blue": 10})),  # no class of these answers
    (question(13, 1, " a star "), annotation(13, "yes", {"no": 5, "star": 1, "yes": 4})),
]
VAL_QUESTIONS = [
    (question(31, 3), annotation(31, "2", {"2": 9, "yes": 1})),
    (question(41, 4), annotation(41, "star", {"yes": 2, "star": 8})),
    (question(42, 4), annotation(42, "star", {"Star": 10})),  # raw answers are not normalised
    (question(51, 5), annotation(51, "yes", {"yes": 10})),
]
EXPECTED_TARGETS = {
    "11": {0: 0.6},
    "12": {1: 0.9, 2: 0.3},
    "13": {1: 1.0, 2: 0.3},
    "31": {0: 1.0, 1: 0.3},
    "41": {1: 0.6, 2: 1.0},
    "42": {},
    "51": {1: 1.0},
}


@pytest.fixture
def vqa(desk: Desk) -> dict[tuple[str, int], bytes]:
    """Raw VQAv2: annotations in a subfolder, questions beside the images; the images by name."""
    for part, found in (("train2014", TRAIN_QUESTIONS), ("val2014", VAL_QUESTIONS)):
        write_questions(desk.raw, part, [q for q, _ in found])
        notes = {"annotations": [a for _, a in found]}
        put(desk.raw / "annotations" / f"v2_mscoco_{part}_annotations.json", notes)
    write_questions(desk.raw, "test2015", [question(61, 6), question(71, 7), question(62, 6)])
    write_questions(desk.raw, "test-dev2015", [question(71, 7)])
    names = {1: "train2014", 2: "train2014", 3: "val2014", 4: "val2014", 5: "val2014"}
    names |= {6: "test2015", 7: "test2015"}
    return {(part, image): vqa_image(desk.raw, part, image) for image, part in names.items()}


def write_questions(raw: Path, part: str, questions: list[dict[str, Any]]) -> None:
    name = f"v2_OpenEnded_mscoco_{part}_questions.json"
    put(raw / name, {"questions": questions})


VQA_OPTIONS = ("--min-answer-count", "2", "--num-val-images", "1")


def test_vqa_rows_targets_and_splits(vqa: dict[tuple[str, int], bytes], desk: Desk) -> None:
    assert desk.prepare("vqa", *VQA_OPTIONS) == 0
    messages = desk.messages()
    labels = load_labels(str(desk.out))
    assert labels == Labels("vqa", ("2", "yes", "star"))
    data = {s: desk.opened(s, "vqa") for s in ("train", "val", "test", "test-dev")}
    assert ids(data["test"]) == ["61", "71", "62"] and ids(data["test-dev"]) == ["71"]
    (held_out,) = chosen([3, 4, 5], 1, 0)
    val = [str(q["question_id"]) for q, _ in VAL_QUESTIONS if q["image_id"] == held_out]
    rest = ["11", "12", "13", "31", "41", "51"]  # 42 has no class: left out unless held out
    assert ids(data["val"]) == val
    assert ids(data["train"]) == [number for number in rest if number not in val]
    answers = {str(a["question_id"]): a for _, a in (*TRAIN_QUESTIONS, *VAL_QUESTIONS)}
    for row in (*rows(data["train"]), *rows(data["val"])):
        targets = dict(zip(row.labels, np.float32(row.scores).tolist(), strict=True))
        assert targets == {k: float(np.float32(v)) for k, v in EXPECTED_TARGETS[row.id].items()}
        assert list(row.answers) == [a["answer"] for a in answers[row.id]["answers"]]
        assert row.answer_type == answers[row.id].get("answer_type", "")
    assert {row.answer_type for row in rows(data["train"])} == {"", "yes/no"}
    first, second, third = rows(data["test"])
    assert first == TaskRow("61", (0,), (0,), ("is it red",))
    assert (second.images, third.images, third.texts) == ((1,), (0,), (2,))
    assert stored_images(data["test"]) == [vqa["test2015", 6], vqa["test2015", 7]]
    assert stored_images(data["train"])[0] == vqa["train2014", 1]
    assert data["train"].row(2).raw == ("a star",)
    for one in data.values():
        assert one.manifest.labels_sha256 == labels.sha256
    manifest = data["train"].manifest
    omitted = 1 + (held_out != 4)
    assert manifest.omitted == {"no answer in the vocabulary": omitted}
    assert f"vqa train: {omitted} samples left out: no answer in the vocabulary\n" in messages
    assert manifest.samples == len(data["train"]) and manifest.rejects == 0
    assert manifest.documents == data["train"].num_images
    assert manifest.tokens == int(data["train"].text_lengths().sum())


def test_vqa_holds_out_questions_without_a_class(
    vqa: dict[tuple[str, int], bytes], desk: Desk
) -> None:
    seed = next(seed for seed in range(50) if chosen([3, 4, 5], 1, seed) == {4})
    assert desk.prepare("vqa", *VQA_OPTIONS, "--seed", str(seed), "--splits", "val", "train") == 0
    val = desk.opened("val", "vqa")
    assert [(row.id, row.labels) for row in rows(val)] == [("41", (1, 2)), ("42", ())]
    assert ids(desk.opened("train", "vqa")) == ["11", "12", "13", "31", "51"]
    assert not Path(f"{desk.out}_test.json").exists()
    # "star" is right for 41; 42 counts as a question that it is wrong for.
    assert guessing_rate("vqa", str(desk.out), "val") == 50.0


def test_at_most_half_of_the_val_images_are_held_out(
    vqa: dict[tuple[str, int], bytes], desk: Desk
) -> None:
    options = ("--min-answer-count", "2", "--splits", "val")  # 1,000 of 3 images
    assert desk.prepare("vqa", *options) == 0
    assert desk.opened("val", "vqa").num_images == 1


@pytest.mark.process
def test_choice_depends_on_nothing_but_seed_and_items() -> None:
    script = (
        "from megatron_vlmoe.prepare.readers.tasks.records import chosen\n"
        "print(sorted(chosen(set(map(str, range(99))), 9, 1)), sorted(chosen(range(99), 9, 1)))"
    )
    texts, numbers = chosen(map(str, range(98, -1, -1)), 9, 1), chosen(range(98, -1, -1), 9, 1)
    assert texts == {str(n) for n in numbers} and len(numbers) == 9
    assert numbers != chosen(range(99), 9, 2)
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == f"{sorted(texts)} {sorted(numbers)}"
    counts = Counter(n for seed in range(200) for n in chosen(range(10), 5, seed))
    assert min(counts.values()) > 60  # 100 on average, standard deviation 7


def test_bad_vqa_records(vqa: dict[tuple[str, int], bytes], desk: Desk) -> None:
    bad = [
        question(81, 1, "?\ud800"),
        question(82, 1, " "),
        question(83, 1, None),
        question(84, 99),
        question(85, 1),
        {"question": "x", "question_id": 86},
    ]
    notes = [
        annotation(q["question_id"], "yes", {"yes": 10}) for q in bad if q["question_id"] != 85
    ]
    notes.append({"question_id": 87, "multiple_choice_answer": "yes", "answers": [{}]})
    # Told once, with its question.
    notes.append({"question_id": 85, "multiple_choice_answer": "yes", "answers": "yes"})
    bad.append(question(88, 1))
    write_questions(desk.raw, "train2014", [*bad, *(q for q, _ in TRAIN_QUESTIONS)])
    notes += [a for _, a in TRAIN_QUESTIONS]
    path = desk.raw / "annotations" / "v2_mscoco_train2014_annotations.json"
    put(path, {"annotations": notes})
    questions = desk.raw / "v2_OpenEnded_mscoco_train2014_questions.json"
    assert desk.prepare("vqa", *VQA_OPTIONS, "--splits", "train") == 1
    assert desk.error() == f"{questions}: question 81: invalid Unicode"
    assert files_of(desk.out.parent) == []
    missing = desk.raw / "train2014" / f"COCO_train2014_{99:012d}.jpg"
    assert desk.prepare("vqa", *VQA_OPTIONS, "--splits", "train", "--on-error", "skip") == 0
    assert rejects_of(f"{desk.out}_train") == [
        ("question 81", "invalid Unicode"),
        ("question 82", "empty text"),
        ("question 83", "text is not a string"),
        ("question 84", f"no such image file: {missing}"),
        ("annotation entry 6", "answers are not a list of objects with an answer"),
        ("question entry 5", "no whole question_id and image_id"),
        ("question 88", f"no annotation in {path}"),
        ("annotation entry 5", "answers are not a list of objects with an answer"),
        ("annotation of question 86", f"no such question in {questions}"),
    ]
    assert ids(desk.opened("train", "vqa"))[:3] == ["11", "12", "13"]
    manifest = load_manifest(f"{desk.out}_train")
    assert manifest.rejects == 9 and "9 rejected" in desk.messages()
    assert list(manifest.left_out or {}) == ["81", "82", "83", "84", "85", "86", "88"]


def test_no_question_counts_twice(vqa: dict[tuple[str, int], bytes], desk: Desk) -> None:
    questions, notes = ([pair[place] for pair in TRAIN_QUESTIONS] for place in (0, 1))
    write_questions(desk.raw, "train2014", [*questions, question(12, 2)])
    path = desk.raw / "annotations" / "v2_mscoco_train2014_annotations.json"
    # If it counted, "blue" would be a class.
    put(path, {"annotations": [*notes, annotation(21, "blue", {"blue": 10})]})
    options = (*VQA_OPTIONS, "--splits", "train")
    assert desk.prepare("vqa", *options) == 1
    assert desk.error() == f"{path}: annotation entry 4: question 21 has one already"
    assert desk.prepare("vqa", *options, "--on-error", "skip") == 0
    assert rejects_of(f"{desk.out}_train") == [
        ("annotation entry 4", "question 21 has one already"),
        ("question entry 4", "question 12 came before"),
    ]
    assert ids(desk.opened("train", "vqa"))[:3] == ["11", "12", "13"]
    assert load_labels(str(desk.out)).labels == ("2", "yes", "star")


def test_more_answers_than_annotators(vqa: dict[tuple[str, int], bytes], desk: Desk) -> None:
    path = desk.raw / "annotations" / "v2_mscoco_train2014_annotations.json"
    notes = [note for _, note in TRAIN_QUESTIONS]
    put(path, {"annotations": [annotation(11, "two", {"2": 2, "yes": 9}), *notes[1:]]})
    assert desk.prepare("vqa", *VQA_OPTIONS, "--splits", "train") == 1
    assert desk.error() == f"{path}: annotation entry 0: 11 answers, more than 10"


def test_bad_image_takes_all_its_samples(vqa: dict[tuple[str, int], bytes], desk: Desk) -> None:
    path = desk.raw / "test2015" / f"COCO_test2015_{6:012d}.jpg"
    path.write_bytes(path.read_bytes()[:300])
    assert desk.prepare("vqa", *VQA_OPTIONS, "--splits", "test", "--on-error", "skip") == 0
    data = desk.opened("test", "vqa")
    assert ids(data) == ["71"]
    found = rejects_of(f"{desk.out}_test")
    assert [record for record, _ in found] == ["question 61", "question 62"]
    assert all(reason.startswith("corrupt image") and str(path) in reason for _, reason in found)
    # The evaluator takes a submission only if it answers every question.
    table = predictions(data, desk, answer=1)
    lines = list(table.rows())
    assert vqa_submission(table.answers) == [
        {"question_id": 71, "answer": "yes"},
        {"question_id": 61, "answer": "yes"},  # the answer of most questions that train
        {"question_id": 62, "answer": "yes"},
    ]
    assert [(line["id"], line["left_out"], line["prediction"]) for line in lines[1:]] == [
        (number, reason, "yes") for number, (_, reason) in zip(("61", "62"), found)
    ]
    assert list(left_out_lines("vqa", "test", data.manifest)) == [
        "test: 2 samples were rejected when the split was prepared and do not count in the metrics; "
        "the submission answers them with 'yes': 61, 62"
    ]


def test_a_usable_question_after_an_unusable_one_of_its_id(
    vqa: dict[tuple[str, int], bytes], desk: Desk
) -> None:
    bad = {"question_id": 61, "image_id": None, "question": "is it red"}
    write_questions(desk.raw, "test2015", [bad, question(61, 6), question(62, 6), question(62, 7)])
    assert desk.prepare("vqa", *VQA_OPTIONS, "--splits", "test", "--on-error", "skip") == 0
    data = desk.opened("test", "vqa")
    assert (ids(data), data.manifest.rejects, data.manifest.left_out) == (["61", "62"], 2, {})
    table = predictions(data, desk, answer=2)
    list(table.rows())
    assert [answer["question_id"] for answer in vqa_submission(table.answers)] == [61, 62]


def predictions(data: TaskDataset, desk: Desk, answer: int) -> Predictions:
    """A model that gives all questions of a split one answer."""
    count = len(data)
    found = {"classes": np.full((count, 1), answer), "probabilities": np.ones((count, 1))}
    split: Any = SimpleNamespace(name="test", dataset=data)
    return Predictions("vqa", found, split, load_labels(str(desk.out)))


def test_what_an_older_preparation_left_out_is_told(
    vqa: dict[tuple[str, int], bytes], desk: Desk
) -> None:
    write_questions(desk.raw, "test2015", [question(61, 6), question(61, 7), {"question_id": 62}])
    assert desk.prepare("vqa", *VQA_OPTIONS, "--splits", "test", "--on-error", "skip") == 0
    path = Path(f"{desk.out}_test.json")
    manifest = json.loads(path.read_text())
    # Of two rejects one is a question that is missing; the other one's id has an answer.
    assert manifest["left_out"] == {"62": "no whole question_id and image_id"}
    (_, unnamed) = left_out_lines("vqa", "test", load_manifest(f"{desk.out}_test"))
    assert unnamed.startswith("test: 1 records") and ".rejects.jsonl" in unnamed
    del manifest["left_out"], manifest["fallback_answer"]
    path.write_text(json.dumps(manifest))
    data = desk.opened("test", "vqa")
    assert len(list(predictions(data, desk, 0).rows())) == 1
    (line,) = left_out_lines("vqa", "test", data.manifest)
    assert line.startswith("test: 2 records") and line.endswith(
        "prepare it again to have them named"
    )


def test_missing_vqa_files_are_told_before_any_work(
    vqa: dict[tuple[str, int], bytes], desk: Desk
) -> None:
    (desk.raw / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    assert desk.prepare("vqa", *VQA_OPTIONS, "--splits", "train", "test") == 1
    assert "v2_OpenEnded_mscoco_test2015_questions.json: no such file" in desk.error()
    (desk.raw / "train2014").rename(desk.raw / "train")
    assert desk.prepare("vqa", *VQA_OPTIONS) == 1
    assert desk.error().startswith(f"{desk.raw / 'train2014'}: no such folder")
    (desk.raw / "train").rename(desk.raw / "train2014")
    assert desk.prepare("vqa") == 1
    assert desk.error().endswith("no answer occurs 9 times: lower --min-answer-count")
    assert desk.prepare("vqa", "--splits", "dev") == 1
    assert "no split 'dev': one of train, val, test, test-dev" in desk.error()
    assert not desk.out.parent.exists()


@pytest.mark.parametrize(("task", "name"), [("vqa", "VQAv2"), ("nlvr2", "NLVR2")])
def test_a_folder_without_any_layout(desk: Desk, task: str, name: str) -> None:
    put(desk.raw / "README.txt", "nothing")
    assert desk.prepare(task) == 1
    assert desk.error().startswith(f"{desk.raw}: no {name} in it: no ")


@pytest.mark.process
def test_workers_do_not_change_the_bytes(
    vqa: dict[tuple[str, int], bytes], monkeypatch: pytest.MonkeyPatch, desk: Desk
) -> None:
    # Several chunks, with images that come again later.
    many = [question(1000 + i, 6 + i % 7 % 2) for i in range(100)]
    write_questions(desk.raw, "test2015", many)
    options = (*VQA_OPTIONS, "--splits", "test")
    assert desk.prepare("vqa", *options) == 0
    files = [path for path in desk.out.parent.iterdir() if path.name != "p_test.json"]
    before = {path: path.read_bytes() for path in files}
    assert len(before) == 6
    assert desk.prepare("vqa", *options, "--workers", "2") == 0
    assert {path: path.read_bytes() for path in files} == before


def as_list(part: str, found: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """The entries of ALBEF's and BLIP's list."""
    return [
        {
            "question_id": q["question_id"],
            "question": q["question"],
            "image": f"/elsewhere/coco/{part}/COCO_{part}_{q['image_id']:012d}.jpg",
            "answer": [said["answer"] for said in note["answers"]],
            "dataset": "vqa",
        }
        for q, note in found
    ]


def as_table(
    found: list[tuple[dict[str, Any], dict[str, Any]]], images: dict[int, bytes], struct: bool
) -> dict[str, list[Any]]:
    """The columns of Hugging Face's table; the image a struct of bytes and path, or bytes alone."""
    return {
        "multiple_choice_answer": [note["multiple_choice_answer"] for _, note in found],
        "answers": [
            [{**said, "answer_confidence": "yes", "answer_id": 1} for said in note["answers"]]
            for _, note in found
        ],
        "answer_type": ["other" for _ in found],
        **{key: [q[key] for q, _ in found] for key in ("image_id", "question_id", "question")},
        "image": [
            {"bytes": images[q["image_id"]], "path": None} if struct else images[q["image_id"]]
            for q, _ in found
        ],
    }


def most_frequent(note: dict[str, Any]) -> str:
    return Counter(said["answer"] for said in note["answers"]).most_common(1)[0][0]


@pytest.mark.parametrize("layout", ["list", "parquet", "arrow"])
def test_other_layouts_give_the_same_samples(
    vqa: dict[tuple[str, int], bytes], desk: Desk, layout: str
) -> None:
    # Lists do not tell the main answer: it is the most frequent one.
    train, val = (
        [(q, {**note, "multiple_choice_answer": most_frequent(note)}) for q, note in found]
        for found in (TRAIN_QUESTIONS, VAL_QUESTIONS)
    )
    for part, found in (("train2014", train), ("val2014", val)):
        path = desk.raw / "annotations" / f"v2_mscoco_{part}_annotations.json"
        put(path, {"annotations": [note for _, note in found]})
    assert desk.prepare("vqa", *VQA_OPTIONS) == 0
    labels = load_labels(str(desk.out))
    splits = ("train", "val", "test", "test-dev")
    expected = {split: desk.opened(split, "vqa") for split in splits}
    wanted = {s: (rows(data), stored_images(data)) for s, data in expected.items()}
    test = [(question(n, i), annotation(n, "", {})) for n, i in ((61, 6), (71, 7), (62, 6))]
    parts = {"train": train, "val": val, "test": test, "testdev": test[1:2]}
    folders = {"train": "train2014", "val": "val2014", "test": "test2015", "testdev": "test2015"}
    for name in ("", "test2015", "val2014", "train2014", "test-dev2015"):
        (desk.raw / f"v2_OpenEnded_mscoco_{name}_questions.json").unlink(missing_ok=True)
    (desk.raw / "annotations").rename(desk.raw / "unused")
    images = {number: data for (_, number), data in vqa.items()}
    for name, found in parts.items():
        if layout == "list":
            more = [{"question_id": 999, "image": "1.jpg", "answer": "a", "dataset": "vg"}]
            content = as_list(folders[name], found) + (more if name == "train" else [])
            put(desk.raw / f"vqa_{name}.json", content)
            continue
        columns = as_table(found, images, struct=layout == "parquet")
        shown = "validation" if name == "val" else name
        half = len(found) // 2
        for shard, rows_of in enumerate((slice(0, half), slice(half, None))):
            path = desk.raw / "data" / f"{shown}-{shard:05d}-of-00002.{layout}"
            put_table(path, {key: values[rows_of] for key, values in columns.items()})
    assert desk.prepare("vqa", *VQA_OPTIONS) == 0
    assert load_labels(str(desk.out)) == labels
    for split, (rows_wanted, images_wanted) in wanted.items():
        data = desk.opened(split, "vqa")
        kind = "other" if layout != "list" and rows_wanted[0].answers else ""
        assert rows(data) == [replace(row, answer_type=kind) for row in rows_wanted]
        assert stored_images(data) == images_wanted
    if layout == "list":
        assert (expected["train"].manifest.omitted or {}) | {"of dataset vg": 1} == desk.opened(
            "train", "vqa"
        ).manifest.omitted


def test_weights_in_lists_are_shares_of_the_annotators(
    vqa: dict[tuple[str, int], bytes], desk: Desk
) -> None:
    entries = [
        *as_list("train2014", TRAIN_QUESTIONS),
        *({"question_id": n, "question": "is it red", "image": "train2014/COCO_train2014_000000000001.jpg"}
          for n in (90, 91, 92, 93)),
    ]  # fmt: skip
    entries[4]["answer"] = {"yes": 0.7, "star": 0.3}
    entries[5] |= {"answer": ["2", "blue"], "weight": [0.2, 0.8]}
    entries[6]["answer"] = {"yes": 0.9, "star": 0.3}
    raw = desk.raw / "lists"
    put(raw / "vqa_train.json", [*entries, entries[0]])
    put(raw / "vqa_val.json", as_list("val2014", VAL_QUESTIONS))
    for name in ("train2014", "val2014"):
        (desk.raw / name).rename(raw / name)
    words = ["--task", "vqa", "--raw", str(raw), "--output", str(desk.out), *VQA_OPTIONS]
    words += ["--splits", "train", "--on-error", "skip", "--text-tokenizer", desk.model]
    assert tool("prepare_task")(words) == 0
    by_id = {row.id: row for row in rows(desk.opened("train", "vqa"))}
    assert by_id["90"].answers == ("yes",) * 7 + ("star",) * 3
    names = load_labels(str(desk.out)).labels
    targets = {names[label]: score for label, score in zip(by_id["90"].labels, by_id["90"].scores)}
    assert targets == pytest.approx({"yes": 1.0, "star": 0.9})
    assert Counter(by_id["91"].answers) == {"2": 2, "blue": 8}
    (record, reason), (second, missing), (third, twice) = rejects_of(f"{desk.out}_train")
    assert (record, second, third) == ("question 92", "question 93", "entry 8")
    assert reason.startswith(
        "weights 0.9, 0.3 are no tenths that add up to 1: give the ten answers"
    )
    assert missing == "answers are not a list of objects with an answer"
    assert twice == "question 11 came before"


def test_ids_that_start_anew_in_merged_tables(desk: Desk) -> None:
    images = {number: encoded(picture(number)) for number in (1, 2, 3)}
    columns = as_table(TRAIN_QUESTIONS, {1: images[1], 2: images[2]}, struct=True)
    put_table(desk.raw / "train-0.parquet", columns)
    # The same ids once more, about another picture: questions 11 and so on, and image 1.
    again = as_table(TRAIN_QUESTIONS[:2], {1: images[3]}, struct=True)
    again["question_id"] = [11, 14]
    put_table(desk.raw / "train-1.parquet", again)
    put_table(
        desk.raw / "validation.parquet",
        as_table(VAL_QUESTIONS, dict.fromkeys((3, 4, 5), images[3]), True),
    )
    options = (*VQA_OPTIONS, "--splits", "train", "--on-error", "skip")
    assert desk.prepare("vqa", *options) == 0
    assert rejects_of(f"{desk.out}_train") == [("row 0", "question 11 came before")]
    data = desk.opened("train", "vqa")
    shown = {row.id: stored_images(data)[row.images[0]] for row in rows(data)}
    assert (shown["11"], shown["12"], shown["14"]) == (images[1], images[1], images[3])
