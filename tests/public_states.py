"""State dicts with the parameter names and shapes of public models, and what the tests of their import share.

Names and shapes: microsoft/unilm (vlmo, beit2, beit3) and microsoft/torchscale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.public.command import import_public, open_source, plan_import
from megatron_vlmoe.convert.public.planner import ImportOptions, ImportReport
from megatron_vlmoe.convert.public.torch_files import PublicState
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.tokenizers.text import TextTokenizerTraining, train_text_tokenizer

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a public model.

    Args:
        width: D.
        depth: blocks.
        heads: attention heads.
        inner: FFN.
        patch: patch side.
        grid: patches along a side.
        vocab: text pieces.
        text: text positions.
        vl: last blocks with VL-FFN.
        codes: classes of the image head.
    """

    width: int = 64
    depth: int = 3
    heads: int = 4
    inner: int = 96
    patch: int = 8
    grid: int = 4
    vocab: int = 60
    text: int = 12
    vl: int = 1
    codes: int = 200


SMALL = Sizes()
BASE = Sizes(768, 12, 12, 3072, 16, 14, 30522, 40, 2, 8192)
WORDS = "a the red blue circle square is above below Paris café, and; of".split()
LENGTHS = {"text_length": 10, "pair_text_length": 8}


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def mlp(name: str, s: Sizes) -> Shapes:
    return linear(f"{name}.fc1", s.width, s.inner) | linear(f"{name}.fc2", s.inner, s.width)


def beit_attention(block: str, s: Sizes, layer_scale: bool = True) -> Shapes:
    d = s.width
    shapes = norm(f"{block}.norm1", d) | linear(f"{block}.attn.proj", d, d)
    shapes |= {
        f"{block}.attn.qkv.weight": (3 * d, d),
        f"{block}.attn.q_bias": (d,),
        f"{block}.attn.v_bias": (d,),
    }
    scales = {f"{block}.gamma_1": (d,), f"{block}.gamma_2": (d,)} if layer_scale else {}
    return shapes | scales


def vlmo_shapes(s: Sizes, absolute: bool = False) -> Shapes:
    """VLMo after vision-language pretraining; `absolute` has the kinds of parameters of base_plus."""
    d = s.width
    shapes: Shapes = {
        "transformer.cls_token": (1, 1, d),
        "transformer.patch_embed.proj.weight": (d, 3, s.patch, s.patch),
        "transformer.patch_embed.proj.bias": (d,),
        "text_embeddings.position_ids": (1, s.text),
        "text_embeddings.word_embeddings.weight": (s.vocab, d),
        "text_embeddings.position_embeddings.weight": (s.text, d),
        "text_embeddings.token_type_embeddings.weight": (2, d),
        "token_type_embeddings.weight": (2, d),
        "mlm_score.bias": (s.vocab,),
        "mlm_score.decoder.weight": (s.vocab, d),
        "logit_scale": (),
        "logit_vl_scale": (),
        **norm("text_embeddings.LayerNorm", d),
        **norm("transformer.norm", d),
        **linear("pooler.dense", d, d),
        **linear("mlm_score.transform.dense", d, d),
        **norm("mlm_score.transform.LayerNorm", d),
        **linear("itm_score.fc", d, 2),
    }
    for head in ("text", "image", "vl_text", "vl_image"):
        shapes[f"itc_{head}_proj.fc.weight"] = (d, d)
    if absolute:
        shapes["transformer.pos_embed"] = (1, s.grid**2 + 1, d)
    else:
        distances = (2 * s.grid - 1) ** 2 + 3 + 2 * 196 + 2
        shapes["relative_position_bias_table"] = (distances, s.heads * s.depth)
    for i in range(s.depth):
        block = f"transformer.blocks.{i}"
        shapes |= beit_attention(block, s, layer_scale=not absolute)
        for kind in ("text", "imag", *(("vl",) if i >= s.depth - s.vl else ())):
            shapes |= norm(f"{block}.norm2_{kind}", d) | mlp(f"{block}.mlp_{kind}", s)
    return shapes


