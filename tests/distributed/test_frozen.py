"""Modules that a run never reaches stay as they are, bit for bit; everything else trains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import Layout, Workers, layout
from training_runs import Recorder, shards, start

CASES = {
    "texts-only": (
        "--data.micro_images 0 --data.micro_pairs 0",
        {"image_head", "image_embedding", "vision", "vl"},
    ),
    "images-only": (
        "--data.micro_texts 0 --data.micro_pairs 0",
        {"text_head", "text_embedding", "text", "vl"},
    ),
    # The last block's T-FFN and V-FFN, which are pools in block 4, read no pairs.
    "pairs-only": ("--data.micro_texts 0 --data.micro_images 0", {"text in 4", "vision in 4"}),
    "no-image-loss": (
        "--data.micro_images 0 --objectives.vlm_image_weight 0",
        {"image_head", "vision in 4"},
    ),
    "frozen-experts": ("--moe.train_experts false", {"experts", "router"}),
    "all": ("", set()),
}


def is_expected(key: str, what: str) -> bool:
    """Whether a parameter belongs to what a case freezes."""
    block, _, rest = key.removeprefix("decoder.layers.").partition(".")
    branch, _, number = what.partition(" in ")
    if what.endswith("_head"):
        return key.startswith(f"heads.{branch.removesuffix('_head')}.")
    if what.endswith("_embedding"):
        return key.startswith(f"embedding.{branch.removesuffix('_embedding')}.")
    if not key.startswith("decoder.layers.") or (number and int(block) + 1 != int(number)):
        return False
    if branch in ("experts", "router"):
        return f".{branch}." in rest
    names = (f".{branch}_norm.", f".{branch}_ffn.", f".experts.{branch}.", f".router.{branch}.")
    return any(name in rest for name in names)


def train(where: Layout, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Weights before and after three steps, and which parameters had a gradient that is not zero."""
    recorder = Recorder(start(where, *arguments))
    before = shards(recorder.parts)
    gradients = [recorder.step(gradients=True)["gradients"] for _ in range(3)]
    used = {
        key for step in gradients for key, parts in step.items() if any(p[2].any() for p in parts)
    }
    return {
        "before": before,
        "after": shards(recorder.parts),
        "used": used,
        "trainable": set(gradients[0]),
        "frozen": recorder.parts.frozen,
    }


@pytest.mark.parametrize("name", CASES)
def test_unreached_modules_are_frozen(name: str, workers: Workers) -> None:
    options, expected = CASES[name]
    where = layout(2)
    arguments = ("--parallel.use_distributed_optimizer", "false", *options.split())
    for result in workers.run(where, train, where, arguments):
        changed = {
            key
            for key, parts in result["before"].items()
            if not all(np.array_equal(p[2], q[2]) for p, q in zip(parts, result["after"][key]))
        }
        frozen = {k for k in result["before"] if any(is_expected(k, what) for what in expected)}
        assert bool(frozen) == bool(expected)
        assert result["before"].keys() - result["trainable"] == frozen
        assert result["used"] == result["trainable"], "a trainable parameter gets no gradient"
        assert changed == result["trainable"]
        assert bool(result["frozen"]) == bool(expected), "the log names what is frozen"
