"""Which expert every patch and word goes to: loads a model, reads pictures and captions with it, keeps what its routers
decide.

A checkpoint of any layout and a Hugging Face folder give the same model, that of `convert/hf`, in fp32. Pictures and
captions are read as pairs, and each alone, because a token's expert may depend on what it is read with.

Letters: S image side, g patches along a side, N tokens, K experts of each.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from megatron_vlmoe.analysis import routing_measures as measures
from megatron_vlmoe.analysis.routing_inputs import Source
from megatron_vlmoe.config.errors import DataError, RoutingError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.convert.hf.configuration_vlmoe import VLMoEConfig
from megatron_vlmoe.convert.hf.modeling_vlmoe import VLMoEModel
from megatron_vlmoe.convert.hf.moe_vlmoe import Routing, VLMoESparseBranch
from megatron_vlmoe.convert.hf_config import export_config
from megatron_vlmoe.convert.importing import HuggingFaceModel
from megatron_vlmoe.convert.name_table import name_table
from megatron_vlmoe.convert.tensors import check_tensors
from megatron_vlmoe.data.augment import CropBox, ImageDraw, views
from megatron_vlmoe.data.image_files import ImageRules, read_image_file
from megatron_vlmoe.data.samples import TextFormat
from megatron_vlmoe.prepare.readers.records import Reject
from megatron_vlmoe.runtime.files import open_atomic, write_parts_atomic, write_text_atomic
from megatron_vlmoe.runtime.progress import Progress
from megatron_vlmoe.sample_corpus.truth import known_scenes, patch_truth
from megatron_vlmoe.sample_corpus.world import Scene
from megatron_vlmoe.stream.block_plan import block_plans
from megatron_vlmoe.tokenizers.text import TextTokenizer
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, is_hugging_face, run_file

Array = npt.NDArray[Any]

INPUTS = ("pairs", "images", "texts")
"""What the model reads at a time: a picture with its caption, a picture alone, a caption alone."""
_SEGMENTS = {
    "pairs": ("pair_texts", "pair_images"),
    "images": ("images",),
    "texts": ("texts",),
}
TEXT, IMAGE = 0, 1
"""Values of the column `modality`."""
FIRST, LAST, PADDING = -1, -2, -3
"""Values of the column `place` that are no patch and no piece: [I_CLS] or [T_CLS], [T_SEP], padding."""
COLUMNS = ("router", "item", "modality", "place", "expert", "gate", "kept")
_DISPLAY_SIDE = 256


@dataclass(frozen=True)
class Model:
    """A model, and what reads its inputs.

    Args:
        name: where it was loaded from.
        config: of the run.
        model: in evaluation mode, with the capacity factor that was asked for.
        tokenizer: None for a model of images alone.
    """

    name: str
    config: RunConfig
    model: VLMoEModel
    tokenizer: Optional[TextTokenizer]

    @property
    def grid(self) -> int:
        """Patches along a side, g."""
        return self.config.model.patch_grid


@dataclass(frozen=True)
class Item:
    """A picture, a caption, or a pair of both.

    Args:
        name: of the picture, or the record of a caption alone.
        pixels: the picture as the model sees it, uint8 ``[S, S, 3]``; None without one.
        display: the same at a resolution for people.
        caption: empty without one.
        ids: pieces of the caption, without special ones.
        pieces: as the tokenizer writes them.
        words: of the caption, in order.
        word_of_piece: number of the word of every piece.
        patch_labels: contents of the patches by name, ``[g * g]`` words each.
    """

    name: str
    pixels: Optional[Array] = None
    display: Optional[Image.Image] = None
    caption: str = ""
    ids: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    word_of_piece: tuple[int, ...] = ()
    patch_labels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def grid(self) -> int:
        """Patches along a side, g; 0 without a picture."""
        return int(len(self.patch_labels.get("color", ())) ** 0.5)

    @property
    def piece_labels(self) -> dict[str, list[str]]:
        """Contents of the pieces by name."""
        labels = [
            measures.word_label(piece, self.words[number])
            for piece, number in zip(self.pieces, self.word_of_piece)
        ]
        return {"word class": [measures.word_class(label) for label in labels], "word": labels}

    def described(self, number: int) -> dict[str, Any]:
        """The line of `items.jsonl`."""
        row: dict[str, Any] = {"item": number, "name": self.name}
        if self.caption:
            row |= {"caption": self.caption, "pieces": self.pieces, "words": self.words}
            row |= {"word_of_piece": self.word_of_piece, "piece_labels": self.piece_labels}
        if self.pixels is not None:
            row["patch_labels"] = dict(self.patch_labels)
        return row


@dataclass(frozen=True)
class Router:
    """One router as it met one kind of input.

    Args:
        input: one of `INPUTS`.
        block: number of the block, from 1.
        pool: `text`, `vision`, `vl` or `shared`.
        experts: of the pool.
    """

    input: str
    block: int
    pool: str
    experts: int


@dataclass(frozen=True)
class Trace:
    """Every decision of every router, one row for a token.

    Args:
        routers: the routers that met something.
        columns: `router` (index into them), `item`, `modality`, `place` ``[N]``; `expert`, `gate`, `kept` ``[N, K]``.
    """

    routers: tuple[Router, ...]
    columns: Mapping[str, Array]

    def rows(self, number: int) -> dict[str, Array]:
        """The columns of one router's rows."""
        own = self.columns["router"] == number
        return {name: values[own] for name, values in self.columns.items()}

    def arrays(self) -> dict[str, Array]:
        """What `trace.npz` holds: the columns, and of the routers `router_input`, `router_block`, ..."""
        table = [asdict(router) for router in self.routers]
        return {
            **self.columns,
            **{f"router_{name}": np.array([row[name] for row in table]) for name in table[0]},
        }


