"""What a user does with exports, in an interpreter that has neither megatron-core nor this package.

    HF_MODULES_CACHE=DIR python -I tests/hf_clean_environment.py FOLDERS OUTPUT

FOLDERS holds exports of random models, one for every task, `inputs.pt` and `uses.json`. Results are
written to OUTPUT. With the interpreter of the tests both packages are hidden; with another one they may be missing.
"""

from __future__ import annotations

import functools
import importlib.abc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HIDDEN = ("megatron", "megatron_vlmoe")


class Hide(importlib.abc.MetaPathFinder):
    """Says that there are no such packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)


sys.meta_path.insert(0, Hide())

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

REMOTE = {"trust_remote_code": True}


def load(auto: str, folder: Path, **options: Any) -> Any:
    return getattr(transformers, auto).from_pretrained(folder, **REMOTE, **options)


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def heads(root: Path) -> dict[str, Any]:
    """The first output of every model class, by way of its Auto class."""
    data = torch.load(root / "inputs.pt")
    text = {name: data[name] for name in ("input_ids", "attention_mask")}
    image = {"pixel_values": data["pixel_values"]}
    two = {"pixel_values": torch.stack([data["pixel_values"]] * 2, dim=1)}
    pairs = text | image
    return {
        "VLMoEModel": logits(load("AutoModel", root / "pretraining"), **pairs),
        "VLMoEForPreTraining": logits(
            load("AutoModelForPreTraining", root / "pretraining"), **pairs
        ),
        "VLMoEForMaskedLM": logits(load("AutoModelForMaskedLM", root / "pretraining"), **pairs),
        "VLMoEForMaskedImageModeling": logits(
            load("AutoModelForMaskedImageModeling", root / "pretraining"), **pairs
        ),
        "VLMoEForVisualQuestionAnswering": logits(
            load("AutoModelForVisualQuestionAnswering", root / "vqa"), **pairs
        ),
        "VLMoEForImagesAndTextClassification": logits(
            load("AutoModelForSequenceClassification", root / "nlvr2"), **text, **two
        ),
        "VLMoEForImageClassification": logits(
            load("AutoModelForImageClassification", root / "imagenet"), **image
        ),
        "VLMoEForSequenceClassification": logits(
            load("AutoModelForSequenceClassification", root / "mnli"), **text
        ),
        "VLMoEForImageAndTextRetrieval": logits(
            load("AutoModelForZeroShotImageClassification", root / "retrieval"), **pairs
        ),
    }


@functools.lru_cache
def pipeline(task: str, folder: Path) -> Any:
    """A pipeline, made once."""
    return transformers.pipeline(task, model=str(folder), **REMOTE)


def pipelines(root: Path) -> dict[str, Any]:
    """What pipelines answer."""

    def make(task: str, folder: str) -> Any:
        return pipeline(task, root / folder)

    picture = Image.new("RGB", (50, 40), (200, 10, 30))
    fill = make("fill-mask", "pretraining")
    ask = make("visual-question-answering", "vqa")
    return {
        "fill-mask": [fill("a red [MASK]", top_k=2), fill(["a [MASK]", "two [MASK] left"])],
        "image-classification": make("image-classification", "imagenet")([picture] * 2),
        "images-alone": make("image-classification", "images")(picture),
        "text-classification": make("text-classification", "mnli")(
            {"text": "a red circle", "text_pair": "two"}, top_k=None
        ),
        "zero-shot-image-classification": make("zero-shot-image-classification", "retrieval")(
            picture, candidate_labels=["red", "blue", "square"], hypothesis_template="a {}"
        ),
        "visual-question-answering": [
            ask(picture, "a red circle", top_k=2),
            ask([picture] * 2, ["a", "two " * 40]),
        ],
        "feature-extraction": make("feature-extraction", "pretraining")("a red circle"),
    }


def pictures(root: Path) -> dict[str, Any]:
    """For every file in `pictures`, its pixels by every way of handing it over, and the class that has most."""
    tasks = {
        "image-classification": ("imagenet", {}),
        "image-feature-extraction": ("imagenet", {}),
        "zero-shot-image-classification": ("retrieval", {"candidate_labels": ["red", "blue"]}),
        "visual-question-answering": ("vqa", {}),
    }
    made = {
        task: (pipeline(task, root / folder), options) for task, (folder, options) in tasks.items()
    }
    processor = load("AutoProcessor", root / "vqa")
    classify = made["image-classification"][0]
    found = {}
    for path in sorted((root / "pictures").iterdir()):
        given = {"path": str(path), "bytes": path.read_bytes(), "pillow": Image.open(path)}
        pixels = {
            name: processor(images=image, return_tensors="pt")["pixel_values"]
            for name, image in given.items()
        }
        for task, (own, options) in made.items():
            for name in ("path", "pillow"):
                image = given[name]
                if task == "visual-question-answering":
                    image = {"image": image, "question": "a red circle"}
                pixels[f"{task} of {name}"] = own.preprocess(image, **options)["pixel_values"]
        best = int(logits(classify.model, pixel_values=pixels["path"]).argmax())
        assert classify(str(path))[0]["label"] == classify.model.config.id2label[best]
        found[path.name] = pixels
    return found


def uses(root: Path) -> dict[str, str]:
    """Runs the code of every model card; the last name that it sets."""
    picture = Image.new("RGB", (50, 40), (200, 10, 30))
    long = "a red circle " * 30
    texts = {"question": long, "sentence": long, "premise": long, "hypothesis": "two"}
    images = {"image": picture, "left": picture, "right": picture}
    found = {}
    for folder, code in json.loads((root / "uses.json").read_text()).items():
        names: dict[str, Any] = {**texts, **images, "images": [picture], "captions": ["a", long]}
        exec(code, names)
        found[folder] = list(names)[-1]
    return found


def saved_again(root: Path) -> list[str]:
    """Saves what was loaded into another folder, and loads every class from there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "again"
        model = load("AutoModelForMaskedLM", root / "pretraining")
        processor = load("AutoProcessor", root / "pretraining")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        other = load("AutoModelForMaskedLM", folder).state_dict()
        assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())
        for auto in load("AutoConfig", folder).auto_map:
            if auto.startswith("AutoModel"):
                # The head for masked patches was not in the model.
                load(auto, folder)
        again = load("AutoProcessor", folder)
        assert (again.text_length, again.pair_text_length) == (12, 16)
        picture = Image.new("RGB", (50, 40), (200, 10, 30))
        first, second = (p(picture, "a [MASK]", return_tensors="pt") for p in (processor, again))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert load("AutoTokenizer", folder)("a [MASK]") == load("AutoTokenizer", root / "vqa")(
            "a [MASK]"
        )
        assert load("AutoImageProcessor", folder).size == {"height": 32, "width": 32}
        other = load(
            "AutoProcessor",
            folder,
            size=48,
            exif="keep",
            text_length=9,
            padding_side="left",
        )
        other.save_pretrained(folder)
        for changed in (other, load("AutoProcessor", folder)):
            assert changed.image_processor.size == {"height": 48, "width": 48}
            assert (changed.image_processor.exif, changed.text_length) == ("keep", 9)
            assert changed.tokenizer.padding_side == "left"
            assert not {"size", "exif", "text_length"} & set(changed.tokenizer.init_kwargs)
        pipeline("visual-question-answering", root / "vqa").save_pretrained(folder / "pipeline")
        assert load("AutoProcessor", folder / "pipeline").text_length == 12
        for option in ({"do_pad": True}, {"text_length": "9"}):
            try:
                load("AutoProcessor", folder, **option)
            except (TypeError, ValueError) as error:
                assert next(iter(option)) in str(error)
            else:
                raise AssertionError(f"{option} was taken")
        return sorted(path.name for path in folder.glob("*.py"))


def main(root: Path, output: Path) -> None:
    """Runs everything."""
    for name in HIDDEN:
        try:
            __import__(name)
        except ImportError:
            continue
        raise AssertionError(f"{name} can be imported")
    results = {
        "heads": heads(root),
        "pipelines": pipelines(root),
        "pictures": pictures(root),
        "uses": uses(root),
        "files": saved_again(root),
        "images_alone": type(load("AutoProcessor", root / "images")).__name__,
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    }
    torch.save(results, output)
    print(f"transformers {transformers.__version__}: ok")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
