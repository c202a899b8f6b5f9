"""Fetches the common tests of the installed transformers and runs them on our classes."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# What the common tests import or read and the archive leaves out, which has files of `tests/` and not its folders.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    # Values other than the defaults for options that every configuration takes.
    "tests/utils/test_configuration_utils.py": """config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 2,
    "architectures": ["SomeModel"],
    "id2label": {0: "first"},
    "label2id": {"first": 0},
    "problem_type": "regression",
}
""",
    "tests/fixtures/sample_text.txt": "A red circle is left of a blue square.\n\nThere are two of the square.\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}


def fetch(cache: Path) -> Path:
    """The folder that has the `tests` of the installed version and what they import besides; fetched once.

    Args:
        cache: folder for what is fetched.
    """
    release = version("transformers")
    folder = cache / f"transformers-{release}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=cache) as name:
        archives, building = Path(name, "archives"), Path(name, "building")
        source = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation"]
        subprocess.run(
            [*pip, "download", "-q", *source, "-d", str(archives), f"transformers=={release}"],
            check=True,
        )
        with tarfile.open(next(archives.glob("*.tar.gz"))) as archive:
            wanted = [
                member
                for member in archive.getmembers()
                if member.isfile() and Path(member.name).match("transformers-*/tests/*.py")
            ]
            archive.extractall(building, wanted, filter="data")
        building = next(building.iterdir())
        for path, content in STAND_INS.items():
            (building / path).parent.mkdir(exist_ok=True)
            (building / path).write_text(content)
        subprocess.run(
            [*pip, "install", "-q", "--no-deps", "-t", str(building / "site"), "parameterized"],
            check=True,
        )
        building.rename(folder)
    return folder


def main() -> int:
    """Runs pytest; returns its exit status."""
    folder = fetch(ROOT / "runs" / "transformers_suite")
    paths = [folder, folder / "site", ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    # Options of the project's other tests do not apply, and neither do their fixtures.
    options = ["-o", "addopts=", "--confcutdir", str(HERE), "-p", "no:cacheprovider"]
    arguments = sys.argv[1:]
    if not any(Path(argument.split("::")[0]).exists() for argument in arguments):
        arguments.append(str(HERE))
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments], env=environment, cwd=ROOT
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