def open_model(
    location: str, text_tokenizer: Optional[str] = None, capacity_factor: Optional[float] = None
) -> Model:
    """Loads the model of a run, checkpoint, iteration or Hugging Face folder; heads are left out.

    Args:
        location: the folder.
        text_tokenizer: SentencePiece model; None: the one that lies there.
        capacity_factor: of the experts; 0 or less drops nothing; None: as the run evaluates.

    Raises:
        RoutingError: the model has no experts, its experts choose tokens, or its text tokenizer is missing or another.
        ConvertError: there is no model, or it is damaged.
        DataError: a text tokenizer that cannot be read.
    """
    source: HuggingFaceModel | CheckpointReader
    if is_hugging_face(location):
        source = HuggingFaceModel(location)
        own = source.tokenizer
    else:
        source = CheckpointReader(location)
        own = run_file(source.path, TOKENIZER_FILE)
        if own is None and Path(source.config.data.text_tokenizer).is_file():
            own = Path(source.config.data.text_tokenizer)
    # Heads and the rest of a task have no routers.
    config = RunConfig(model=source.config.model, moe=source.config.moe, data=source.config.data)
    if not any(plan.pools for plan in block_plans(config.model, config.moe)):
        raise RoutingError(f"{location}: a dense model: no block of it has experts to route to")
    if config.moe.routing == "expert_choice":
        raise RoutingError(
            f"{location}: its experts choose tokens (moe.routing=expert_choice); what is shown here is which experts "
            "tokens choose"
        )
    tokenizer = None
    if config.model.vocab_size:
        if text_tokenizer is None and own is None:
            raise RoutingError(f"{location}: no {TOKENIZER_FILE} there; name it: --text-tokenizer")
        tokenizer = TextTokenizer(text_tokenizer or own or "")
        if tokenizer.size != config.model.vocab_size:
            raise RoutingError(
                f"{tokenizer.model_path}: has {tokenizer.size} pieces, but the model of {location} has "
                f"{config.model.vocab_size}"
            )
    model = VLMoEModel(VLMoEConfig(**export_config(config)))
    entries = [e for e in name_table(config) if e.theirs[0].startswith("vlmoe.")]
    shapes = {entry.ours: entry.shape for entry in entries}
    given = {key: tensor for key, tensor in source.tensors.items() if key in shapes}
    check_tensors(source.path, given, shapes, "its configuration", "the model")
    state: dict[str, Tensor] = {}
    for entry in entries:
        parts = entry.parted(given[entry.ours], config.model)
        state |= {name.removeprefix("vlmoe."): part for name, part in zip(entry.theirs, parts)}
    model.load_state_dict(state)
    if capacity_factor is None:
        dropless = config.moe.dispatcher == "dropless"
        capacity_factor = 0.0 if dropless else config.moe.eval_capacity_factor
    model.config.capacity_factor = capacity_factor
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(location, config, model.eval().to(device), tokenizer)


