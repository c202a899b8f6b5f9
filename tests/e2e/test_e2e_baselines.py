"""The baselines of examples/configs/ from the command line, contrastive pretraining from data to a fine-tuned model."""

from __future__ import annotations

import math

import pytest
import torch
from commands import REPOSITORY, run, run_many, tool
from conftest import Run
from small_corpus import ROOMY, Corpus, assert_same_metrics, metrics

from megatron_vlmoe.commands.main import main
from megatron_vlmoe.convert.checkpoints import CheckpointReader

CONFIGS = REPOSITORY / "examples" / "configs"
# The small model of these tests sets its batch on the command line, which wins over a file.
PAIRS_ALONE = "--data.micro_texts 0 --data.micro_images 0".split()

POOLS = {
    **{name: "32 shared" for name in ("limoe", "limoe_contrastive")},
    **{name: "32 text" for name in ("text_experts", "switch_text", "gshard_text")},
    "vmoe": "32 vision",
    "vl_experts": "32 text, 32 vision, 32 vl",
}


def config(name: str) -> list[str]:
    return ["--config", str(CONFIGS / f"{name}.yaml")]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_baseline_plans(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "small-32e", *config(name), "--dry-run"]
    assert main(["pretrain", *options, "--dry-run-world-size", "32"]) == 0
    text = capsys.readouterr().out
    assert "Parameters per rank" in text and "Expert capacity" in text
    assert f"  experts: {POOLS.get(name, '32 text, 32 vision')} in blocks " in text


@pytest.mark.parametrize("name", ["expert_choice", "loss_free", "limoe", "vl_experts"])
def test_new_ways_to_route_train(name: str, corpus: Corpus) -> None:
    folder = corpus.folder / "runs" / name
    # Block 4 is the one with a VL-FFN.
    more = "--moe.num_vl_experts 4 --moe.layers 2 4".split() if name == "vl_experts" else []
    corpus.pretrain(folder, 2, *config(name), *more).succeeded()
    records = [record for record in metrics(folder) if "loss/total" in record]
    assert [record["step"] for record in records] == [1, 2]
    last = records[-1]
    pools = {"limoe": ["shared"], "vl_experts": ["text", "vision", "vl"]}
    for pool in pools.get(name, ["text", "vision"]):
        assert 0.0 <= last[f"moe/{pool}/dropped_fraction"] < 1.0
    if name == "expert_choice":
        # Images have no padding: every expert has as many tokens as it has slots, twice as many as tokens in all.
        assert last["moe/vision/load_min"] == last["moe/vision/load_max"] == 1.0
        assert last["moe/vision/effective_capacity_factor"] == pytest.approx(2.0, abs=0.05)
        assert last["loss/aux/vision"] == last["loss/aux/text"] == 0.0
    if name == "limoe":
        entropies = [key for key in last if key.startswith("moe/shared/layer_2/aux/")]
        assert {key.rpartition("/")[2] for key in entropies} == {
            *("importance", "load", "local_entropy", "global_entropy")
        }
    if name == "loss_free":
        tensors = CheckpointReader(folder).tensors
        biases = [tensor.read() for key, tensor in tensors.items() if "balance_bias" in key]
        assert len(biases) == 4
        for bias in biases:
            # Two steps of 0.001, up, down or not at all.
            steps = bias / 0.001
            assert (steps - steps.round()).abs().max() < 1e-3 and 0 < steps.abs().max() < 2.01
        # A run without it is of another model.
        refused = corpus.pretrain(folder, 3, "--moe.noise_std", "0")
        refused.refused("moe.balance_bias_rate is 0.001 there, 0 here")


def contrastive_words() -> list[str]:
    # With these initial values all similarities are nearly the same before training.
    start = "--model.init_std 0.02 --data.pixel_std 0.5 0.5 0.5 --train.eval_interval 2".split()
    pairs = [*PAIRS_ALONE, "--data.global_pairs", "8"]
    return [*config("limoe_contrastive"), *pairs, *ROOMY, *start]


@pytest.fixture(scope="module")
def contrastive(corpus: Corpus) -> Run:
    """Captions and images of pairs, told apart by a shared router."""
    folder = corpus.folder / "runs" / "contrastive"
    outcome = corpus.pretrain(folder, 4, *contrastive_words())
    return Run(folder, outcome.succeeded())


