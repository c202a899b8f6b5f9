"""The command line as a user meets it: help, errors and their statuses, former spellings, tools, start-up time."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from command_parsers import parser_of

from megatron_vlmoe.commands.main import main, run, run_one_of
from megatron_vlmoe.commands.table import COMMANDS
from megatron_vlmoe.data.manifest import DatasetManifest, FileRecord, stage_manifest

ROOT = Path(__file__).resolve().parents[2]
# Their options are those of the configuration.
TRAINING = ("pretrain", "pretrain-random", "finetune", "evaluate", "check-options", "check")
OWN_PARSER = [name for name in COMMANDS if name not in TRAINING]


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith(command.summary) and command.group in printed
    assert main([]) == 2


@pytest.mark.parametrize("name", OWN_PARSER)
def test_every_option_is_explained(name: str) -> None:
    parser = parser_of(name)
    blank = [
        action.option_strings or action.dest
        for action in parser._actions
        if not action.help or action.help is argparse.SUPPRESS
    ]
    assert not blank
    assert parser._option_string_actions["-h"] is parser._option_string_actions["--help"]


def test_every_tool_is_a_command() -> None:
    for path in sorted((ROOT / "tools").glob("*.py")):
        source = path.read_text()
        assert any(f'"{name}"' in source for name in COMMANDS), path.name
        assert len(source.splitlines()) < 25, f"{path.name}: its work belongs into the package"


def started(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        (["-m", "megatron_vlmoe", "nonsense"], "unknown command 'nonsense'", 2),
        (["-m", "megatron_vlmoe", "pretrian"], "did you mean pretrain?", 2),
        (["-m", "megatron_vlmoe", "index-text", "--outptu", "x"], "did you mean --output?", 2),
        (["-m", "megatron_vlmoe", "index-images", "--output", "x"], "required: --input", 2),
        (["-m", "megatron_vlmoe", "predict", "--load", "nowhere"], "no input", 2),
        (["-m", "megatron_vlmoe", "plot-losses", "--run", "nowhere", "--output", "x.png"], "", 1),
        ([ROOT / "tools" / "merge_datasets.py", "--input", "no", "--output", "x"], "no.json", 1),
        ([ROOT / "tools" / "make_sample_corpus.py", "--output", "x", "--num-images", "1"], "2", 2),
        ([ROOT / "tools" / "convert_checkpoint.py", "exprt"], "one of export, import", 2),
    ],
)
def test_a_users_error_is_one_line(words: list[str | Path], message: str, status: int) -> None:
    done = started(*words)
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("bench --preset tiny-8e --step 2", "--steps"),
        ("compare-layouts --layouts dp1 --step 2", "--steps"),
        ("upcycle --load x --output y --num-expert 4", "--num-experts"),
        ("upcycle --load x --output y --overwrit", "--overwrite"),
        ("upcycle --load x --output y --moe.tpok 2", "--moe.topk"),
    ],
)
def test_commands_that_pass_options_on_know_their_own(
    words: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {meant}?\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "index-images --input x --output y --workers abc",
            "--workers abc: expected a whole number of at least 1",
        ),
        ("bench --preset x --texts many", "--texts many: expected a whole number of at least 0"),
        (
            "export --load x --output y --dtype float8",
            "--dtype float8: expected one of float32, bfloat16, float16; did you mean float32 or float16?",
        ),
        (
            "export --load x --output y --max-shard-gb nan",
            "--max-shard-gb nan: must be above 0 and finite",
        ),
        (
            "import --load x --output y --tensor-model-parallel-size 0",
            "--tensor-model-parallel-size 0: expected a whole number of at least 1",
        ),
        (
            "import-public vlmoo",
            "FAMILY vlmoo: expected one of vlmo, beit3, beit2; did you mean vlmo?",
        ),
        (
            "compare-checkpoints a b --top -1",
            "--top -1: expected a whole number of at least 0",
        ),
        (
            "prepare-task --task vqa",
            f"unknown command 'prepare-task'; one of {', '.join(COMMANDS)}; did you mean index-task?",
        ),
        ("upcycle --load x --output y --noise nan", "--noise nan: must be 0 or more"),
        ("bench --preset x --threads -2", "--threads -2: expected a whole number of at least 0"),
        (
            "fill-masked --model x --image-tokenizer y --pairs z --output o --seed -1",
            "--seed -1: expected a whole number of at least 0",
        ),
        ("check-options pretrian", "pretrian is not a training command; did you mean pretrain?"),
        ("check pretrian", "pretrian is no command that can be checked; did you mean pretrain?"),
        (
            "compare-layouts --layouts tp1 --steps 0",
            "--steps 0: expected a whole number of at least 1",
        ),
    ],
)
def test_wrong_values_are_told_in_plain_words(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        # Each would otherwise be about the folder that the user happens to be in.
        (["upcycle", "--load", "x", "--output", ""], "--output"),
        (["train-text-tokenizer", "--input", "x", "--vocab-size", "9", "--output="], "--output"),
        (["plot", "--run", "x", ""], "--run"),
        (["plot-losses", "--run", "x", "", "--output", "y.png"], "--run"),
        (["bench", "--preset", ""], "--preset"),
        (["inspect-checkpoint", ""], "PATH"),
        (["bench", "--preset", "tiny-8e", "--output", ""], "--output"),
        (["predict", "--load", "x", "--task", ""], "--task"),
        (["upcycle", "--load", "x", "--output", "y", "--preset", ""], "--preset"),
        (["compare-layouts", "--layouts", "tp1", "--preset="], "--preset"),
    ],
)
def test_what_a_command_needs_is_not_empty(
    words: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a shell variable that is not set."""
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {name} is empty\n"


