"""Export and import on files: what is written, what is refused, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from commands import tool
from hf_folder import sentencepiece_model
from safetensors.torch import load_file, save_file
from small_checkpoints import CONFIGS, MODEL, SPARSE, random_tensors, save

from megatron_vlmoe.commands.main import main
from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import ModelConfig, MoEConfig, RunConfig
from megatron_vlmoe.convert.checkpoints import CheckpointReader, write_checkpoint
from megatron_vlmoe.convert.exporting import CardOptions, export_checkpoint
from megatron_vlmoe.convert.importing import import_checkpoint
from megatron_vlmoe.convert.tensors import INDEX_FILE, LazyTensor
from megatron_vlmoe.planning.parameters import checkpoint_shapes
from megatron_vlmoe.train.run_files import TOKENIZER_FILE

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
# The tokenizer of the tests has 80 pieces.
CONFIG = RunConfig(model=replace(MODEL, vocab_size=80), moe=SPARSE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of pretraining."""
    folder = tmp_path_factory.mktemp("run")
    save(folder / "checkpoints", CONFIG, random_tensors(CONFIG))
    sentencepiece_model(folder / TOKENIZER_FILE)
    rows = [
        {"step": 0, "eval/loss/mlm": 4.0, "acc/mlm": 0.0, "loss/total": 9.0},
        {"step": 99, "eval/loss/mlm": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def export(run: Path, output: Path, **options: Any) -> Path:
    return export_checkpoint(run, output, **options)


@pytest.mark.process
def test_the_command_line_goes_there_and_back(run: Path, tmp_path: Path) -> None:
    hf, back = tmp_path / "hf", tmp_path / "back"
    made = tool(
        "convert_checkpoint", "export", "--load", run, "--output", hf, "--max-shard-gb", "1e-5"
    )
    made.succeeded()
    assert len(list(hf.glob("model-*-of-*.safetensors"))) > 2
    made = tool(
        "convert_checkpoint",
        "import",
        "--load",
        hf,
        "--output",
        back,
        "--tensor-model-parallel-size",
        "2",
    )
    made.succeeded()
    before, after = CheckpointReader(run), CheckpointReader(back)
    assert before.tensors.keys() == after.tensors.keys()
    for key, tensor in before.tensors.items():
        assert torch.equal(tensor.read(), after.tensors[key].read()), key
    assert after.config.parallel.tensor_model_parallel_size == 2
    assert (back / TOKENIZER_FILE).read_bytes() == (run / TOKENIZER_FILE).read_bytes()
    again = tool("convert_checkpoint", "export", "--load", run, "--output", hf)
    assert again.code == 1
    assert again.stderr.strip() == f"error: {hf}: exists (--overwrite replaces it)"


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_files_are_readable_as_the_umask_says(run: Path, tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        folder = export(run, tmp_path / "hf")
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_no_pickle_travels(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "hf")
    endings = {path.suffix for path in folder.iterdir()}
    assert endings == {".safetensors", ".json", ".py", ".md", ".model", ""}
    source = TOOL.parents[1] / "megatron_vlmoe" / "convert"
    readers = [source / "tensors.py", source / "importing.py", *source.glob("hf/*.py")]
    assert not [path.name for path in readers if "torch.load" in path.read_text()]


def test_dtype_is_that_asked_for_but_routers_stay_fp32(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "hf", dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in load_file(folder / "model.safetensors").items()}
    routers = {name for name in dtypes if "router" in name}
    assert routers and {dtypes[name] for name in routers} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - routers} == {torch.bfloat16}
    reader = CheckpointReader(import_checkpoint(folder, tmp_path / "back").parent)
    for key, tensor in reader.tensors.items():
        assert tensor.dtype == (torch.float32 if "router" in key else torch.bfloat16), key


def test_card_says_what_the_run_was(run: Path, tmp_path: Path) -> None:
    card = CardOptions(name="shapes", license="mit", limitations="Knows shapes alone.")
    text = (export(run, tmp_path / "hf", card=card) / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n") and "license: mit\n" in text
    assert "experts in blocks 2, 3: 2 text, 4 vision; 1 per token" in text
    # Results of later steps are not those of this checkpoint.
    assert "| eval/loss/mlm | 4 |" in text and "loss/total" not in text
    assert "Knows shapes alone." in text and 'from_pretrained("shapes"' in text


@pytest.mark.parametrize(
    ("name", "pools"),
    [
        ("vl", "2 text, 4 vision, 2 vl; 1 per token"),
        ("text-only", "2 text; 1 per token"),
        ("vision-only", "4 vision; 1 per token"),
        ("shared-and-vl", "4 shared, 2 vl; 2 per token"),
    ],
)
def test_card_names_the_pools_that_there_are(name: str, pools: str, tmp_path: Path) -> None:
    config = replace(CONFIGS[name], model=replace(MODEL, vocab_size=80))
    save(tmp_path / "run" / "checkpoints", config, random_tensors(config))
    sentencepiece_model(tmp_path / "run" / TOKENIZER_FILE)
    text = (export(tmp_path / "run", tmp_path / "hf") / "README.md").read_text()
    assert f"experts in blocks 2, 3: {pools}\n" in text


def test_card_of_images_alone(tmp_path: Path) -> None:
    config = CONFIGS["no-text-vocabulary"]
    save(tmp_path / "run" / "checkpoints", config, random_tensors(config))
    text = (export(tmp_path / "run", tmp_path / "hf") / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction\n" in text
    assert "pretrained on masked images" in text and "AutoProcessor" not in text


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        (folder / "SHA256SUMS").unlink()

    return rewrite


EXPERTS = "vlmoe.encoder.layer.1.feed_forward.vision.experts.fc1_weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_truncate, "model.safetensors: damaged or truncated"),
    "tampered": (_flip_a_bit, "model.safetensors: differs from what was exported"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "other model": (_change_config(model_type="bert"), "model_type is 'bert', not 'vlmoe'"),
    "other size": (_change_config(hidden_size=16), "but config.json says"),
    "damaged config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: damaged: ",
    ),
    "blocks that it has not": (
        _change_config(training={"moe": {"layers": [-3]}}),
        "config.json: moe.layers has block -3",
    ),
    "more blocks than any": (
        _change_config(num_hidden_layers=2**30),
        "config.json: model.num_layers=1073741824 is more than 10000",
    ),
    "no heads": (
        _change_config(num_attention_heads=0),
        "config.json: model.num_attention_heads=0 must be positive",
    ),
    "a size of no tensor": (
        _change_config(hidden_size=2**63),
        "config.json: model.hidden_size=9223372036854775808 must be below 2**31",
    ),
    "a block twice": (
        _change_config(moe_layers=[2, 2]),
        "config.json: moe.layers=[2, 2] lists a block twice",
    ),
    "sums that are no text": (
        lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff"),
        "SHA256SUMS: damaged: its last line has no end",
    ),
    "sums of no name": (
        lambda folder: (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {'x' * 300}\n"),
        "SHA256SUMS: damaged: line 1 is not SHA-256 and file name",
    ),
    "sums of a file that is not there": (
        lambda folder: (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {'x' * 255}\n"),
        "missing, though SHA256SUMS lists it",
    ),
    "sums without a name": (
        lambda folder: (folder / "SHA256SUMS").write_text("x\n"),
        "SHA256SUMS: damaged: line 1 is not SHA-256 and file name",
    ),
    "sums of another folder": (
        lambda folder: (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../config.json\n"),
        "SHA256SUMS: damaged: line 1 is not SHA-256 and file name",
    ),
    "sums that cannot be read": (
        lambda folder: ((folder / "SHA256SUMS").unlink(), (folder / "SHA256SUMS").mkdir()),
        "SHA256SUMS: Is a directory",
    ),
    "an index that is nested too deeply": (
        lambda folder: (folder / INDEX_FILE).write_text("[" * 20_000),
        f"{INDEX_FILE}: damaged (",
    ),
    "an index of no name": (
        lambda folder: (folder / INDEX_FILE).write_text(
            json.dumps({"weight_map": {"x": "x" * 300}})
        ),
        "x: missing",
    ),
    "unknown field": (_change_config(moe_modalities="smell"), "modalities"),
    "missing expert": (
        _change_tensors(lambda tensors: tensors.update({EXPERTS: tensors[EXPERTS][:3].clone()})),
        f"{EXPERTS} has shape [3, 16, 8], but config.json says [4, 16, 8]",
    ),
    "missing tensor": (_change_tensors(lambda t: t.pop(EXPERTS)), f"has no {EXPERTS}"),
    "unknown tensor": (
        _change_tensors(lambda tensors: tensors.update(extra=torch.zeros(1))),
        "extra has no place in a checkpoint",
    ),
    "no tokenizer": (
        lambda folder: (folder / "sentencepiece.model").unlink(),
        "sentencepiece.model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_error(run: Path, tmp_path: Path, damage: str) -> None:
    folder = export(run, tmp_path / "hf")
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(ConvertError) as caught:
        import_checkpoint(folder, tmp_path / "back")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not list((tmp_path / "back").rglob("*"))


@pytest.mark.parametrize("damage", ["tampered", "truncated", "blocks that it has not"])
def test_words_are_not_filled_by_a_damaged_folder(
    run: Path,
    tmp_path: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megatron_vlmoe.commands.fill_masked.check_dataset", lambda *_: None)
    folder = export(run, tmp_path / "hf")
    change, message = DAMAGE[damage]
    change(folder)
    capsys.readouterr()
    words = ["--image-tokenizer", "x", "--pairs", "x", "--output", str(tmp_path / "y.png")]
    assert main(["fill-masked", "--model", str(folder), *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_checkpoint_that_is_not_whole_is_not_exported(run: Path, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    del tensors["decoder.layers.1.mlp.moe.experts.vision.weight2"]
    save(tmp_path / "run", CONFIG, tensors)
    sentencepiece_model(tmp_path / "run" / TOKENIZER_FILE)
    with pytest.raises(
        ConvertError, match="has no decoder.layers.1.mlp.moe.experts.vision.weight2"
    ):
        export(tmp_path / "run", tmp_path / "hf")
    (data,) = (tmp_path / "run").rglob("*.distcp")
    save(tmp_path / "cut" / "checkpoints", CONFIG, random_tensors(CONFIG))
    sentencepiece_model(tmp_path / "cut" / TOKENIZER_FILE)
    (data,) = (tmp_path / "cut").rglob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ConvertError):
        export(tmp_path / "cut", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "run"]


def test_an_import_refuses_its_output_before_it_reads(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "hf")
    import_checkpoint(folder, tmp_path / "back")
    kept = {path: path.read_bytes() for path in (tmp_path / "back").rglob("*") if path.is_file()}
    # What reading would complain of.
    (folder / "config.json").write_text("{")
    with pytest.raises(ConvertError, match="back: has a checkpoint already"):
        import_checkpoint(folder, tmp_path / "back")
    with pytest.raises(ConvertError, match="is the folder of a run with checkpoints"):
        import_checkpoint(folder, run, overwrite=True)
    with pytest.raises(ConvertError, match="config.json"):
        import_checkpoint(folder, tmp_path / "back", overwrite=True)
    assert kept == {path: path.read_bytes() for path in kept}


def test_overwriting_replaces_an_export_and_nothing_else(run: Path, tmp_path: Path) -> None:
    """The run that is read, data, and an export in which something was put all stay."""
    folder = export(run, tmp_path / "hf")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text_document.bin").write_bytes(b"0")
    (folder / "kept" / "run").mkdir(parents=True)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for output in (
        run,
        run.parent,
        run / "checkpoints",
        *map(tmp_path.joinpath, ("data", "hf", "file")),
    ):
        with pytest.raises(ConvertError, match="--overwrite replaces exported models alone"):
            export(run, output, overwrite=True)
    # It looks like an export from outside, and the checkpoint that is read lies in it.
    inside = folder / "kept" / "run"
    shutil.copytree(run, inside, dirs_exist_ok=True)
    with pytest.raises(ConvertError, match="--overwrite replaces exported models alone"):
        export(inside, folder, overwrite=True)
    shutil.rmtree(folder / "kept")
    assert sorted(tmp_path.rglob("*")) == [path for path in before if "kept" not in path.parts]
    (folder / "config.json").write_text("{}")
    assert json.loads((export(run, folder, overwrite=True) / "config.json").read_text())
    (tmp_path / "empty").mkdir()
    assert (export(run, tmp_path / "empty", overwrite=True) / "config.json").is_file()


def test_a_model_of_images_alone_needs_no_tokenizer(tmp_path: Path) -> None:
    config = CONFIGS["no-text-vocabulary"]
    save(tmp_path / "run", config, random_tensors(config))
    folder = export(tmp_path / "run", tmp_path / "hf")
    assert not (folder / "sentencepiece.model").exists()
    import_checkpoint(folder, tmp_path / "back")


# A small model first, so that what the libraries take is not counted; then the peak of each conversion alone, over what
# the process had before it (Linux: writing 5 there sets the peak back to what is resident now).
MEASURE = """
import sys
from pathlib import Path
from megatron_vlmoe.commands.main import main
run, hf, back, small, shard = sys.argv[1:]
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
def convert(command, source, target, *more):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    assert main([command, "--load", source, "--output", target, *more]) == 0
    return resident("VmHWM") - before
convert("export", small, small + "-hf")
convert("import", small + "-hf", small + "-back")
print(convert("export", run, hf, "--max-shard-gb", str(float(shard) / 1e9)), convert("import", hf, back))
"""


@pytest.mark.process
def test_memory_stays_below_two_shards(run: Path, tmp_path: Path) -> None:
    shard = 32_000_000
    model = ModelConfig(num_layers=6, hidden_size=256, num_attention_heads=4, ffn_hidden_size=1024)
    config = RunConfig(
        model=replace(model, visual_vocab_size=64, num_vl_layers=1),
        moe=MoEConfig(num_vision_experts=16, num_text_experts=16),
    )
    shapes = checkpoint_shapes(config)
    tensors = {
        key: LazyTensor(shape, torch.float32, lambda s=shape: torch.full(s, 0.01))
        for key, shape in shapes.items()
    }
    write_checkpoint(tmp_path / "run", tensors, config)
    words = [tmp_path / "run", tmp_path / "hf", tmp_path / "back", run, shard]
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    total = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    export_peak, import_peak = map(int, process.stdout.split()[-2:])
    assert total > 4 * shard
    assert export_peak < 2 * shard, f"{export_peak / 1e6:.0f} MB"
    assert import_peak < 2 * shard, f"{import_peak / 1e6:.0f} MB"
