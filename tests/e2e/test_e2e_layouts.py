"""Two processes on real data, once under torchrun: expert, tensor and pipeline parallel runs equal one process."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Run
from small_corpus import ROOMY, Corpus, assert_same_metrics, metrics

LAYOUTS = {
    "EP2": ["--parallel.expert_model_parallel_size", "2"],
    "TP2": ["--parallel.tensor_model_parallel_size", "2"],
    "PP2": ["--parallel.pipeline_model_parallel_size", "2"],
}


def comparable(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What every layout must agree on: the losses, and what is counted over whole batches."""
    prefixes = ("step", "loss/", "eval/loss/", "eval/grounding/", "acc/", "unigram/", "grad_norm")
    prefixes += ("lr",)
    return [
        {key: value for key, value in record.items() if key.startswith(prefixes)}
        for record in records
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_steps_equal_one_process(unbroken: Run, corpus: Corpus, name: str) -> None:
    """Same samples, masks, noise and weights: a run of six steps that leaves after three."""
    folder = corpus.folder / "runs" / name
    words = [*ROOMY, *LAYOUTS[name], "--train.eval_interval", "3", "--exit-interval", "3"]
    if name == "TP2":
        corpus.torchrun(folder, 6, *words).succeeded()
    else:
        corpus.pretrain(folder, 6, *words, ranks=2).succeeded()
    expected = [record for record in unbroken.metrics if record["step"] <= 3]
    assert_same_metrics(comparable(metrics(folder)), comparable(expected), tolerance=2e-4)
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == "3"
    if name == "PP2":
        # Goes on from two stages at another layout, as one process would have.
        words = [*ROOMY, *LAYOUTS["EP2"], "--train.eval_interval", "3"]
        outcome = corpus.pretrain(folder, 6, *words, ranks=2).succeeded()
        assert_same_metrics(
            comparable(metrics(folder)), comparable(unbroken.metrics), tolerance=5e-4
        )
        said = f"going on in {folder}/checkpoints/iter_0000003 with other options"
        assert outcome.stdout.count(said) == 1, "once, not once per rank"
        log = (folder / "log.txt").read_text()
        assert log.count(" started on ") == 2 and log.count(said) == 1
        assert "stopped after step 3" in log and log.count("finished 6 steps") == 1
        assert log.count("INFO step ") == 6 and "rank 1 " not in log
