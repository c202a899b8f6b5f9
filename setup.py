"""Installation: dependencies from requirements.txt, optional accelerators as extras."""

from pathlib import Path

from setuptools import setup

REQUIREMENTS = [
    line.strip()
    for line in (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]

setup(
    install_requires=REQUIREMENTS,
    extras_require={
        # The range that megatron-core 0.16.1 asks for; 0.19.2 asks for none, and was imported beside 2.20. NVIDIA's
        # apex has no package on PyPI (the `apex` there is another project): see docs/installation.md.
        "transformer-engine": [
            'transformer-engine[pytorch]>=2.9,<2.12; python_version < "3.12"',
            'transformer-engine[pytorch]>=2.20,<2.21; python_version >= "3.12"',
        ],
        "deepspeed": ["deepspeed>=0.19"],
        "wandb": ["wandb>=0.18"],
        # Exports are written without it; it loads and fine-tunes them, and loads CLIP or ViT teachers.
        "hf": ["transformers>=4.56", "accelerate>=1.1"],
        # Indexing on a cluster, `--executor ray`.
        "ray": ["ray>=2.40"],
        # Photographs as iPhones take them.
        "heic": ["pillow-heif>=0.18"],
        # The site: `mkdocs serve`, or `mkdocs build --strict` into site/.
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
        "dev": [
            "transformers>=4.56",
            "accelerate>=1.1",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "scipy>=1.11",
            "mypy>=1.11",
            "types-PyYAML",
            "pre-commit>=3.8",
        ],
    },
)
