"""Tokenizer, image processor and processor of an export, against what the trainer reads."""

from __future__ import annotations

import functools
import io
import pickle
import random
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_folder import TINY, VOCAB, sentencepiece_model, write_processors
from PIL import Image

from megatron_vlmoe.config.schema import DataConfig
from megatron_vlmoe.finetune.samples import TextFormat
from megatron_vlmoe.inference.inputs import Item, pixels
from megatron_vlmoe.tokenizers.text import TextTokenizer

pytest.importorskip("transformers")

from megatron_vlmoe.convert.hf.image_processing_vlmoe import VLMoEImageProcessor
from megatron_vlmoe.convert.hf.processing_vlmoe import VLMoEProcessor
from megatron_vlmoe.convert.hf.tokenization_vlmoe import VLMoETokenizer

TEXTS = [
    "a red circle",
    "  two   blue squares \n",
    "\u3000the left\u00a0circle\t",
    "\x1cthere is a square",
    "naïve café ﬁne ½ Ⅷ",
    "日本語 красный κύκλος",
    "😀 a 👩‍👩‍👧 circle",
    "unknown ☃ runs ☃☃☃ and\u200bzero width",
    "UPPER case, punctuation! (really?)",
    "mask without brackets MASK",
    "▁ meta ▁space",
    "x" * 60,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    write_processors(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> VLMoETokenizer:
    return VLMoETokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def trainers(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder / "sentencepiece.model")


def random_texts(count: int) -> list[str]:
    generator = random.Random(1)
    letters = "abcdefghij redblue [](){}<>/_▁\t\n\u00a0éß漢字☃😀"
    return ["".join(generator.choices(letters, k=generator.randint(1, 40))) for _ in range(count)]


def test_plain_text_has_the_trainers_ids(tokenizer, trainers):
    texts = TEXTS + [text for text in random_texts(500) if text.strip()]
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, found, strict=True):
        assert ids == trainers.encode(text.strip()), repr(text)
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids


def test_special_tokens_are_those_of_the_model(tokenizer, trainers):
    for name in ("bos", "eos", "pad", "unk", "mask"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(trainers, f"{name}_id")
    assert tokenizer.cls_token_id == trainers.bos_id
    assert tokenizer.sep_token_id == trainers.eos_id
    assert len(tokenizer) == tokenizer.vocab_size == trainers.size == VOCAB
    vocabulary = tokenizer.get_vocab()
    assert [trainers.piece(i) for i in range(VOCAB)] == sorted(vocabulary, key=vocabulary.get)
    assert tokenizer.model_max_length == max(TINY["text_length"], TINY["pair_text_length"])


def test_texts_are_framed_as_in_training(tokenizer, trainers):
    bos, eos, mask = trainers.bos_id, trainers.eos_id, trainers.mask_id
    red, circle = (trainers.encode(word) for word in ("a red", "circle"))
    assert tokenizer("a red circle")["input_ids"] == [bos, *trainers.encode("a red circle"), eos]
    assert tokenizer("a red", "circle")["input_ids"] == [bos, *red, eos, *circle, eos]
    for text in ("a red [MASK] circle", "a red[MASK]circle", " a red  [MASK]  circle "):
        assert tokenizer(text)["input_ids"] == [bos, *red, mask, *circle, eos]
    special = tokenizer("a red", "circle", return_special_tokens_mask=True)["special_tokens_mask"]
    assert special == [1, *([0] * len(red)), 1, *([0] * len(circle)), 1]


@pytest.mark.parametrize("length", [4, 5, 6, 9, 12])
def test_longer_texts_are_cut_and_padded_as_in_training(tokenizer, trainers, length):
    layout = TextFormat.of(trainers, length)
    generator = random.Random(2)
    words = ["a", "red", "circle", "the", "left", "two"]
    pairs = [
        [" ".join(generator.choices(words, k=generator.randint(1, 9))) for _ in range(2)]
        for _ in range(20)
    ]
    for columns in ([[a] for a, _ in pairs], pairs):
        parts = [[np.array(trainers.encode(text)) for text in texts] for texts in columns]
        ids, lengths = layout.rows(parts)
        found = tokenizer(
            *([*column] for column in zip(*columns)),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="np",
        )
        assert np.array_equal(found["input_ids"], ids)
        assert np.array_equal(found["attention_mask"].sum(axis=1), lengths)


def test_truncation_of_the_left_side_keeps_the_ends(folder, tokenizer):
    left = VLMoETokenizer.from_pretrained(folder, truncation_side="left")
    ids = tokenizer("a red circle", "the left")["input_ids"]
    first, second = ids[1:4], ids[5:7]
    bos, eos = ids[0], ids[-1]
    found = left("a red circle", "the left", truncation=True, max_length=len(ids) - 2)["input_ids"]
    assert found == [bos, *first[2:], eos, *second, eos]
    one = tokenizer("a red circle", "the left", truncation="only_second", max_length=len(ids) - 1)
    assert one["input_ids"] == [bos, *first, eos, second[0], eos]


def test_decoding_gives_the_text_back(tokenizer, trainers):
    ids = tokenizer("a red [MASK] circle")["input_ids"]
    assert tokenizer.decode(ids) == "<s> a red [MASK] circle </s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle"
    plain = trainers.encode("a ☃ circle")
    assert tokenizer.decode(plain) == trainers.decode(plain)
    assert tokenizer.batch_decode([plain[:1], ids[1:3]]) == ["a", "a red"]


def test_tokenizer_can_be_saved_pickled_and_extended(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    saved, original = (path / "sentencepiece.model" for path in (tmp_path, folder))
    assert saved.read_bytes() == original.read_bytes()
    for again in (
        VLMoETokenizer.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
        assert again("a [MASK]")["input_ids"] == tokenizer("a [MASK]")["input_ids"]
        assert again.model_max_length == tokenizer.model_max_length
    again.add_tokens(["dodecahedron"])
    assert again("a dodecahedron")["input_ids"][2] == VOCAB == len(again) - 1


def test_a_model_without_a_special_piece_is_refused(tmp_path):
    path = sentencepiece_model(tmp_path / "other.model", user_defined_symbols=["mask"])
    assert VLMoETokenizer(path).mask_token == "[MASK]"
    with pytest.raises(ValueError, match=r"mask_token='<mask>' is no piece"):
        VLMoETokenizer(path, mask_token="<mask>")


def picture(mode: str, width: int = 70, height: int = 45) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return (
        Image.fromarray(noise, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(noise)
    )


def encoded(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name)
    return buffer.getvalue()


def image_processor(**options) -> VLMoEImageProcessor:
    return VLMoEImageProcessor(
        size=32, image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.6, 0.7), **options
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("shape", [(70, 45), (9, 120), (32, 32), (1, 1)])
def test_pixels_are_those_of_evaluation(mode, shape):
    image = picture(mode, *shape)
    expected = pixels([Item("image", image)], 32)
    raw = image_processor()(image, do_rescale=False, do_normalize=False, return_tensors="np")
    assert np.array_equal(raw["pixel_values"], expected.astype(np.float32))
    # As model/embeddings.py does.
    data = DataConfig(pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.5, 0.6, 0.7))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.pixel_mean, data.pixel_std))
    normalised = (torch.as_tensor(expected).float() / 255.0 - mean) / std
    found = image_processor()(image, return_tensors="pt")["pixel_values"]
    assert found.dtype == torch.float32 and torch.equal(found, normalised)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_files_are_read_as_in_evaluation(name, tmp_path):
    data = encoded(picture("RGB"), name)
    path = tmp_path / "image"
    path.write_bytes(data)
    expected = pixels([Item("image", data)], 32).astype(np.float32)
    for image in (data, path, str(path)):
        found = image_processor()(image, do_rescale=False, do_normalize=False, return_tensors="np")
        assert np.array_equal(found["pixel_values"], expected)


def test_the_orientation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
    data = (tmp_path / "turned.jpg").read_bytes()
    found = image_processor()(data, do_rescale=False, do_normalize=False, return_tensors="np")
    expected = pixels([Item("image", data)], 32).astype(np.float32)
    assert np.array_equal(found["pixel_values"], expected)


def test_a_url_gives_what_the_file_gives(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
    picture("I;16").save(tmp_path / "deep.png")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            for name in ("turned.jpg", "deep.png"):
                url = f"http://127.0.0.1:{server.server_port}/{name}"
                found, expected = (
                    image_processor()(x)["pixel_values"] for x in (url, tmp_path / name)
                )
                assert np.array_equal(found, expected), name
            with pytest.raises(ValueError, match=f"{server.server_port}/none.png is not readable"):
                image_processor()(f"http://127.0.0.1:{server.server_port}/none.png")
        finally:
            server.shutdown()


def test_arrays_may_have_channels_first_or_last():
    image = picture("RGB")
    array = np.asarray(image)
    expected = image_processor()(image, return_tensors="pt")["pixel_values"]
    for values in (array, array.transpose(2, 0, 1), torch.tensor(array), array[None]):
        found = image_processor()(values, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)
    grey = image_processor()(array[:, :, 0], return_tensors="pt")["pixel_values"]
    assert torch.equal(
        grey, image_processor()(picture("RGB").getchannel(0), return_tensors="pt")["pixel_values"]
    )


def test_samples_of_two_images_stay_together():
    first, second, third = (picture("RGB", 20 + n, 30) for n in range(3))
    found = image_processor()([[first, second], [third, first]], return_tensors="pt")
    flat = image_processor()([first, second, third, first], return_tensors="pt")["pixel_values"]
    assert torch.equal(found["pixel_values"], flat.view(2, 2, 3, 32, 32))
    with pytest.raises(ValueError, match="same number of images"):
        image_processor()([[first, second], [third]])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"no image", "bytes is not readable"),
        ("/nowhere/image.png", "/nowhere/image.png was not found"),
        (np.zeros((4, 4, 3)), "float64.*uint8"),
        (np.zeros((5, 4, 5), dtype=np.uint8), r"\[5, 4, 5\]"),
        (3, "got int"),
        (encoded(picture("RGB"), "PNG")[:-900], "not readable"),
    ],
)
def test_what_is_no_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        image_processor()(image)


