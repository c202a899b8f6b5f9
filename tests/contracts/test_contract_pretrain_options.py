"""The grammar of `python -m megatron_vlmoe pretrain`: what is refused, how, and what wins over what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from commands import REPOSITORY, Outcome, run, run_many

PRESETS = [
    f"{size}-{kind}"
    for size in ("tiny", "small", "base", "large")
    for kind in ("dense", "8e", "16e", "32e")
]

# Options after `pretrain --preset tiny-8e --dry-run`, and what the error line must name.
REFUSED: dict[str, tuple[str, list[str]]] = {
    "misspelt option": ("--model.hiden_size 64", ["model.hiden_size"]),
    "unknown section": ("--modle.hidden_size 64", ["modle.hidden_size"]),
    "unknown alias": ("--save-intervall 64", ["save-intervall"]),
    "stray word": ("frobnicate", ["frobnicate"]),
    "not a number": ("--train.steps many", ["train.steps", "many"]),
    "not a choice": ("--moe.dispatcher magic", ["moe.dispatcher", "magic"]),
    "unknown preset": ("--preset gigantic", ["gigantic", "tiny-8e"]),
    "context parallel": (
        "--parallel.context_parallel_size 2 --dry-run-world-size 2",
        ["context_parallel_size"],
    ),
    "expert tensor parallel": (
        "--parallel.tensor_model_parallel_size 2 --parallel.expert_tensor_parallel_size 2 --dry-run-world-size 2",
        ["expert_tensor_parallel_size"],
    ),
    "tensor parallel and heads": (
        "--model.hidden_size 96 --model.num_attention_heads 3 --parallel.tensor_model_parallel_size 2"
        " --dry-run-world-size 2",
        ["tensor_model_parallel_size", "num_attention_heads"],
    ),
    "tensor parallel and counts": (
        "--data.micro_texts 3 --data.micro_images 4 --data.micro_pairs 4 --data.global_texts 3 --data.global_images 4"
        " --data.global_pairs 4 --parallel.tensor_model_parallel_size 2"
        " --dry-run-world-size 2",
        ["tensor_model_parallel_size", "micro_texts"],
    ),
    "expert parallel and vision pool": (
        "--moe.num_vision_experts 6 --parallel.expert_model_parallel_size 4 --dry-run-world-size 4",
        ["expert_model_parallel_size", "vision"],
    ),
    "expert parallel and text pool": (
        "--moe.num_text_experts 6 --parallel.expert_model_parallel_size 4 --dry-run-world-size 4",
        ["expert_model_parallel_size", "text"],
    ),
    "interleaving with batched sends": (
        "--parallel.pipeline_model_parallel_size 2 --parallel.virtual_pipeline_model_parallel_size 2"
        " --parallel.batch_p2p_comm true --dry-run-world-size 2",
        ["batch_p2p_comm"],
    ),
    "MoE block past the last": ("--moe.layers 2 99", ["moe.layers", "99"]),
    "MoE block zero": ("--moe.layers 0 2", ["moe.layers", "0"]),
    "layouts and processes": (
        "--parallel.tensor_model_parallel_size 2 --dry-run-world-size 3",
        ["3"],
    ),
    "more pipeline stages than blocks": (
        "--parallel.pipeline_model_parallel_size 64 --dry-run-world-size 64",
        ["pipeline_model_parallel_size"],
    ),
    "global batch": ("--data.micro_texts 4 --data.global_texts 9", ["global_texts", "micro_texts"]),
    "unequal numbers of micro-batches": (
        "--data.micro_texts 4 --data.global_texts 4 --data.micro_images 4 --data.global_images 8"
        " --data.micro_pairs 4 --data.global_pairs 4",
        ["global_"],
    ),
    "top k over experts": ("--moe.topk 9", ["moe.topk", "9"]),
    "patches and image": (
        "--model.image_size 60 --model.patch_size 16",
        ["image_size", "patch_size"],
    ),
    "heads and width": (
        "--model.hidden_size 100 --model.num_attention_heads 3",
        ["hidden_size", "num_attention_heads"],
    ),
    "more VL blocks than blocks": (
        "--model.num_layers 4 --model.num_vl_layers 5",
        ["num_vl_layers"],
    ),
    "no steps": ("--train.steps 0", ["train.steps"]),
    "negative batch": ("--data.micro_texts -4 --data.global_texts -4", ["_texts"]),
    "missing config": ("--config /nowhere/run.yaml", ["/nowhere/run.yaml"]),
    "nothing to learn": (
        "--data.micro_texts 0 --data.global_texts 0 --data.micro_images 0 --data.global_images 0"
        " --data.micro_pairs 0 --data.global_pairs 0",
        ["data."],
    ),
}
YAML_REFUSED = {
    "unknown section": ("modle: {hidden_size: 64}\n", "modle"),
    "unknown option": ("model: {hiden_size: 64}\n", "hiden_size"),
    "wrong type": ("train: {steps: many}\n", "steps"),
    "not YAML": ("model: {hidden_size: 64\n", "run.yaml"),
    "a list": ("- model\n- train\n", "run.yaml"),
}
ALIASES = "--save runs/x --load runs/y --save-interval 7 --exit-interval 9"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All dry runs of this file by name."""
    folder = tmp_path_factory.mktemp("yaml")
    tiny = ["pretrain", "--preset", "tiny-8e", "--dry-run"]
    lines = {name: [*tiny, *options.split()] for name, (options, _) in REFUSED.items()}
    for name, (content, _) in YAML_REFUSED.items():
        path = folder / name / "run.yaml"
        path.parent.mkdir()
        path.write_text(content)
        lines[f"yaml {name}"] = [*tiny, "--config", str(path)]
    good = folder / "run.yaml"
    good.write_text("model: {num_layers: 6, num_vl_layers: 2}\ntrain: {steps: 7, seed: 3}\n")
    lines["yaml"] = [*tiny, "--config", str(good), "--train.seed", "4"]
    lines["yaml last"] = [*tiny, "--train.seed", "4", "--config", str(good)]
    lines["aliases"] = [*tiny, *ALIASES.split()]
    lines["equals sign"] = [*tiny, "--train.steps=12", "--moe.layers=[2,4]"]
    for preset in PRESETS:
        lines[preset] = ["pretrain", "--preset", preset, "--dry-run"]
    lines["no preset"] = ["pretrain", "--dry-run"]
    lines["parts"] = [
        *["pretrain", "--preset", "base-32e", "--dry-run", "--dry-run-world-size", "64"],
        *[
            "--parallel.expert_model_parallel_size",
            "8",
            "--parallel.tensor_model_parallel_size",
            "2",
        ],
    ]
    lines["unknown command"] = ["pretrian", "--preset", "tiny-8e"]
    return dict(zip(lines, run_many(list(lines.values()))))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(outcomes: dict[str, Outcome], name: str) -> None:
    outcomes[name].refused(*REFUSED[name][1], code=2)
    assert outcomes[name].stdout == ""


