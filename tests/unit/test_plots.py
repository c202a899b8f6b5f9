"""Pictures and tables of a run's metrics: what they are labelled with, and what they refuse."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text

from megatron_vlmoe.analysis.plots import (
    LOSSES,
    divergence,
    draw_experts,
    draw_losses,
    experts_of_pools,
    last_evaluation_table,
    read_metrics,
    run_folders,
    run_names,
    series,
)
from megatron_vlmoe.commands.main import main
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
    return {"step": step, "loss/mlm": 5.0 - step, "loss/mim": 4.0, "grad_norm": 2.0, **more}


def evaluated(step: int) -> dict[str, float]:
    return row(step, **{"eval/loss/mlm": 2.25, "unigram/mlm": 3.5, "acc/mlm": 0.125})


def routed(step: int, pool: str, block: int, scale: float = 1.0) -> dict[str, float]:
    names = {"load_max": 2.0, "load_min": 0.0, "dropped_fraction": 0.25, "router_entropy": 0.5}
    names |= {"dead_experts": 1.0, "aux/load": 0.125}
    own = {f"moe/{pool}/layer_{block}/{name}": scale * x for name, x in names.items()}
    return row(step, **own, **{f"moe/{pool}/load_max": 2.0, f"moe/{pool}/load_min": 0.0})


def write_run(folder: Path, lines: Sequence[str | dict[str, float]]) -> Path:
    folder.mkdir(parents=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(text))
    return folder


def axis_of(figure: matplotlib.figure.Figure, title: str) -> Axes:
    (axis,) = [axis for axis in figure.axes if axis.get_title(loc="left") == title]
    return axis


def values(figure: matplotlib.figure.Figure, title: str, line: str = "-") -> list[list[float]]:
    """The values of all lines of a kind in a panel; thin black ones only help to read it."""
    lines = axis_of(figure, title).get_lines()
    own = [one for one in lines if one.get_color() != "black" and one.get_linestyle() == line]
    return [list(one.get_ydata()) for one in own]


def drawn_texts(figure: matplotlib.figure.Figure, title: str = LOSSES["mlm"]) -> list[Text]:
    return list(axis_of(figure, title).texts)


def said(figure: matplotlib.figure.Figure, title: str) -> list[str]:
    """What is written into a panel."""
    return [text.get_text() for text in drawn_texts(figure, title)]


def test_a_run_that_is_resumed_or_still_going_reads_as_one(tmp_path: Path) -> None:
    """Steps 20 and 30 were trained twice; of 40 the first attempt alone is left, which is not of this run."""
    first = [row(step, lr=1.0) for step in (10, 20, 30, 40)]
    second = [row(step, lr=2.0) for step in (20, 30)]
    run = write_run(tmp_path / "run", [*first, *second, json.dumps(row(40, lr=2.0))[:20]])
    assert series(read_metrics(run), "lr") == ([10, 20, 30], [1.0, 2.0, 2.0])


def test_values_that_are_not_finite_are_gaps(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    """As null, as this program writes them, and as other programs do; a score that never was a number is none."""
    rows = [row(step, **{"val/vqa_official": math.nan}) for step in (1, 2, 3)]
    rows[0]["grad_norm"], rows[1]["loss/mim"] = math.inf, -math.inf
    lines = [json.dumps(one).replace('"loss/mim": -Infinity', '"loss/mim": null') for one in rows]
    run = write_run(tmp_path / "run", [*lines, ""])
    assert main(["plot", "--run", str(run)]) == 0
    assert "nan" not in capsys.readouterr().out
    gaps = [pytest.approx([math.nan, 2.0, 2.0], nan_ok=True)]
    assert values(drawn[0], "gradient norm") == gaps
    assert said(drawn[0], "gradient norm") == ["not finite at step 1"]
    # What has a gap on both sides would not show as a line.
    (line,) = axis_of(drawn[0], LOSSES["mim"]).get_lines()
    assert list(line.get_ydata()) == pytest.approx([4.0, math.nan, 4.0], nan_ok=True)
    assert (line.get_marker(), line.get_markevery()) == (".", [0, 2])


def diverged() -> list[dict[str, Any]]:
    """Evaluated at 0, 10 and 20, logged at 5 to 20; losses are not finite from 10 on."""
    unknown: dict[str, Any] = {"loss/mlm": None, "eval/loss/mlm": None, "grad_norm": None}
    rows: list[dict[str, Any]] = [evaluated(0) | {"acc/mlm": 0.5, "unigram/mlm": 1.0}]
    del rows[0]["loss/mlm"], rows[0]["loss/mim"], rows[0]["grad_norm"]
    rows.append({**row(5), "loss/mlm": 4.0, "lr": 1.0})
    rows += [evaluated(step) | unknown | {"lr": 1.0} for step in (10, 20)]
    return rows


def test_a_diverged_run_is_said_to_have_diverged(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    """All cells are of the last evaluation; panels reach to the last step and say where the finite values end."""
    run = write_run(tmp_path / "run", [*diverged(), ""])
    fine = write_run(tmp_path / "fine", [row(5), evaluated(15), ""])
    assert main(["plot", "--run", str(run)]) == 0
    first, _, mlm, text, _ = capsys.readouterr().out.splitlines()
    assert first == "run, last evaluation (step 20)"
    assert mlm.split()[3:] == ["not", "finite", "3.500", "12.5%"]
    assert text == "  losses are not finite from step 10 on"
    assert main(["plot", "--run", str(run), str(fine), "--output", str(tmp_path / "b.png")]) == 0
    for figure in drawn:
        for title in (LOSSES["mlm"], "gradient norm"):
            assert said(figure, title) == ["not finite from step 10"]
            assert axis_of(figure, title).get_xlim()[1] >= 20.0
        assert not said(figure, "learning rate") and not said(figure, LOSSES["mim"])
    # Each run in its colour.
    lines, (text_of_run,) = axis_of(drawn[1], LOSSES["mlm"]).get_lines(), drawn_texts(drawn[1])
    assert text_of_run.get_color() == lines[0].get_color()


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([1.0, 1.0, 1.0], ""),
        ([1.0, None, None], "losses are not finite from step 1,001 on"),
        ([None, 1.0, None], "losses are not finite at 2 of 3 logged steps, the first is step 1"),
    ],
)
def test_where_losses_are_not_finite(losses: list[float | None], sentence: str) -> None:
    rows = [{"step": 1000 * n + 1, "loss/vqa": loss} for n, loss in enumerate(losses)]
    # Neither of these is a loss, and a part of a picture may have no patch.
    rows += [{"step": 5000, "lr": None}, {"step": 6000, "eval/loss/mim_foreground": None}]
    assert divergence(rows) == sentence


def test_a_run_that_was_only_evaluated_has_something_to_show(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    """As before its first logged step."""
    more = {"eval/loss/mim": 4.0, "eval/loss/mim_foreground": 5.0, "acc/mim": 0.5}
    run = write_run(tmp_path / "run", [{"step": 0, **more}, ""])
    assert main(["plot", "--run", str(run)]) == 0
    assert values(drawn[0], LOSSES["mim"]) == [[4.0]]
    assert "last evaluation (step 0)" in capsys.readouterr().out


def test_the_picture_of_several_runs_is_not_written_over_that_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(tmp_path / name, [row(1), ""])) for name in ("a", "b")]
    assert main(["plot", "--run", *runs]) == 2
    picture = tmp_path / "a" / "plot.png"
    assert f"--output: name the picture of several runs; {picture} is" in capsys.readouterr().err
    assert not picture.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 has no step"),
        ('{"step": null}', "line 2 has no step"),
        ('{"step": 2, "lr": "low"}', "line 2: lr is not a number"),
    ],
)
def test_damaged_metrics_are_named(line: str, message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(1), line, row(3), ""])
    with pytest.raises(MetricsError, match=re.escape(f"{run}/metrics.jsonl: {message}")):
        read_metrics(run)


def test_runs_are_named_from_the_folder_that_they_share(tmp_path: Path) -> None:
    assert run_names(["runs/a", "runs/b/"]) == ["a", "b"] and run_names(["runs/a"]) == ["a"]
    found = run_names(["runs/vqa/moe", "runs/mnli/moe", "runs/c"])
    assert found == ["vqa/moe", "mnli/moe", "c"]
    for name in ("a/seed_1", "a/seed_2", "b"):
        write_run(tmp_path / name, [row(1)])
    found = run_folders([tmp_path / "a", tmp_path / "b", tmp_path / "b", tmp_path / "none"])
    assert found == [tmp_path / name for name in ("a/seed_1", "a/seed_2", "b", "none")]


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


def test_the_table_tells_foreground_and_grounding_apart() -> None:
    more = {"acc/mim_foreground": 0.25, "acc/mim_background": 0.75, "eval/grounding/mim": -0.5}
    rows = [row(1, **{"eval/loss/mim": 1.0, "unigram/mim": 2.0, "acc/mim": 0.5}, **more)]
    _, heading, line = last_evaluation_table("a", rows).splitlines()
    assert heading.split()[-3:] == ["foreground", "background", "grounding"]
    assert line.split()[-4:] == ["50.0%", "25.0%", "75.0%", "-0.500"]
    scores = {"val/top1": 12.5, "val/top5": 50.0, "val/samples": 40.0, "val/unlabelled": 0.0}
    _, first, second = last_evaluation_table("a", [{"step": 1, **scores}]).splitlines()
    assert (first.split(), second.split()) == (
        ["val/top1", "12.50", "%"],
        ["val/top5", "50.00", "%"],
    )


def test_losses_of_runs_have_their_colours(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    runs = {"runs/a": [row(1), evaluated(2)], "runs/$b$": [row(1), evaluated(2), row(4)]}
    draw_losses(runs, tmp_path / "new" / "losses.png")
    (figure,) = drawn
    assert figure.get_suptitle() == r"Losses of a, \$b\$", "dollars would make it a formula"
    colors = {handle.get_color() for handle in figure.legends[0].get_lines()}
    lines = axis_of(figure, LOSSES["mlm"]).get_lines()
    assert {line.get_color() for line in lines} == colors | {"black"} and len(colors) == 2
    assert values(figure, LOSSES["mlm"]) == [[4.0, 3.0], [2.25], [4.0, 3.0, 1.0], [2.25]]
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert labels == ["training", "held out", "guessing by frequency"]


def test_loads_drops_and_entropy_of_every_block(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    rows = [routed(1, "text", 2) | routed(1, "vision", 2) | routed(1, "vision", 12, 2.0)]
    (tmp_path / "config.yaml").write_text(
        "moe: {num_text_experts: 2, num_vision_experts: 32, num_vl_experts: 0}"
    )
    draw_experts("runs/a", rows, experts_of_pools(tmp_path), tmp_path / "experts.png")
    (figure,) = drawn
    assert values(figure, "text: dropped") == [[25.0]]
    assert values(figure, "vision: dropped") == [[25.0], [50.0]]
    assert values(figure, "vision: dead experts") == [[1.0], [2.0]]
    assert values(figure, "vision: auxiliary losses") == [[0.125], [0.25]]
    entropy = axis_of(figure, "vision: router entropy")
    (limit,) = [line for line in entropy.get_lines() if line.get_linestyle() == "--"]
    assert limit.get_ydata()[0] == pytest.approx(math.log(32))
    # An expert without any token is at the bottom of the scale, not outside of the picture.
    assert values(figure, "vision: load of an expert", ":") == [[1 / 64], [1 / 64]]
    load = axis_of(figure, "vision: load of an expert")
    labels = dict(zip(load.get_yticks(), (text.get_text() for text in load.get_yticklabels())))
    assert load.get_ylim()[0] <= 1 / 64 and labels[1 / 64] == "1/64 or less"
    # Every pool has the same scale, so that they can be compared.
    assert axis_of(figure, "text: dropped").get_ylim()[1] >= 50
    names = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert names == ["block 2", "block 12", "fullest expert", "emptiest expert"]


def test_one_picture_shows_everything_of_runs(
    tmp_path: Path,
    drawn: list[matplotlib.figure.Figure],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of one run block by block; of several, one of them dense and one without blocks, by the pool."""
    dense = write_run(tmp_path / "dense", [row(1), evaluated(2), ""])
    sparse = write_run(tmp_path / "sparse", [routed(1, "text", 2), routed(3, "text", 2), ""])
    totals = {"moe/shared/load_max": 3.0, "moe/shared/dropped_fraction": 0.125}
    shared = write_run(tmp_path / "shared", [row(1, **totals, **{"loss/aux/shared": 0.5}), ""])
    tuned = {"step": 5, "loss/vqa": 1.0, "loss/total": 1.5, "val/vqa_official": 30.0}
    vqa = write_run(tmp_path / "vqa", [tuned, ""])
    assert main(["plot", "--run", str(sparse)]) == 0
    assert (sparse / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert values(drawn[0], "text: dropped") == [[25.0, 25.0]]
    assert values(drawn[0], "gradient norm") == [[2.0, 2.0]]
    runs = [str(run) for run in (dense, sparse, shared, vqa)]
    assert main(["plot", "--run", *runs, "--output", str(tmp_path / "all.svg")]) == 0
    figure = drawn[1]
    assert values(figure, "text: load of an expert") == [[2.0, 2.0]]
    assert values(figure, "shared: dropped") == [[12.5]]
    assert values(figure, "shared: auxiliary losses") == [[0.5]]
    assert values(figure, f"right: {LOSSES['mlm']}") == [[12.5]]
    assert values(figure, "vqa") == [[1.0]] and values(figure, "val/vqa_official") == [[30.0]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "sparse", "shared", "vqa"]
    assert f"wrote {tmp_path}/all.svg" in capsys.readouterr().out
    empty = write_run(tmp_path / "empty", [])
    picture = ["--output", str(tmp_path / "empty.png")]
    for words in (["plot"], ["plot-losses", *picture]):
        assert main([*words, "--run", str(empty)]) == 1
        assert capsys.readouterr().err == "error: empty: nothing logged yet\n"


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
