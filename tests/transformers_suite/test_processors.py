"""The common tests of tokenizer, image processor and processor."""

from __future__ import annotations

import io
import unittest
from pathlib import Path
from typing import Any

import sentencepiece
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from tests.test_processing_common import ProcessorTesterMixin

from megatron_vlmoe.convert.hf.image_processing_vlmoe import VLMoEImageProcessor
from megatron_vlmoe.convert.hf.processing_vlmoe import VLMoEProcessor
from megatron_vlmoe.convert.hf.tokenization_vlmoe import VLMoETokenizer
from tests import test_tokenization_common

SIDE = 20


def tokenizer() -> VLMoETokenizer:
    """A tokenizer that knows the words of the tests: its model is trained on their source."""
    writer = io.BytesIO()
    lines = Path(test_tokenization_common.__file__).read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=writer,
        vocab_size=1000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=["[MASK]"],
        num_threads=1,
        minloglevel=2,
    )
    folder = Path(test_tokenization_common.__file__).parent
    path = folder / "sentencepiece.model"
    path.write_bytes(writer.getvalue())
    return VLMoETokenizer(str(path))


class VLMoETokenizerTest(test_tokenization_common.TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = VLMoETokenizer
    test_tokenizer_from_extractor = False

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        tokenizer().save_pretrained(cls.tmpdirname)
        cls.from_pretrained_id = [cls.tmpdirname]
        cls.tokenizers_list = [(VLMoETokenizer, cls.tmpdirname, {})]


class ImageTester(ImageProcessingTester):
    """Small images."""

    def __init__(self, parent: Any) -> None:
        super().__init__(
            parent,
            min_resolution=15,
            max_resolution=40,
            size={"height": SIDE, "width": SIDE},
            do_resize=True,
            do_normalize=True,
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.5, 0.6, 0.7],
        )

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"pil": VLMoEImageProcessor}

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        """Options of the image processor."""
        names = ("size", "do_resize", "do_normalize", "image_mean", "image_std")
        return {name: getattr(self, name) for name in names}


class VLMoEImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester


class VLMoEProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = VLMoEProcessor

    @classmethod
    def _setup_tokenizer(cls) -> VLMoETokenizer:
        return tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> VLMoEImageProcessor:
        return VLMoEImageProcessor(size=SIDE)
