"""The grammar of the commands' options: what is refused, how, what wins over what, and what --help explains."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from commands import REPOSITORY, Outcome, run, run_many

from megatron_vlmoe.commands.main import main
from megatron_vlmoe.config.command_line import ALIASES as SHORT_FORMS
from megatron_vlmoe.config.command_line import option_types, parse_run
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.finetune.options import parse_finetune
from megatron_vlmoe.planning.validate import validate, validate_task

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
    "graph without draws of a counter": (
        "--train.cuda_graph true",
        ["cuda_graph", "counter_draws"],
    ),
    **{
        f"graph and {option} {value}": (
            f"--train.cuda_graph true --train.counter_draws true --{option} {value} --dry-run-world-size 2",
            ["cuda_graph", f"{option}={value}"],
        )
        for option, value in (
            ("parallel.pipeline_model_parallel_size", "2"),
            ("parallel.overlap_param_gather", "true"),
            ("train.recompute", "full"),
            ("train.precision", "fp16"),
            ("moe.dispatcher", "alltoall"),
            ("moe.capacity_factor", "-1"),
        )
    },
    "graph and documents as sequences": (
        "--train.cuda_graph true --train.counter_draws true --data.reset_attention true "
        "--model.attention_backend varlen",
        ["cuda_graph", "reset_attention", "sdpa"],
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


@pytest.mark.process
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(outcomes: dict[str, Outcome], name: str) -> None:
    outcomes[name].refused(*REFUSED[name][1], code=2)
    assert outcomes[name].stdout == ""


@pytest.mark.process
@pytest.mark.parametrize("name", YAML_REFUSED)
def test_yaml_refused_with_one_line(outcomes: dict[str, Outcome], name: str) -> None:
    outcomes[f"yaml {name}"].refused("run.yaml", YAML_REFUSED[name][1], code=2)


@pytest.mark.process
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


@pytest.mark.process
def test_options_win_over_yaml_and_yaml_over_the_preset(outcomes: dict[str, Outcome]) -> None:
    for name in ("yaml", "yaml last"):
        config = resolved(outcomes[name])
        assert config["model"]["num_layers"] == 6 and config["model"]["num_vl_layers"] == 2
        assert config["train"]["steps"] == 7 and config["train"]["seed"] == 4
        assert config["moe"]["num_vision_experts"] == 8, "from the preset"


@pytest.mark.process
def test_aliases(outcomes: dict[str, Outcome]) -> None:
    config = resolved(outcomes["aliases"])
    assert config["checkpoint"]["save"] == "runs/x" and config["checkpoint"]["load"] == "runs/y"
    assert config["checkpoint"]["save_interval"] == 7
    assert config["train"]["exit_interval"] == 9


@pytest.mark.process
def test_equals_sign_and_lists(outcomes: dict[str, Outcome]) -> None:
    config = resolved(outcomes["equals sign"])
    assert config["train"]["steps"] == 12 and list(config["moe"]["layers"]) == [2, 4]


@pytest.mark.process
def test_dry_run_leaves_nothing_and_starts_nothing(outcomes: dict[str, Outcome]) -> None:
    for name in ("aliases", "parts", "base-32e"):
        assert "process group" not in outcomes[name].stderr
    assert not (REPOSITORY / "runs" / "x").exists()


@pytest.mark.process
@pytest.mark.parametrize("preset", [*PRESETS, "no preset", "parts"])
def test_dry_run_prints_what_was_asked_for(outcomes: dict[str, Outcome], preset: str) -> None:
    text = outcomes[preset].succeeded().stdout.lower()
    for word in ("total", "per token", "per rank", "flops per step", "memory per rank"):
        assert word in text, f"{word}\n{text}"


@pytest.mark.process
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


@pytest.mark.process
def test_the_real_command_refuses_before_it_runs(tmp_path: Path) -> None:
    """Without --dry-run, in a process of its own, from another folder."""
    folder = tmp_path / "run"
    words = ["-m", "megatron_vlmoe", "pretrain", "--preset", "tiny-8e", "--save", str(folder)]
    run(*words, "--moe.layers", "2", "99", cwd=tmp_path).refused("moe.layers", code=2)
    assert os.listdir(tmp_path) == []


OPTIONS = {"pretrain": RunConfig, "finetune": FinetuneConfig, "evaluate": FinetuneConfig}


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What `--help` and `-h` of each command print, by command line."""
    lines = [[command, word] for command in OPTIONS for word in ("--help", "-h")]
    return {" ".join(line): o.succeeded().stdout for line, o in zip(lines, run_many(lines))}


