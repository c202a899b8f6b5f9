"""A step of every downstream task, and what transformers makes of an exported model."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch
from e2e.inference_runs import SMALL, SPLITS
from prepared_tasks import Prepared, prepare_all

from checks.report import Report, difference, vlmoe

QUESTIONS = ["how many circles are there?", "what color is the square?"]


def tasks(report: Report) -> None:
    """Fine-tunes all tasks for a step and evaluates them; asks one model here, exported, and by transformers."""
    torch.backends.cudnn.allow_tf32 = False
    prepared = prepare_all(report.folder / "data")
    found: dict[str, Any] = {}
    for task in SPLITS:
        try:
            found[task] = _finetune(report, task, prepared)
        except Exception as error:
            report.expect(False, f"{task}: {str(error).strip()[:300]}")
        report.note(tasks=found)
    if "vqa" not in found:
        return
    run = report.folder / "vqa"
    picture = next((report.folder / "data/raw").rglob("*.jpg"))
    _exported(report, run, picture)


def _finetune(report: Report, task: str, prepared: Prepared) -> dict[str, float]:
    """One step and an evaluation, in the precision of the device; losses and metrics."""
    save = report.folder / task
    vlmoe(
        *("finetune", "--task", task, "--preset", f"sample-{task}", *SMALL),
        *("--task.data", prepared.prefix(task), "--task.eval_splits", SPLITS[task]),
        *("--data.text_tokenizer", prepared.tokenizer, "--save", str(save)),
        *("--train.steps", "1", "--log.interval", "1"),
    )
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    values = {key: value for row in rows for key, value in row.items()}
    kept = {k: v for k, v in values.items() if k.startswith(("loss/", SPLITS[task]))}
    kept["grad_norm"] = values["grad_norm"]
    bad = [key for key, value in kept.items() if not math.isfinite(value)]
    report.expect(not bad, f"{task}: {bad} are not finite")
    report.expect(values["grad_norm"] > 0.0, f"{task}: no gradient")
    report.expect(len(kept) > 2, f"{task}: nothing was evaluated: {sorted(values)}")
    return kept


def _exported(report: Report, run: Path, picture: Path) -> None:
    """Answers of `VLMoE`, of the export read by it, and logits of transformers on the device and on the CPU."""
    from megatron_vlmoe.inference import VLMoE

    export = report.folder / "export"
    vlmoe("export", "--load", str(run), "--output", str(export))
    scores = {}
    for name, path in (("checkpoint", run), ("export", export)):
        model = VLMoE.from_checkpoint(path, precision="fp32")
        answers = model.answer(picture, QUESTIONS, top_k=3)
        scores[name] = [[score for _, _, score in own.most_likely] for own in answers]
    left, right = (torch.tensor(own) for own in scores.values())
    off = difference(left, right)
    report.note(vlmoe_scores=scores["checkpoint"], export_off_by=off)
    report.expect(off < 1e-5, f"scores of the export are off by {off:.2g}")
    if not importlib.util.find_spec("transformers"):
        report.left_out("the exported model in transformers, which is not installed")
        return
    logits = _transformers(export, picture, report.device)
    on_cpu = _transformers(export, picture, "cpu")
    off = difference(logits, on_cpu)
    report.note(transformers_off_by=off, logits=logits.flatten().tolist()[:6])
    report.expect(off < 1e-3, f"logits of transformers are off by {off:.2g} from the CPU's")
    best = torch.sigmoid(logits).topk(3, dim=1).values
    off = difference(best, left)
    report.note(transformers_vlmoe_off_by=off)
    report.expect(off < 1e-3, f"answers of transformers are off by {off:.2g} from those of VLMoE")


def _transformers(export: Path, picture: Path, device: str) -> torch.Tensor:
    """Logits of the export by transformers, with the code that it brings; on the CPU."""
    import transformers
    from PIL import Image

    auto = transformers.AutoModelForVisualQuestionAnswering
    options = {"trust_remote_code": True, "dtype": torch.float32}
    model = auto.from_pretrained(export, **options).eval().to(device)
    processor = transformers.AutoProcessor.from_pretrained(export, trust_remote_code=True)
    images = [Image.open(picture)] * len(QUESTIONS)
    inputs = processor(text=QUESTIONS, images=images, return_tensors="pt").to(device)
    with torch.no_grad():
        return model(**inputs).logits.float().cpu()