def beit2_shapes(s: Sizes, absolute: bool = False, finetuned: bool = False) -> Shapes:
    """BEiT v2 with its [CLS] pretraining, or fine-tuned on classes."""
    d, distances = s.width, (2 * s.grid - 1) ** 2 + 3
    shapes: Shapes = {
        "cls_token": (1, 1, d),
        "patch_embed.proj.weight": (d, 3, s.patch, s.patch),
        "patch_embed.proj.bias": (d,),
    }
    index = (s.grid**2 + 1, s.grid**2 + 1)
    if absolute:
        shapes["pos_embed"] = (1, s.grid**2 + 1, d)
    elif not finetuned:
        shapes["rel_pos_bias.relative_position_bias_table"] = (distances, s.heads)
        shapes["rel_pos_bias.relative_position_index"] = index
    blocks = [f"blocks.{i}" for i in range(s.depth)]
    for block in blocks if finetuned else [*blocks, "cls_pt_layers.0", "cls_pt_layers.1"]:
        shapes |= beit_attention(block, s) | norm(f"{block}.norm2", d) | mlp(f"{block}.mlp", s)
        if finetuned:
            shapes[f"{block}.attn.relative_position_bias_table"] = (distances, s.heads)
            shapes[f"{block}.attn.relative_position_index"] = index
    if finetuned:
        return shapes | norm("fc_norm", d) | linear("head", d, 10)
    head = {"mask_token": (1, 1, d), **linear("lm_head", d, s.codes)}
    return shapes | head | norm("norm", d)


def beit3_shapes(s: Sizes, text: bool = True) -> Shapes:
    """BEiT-3 after pretraining, or without its text side."""
    d = s.width
    letters = "AB" if text else "A"
    shapes: Shapes = {
        "beit3.vision_embed.cls_token": (1, 1, d),
        "beit3.vision_embed.mask_token": (1, 1, d),
        "beit3.vision_embed.proj.weight": (d, 3, s.patch, s.patch),
        "beit3.vision_embed.proj.bias": (d,),
        "beit3.encoder.embed_positions.A.weight": (s.grid**2 + 3, d),
        **linear("mim_head", d, s.codes),
    }
    if text:
        shapes["beit3.text_embed.weight"] = (s.vocab, d)
        shapes["beit3.encoder.embed_positions.B.weight"] = (s.text, d)
        shapes |= linear("mlm_head", d, s.vocab)
    for letter in letters:
        shapes |= norm(f"beit3.encoder.layer_norm.{letter}", d)
        for i in range(s.depth):
            layer = f"beit3.encoder.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear(f"{layer}.self_attn.{part}.{letter}", d, d)
            for part in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                shapes |= norm(f"{layer}.{part}.{letter}", d)
            shapes |= mlp(f"{layer}.ffn.{letter}", s)
            shapes |= norm(f"{layer}.ffn.{letter}.ffn_layernorm", s.inner)
    return shapes