def explained(text: str) -> dict[str, str]:
    """Every option of a help text with the lines below it."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.split("\noptions:\n")[1].splitlines():
        if re.match("  -", line):
            names = re.findall(r"(?<!\S)--?[a-z][\w.-]*", line)
            found.update(dict.fromkeys(names, ""))
        elif line.startswith("        "):
            found.update({name: f"{found[name]} {line.strip()}".strip() for name in names})
    return found


@pytest.mark.process
def test_help_lists_every_option(helps: dict[str, str]) -> None:
    for option in (
        "--preset --config --dry-run --save --load --save-interval --exit-interval --data.text --data.images"
        " --data.pairs --data.text_tokenizer --data.image_tokenizer --train.steps --train.seed --data.micro_texts"
        " --data.global_pairs --parallel.tensor_model_parallel_size --parallel.expert_model_parallel_size"
    ).split():
        assert re.search(rf"(?<!\S){re.escape(option)}[ ,\n]", helps["pretrain --help"]), option
    assert "pretrain" in run("-m", "megatron_vlmoe", "--help").succeeded().stdout


@pytest.mark.process
@pytest.mark.parametrize("command", OPTIONS)
def test_help_describes_every_option(helps: dict[str, str], command: str) -> None:
    assert helps[f"{command} -h"] == helps[f"{command} --help"]
    options = explained(helps[f"{command} --help"])
    names = {f"--{name}" for name in option_types(OPTIONS[command])}
    shorts = {short for short, full in SHORT_FORMS.items() if full in names}
    program = {"--preset", "--config", "--dry-run", "--dry-run-world-size", "-h", "--help"}
    assert set(options) == names | shorts | program | {"--dry-run-gpus-per-node"}
    for name, text in options.items():
        description = re.sub(r"\(default: .*\)$", "", text).strip()
        assert len(description) >= 15, f"{name}: {text!r}"


@pytest.mark.process
def test_help_is_in_plain_words(helps: dict[str, str]) -> None:
    text = helps["finetune --help"]
    headings = re.findall(r"(?m)^([A-Z].*):$", text)
    assert headings[:2] == ["Model", "Mixture of experts"]
    assert {"Checkpoints: saving, loading and resuming", "Downstream task"} <= set(headings)
    for line in (
        "--moe.layers N ...",
        "--data.pixel_mean X X X",
        "--moe.dispatcher {fixed_capacity,alltoall,dropless}",
        "--save, --checkpoint.save TEXT",
    ):
        assert f"  {line}\n" in text
    pretraining = helps["pretrain --help"]
    assert "(default: SIGTERM SIGUSR1)" in " ".join(pretraining.split())
    assert "(default: true)" in pretraining
    for word in ("class '", "ITEM", "tuple", "Literal", "CONFIG", "type:"):
        assert word not in text


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "base"),
    [("finetune", "the recipe of the task"), ("evaluate", "the options in the checkpoint")],
)
def test_help_shows_no_default_that_the_checkpoint_or_the_recipe_replaces(
    helps: dict[str, str], command: str, base: str
) -> None:
    text = helps[f"{command} --help"]
    assert base in " ".join(text.split()) and "(default: " not in text.split("\nModel:")[1]


def message(words: str, ranks: int = 1) -> str:
    """What a user reads who types this."""
    command, *options = words.split()
    with pytest.raises(ConfigError) as error:
        if command == "pretrain":
            validate(parse_run(command, ["--preset", "tiny-8e", *options]).config, ranks)
        else:
            architecture = ["--task.architecture", "tiny-8e"]
            validate_task(parse_finetune([*architecture, *options]).config, ranks)
    assert "\n" not in str(error.value)
    return str(error.value)


# What a user types after `pretrain --preset tiny-8e`, and the whole answer.
ANSWERS = {
    "--train.stesp 5": "unknown option --train.stesp; did you mean --train.steps?",
    "--train.step 5": "unknown option --train.step; did you mean --train.steps?",
    "--modle.hidden_size 64": "unknown option --modle.hidden_size; did you mean --model.hidden_size?",
    "--steps 5": "unknown option --steps; did you mean --train.steps or --profile.steps?",
    "--train.lr 1e-3": "unknown option --train.lr; did you mean --optim.lr?",
    "--model.num-layers 4": "unknown option --model.num-layers; did you mean --model.num_layers?",
    "--save-intervall 5": "unknown option --save-intervall; did you mean --save-interval?",
    "--frobnicate 5": "unknown option --frobnicate; see --help",
    "--task vqa": "unknown option --task, which finetune and evaluate have",
    "--train.seed 4 -train.steps 5": "--train.seed is followed by '-train.steps'; did you mean --train.steps?",
    "--dry-run train.steps=5": "--dry-run is followed by 'train.steps=5'; did you mean --train.steps=5?",
    "--dry-run true": "--dry-run is followed by 'true', but takes no value",
    "--train.steps abc": "--train.steps abc: expected a whole number",
    "--train.steps=1e3": "--train.steps 1e3: expected a whole number, such as 1000",
    "--train.steps": "--train.steps needs a whole number after it",
    "--save": "--save needs a value after it",
    "--optim.lr fast": "--optim.lr fast: expected a number",
    "--optim.lr=-1e-4": "optim.lr=-0.0001 must be positive",
    "--moe.vl maybe": "--moe.vl maybe: expected true or false",
    "--moe.dispatcher all-to-all": "--moe.dispatcher all-to-all: expected one of fixed_capacity, alltoall, dropless;"
    " did you mean alltoall?",
    "--moe.layers 2 four": "--moe.layers 2 four: expected whole numbers, got four",
    "--data.pixel_mean 0.5 0.5": "--data.pixel_mean 0.5 0.5: expected 3 numbers, got 2",
    "--dry-run-world-size many": "--dry-run-world-size many: expected a whole number",
    "--dry-run-world-size -2": "--dry-run-world-size -2: must be at least 0",
    "--train.exit_signals SIGTEM": "train.exit_signals has SIGTEM, which is no signal that a process can answer "
    "(SIGTERM, SIGUSR1, ...); did you mean SIGTERM?",
    "--train.exit_signals SIGKILL": "train.exit_signals has SIGKILL, which is no signal that a process can answer "
    "(SIGTERM, SIGUSR1, ...); did you mean SIGILL?",
    "--model nosuch.yaml": "--model nosuch.yaml: No such file or directory",
    "--data.text d/X_text_document.bin": "--data.text d/X_text_document.bin: is one file of a dataset; give the prefix"
    " of all its files: --data.text d/X",
    "--data.images d/X_image.idx": "--data.images d/X_image.idx: is one file of a dataset; give the prefix of all its"
    " files: --data.images d/X",
    "--data.pairs 0.5 X.json 0.5 Y": "--data.pairs X.json: is one file of a dataset; give the prefix of all its files:"
    " --data.pairs X",
    "--data.eval_text X_text_document": "--data.eval_text X_text_document: is one file of a dataset; give the prefix of"
    " all its files: --data.eval_text X",
    "--model.num_attention_heads 5": "model.hidden_size=128 is not divisible by model.num_attention_heads=5: 4 or 8 "
    "heads fit",
    "--save s3://bucket/run": "--save s3://bucket/run: must be a local path: a run folder lies on a disk that all nodes"
    " see",
    "--parallel.startup_timeout_minutes 6e5": "parallel.startup_timeout_minutes=600000 must not be above a year,"
    " 525600",
    "--data.eval_fraction 2": "data.eval_fraction=2 is not in [0, 1)",
    "--data.num_workers -2": "data.num_workers=-2 must not be below -1",
    "--moe.balance_bias_rate 2": "moe.balance_bias_rate=2 is not in [0, 1]",
    "--moe.all_to_all_chunks 0": "moe.all_to_all_chunks=0 must be at least 1",
    "--moe.all_to_all_chunks 2 --moe.dispatcher alltoall": "moe.all_to_all_chunks=2 with moe.dispatcher=alltoall: only"
    " fixed_capacity sends the tokens of single experts",
    "--moe.text_aux.global_entropy_experts -3": "moe.text_aux.global_entropy_experts=-3 must not be negative",
    "--parallel.expert_model_parallel_size 2": "parallel.expert_model_parallel_size=2 does not divide 1 process: start"
    " with torchrun --nproc-per-node 2 (or plan with --dry-run-world-size 2), or use"
    " --parallel.expert_model_parallel_size 1",
    "--parallel.tensor_model_parallel_size 2": "1 process cannot hold parallel.tensor_model_parallel_size=2 x"
    " parallel.pipeline_model_parallel_size=1: start with torchrun --nproc-per-node 2 (or plan with"
    " --dry-run-world-size 2)",
}


@pytest.mark.parametrize("words", ANSWERS)
def test_answers_to_mistakes(words: str) -> None:
    assert message(f"pretrain {words}") == ANSWERS[words]


@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate", "check-options pretrain"])
@pytest.mark.parametrize("option", ["--preset", "--config", "--task", "--dry-run-world-size"])
def test_what_names_something_is_not_empty(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a shell variable that is not set; the preset would be another one than was meant."""
    if option == "--task" and "pretrain" in command:
        return
    for words in ([option, ""], [f"{option}="]):
        assert main([*command.split(), "--dry-run", *words]) == 2
        assert capsys.readouterr().err == f"error: {option} is empty\n"


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [
        ("pretrain --preset tiny8e", "--preset tiny8e: unknown", "; did you mean tiny-8e?"),
        (
            "finetune --preset sample-vqaa",
            "--preset sample-vqaa: unknown",
            "; did you mean sample-vqa?",
        ),
        ("finetune --task vaq", "--task vaq: unknown", "mnli; did you mean vqa?"),
        (
            "finetune --preset vqa --task.architecture tiny8e",
            "--task.architecture tiny8e: unknown",
            "; did you mean tiny-8e?",
        ),
    ],
)
def test_misspelt_names_are_recognized(words: str, start: str, end: str) -> None:
    assert message(words).startswith(f"{start}; choose one of ")
    assert message(words).endswith(end)