def read_items(
    sources: Sequence[Source], model: Model, rules: ImageRules
) -> tuple[list[Item], list[str]]:
    """Decodes pictures and tokenizes captions.

    Returns:
        What can be read, and a reason for each that cannot, which names it. A pair is left out as a whole.

    Raises:
        DataError: nothing can be read.
        RoutingError: captions for a model of images alone.
    """
    size, grid = model.config.model.image_size, model.grid
    pictures = [Path(s.picture.path).absolute() for s in sources if s.picture is not None]
    scenes = known_scenes(pictures[0]) if pictures else {}
    if not all(place in scenes for place in pictures):
        # The truth of some pictures alone would compare different things.
        scenes = {}
    items: list[Item] = []
    left_out: list[str] = []
    for source in sources:
        parts: dict[str, Any] = {}
        if source.picture is not None:
            try:
                image = read_image_file(source.picture.read(), rules)
            except DataError as error:
                file = source.picture
                # A file of its own is named by its path, any other picture by where its record is.
                where = Reject(file.source, file.record, str(error))
                if file.path and file.size is None:
                    where = Reject(file.path, "", str(error))
                left_out.append(str(where))
                continue
            whole = ImageDraw(CropBox.whole(image.width, image.height))
            pixels = views(image, whole, [size])[0].transpose(1, 2, 0)
            side = min(max(size, *image.size), max(size, _DISPLAY_SIDE))
            parts |= {
                "pixels": pixels,
                "display": image.resize((side, side), Image.Resampling.BICUBIC),
            }
            scene = scenes.get(Path(source.picture.path).absolute())
            parts["patch_labels"] = _patch_labels(pixels, grid, size, scene)
        if source.caption:
            if model.tokenizer is None:
                raise RoutingError(f"{model.name}: a model of images alone reads no captions")
            try:
                parts |= _tokenized(source, model.tokenizer)
            except DataError as error:
                left_out.append(str(error))
                continue
        items.append(Item(source.name, **parts))
    if not items:
        raise DataError(f"nothing can be read of {len(sources)} chosen; first: {left_out[0]}")
    return items, left_out


def _patch_labels(
    pixels: Array, grid: int, size: int, scene: Optional[Scene]
) -> dict[str, list[str]]:
    side = size // grid
    patches = pixels[: grid * side, : grid * side].reshape(grid, side, grid, side, 3)
    patches = patches.transpose(0, 2, 1, 3, 4).reshape(grid * grid, side, side, 3)
    labels = {
        "color": [measures.COLOR_CLASSES[code] for code in measures.color_classes(patches)],
        "edge": [measures.EDGE_CLASSES[code] for code in measures.edge_classes(patches)],
    }
    if scene is not None:
        labels["drawn color"], labels["drawn shape"] = patch_truth(scene, size, grid)
    return labels


def _tokenized(source: Source, tokenizer: TextTokenizer) -> dict[str, Any]:
    ids = tokenizer.encode(source.caption)
    if not ids:
        raise DataError(f"{source.name}: the caption has no token")
    pieces = [tokenizer.piece(i) for i in ids]
    words, numbers = measures.words_of_pieces(pieces)
    return {
        "caption": source.caption,
        "ids": tuple(ids),
        "pieces": tuple(pieces),
        "words": tuple(words),
        "word_of_piece": tuple(numbers),
    }