def filled(shapes: Shapes, seed: int = 3) -> dict[str, Tensor]:
    """Random values, norms near one and LayerScale large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if "relative_position_index" in name or name.endswith("position_ids"):
            state[name] = torch.arange(math.prod(shape)).reshape(shape)
            continue
        value = 0.2 * torch.randn(shape, generator=generator)
        is_norm = any(word in name for word in ("norm", "LayerNorm", "_ln")) and "weight" in name
        state[name] = value + 1.0 if is_norm or "gamma" in name else value
    return state


def count(shapes: Mapping[str, tuple[int, ...]], *starts: str) -> int:
    """Parameters whose names begin so (all of them without a start); indexes do not count."""
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith(starts or ("",)) and not name.endswith(("_ids", "position_index"))
    )


def with_experts(state: Mapping[str, Tensor], blocks: Mapping[int, int], kinds: str) -> dict:
    """Turns the FFNs of some blocks (from 0) into DeepSpeed MoE layers of so many different experts."""
    result = dict(state)
    generator = torch.Generator().manual_seed(11)
    for block, experts in blocks.items():
        for kind in kinds.split():
            name = f"transformer.blocks.{block}.mlp_{kind}"
            width = state[f"{name}.fc1.weight"].shape[1]
            result[f"{name}.deepspeed_moe.gate.wg.weight"] = torch.randn(
                experts, width, generator=generator
            )
            for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                dense = result.pop(f"{name}.{part}")
                for e in range(experts):
                    noise = 0.1 * torch.randn(dense.shape, generator=generator)
                    key = f"{name}.deepspeed_moe.experts.deepspeed_experts.{e}.{part}"
                    result[key] = dense + noise
    return result


def write_deepspeed(folder: Path, state: Mapping[str, Tensor], **extra: Any) -> Path:
    """The files that DeepSpeed writes for such a state dict."""
    folder.mkdir(parents=True)
    marker = ".deepspeed_moe.experts.deepspeed_experts."
    dense = {k: v for k, v in state.items() if marker not in k}
    torch.save({"module": dense, "global_steps": 2, **extra}, folder / "mp_rank_00_model_states.pt")
    layers = [key.partition(".deepspeed_moe.")[0] for key in dense if "gate.wg.weight" in key]
    for number, layer in enumerate(layers):
        experts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith(layer + marker):
                experts.setdefault(key.removeprefix(layer + marker).split(".")[0], {})[key] = value
        for expert, tensors in experts.items():
            torch.save(
                tensors, folder / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt"
            )
    return folder


# ---- imports of them


def write_text_model(folder: Path) -> Path:
    """A SentencePiece model of ours with some sixty pieces."""
    lines = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(200)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    training = TextTokenizerTraining(
        vocab_size=60, output_prefix=folder / "m", character_coverage=1.0
    )
    train_text_tokenizer(training, lines)
    return folder / "m.model"


def write_wordpiece(path: Path) -> Path:
    """A WordPiece vocabulary that has half of the words."""
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "circle", "is", "paris"]
    lines += [",", "cafe", "a", "##a", "##e", "##s", "##le"]
    lines += [f"[unused{i}]" for i in range(SMALL.vocab - len(lines))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save(path: Path, state: dict[str, Tensor], container: str = "model", **more: Any) -> Path:
    torch.save({container: state, **more}, path)
    return path


def options_for(path: Path, family: str, **options: Any) -> ImportOptions:
    return ImportOptions(family=family, source=path, **{**LENGTHS, **options})  # type: ignore[arg-type]


def write(path: Path, family: str, **options: Any) -> tuple[ImportReport, Path]:
    """Imports into a folder beside the file."""
    output = path.with_suffix(".out")
    return import_public(options_for(path, family, **options), output, strict=True), output


def run(
    path: Path, family: str, strict: bool = True, **options: Any
) -> tuple[ImportReport, dict[str, Tensor], RunConfig]:
    """What an import would write: report, tensors and configuration."""
    given = options_for(path, family, **options)
    report = import_public(given, path.with_suffix(".out"), strict=strict, write=False)
    plan, _ = plan_import(given, open_source(given))
    tensors = {key: tensor.read() for key, tensor in plan.tensors().items()}
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == plan.shapes
    return report, tensors, plan.config


def expect(message: str, path: Path, family: str, **options: Any) -> None:
    with pytest.raises(ConvertError, match=re.escape(message)) as caught:
        write(path, family, **options)
    assert "\n" not in str(caught.value)
    assert not path.with_suffix(".out").exists()


def planned(shapes: Shapes, family: str, **options: Any) -> ImportReport:
    """A plan by names and shapes alone: reading a value would fail."""

    def unread() -> Tensor:
        raise AssertionError("read")

    tensors = {name: LazyTensor(shape, torch.float32, unread) for name, shape in shapes.items()}
    source = PublicState(Path("published"), tensors)
    given = ImportOptions(family=family, source=source.path, **options)  # type: ignore[arg-type]
    plan, what = plan_import(given, source)
    return plan.report(what)


def assert_complete(report: ImportReport, ours: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Every tensor of either side is spoken of once."""
    told = [entry.ours for entry in (*report.taken, *report.adapted, *report.new)]
    assert sorted(told) == sorted(ours)
    used = {name for entry in (*report.taken, *report.adapted) for name in entry.sources}
    assert sorted([*used, *(left.name for left in report.left)]) == sorted(state)


def reason(report: ImportReport, name: str) -> str:
    return next(left.why for left in report.left if left.name == name)


def heads_first(*parts: Tensor, heads: int = SMALL.heads) -> Tensor:
    """megatron-core's rows [H, (q, k, v), K], written as loops."""
    size = len(parts[0]) // heads
    return torch.cat([part[h * size : (h + 1) * size] for h in range(heads) for part in parts])


def foreign_spm(path: Path, text_model: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model with its own order of special pieces, like `beit3.spm`."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((text_model.parent / "corpus.txt").read_text().split("\n")),
            model_writer=file, vocab_size=36, character_coverage=1.0, minloglevel=2,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path))