YAML_ANSWERS = {
    "modle: {hidden_size: 64}": "unknown section modle (modle.hidden_size); did you mean model?",
    "model: {hiden_size: 64}": "unknown option model.hiden_size; did you mean model.hidden_size?",
    "moe: {text_aux: {lod: 1.0}}": "unknown option moe.text_aux.lod; did you mean moe.text_aux.load?",
    "train: {steps: many}": "train.steps=many: expected a whole number",
    "train: {steps: }": "train.steps is empty: expected a whole number",
    "train: {steps: {a: 1}}": "train.steps: a whole number is expected there, not a section",
    "model: 3": "model is a section of options, got 3",
    "moe: {dispatcher: all_to_all}": "moe.dispatcher=all_to_all: expected one of fixed_capacity, alltoall, dropless; "
    "did you mean alltoall?",
    "moe: {vl: maybe}": "moe.vl=maybe: expected true or false",
    "moe: {layers: [2, four]}": "moe.layers=[2, 'four']: expected whole numbers, got four",
    "data: {text: [0.7, a]}": "data.text=[0.7, 'a']: expected texts, got 0.7, which needs quotes: '0.7'",
    "train: {steps: 2, steps: 3}": "not valid YAML: line 1, column 19: steps is there twice",
    "preset: tiny-8e": "preset is not for files; give --preset on the command line",
    "task: {name: vqa}": "unknown section task, which finetune and evaluate have",
    "data: {text: a}": "data.text=a: expected texts as a list, as in [a]",
    "log: {wandb_name: 5}": "log.wandb_name=5: expected a text, as in '5'",
    "model: {num_layers: 3": "not valid YAML: line 1, column 22: expected ',' or '}', but got '<stream end>'",
}