def inputs_of(items: Sequence[Item], model: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of `INPUTS` that the items give and that meet a router, and those that meet none.

    Raises:
        RoutingError: none does.
    """
    plans = block_plans(model.config.model, model.config.moe)
    met = {segment for plan in plans for pool in plan.pools for segment in pool.segments}
    given = {name: any(all(_wanted(name, *_has(item))) for item in items) for name in INPUTS}
    found = tuple(name for name in INPUTS if given[name] and met & set(_SEGMENTS[name]))
    if not found:
        asked = " and ".join(name for name in INPUTS if given[name])
        pools = ", ".join(dict.fromkeys(p.name for plan in plans for p in plan.pools))
        raise RoutingError(
            f"{model.name}: no router reads {asked}: the experts of this model are those of {pools}"
        )
    return found, tuple(name for name in INPUTS if given[name] and name not in found)


def _has(item: Item) -> tuple[bool, bool]:
    return item.pixels is not None, bool(item.caption)


@torch.no_grad()
def trace(model: Model, items: Sequence[Item], inputs: Sequence[str], batch_size: int) -> Trace:
    """Reads the items and keeps what every router decides.

    Captions of pairs are padded to the length that they have in training. Captions alone are padded to the longest of
    the batch, since texts are packed full in training, where padding gives experts hardly any room. The capacity of
    experts counts padding too, and which tokens are dropped depends on what else is in the batch.

    Args:
        model: the model.
        items: what is read.
        inputs: how (`INPUTS`).
        batch_size: items at a time.

    Raises:
        RoutingError: a router gives no number.
    """
    routers: dict[Router, int] = {}
    parts: list[dict[str, Array]] = []
    rows = {
        name: [n for n, item in enumerate(items) if all(_wanted(name, *_has(item)))]
        for name in inputs
    }
    with Progress("routing", "items", sum(map(len, rows.values()))) as progress:
        for name, numbers in rows.items():
            for first in range(0, len(numbers), batch_size):
                own = numbers[first : first + batch_size]
                batch = _batch(model, [items[n] for n in own], name)
                with _recorded(model.model) as calls:
                    model.model(**batch)
                for block, branch, routing in calls:
                    if not routing.gate.isfinite().all():
                        raise RoutingError(
                            f"{model.name}: the gates of block {block} ({branch.name} experts) are no numbers; has its "
                            "training diverged?"
                        )
                    router = Router(name, block, branch.name, branch.num_experts)
                    number = routers.setdefault(router, len(routers))
                    parts.append(_rows(number, router, own, batch, routing, model))
                progress.add(len(own))
        progress.finish()
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    return Trace(tuple(routers), columns)


def _wanted(name: str, picture: bool, caption: bool) -> tuple[bool, ...]:
    return {"pairs": (picture, caption), "images": (picture,), "texts": (caption,)}[name]


def _text_length(model: Model, name: str) -> int:
    """The most tokens of a caption in one of the `INPUTS`, [T_CLS] and [T_SEP] included."""
    sizes = model.config.model
    return sizes.pair_text_length if name == "pairs" else sizes.text_length


def _batch(model: Model, items: Sequence[Item], name: str) -> dict[str, Tensor]:
    """Arguments of the model for items that are read in one of the `INPUTS`."""
    device = next(model.model.parameters()).device
    batch = {}
    if name != "texts":
        pixels = torch.tensor(np.stack([item.pixels for item in items if item.pixels is not None]))
        data = model.config.data
        mean, std = torch.tensor(data.pixel_mean), torch.tensor(data.pixel_std)
        batch["pixel_values"] = ((pixels / 255.0 - mean) / std).permute(0, 3, 1, 2)
    if name != "images":
        assert model.tokenizer is not None
        length = _text_length(model, name)
        if name == "texts":
            length = min(length, 2 + max(len(item.ids) for item in items))
        texts = [[np.array(item.ids, dtype=np.int64)] for item in items]
        ids, lengths = TextFormat.of(model.tokenizer, length).rows(texts)
        batch["input_ids"] = torch.tensor(ids)
        batch["attention_mask"] = torch.arange(length) < torch.tensor(lengths)[:, None]
    return {key: value.to(device) for key, value in batch.items()}


Call = tuple[int, VLMoESparseBranch, Routing]


@contextlib.contextmanager
def _recorded(model: VLMoEModel) -> Iterator[list[Call]]:
    """Inside, every routing of the model is put into the list: block, pool, routing."""
    calls: list[Call] = []

    def record(
        block: int, branch: VLMoESparseBranch, logits: Tensor, mask: Optional[Tensor]
    ) -> Routing:
        routing = VLMoESparseBranch.route(branch, logits, mask)
        calls.append((block, branch, routing))
        return routing

    branches = [
        (number, branch)
        for number, layer in enumerate(model.encoder.layer, start=1)
        for branch in layer.modules()
        if isinstance(branch, VLMoESparseBranch)
    ]
    try:
        for number, branch in branches:
            # In front of the method, for this object alone: no output of the model says which choices were dropped.
            vars(branch)["route"] = partial(record, number, branch)
        yield calls
    finally:
        for _, branch in branches:
            vars(branch).pop("route", None)


def _rows(
    number: int,
    router: Router,
    items: Sequence[int],
    batch: Mapping[str, Tensor],
    routing: Routing,
    model: Model,
) -> dict[str, Array]:
    """One call of a router as rows of a trace; all texts of the batch come before all images."""
    columns: dict[str, list[Array]] = {"item": [], "modality": [], "place": []}
    if "input_ids" in batch and router.pool != "vision":
        mask = batch["attention_mask"].cpu().numpy()
        length = mask.shape[1]
        place = np.broadcast_to(np.arange(-1, length - 1), mask.shape).copy()
        place[np.arange(len(mask)), mask.sum(axis=1) - 1] = LAST
        place[~mask] = PADDING
        columns["item"].append(np.repeat(items, length))
        columns["place"].append(place.ravel())
        columns["modality"].append(np.full(place.size, TEXT))
    if "pixel_values" in batch and router.pool != "text":
        patches = model.grid**2
        columns["item"].append(np.repeat(items, 1 + patches))
        columns["place"].append(np.tile(np.arange(-1, patches), len(items)))
        columns["modality"].append(np.full(len(items) * (1 + patches), IMAGE))
    found: dict[str, Array] = {name: np.concatenate(values) for name, values in columns.items()}
    expert, gate = routing.expert.cpu().numpy(), routing.gate.float().cpu().numpy()
    kept = np.ones_like(expert, dtype=bool)
    if routing.kept is not None:
        kept = routing.kept.cpu().numpy()
    # Padding goes nowhere, unless the model routes it as the paper's did.
    routed = found["place"] != PADDING
    if model.config.moe.route_padding:
        routed[:] = True
    types = {"item": np.int32, "modality": np.int8, "place": np.int16}
    return {
        "router": np.full(int(routed.sum()), number, dtype=np.int16),
        **{name: values[routed].astype(types[name]) for name, values in found.items()},
        "expert": expert[routed].astype(np.int16),
        "gate": gate[routed],
        "kept": kept[routed],
    }


def token_labels(rows: Mapping[str, Array], items: Sequence[Item]) -> dict[str, measures.Labels]:
    """What the tokens of a router are about, by name; special tokens and padding are about nothing.

    Args:
        rows: of the router (`Trace.rows`).
        items: that the trace is of.
    """
    item, modality, place = rows["item"], rows["modality"], rows["place"]
    labels: dict[str, measures.Labels] = {}
    for kind in (IMAGE, TEXT):
        own = (modality == kind) & (place >= 0)
        if not own.any():
            continue
        places = list(zip(item[own].tolist(), place[own].tolist()))
        contents = {
            n: items[n].patch_labels if kind == IMAGE else items[n].piece_labels
            for n in dict.fromkeys(item[own].tolist())
        }
        for name in dict.fromkeys(itertools.chain.from_iterable(contents.values())):
            values = np.full(len(item), "", dtype=object)
            values[own] = [contents[n][name][at] for n, at in places]
            labels[name] = measures.coded(values.tolist())
        where = "patch position" if kind == IMAGE else "word position"
        names_of_places = tuple(map(str, range(int(place[own].max()) + 1)))
        labels[where] = measures.Labels(names_of_places, np.where(own, place, -1).astype(np.int64))
    if len(set(modality.tolist())) > 1:
        codes = np.where(place >= 0, modality, -1).astype(np.int64)
        labels["modality"] = measures.Labels(("text", "image"), codes)
    return labels


COUNTED_CLASSES = 16
"""Contents with at most so many classes are counted by expert in `routing.json`."""


def summarize(
    found: Trace, items: Sequence[Item], model: Model, permutations: int, seed: int
) -> dict[str, Any]:
    """The content of `routing.json`: for every router load, drops, classes by expert, co-activation, specialisation.

    Contents are compared with the first choice of every token, also where that was dropped.

    Args:
        found: the trace.
        items: that it is of.
        model: for what it is called.
        permutations: of the baselines; 0 leaves specialisation out.
        seed: of them.
    """
    routers = []
    rng = np.random.default_rng(seed)
    all_rows = [found.rows(number) for number in range(len(found.routers))]
    with Progress("measuring", "routers", len(all_rows)) as progress:
        for router, rows in zip(found.routers, all_rows):
            labels = token_labels(rows, items)
            first = rows["expert"][:, 0].astype(np.int64)
            measured = []
            if permutations:
                measured = measures.specialisation(
                    first, router.experts, labels, rows["item"], permutations, rng
                )
            entry = {
                **asdict(router),
                **measures.load_of(rows["expert"], rows["kept"], router.experts),
                "mean_gate": float(rows["gate"][:, 0].mean()),
                "classes": {
                    name: {
                        "names": list(label.names),
                        "counts": measures.class_counts(first, router.experts, label),
                    }
                    for name, label in labels.items()
                    if len(label.names) <= COUNTED_CLASSES
                },
                "specialisation": [asdict(one) for one in measured],
            }
            if rows["expert"].shape[1] > 1:
                counts = measures.together(rows["expert"].astype(np.int64), router.experts)
                entry["chosen_together"] = counts.tolist()
            routers.append(entry)
            progress.add()
        progress.finish()
    return {
        "model": model.name,
        "experts_per_token": model.config.moe.topk,
        "capacity_factor": model.model.config.capacity_factor,
        "pictures": sum(item.pixels is not None for item in items),
        "captions": sum(bool(item.caption) for item in items),
        "cut_captions": {
            name: {"captions": sum(len(item.ids) > most for item in items), "pieces": most}
            for name in dict.fromkeys(router.input for router in found.routers)
            if name != "images"
            for most in [_text_length(model, name) - 2]
        },
        "permutations": permutations,
        "routers": routers,
        "consecutive": _consecutive(found, all_rows),
    }


def _consecutive(found: Trace, all_rows: Sequence[Mapping[str, Array]]) -> list[dict[str, Any]]:
    """Of every router and the next one that the same pool has: how often two experts follow each other in a token."""
    pairs = []
    # What is padding has no place of its own by which it is found again.
    tokens = [
        {name: values[rows["place"] != PADDING] for name, values in rows.items()}
        for rows in all_rows
    ]
    for number, router in enumerate(found.routers):
        later = [
            (other.block, place)
            for place, other in enumerate(found.routers)
            if (other.input, other.pool) == (router.input, router.pool)
            and other.block > router.block
        ]
        if later:
            _, place = min(later)
            other = found.routers[place]
            counts = measures.consecutive(
                tokens[number], tokens[place], (router.experts, other.experts)
            )
            pairs.append(
                {
                    "input": router.input,
                    "pool": router.pool,
                    "blocks": [router.block, other.block],
                    "counts": counts.tolist(),
                    "nmi": measures.normalized_mutual_information(counts),
                }
            )
    return pairs


def write_trace(
    folder: Path, found: Trace, items: Sequence[Item], summary: Mapping[str, Any]
) -> None:
    """Writes `trace.npz`, `items.jsonl` and `routing.json` into a folder. Raises FileError."""
    arrays: dict[str, Any] = found.arrays()
    with open_atomic(folder / "trace.npz") as file:
        np.savez_compressed(file, **arrays)
    lines = (item.described(number) for number, item in enumerate(items))
    write_parts_atomic(
        folder / "items.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
    )
    write_text_atomic(folder / "routing.json", json.dumps(summary, ensure_ascii=False) + "\n")


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for every router: load, drops and the contents that its experts tell most of; and what was cut."""
    lines = [
        f"{name}: {cut['captions']} of {summary['captions']} captions are cut after {cut['pieces']} "
        "pieces, as in training"
        for name, cut in summary["cut_captions"].items()
        if cut["captions"]
    ]
    for router in summary["routers"]:
        even = router["assignments"] / router["experts"]
        best = sorted(router["specialisation"], key=lambda one: -one["adjusted"])[:2]
        told = ", ".join(
            f"{one['target']} {one['nmi']:.3f} (chance {one['chance']['mean']:.3f})" for one in best
        )
        lines.append(
            f"{router['input']}, block {router['block']}, {router['pool']}: {router['tokens']} tokens, load "
            f"{min(router['load']) / even:.2f} to {max(router['load']) / even:.2f} of the mean, "
            f"{router['dropped_share']:.1%} dropped" + (f"; NMI of {told}" if told else "")
        )
    return lines