@pytest.mark.parametrize("name", YAML_REFUSED)
def test_yaml_refused_with_one_line(outcomes: dict[str, Outcome], name: str) -> None:
    outcomes[f"yaml {name}"].refused("run.yaml", YAML_REFUSED[name][1], code=2)


def test_unknown_command_names_the_known_ones(outcomes: dict[str, Outcome]) -> None:
    outcomes["unknown command"].refused("pretrian", "pretrain", code=2)


def resolved(outcome: Outcome) -> dict[str, dict[str, object]]:
    """The configuration that a dry run prints: the YAML lines at the start."""
    lines = []
    for line in outcome.succeeded().stdout.splitlines():
        key = line.split(":")[0]
        if line and not line.startswith((" ", "-")) and not (":" in line and key.islower()):
            break
        lines.append(line)
    config = yaml.safe_load("\n".join(lines))
    assert isinstance(config, dict), outcome.text
    return config


def test_options_win_over_yaml_and_yaml_over_the_preset(outcomes: dict[str, Outcome]) -> None:
    for name in ("yaml", "yaml last"):
        config = resolved(outcomes[name])
        assert config["model"]["num_layers"] == 6 and config["model"]["num_vl_layers"] == 2
        assert config["train"]["steps"] == 7 and config["train"]["seed"] == 4
        assert config["moe"]["num_vision_experts"] == 8, "from the preset"