def test_images_of_other_sizes_are_kept_only_where_they_fit_together():
    images = [picture("RGB", 16, 24), picture("RGB", 16, 24)]
    kept = image_processor(do_resize=False)(images, return_tensors="pt")["pixel_values"]
    assert kept.shape == (2, 3, 24, 16)
    other = image_processor()(images, size={"height": 8, "width": 24}, return_tensors="pt")
    assert other["pixel_values"].shape == (2, 3, 8, 24)
    with pytest.raises(ValueError, match="different sizes"):
        image_processor(do_resize=False)([*images, picture("RGB")], return_tensors="pt")
    with pytest.raises(ValueError, match="mode L"):
        image_processor(do_convert_rgb=False)(picture("L"))


def test_image_processor_survives_its_file(folder, tmp_path):
    processor = VLMoEImageProcessor.from_pretrained(folder)
    assert processor.size == {"height": 32, "width": 32}
    processor.save_pretrained(tmp_path)
    again = VLMoEImageProcessor.from_pretrained(tmp_path)
    image = picture("RGB")
    first, second, third = (
        p(image, return_tensors="pt")["pixel_values"] for p in (processor, again, image_processor())
    )
    assert torch.equal(first, second) and torch.equal(first, third)
    larger = VLMoEImageProcessor.from_pretrained(folder, size=48)
    assert larger(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)