def test_contrastive_pretraining(contrastive: Run) -> None:
    first, *steps = contrastive.metrics
    # A pool is the two pairs of a micro-batch.
    assert first["eval/loss/contrastive"] == pytest.approx(math.log(2), abs=0.6)
    assert "recall at 1 among 2 pairs" in contrastive.outcome.text
    for record in (first, steps[-1]):
        for way in ("image_to_text", "text_to_image"):
            assert 0.0 <= record[f"eval/recall_at_1/{way}"] <= 1.0
    for record in steps:
        names = {key for key in record if key.startswith("loss/")}
        assert names == {"loss/total", "loss/contrastive", "loss/aux/shared"}
        total = record["loss/contrastive"] + record["loss/aux/shared"]
        assert record["loss/total"] == pytest.approx(total, rel=1e-5)
    keys = CheckpointReader(contrastive.folder).tensors.keys()
    assert {key for key in keys if key.startswith("heads.")} == {
        *("heads.text_projection.weight", "heads.image_projection.weight", "heads.logit_scale")
    }
    assert "embedding.image.mask_token" in contrastive.outcome.text, "frozen, and listed"


def test_contrastive_pretraining_is_resumed(contrastive: Run, corpus: Corpus) -> None:
    folder = corpus.folder / "runs" / "contrastive-resumed"
    options = contrastive_words()
    corpus.pretrain(folder, 4, *options, "--exit-interval", "2").succeeded()
    corpus.pretrain(folder, 4, *options).succeeded()
    assert_same_metrics(metrics(folder), contrastive.metrics)


def test_what_becomes_of_a_contrastive_checkpoint(contrastive: Run, corpus: Corpus) -> None:
    run_folder = str(contrastive.folder)
    # It has no masks to go on with, and no class of transformers.
    masked = corpus.words(corpus.folder / "runs" / "masked", 5, "--load", run_folder)
    masked += ["--moe.shared_router", "true"]
    exported, inspected, other = run_many(
        [
            ["export", "--load", run_folder, "--output", "hf"],
            ["inspect-checkpoint", run_folder],
            masked,
        ],
        cwd=corpus.folder,
    )
    exported.refused("is of contrastive pretraining")
    assert not (corpus.folder / "hf").exists()
    inspected.succeeded()
    other.refused("is of contrastive pretraining")
    # Retrieval starts from its heads, other tasks from its body.
    tool(
        *("prepare_task", "--task", "retrieval", "--raw", "raw/tasks/flickr30k"),
        *("--output", "retrieval", "--text-tokenizer", "text.model", "--workers", "1"),
        cwd=corpus.folder,
    ).succeeded()
    words = """
    finetune --task retrieval --preset sample-retrieval --task.data retrieval --data.text_tokenizer text.model
    --model.text_length 24 --model.pair_text_length 24 --task.micro_batch_size 2 --task.global_batch_size 4
    --train.steps 1 --data.num_workers 0 --contrastive.matching_weight 1 --save-initial true
    """
    tuned = [*words.split(), "--load", run_folder, "--save", "runs/tuned"]
    outcome = run("-m", "megatron_vlmoe", *tuned, cwd=corpus.folder).succeeded()
    assert "new: heads.matching.weight" in outcome.text
    assert "new: heads.text_projection.weight" not in outcome.text
    start = CheckpointReader(corpus.folder / "runs/tuned/checkpoints/iter_0000000").tensors
    before = CheckpointReader(contrastive.folder).tensors
    for key in ("heads.text_projection.weight", "heads.logit_scale", "decoder.layers.0.gamma_1"):
        assert torch.equal(start[key].read(), before[key].read()), key


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("", "leave the rest out with --data.micro_texts 0 --data.micro_images 0"),
        (f"{' '.join(PAIRS_ALONE)} --data.micro_pairs 1", "one pair has no other"),
        ("--data.micro_pairs 0", "objectives.kind=contrastive needs data.micro_pairs"),
        (
            f"{' '.join(PAIRS_ALONE)} --objectives.contrastive_temperature 0",
            "objectives.contrastive_temperature=0.0 must be positive",
        ),
        (
            f"{' '.join(PAIRS_ALONE)} --data.micro_pairs 3 --data.global_pairs 3 --dry-run-world-size 2"
            " --parallel.tensor_model_parallel_size 2",
            "data.micro_pairs=3 is not divisible by parallel.tensor_model_parallel_size=2",
        ),
    ],
)
def test_contrastive_options_that_fit_no_run(
    options: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"pretrain --preset tiny-8e --objectives.kind contrastive {options} --dry-run"
    assert main(words.split()) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--moe.dispatcher dropless", "moe.routing=expert_choice with moe.dispatcher=dropless"),
        ("--moe.capacity_factor 0", "moe.capacity_factor=0 with moe.routing=expert_choice"),
        ("--moe.eval_capacity_factor 0", "moe.eval_capacity_factor=0 with moe.routing="),
        ("--moe.normalize_gate true", "moe.normalize_gate=true with moe.routing=expert_choice"),
        ("--moe.balance_bias_rate 0.001", "moe.balance_bias_rate=0.001 with moe.routing="),
    ],
)
def test_options_that_expert_choice_does_not_take(
    options: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"pretrain --preset tiny-8e --moe.routing expert_choice {options} --dry-run"
    assert main(words.split()) == 2
    assert named in capsys.readouterr().err