def test_aliases(outcomes: dict[str, Outcome]) -> None:
    config = resolved(outcomes["aliases"])
    assert config["checkpoint"]["save"] == "runs/x" and config["checkpoint"]["load"] == "runs/y"
    assert config["checkpoint"]["save_interval"] == 7
    assert config["train"]["exit_interval"] == 9


def test_equals_sign_and_lists(outcomes: dict[str, Outcome]) -> None:
    config = resolved(outcomes["equals sign"])
    assert config["train"]["steps"] == 12 and list(config["moe"]["layers"]) == [2, 4]


def test_dry_run_leaves_nothing_and_starts_nothing(outcomes: dict[str, Outcome]) -> None:
    for name in ("aliases", "parts", "base-32e"):
        assert "process group" not in outcomes[name].stderr
    assert not (REPOSITORY / "runs" / "x").exists()


@pytest.mark.parametrize("preset", [*PRESETS, "no preset", "parts"])
def test_dry_run_prints_what_was_asked_for(outcomes: dict[str, Outcome], preset: str) -> None:
    text = outcomes[preset].succeeded().stdout.lower()
    for word in ("total", "per token", "per rank", "flops per step", "memory per rank"):
        assert word in text, f"{word}\n{text}"


def test_presets_have_the_paper_s_values(outcomes: dict[str, Outcome]) -> None:
    for preset, layers, width, heads in (
        ("small-8e", 8, 384, 6),
        ("base-32e", 12, 768, 12),
        ("large-16e", 24, 1024, 16),
    ):
        config = resolved(outcomes[preset])
        assert config["model"]["num_layers"] == layers
        assert config["model"]["hidden_size"] == width
        assert config["model"]["num_attention_heads"] == heads
        assert (
            config["moe"]["num_text_experts"]
            == config["moe"]["num_vision_experts"]
            == int(preset.split("-")[1][:-1])
        )
    base = resolved(outcomes["base-32e"])
    for kind in ("texts", "images", "pairs"):
        assert base["data"][f"global_{kind}"] == 2048
    assert base["moe"]["capacity_factor"] == 1.05 and base["moe"]["eval_capacity_factor"] == 1.0
    assert base["moe"]["aux_loss_coefficient"] == 0.01 and base["moe"]["topk"] == 1


def test_the_real_command_refuses_before_it_runs(tmp_path: Path) -> None:
    """Without --dry-run, in a process of its own, from another folder."""
    folder = tmp_path / "run"
    words = ["-m", "megatron_vlmoe", "pretrain", "--preset", "tiny-8e", "--save", str(folder)]
    run(*words, "--moe.layers", "2", "99", cwd=tmp_path).refused("moe.layers", code=2)
    assert os.listdir(tmp_path) == []


def test_help_lists_every_option_and_version_is_a_version() -> None:
    help_text = run("-m", "megatron_vlmoe", "pretrain", "--help").succeeded().stdout
    for option in (
        "--preset --config --dry-run --save --load --save-interval --exit-interval --data.text --data.images"
        " --data.pairs --data.text_tokenizer --data.image_tokenizer --train.steps --train.seed --data.micro_texts"
        " --data.global_pairs --parallel.tensor_model_parallel_size --parallel.expert_model_parallel_size"
    ).split():
        assert option + " " in help_text, option
    assert "pretrain" in run("-m", "megatron_vlmoe", "--help").succeeded().stdout