@pytest.fixture(scope="module")
def processor(folder: Path, tokenizer: VLMoETokenizer) -> VLMoEProcessor:
    return VLMoEProcessor(
        VLMoEImageProcessor.from_pretrained(folder),
        tokenizer,
        text_length=TINY["text_length"],
        pair_text_length=TINY["pair_text_length"],
    )


def test_texts_are_filled_up_to_the_length_of_training(processor):
    texts = ["a red circle", "two " * 30]
    images = [picture("RGB"), picture("L")]
    alone = processor(text=texts, return_tensors="pt")
    assert alone["input_ids"].shape == (2, TINY["text_length"])
    pairs = processor(images, texts, return_tensors="pt")
    assert set(pairs) == set(processor.model_input_names)
    assert pairs["input_ids"].shape == (2, TINY["pair_text_length"])
    assert pairs["pixel_values"].shape == (2, 3, 32, 32)
    assert set(processor(images=images, return_tensors="pt")) == {"pixel_values"}
    longest = processor(images, ["a", "a red circle"], padding=True, return_tensors="pt")
    assert longest["input_ids"].shape == (2, 5)
    cut = processor(text=texts, max_length=6, return_tensors="pt")
    assert cut["input_ids"].shape == (2, 6)
    two = processor(text="a red", text_pair="circle", padding=False)
    assert two["input_ids"] == processor.tokenizer("a red", "circle")["input_ids"]
    other = processor(images, images_kwargs={"size": 16}, return_tensors="pt")
    assert other["pixel_values"].shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="give text, images or both"):
        processor()


def test_processor_decodes(processor):
    ids = processor(text=["a red circle"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a red circle"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "a red circle"