@pytest.mark.parametrize("content", YAML_ANSWERS)
def test_answers_to_mistakes_in_a_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert message(f"pretrain --config {path}") == f"--config {path}: {YAML_ANSWERS[content]}"


def test_a_capacity_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("moe: {capacity_factor: .inf}")
    answer = message(f"pretrain --preset tiny-8e --config {path}")
    assert answer == "moe.capacity_factor=inf must be finite"


def test_answers_to_mistakes_in_the_file_of_a_section(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("hiden_size: 64")
    wrong = "unknown option model.hiden_size; did you mean model.hidden_size?"
    assert message(f"pretrain --model {path}") == f"--model {path}: {wrong}"


def test_a_section_without_options_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  # num_layers: 4\ntrain: {seed: 3}\n")
    config = parse_run("pretrain", ["--config", str(path)]).config
    assert config.train.seed == 3 and config.model == parse_run("pretrain", []).config.model


SIZES = {
    "pretrain --preset base-32e": 24,
    "pretrain --data.global_texts 100": 1,
    "pretrain --data.micro_texts 6": 1,
    "pretrain --data.micro_texts 0 --data.global_images 48": 4,
    "pretrain --data.global_texts 0": 2,
    "pretrain --parallel.tensor_model_parallel_size 2": 24,
    "pretrain --model.num_layers 6 --parallel.pipeline_model_parallel_size 3"
    " --parallel.virtual_pipeline_model_parallel_size 2": 3,
    "finetune --preset sample-vqa": 2,
    "finetune --preset sample-nlvr2": 3,
    "finetune --preset sample-vqa --task.global_batch_size 10": 1,
}


@pytest.mark.parametrize("words", SIZES)
def test_the_batch_sizes_that_are_advised_fit(words: str) -> None:
    ranks = SIZES[words]
    advice = message(words, ranks).partition("; use ")[2]
    assert re.fullmatch(r"(--(data|task)\.\w+ \d+ ?)+", advice), advice
    command, *options = [*words.split(), *advice.split()]
    if command == "pretrain":
        validate(parse_run(command, ["--preset", "tiny-8e", *options]).config, ranks)
    else:
        architecture = ["--task.architecture", "tiny-8e"]
        validate_task(parse_finetune([*architecture, *options]).config, ranks)


@pytest.mark.parametrize(
    ("words", "ranks", "advised"),
    [
        (
            "--parallel.expert_model_parallel_size 8",
            12,
            "start 8 or 16 processes, or use --parallel",
        ),
        ("--parallel.tensor_model_parallel_size 2", 3, "start 2 or 4 processes"),
        ("--parallel.pipeline_model_parallel_size 2", 1, "torchrun --nproc-per-node 2 "),
    ],
)
def test_numbers_of_processes_that_fit_are_named(words: str, ranks: int, advised: str) -> None:
    assert advised in message(f"pretrain {words}", ranks)


@pytest.mark.parametrize("command", ["pretrain", "finetune --preset vqa"])
@pytest.mark.parametrize("name", ["tensor", "pipeline", "expert"])
def test_no_parallel_size_is_zero(command: str, name: str) -> None:
    option = f"parallel.{name}_model_parallel_size"
    assert message(f"{command} --{option} 0") == f"{option}=0 must be at least 1"
