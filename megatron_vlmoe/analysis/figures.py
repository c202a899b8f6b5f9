"""Drawings as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlmoe.runtime.files import open_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, output: Path) -> None:
    """Writes a figure and closes it. The suffix says in what format; without one it is PNG, and the name gets it.

    Raises:
        FileError: the file cannot be written.
        ValueError: a format that matplotlib does not know.
    """
    import matplotlib.pyplot as plt

    target = output if output.suffix else output.with_suffix(".png")
    with open_atomic(target) as file:
        figure.savefig(file, format=target.suffix[1:], dpi=110)
    plt.close(figure)