@pytest.mark.parametrize(
    "words",
    [
        "inspect-data x --png",
        "bench --preset tiny-8e --output",
        "plot --run x --output",
        "plot-losses --run x --output",
        "plot-losses --run x --output y.png --experts",
        "fill-masked --model x --image-tokenizer y --pairs z --output",
        "downstream-table --runs x --data y --output",
        "predict --load x --image y --output",
        "inspect-checkpoint x --json",
        "compare-checkpoints x y --json",
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = words.split()[-1]
    (tmp_path / "file").touch()
    for name, wrong in (
        (f"{tmp_path}", "is a folder"),
        (f"{tmp_path}/new/", "is a folder"),
        (f"{tmp_path}/file/new/a.png", f"{tmp_path}/file is a file, not a folder"),
    ):
        assert main([*words.split(), name]) == 2
        assert capsys.readouterr() == ("", f"error: {option} {name}: {wrong}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "words",
    [
        "plot --run x --output a.xyz",
        "plot-losses --run x --output a.xyz",
        "plot-losses --run x --output y.png --experts a.xyz",
        "fill-masked --model x --image-tokenizer y --pairs z --output a.xyz",
    ],
)
def test_a_name_that_is_no_pictures_is_refused_before_the_work(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 1
    assert capsys.readouterr().err.startswith("error: a.xyz: not a picture's name; it may end in ")


@pytest.mark.parametrize(
    "words",
    [
        "train-text-tokenizer --input x --vocab-size 9 --output",
        "index-text --input x --text-tokenizer y --output",
        "index-task --task vqa --raw x --output",
        "merge-data --input x --output",
        "encode-images --images x --image-tokenizer y --output",
    ],
)
def test_what_files_begin_with_is_more_than_their_folder(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), f"{tmp_path}/new/"]) == 2
    line = f"error: --output {tmp_path}/new/: an output prefix needs a name after its folder"
    assert capsys.readouterr().err == f"{line}, such as {tmp_path}/new/NAME\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "option", "file"),
    [
        ("inspect-data", "PREFIX", "X_image.bin"),
        ("inspect-data", "PREFIX", "X_samples.arrow"),
        ("merge-data --output y --input x", "--input", "X_text_document.idx"),
        ("encode-images --image-tokenizer y --images", "--images", "X.json"),
        ("train-image-tokenizer --output y --images", "--images", "X_image.idx"),
        ("fill-masked --model x --image-tokenizer y --output z --pairs", "--pairs", "X_text.bin"),
    ],
)
def test_one_file_of_a_dataset_is_no_prefix(
    words: str, option: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), f"data/{file}"]) == 2
    line = "is one file of a dataset; give the prefix of all its files: data/X"
    assert capsys.readouterr().err == f"error: {option} data/{file}: {line}\n"


