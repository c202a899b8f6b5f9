"""Pictures and tables of a run's metrics: what they are labelled with, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from megatron_vlmoe.analysis.plots import (
    draw_experts,
    draw_losses,
    experts_of_pools,
    last_evaluation_table,
    read_metrics,
)
from megatron_vlmoe.config.errors import MetricsError


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that were saved."""
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(self: matplotlib.figure.Figure, *args: Any, **more: Any) -> None:
        figures.append(self)
        save(self, *args, **more)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def row(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "loss/mlm": 5.0 - step, "loss/mim": 4.0, **more}


def evaluated(step: int) -> dict[str, float]:
    return row(step, **{"eval/loss/mlm": 2.25, "unigram/mlm": 3.5, "acc/mlm": 0.125})


def routed(step: int, pool: str, block: int) -> dict[str, float]:
    names = {"load_max": 2.0, "load_min": 0.0, "dropped_fraction": 0.25, "router_entropy": 0.5}
    return row(step, **{f"moe/{pool}/layer_{block}/{name}": x for name, x in names.items()})


def test_the_table_has_a_heading_over_every_number() -> None:
    _, heading, *lines = last_evaluation_table(
        "runs/a", [row(1), evaluated(2), row(3)]
    ).splitlines()
    assert heading.split("  ") and heading.index("guessing by frequency") > heading.index(
        "held-out"
    )
    (line,) = lines
    for title, value in (
        ("held-out loss", "2.250"),
        ("guessing by frequency", "3.500"),
        ("accuracy", "12.5%"),
    ):
        end = heading.index(title) + len(title)
        assert line[:end].endswith(value), "a number stands below the end of its heading"
    assert line.strip().startswith("masked language (texts)")


def test_every_line_of_the_losses_is_in_the_legend_in_its_colour(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    runs = {"runs/a": [row(1), evaluated(2)], "runs/b": [row(1), evaluated(2)]}
    draw_losses(runs, tmp_path / "new" / "losses.png")
    (figure,) = drawn
    assert figure.get_suptitle() == "Losses of a, b"
    axis = figure.axes[0]
    handles, labels = axis.get_legend_handles_labels()
    assert labels == [
        *("a, training", "a, held out", "b, training", "b, held out"),
        "guessing by frequency",
    ]
    assert set(handles) == set(axis.get_lines()), "a line is not in the legend"


def test_loads_drops_and_entropy_of_every_block(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    rows = [routed(1, "text", 2) | routed(1, "vision", 2) | routed(1, "vision", 4)]
    (tmp_path / "config.yaml").write_text(
        "moe: {num_text_experts: 2, num_vision_experts: 32, num_vl_experts: 0}"
    )
    draw_experts("runs/a", rows, experts_of_pools(tmp_path), tmp_path / "experts.png")
    (figure,) = drawn
    load, _, _, drops, _, entropy = figure.axes
    assert load.get_title() == "text: 2 experts per block"
    assert figure.axes[1].get_title() == "vision: 32 experts per block"
    assert [line.get_ydata()[0] for line in drops.get_lines()] == [25.0, 25.0]
    (limit,) = [line for line in entropy.get_lines() if line.get_linestyle() == "--"]
    assert limit.get_ydata()[0] == pytest.approx(math.log(32))
    # An expert without any token is at the bottom of the scale, not outside of the picture.
    lowest = min(line.get_ydata()[0] for line in load.get_lines())
    assert load.get_ylim()[0] <= lowest and load.get_yticklabels()[0].get_text() == "1/64 or less"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["block 2", "block 4", "fullest expert", "emptiest expert"]


def test_a_dense_run_has_no_experts_to_draw(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(evaluated(1)) + "\n")
    with pytest.raises(MetricsError, match="runs/dense: .* no loads of experts"):
        draw_experts("runs/dense", read_metrics(tmp_path), {}, tmp_path / "experts.png")
    assert experts_of_pools(tmp_path) == {} and not (tmp_path / "experts.png").exists()


def test_the_name_says_the_format(tmp_path: Path) -> None:
    runs = {"run": [row(1)]}
    assert draw_losses(runs, tmp_path / "losses") == tmp_path / "losses.png"
    with pytest.raises(MetricsError, match=r"losses\.xyz: .* it may end in .*\.png"):
        draw_losses(runs, tmp_path / "losses.xyz")