def test_a_layout_that_does_not_fit_is_refused_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    words = "compare-layouts --preset tiny-8e --layouts tp1 pp7 --random-data --output"
    assert main([*words.split(), str(tmp_path / "runs")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: layout pp7: ") and not printed.out
    assert "pipeline_model_parallel_size" in printed.err and not list(tmp_path.iterdir())


def test_a_folder_that_is_no_export_is_not_looked_for_on_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--image-tokenizer", "x", "--pairs", "x", "--output", "y.png"]
    for model in (tmp_path, tmp_path / "nowhere"):
        assert main(["fill-masked", "--model", str(model), *rest]) == 1
        assert capsys.readouterr().err == f"error: {model}/config.json: not found\n"


def test_captions_of_another_tokenizer_are_not_filled(
    tmp_path: Path, tiny_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "hf"
    model.mkdir()
    config = {"model_type": "vlmoe", "architectures": ["VLMoEForPreTraining"]}
    (model / "config.json").write_text(json.dumps(config))
    (model / "sentencepiece.model").write_bytes(Path(tiny_tokenizer).read_bytes())
    files = {
        f"_{part}.{kind}": FileRecord(0, "")
        for part in ("image", "text")
        for kind in ("bin", "idx")
    }
    for kind, reason in (
        ("pairs", "made with another tokenizer"),
        ("text", "but one of pairs is wanted"),
    ):
        if kind == "text":
            files = {f"_text_document.{suffix}": FileRecord(0, "") for suffix in ("bin", "idx")}
        manifest = DatasetManifest(kind, 1, 1, 1, 1, files, {}, tokenizer_fingerprint="0")
        stage_manifest(tmp_path / kind, manifest).publish()
        words = ["--image-tokenizer", "x", "--pairs", str(tmp_path / kind), "--output", "y.png"]
        assert main(["fill-masked", "--model", str(model), *words]) == 1
        error = capsys.readouterr().err
        assert str(tmp_path / kind) in error and reason in error and error.count("\n") == 1


def console(line: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in which `vlmoe` is the program, and `python` its interpreter."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    program = f'set -o pipefail; vlmoe() {{ {sys.executable} -m megatron_vlmoe "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, env=variables, timeout=200
    )


LOGGED = """
import logging, sys, time
from pathlib import Path
from megatron_vlmoe.commands.main import run_command
from megatron_vlmoe.train.run_log import begin_run_logs, open_run_log
def train():
    open_run_log(Path(sys.argv[1]))
    begin_run_logs()
    for step in (1, 2):
        time.sleep(0.2)
        logging.getLogger("megatron_vlmoe").info("step %d", step)
sys.exit(run_command(train))
"""


@pytest.mark.process
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("console_gone", [">&-", "| true", "> /dev/full"])
def test_training_goes_on_without_its_console(
    console_gone: str, unbuffered: str, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(LOGGED)
    done = console(f"python {tmp_path}/program.py {tmp_path} {console_gone}", unbuffered)
    assert (done.returncode, done.stderr) == (0, "")
    log = (tmp_path / "log.txt").read_text()
    assert "INFO step 2" in log and "Traceback" not in log


@pytest.mark.process
@pytest.mark.parametrize("words", ["--help", "--version", "", "bench --help", "pretrain --help"])
def test_a_reader_may_go_away(words: str) -> None:
    assert console(f"vlmoe {words} | true").stderr == ""
    assert console(f"vlmoe {words} >&-").stderr == ""


@pytest.mark.process
@pytest.mark.parametrize(
    "words", ["--help", "--version", "bench --help", "pretrain --preset tiny-8e --dry-run"]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(words: str, unbuffered: str) -> None:
    data = "--data.text x --data.images x --data.pairs x" if "dry-run" in words else ""
    done = console(f"vlmoe {words} {data} > /dev/full", unbuffered)
    assert (done.returncode, done.stderr) == (1, "error: stdout: No space left on device\n")


def test_what_a_tool_of_several_commands_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_one_of(("export", "import"), ["--help"]) == 0
    printed = capsys.readouterr().out
    assert COMMANDS["export"].summary in printed and "pretrain" not in printed
    assert run("inspect-checkpoint", ["--help"]) == 0
    assert "diff A B" in capsys.readouterr().out


@pytest.mark.process
def test_an_error_of_every_rank_is_one_line(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(ONE_OR_ALL)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program)
    for ranks, line in (("01", "error: rank 0: no data"), ("1", "error: rank 1: no data")):
        told = started(*launch, ranks).stderr.splitlines()
        assert [words for words in told if words.startswith("error: ")] == [line]


ONE_OR_ALL = """
import os, sys, time
from megatron_vlmoe.commands.main import run_command
from megatron_vlmoe.config.errors import DataError
def fail():
    if os.environ["RANK"] in sys.argv[1]:
        raise DataError(f"rank {os.environ['RANK']}: no data")
    time.sleep(60)
sys.exit(run_command(fail))
"""

BROKEN = """
import sys
import megatron_vlmoe.prepare.corpora as merge
from megatron_vlmoe.commands.main import main, run
def broken(*_):
    raise ValueError("an invariant does not hold")
merge.merge_datasets = broken
"""


@pytest.mark.process
@pytest.mark.parametrize(
    "start",
    [
        "sys.exit(main(['merge-data', '--input', 'a', '--output', 'b']))",
        "import runpy; sys.argv = ['merge', '--input', 'a', '--output', 'b']; "
        f"runpy.run_path({str(ROOT / 'tools' / 'merge_datasets.py')!r}, run_name='__main__')",
    ],
    ids=["command", "tool"],
)
def test_a_mistake_in_the_program_keeps_its_traceback(start: str) -> None:
    done = started("-c", BROKEN + start)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "in broken" in done.stderr
    assert done.stderr.rstrip().endswith("ValueError: an invariant does not hold")


@pytest.mark.process
def test_an_error_of_the_options_is_printed_by_one_rank() -> None:
    words = ("-m", "megatron_vlmoe", "index-images")
    assert started(*words, RANK="0").stderr and not started(*words, RANK="1").stderr


def test_interrupted_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from unittest import mock

    with mock.patch("megatron_vlmoe.commands.measure.read_metrics") as read:
        read.side_effect = KeyboardInterrupt
        assert run("plot-losses", ["--run", "x", "--output", "y"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_former_spellings_work_for_one_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--input", str(tmp_path / "no.txt"), "--output-prefix=x", "--tokenizer-model", "m"]
    assert run("index-text", words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        f"warning: {former} is now {current}; the former spelling goes with the next release"
        for former, current in (
            ("--output-prefix", "--output"),
            ("--tokenizer-model", "--text-tokenizer"),
        )
    ]
    assert len(lines) == 3 and lines[2].startswith("error: ")


LIGHT = """
import sys
from megatron_vlmoe.commands.main import main
try:
    status = main({words!r})
except SystemExit as end:
    status = end.code or 0
heavy = {{"torch", "megatron", "transformers"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else status)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    "words", [["--help"], *([name, "--help"] for name in COMMANDS), ["pretrain", "--dry-run"]]
)
def test_help_and_dry_runs_start_at_once(words: list[str]) -> None:
    assert_light(words)


@pytest.mark.process
@pytest.mark.parametrize("start", ["architecture", "checkpoint", "export"])
def test_the_dry_run_of_a_task_opens_data_and_checkpoint_at_once(
    start: str, tmp_path: Path
) -> None:
    import small_checkpoints
    from data_files import encoded, picture

    for split in ("train", "val"):
        for name in ("n01", "n02"):
            folder = tmp_path / "raw" / split / name
            folder.mkdir(parents=True)
            (folder / f"{split}.JPEG").write_bytes(encoded(picture(1)))
    task = ["--task", "imagenet"]
    raw = ["--raw", str(tmp_path / "raw"), "--output", str(tmp_path / "in")]
    assert run("index-task", [*task, *raw]) == 0
    config = small_checkpoints.CONFIGS["no-text-vocabulary"]
    tensors = small_checkpoints.random_tensors(config)
    model = ["--load", str(tmp_path / "run")]
    if start == "checkpoint":
        small_checkpoints.save(tmp_path / "run", config, tensors)
    elif start == "export":
        small_checkpoints.save_hugging_face(tmp_path / "run", config, tensors)
    else:
        model = ["--task.architecture", "tiny-8e"]
    data = ["--task.data", str(tmp_path / "in")]
    done = assert_light(["finetune", *task, *data, *model, "--dry-run"])
    assert "imagenet: 2 training samples" in done.stdout and "\nParameters" in done.stdout
    assert ("  3 blocks, hidden size 8," in done.stdout) == (start != "architecture")


def assert_light(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command that must neither import torch nor take long."""
    used = []
    # 0.4 to 0.9 s on an idle core; torch alone takes 2.5 s. The same work counts more where cores are shared.
    while not used or (used[-1] >= 1.5 and len(used) < 3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = started("-c", LIGHT.format(words=words))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(used) < 1.5
    return done


@pytest.mark.process
def test_short_and_long_help_are_the_same() -> None:
    short, long = (
        started("-m", "megatron_vlmoe", "index-text", word).stdout for word in ("-h", "--help")
    )
    assert short == long != ""


def test_a_command_is_recorded_with_what_it_made(tmp_path: Path) -> None:
    from data_files import encoded, picture

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(picture(1)))
    words = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "set")]
    assert run("index-images", words) == 0
    command = json.loads((tmp_path / "set.json").read_text())["source"]["command"]
    assert command == f"vlmoe index-images {' '.join(words)}"


NOISE = """#!/bin/bash
echo "${CUDA_DEVICE_MAX_CONNECTIONS-none}" > "$STARTED"
echo "starting" >&2
echo "error: rank 1 ran out of data" >&2
printf 'traceback of torchrun\\n=====\\n' >&2
exit "${STATUS:-1}"
"""


def launched(
    folder: Path, *words: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], bool]:
    """What the example scripts do with their options, with a torchrun that fails; whether it was started."""
    fake = folder / "bin" / "torchrun"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(NOISE)
    fake.chmod(0o755)
    started = folder / "started"
    started.unlink(missing_ok=True)
    line = 'set -euo pipefail; source "$0/examples/launch_common.sh"; start_workers "$@"'
    path = f"{fake.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "STARTED": str(started)}
    # Where no environment is active, the scripts put the repository's own before everything else.
    environment["VIRTUAL_ENV"] = sys.prefix
    done = subprocess.run(
        ["bash", "-c", line, str(ROOT), *words],
        capture_output=True,
        text=True,
        env={**environment, **variables},
        timeout=100,
    )
    return done, started.exists()


@pytest.mark.process
def test_launcher_repeats_the_error_below_what_torchrun_prints(tmp_path: Path) -> None:
    done, started = launched(tmp_path, "pretrain", "--preset", "tiny-8e", NPROC="2")
    assert started and done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines == [
        *("starting", "error: rank 1 ran out of data", "traceback of torchrun", "====="),
        "error: rank 1 ran out of data",
    ]
    done, started = launched(tmp_path, "pretrain", "--preset", "tiny-8e", STATUS="0")
    assert started and done.returncode == 0 and done.stderr.splitlines()[-1] == "====="


@pytest.mark.process
@pytest.mark.parametrize(
    "words",
    [
        ("pretrain", "--train.stepz", "3"),
        ("pretrain", "--preset", "tiny-8e", "--parallel.expert_model_parallel_size", "16"),
        ("finetune", "--task", "vqa", "--load", "nowhere", "--optim.lr", "high"),
        ("evaluate", "--load", "nowhere", "--nonsense.option", "1"),
    ],
)
def test_launcher_finds_wrong_options_before_torchrun(tmp_path: Path, words: tuple[str]) -> None:
    done, started = launched(tmp_path, *words, NPROC="2", RANK="3")
    assert not started and done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")


@pytest.mark.process
def test_launcher_starts_what_only_other_nodes_make_whole(tmp_path: Path) -> None:
    words = ("pretrain", "--preset", "tiny-8e", "--parallel.expert_model_parallel_size", "4")
    words += ("--data.micro_texts=1", "--data.micro_images=4", "--data.micro_pairs=6")
    nodes = {"NNODES": "2", "GPUS_PER_NODE": "2", "MASTER_ADDR": "host"}
    assert launched(tmp_path, *words, **nodes)[1]
    assert not launched(tmp_path, *words, NPROC="2")[1]


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "variables", "connections"),
    [
        ((), {}, "none"),
        ((), {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8"),
        (("--parallel.tensor_model_parallel_size", "2"), {}, "1"),
        (("--parallel.tensor_model_parallel_size=2",), {}, "1"),
        (("--parallel.tensor_model_parallel_size", "1"), {}, "none"),
        (("--parallel.tensor_model_parallel_size", "2"), {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8"),
    ],
)
def test_one_hardware_queue_is_for_tensor_parallelism_alone(
    tmp_path: Path,
    words: tuple[str, ...],
    variables: dict[str, str],
    connections: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    _, started = launched(
        tmp_path, "pretrain", "--preset", "tiny-8e", *words, NPROC="2", **variables
    )
    assert started and (tmp_path / "started").read_text() == f"{connections}\n"


@pytest.mark.process
def test_launcher_prints_help_without_torchrun(tmp_path: Path) -> None:
    done, started = launched(tmp_path, "pretrain", "--help")
    assert done.returncode == 0 and "--train.steps" in done.stdout and not started
