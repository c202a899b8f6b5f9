"""The studies of the paper, one function each, which says what the study is at a scale.

A new study is one more function here and its name in `STUDIES`; a run more in a study is one more `Run`. Studies that
ask for the same run, with the same options, seed and data, share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_vlmoe.analysis.paper_tables import TABLE_1, TABLE_2
from megatron_vlmoe.analysis.studies.metrics import DROPPED
from megatron_vlmoe.analysis.studies.scales import Scale
from megatron_vlmoe.analysis.studies.study import (
    Claim,
    Panel,
    PaperRow,
    Part,
    Run,
    Study,
    above,
    below,
)

LOSSES = ("mlm", "mim", "vlm")
COSTS = ("flops", "seconds_per_step", "parameters", "parameters_per_token")
# The four tasks of the paper's section 5, and the scores of its Table 3, whose mean it calls Avg.
ABLATION = ("nlvr2", "retrieval", "imagenet", "mnli")
ABLATION_SCORES = (
    *("nlvr2/dev/accuracy", "nlvr2/test/accuracy", "retrieval/test/TR@1", "retrieval/test/IR@1"),
    *("imagenet/val/top1", "mnli/dev_matched/accuracy"),
)


def scaling(scale: Scale) -> Study:
    """Sizes and numbers of experts: held-out losses against what they cost."""

    def below_dense(loss: str, size: str) -> Claim:
        # All pools against the dense model of the size.
        return Claim(
            f"{loss.upper()}, {size}: experts are below dense at equal FLOPs",
            "section 4.1, Fig. 2",
            tuple(
                below(loss, f"{size}-{pool}", f"{size}-dense", equal_flops=True)
                for pool in scale.pools[1:]
            ),
        )

    def less_than(other: str, size: str) -> Claim:
        return Claim(
            f"{size}: the gain on VLM is smaller than that on {other.upper()}",
            "section 4.2",
            (
                Part(
                    f"gain of {scale.pool} over dense, {other.upper()} minus VLM",
                    (
                        *((1.0, other, f"{size}-dense"), (-1.0, other, f"{size}-{scale.pool}")),
                        *((-1.0, "vlm", f"{size}-dense"), (1.0, "vlm", f"{size}-{scale.pool}")),
                    ),
                    equal_flops=True,
                ),
            ),
        )

    return Study(
        name="scaling",
        title="Held-out losses against training FLOPs and time (Fig. 2)",
        runs=tuple(
            Run(f"{size}-{pool}", pool, size=size)
            for size in scale.compared
            for pool in scale.pools
        ),
        columns=(*LOSSES, *COSTS, "seconds"),
        panels=(
            *(Panel("curve", (loss,), "flops") for loss in LOSSES),
            *(Panel("curve", (loss,), "seconds") for loss in LOSSES),
        ),
        claims=(
            *(below_dense(loss, size) for loss in LOSSES for size in scale.compared),
            *(less_than(loss, size) for loss in ("mlm", "mim") for size in scale.compared),
        ),
    )


def experts(scale: Scale) -> Study:
    """More experts: scores of fine-tuned models."""
    chain = tuple(zip(scale.pools, scale.pools[1:]))
    return Study(
        name="experts",
        title="Downstream scores against the number of experts (Fig. 5)",
        runs=tuple(Run(pool, pool, tasks=ABLATION) for pool in scale.pools),
        columns=(*ABLATION_SCORES, "average", *LOSSES, "parameters"),
        panels=(
            *(Panel("values", (score,)) for score in ABLATION_SCORES),
            Panel("values", ("average",)),
            *(Panel("values", (loss,)) for loss in LOSSES),
        ),
        claims=(
            Claim(
                "Larger pools score higher on average",
                "section 5, Fig. 5",
                tuple(above("average", more, fewer) for fewer, more in chain),
            ),
            *(
                Claim(
                    f"Larger pools have a lower {loss.upper()} loss",
                    "section 4.1, Fig. 2",
                    tuple(below(loss, more, fewer) for fewer, more in chain),
                )
                for loss in LOSSES
            ),
        ),
        scores=ABLATION_SCORES,
    )


def strategy(scale: Scale) -> Study:
    """Experts for text, for images, for both, for neither."""
    paper = {
        "paper: neither": (67.42, 68.21, 80.4, 61.7, 67.2, 54.3, 66.5),
        "paper: T-only": (72.42, 72.73, 83.2, 64.7, 67.8, 58.3, 69.9),
        "paper: V-only": (71.19, 72.23, 82.9, 64.5, 69.2, 55.2, 69.2),
        "paper: both": (72.98, 73.34, 84.7, 65.3, 69.0, 58.1, 70.6),
    }
    only = {"T-only": "text", "V-only": "vision"}
    return Study(
        name="strategy",
        title="Scaling strategies: experts for texts, images, both or neither (Table 3, Fig. 7)",
        runs=(
            Run("neither", "dense", tasks=ABLATION),
            *(
                Run(label, scale.pool, ("--moe.modalities", value), ABLATION)
                for label, value in only.items()
            ),
            Run("both", scale.pool, tasks=ABLATION),
        ),
        columns=(*ABLATION_SCORES, "average", *LOSSES),
        panels=(
            *(Panel("curve", (loss,)) for loss in LOSSES),
            Panel("values", ("average",)),
            Panel("values", ("nlvr2/test/accuracy",)),
            Panel(
                "values", ("retrieval/test/TR@1", "retrieval/test/IR@1"), title="Flickr30K R@1, %"
            ),
            Panel("values", ("imagenet/val/top1",)),
            Panel("values", ("mnli/dev_matched/accuracy",)),
        ),
        claims=(
            Claim(
                "Both score higher on average than either alone",
                "section 5, Table 3",
                tuple(above("average", "both", label) for label in only),
            ),
            Claim(
                "Either alone scores higher on average than neither",
                "section 5, Table 3",
                tuple(above("average", label, "neither") for label in only),
            ),
            *(
                Claim(
                    f"{label}: scaling a modality improves the task of that modality",
                    "section 5, Table 3",
                    (above(score, label, "neither"),),
                )
                for label, score in (
                    ("T-only", "mnli/dev_matched/accuracy"),
                    ("V-only", "imagenet/val/top1"),
                )
            ),
            *(
                Claim(
                    f"{label}: scaling a modality lowers its own loss",
                    "appendix A.1, Fig. 7",
                    (below(loss, label, "neither"),),
                )
                for label, loss in (("T-only", "mlm"), ("V-only", "mim"))
            ),
            *(
                Claim(
                    f"{label}: scaling a modality lowers the VLM loss",
                    "appendix A.1, Fig. 7",
                    (below("vlm", label, "neither"),),
                )
                for label in only
            ),
            Claim(
                "Both have a lower VLM loss than either alone",
                "appendix A.1, Fig. 7",
                tuple(below("vlm", "both", label) for label in only),
            ),
        ),
        scores=ABLATION_SCORES,
        paper=tuple(
            PaperRow(label, dict(zip((*ABLATION_SCORES, "average"), values)))
            for label, values in paper.items()
        ),
    )


def _losses_of(pool: str, **weights: float) -> tuple[str, ...]:
    """Options that give the routers of a pool these auxiliary losses and no others."""
    words: list[str] = []
    for name, weight in ({"importance": 0.0, "load": 0.0} | weights).items():
        words += [f"--moe.{pool}_aux.{name}", f"{weight:g}"]
    return tuple(words)


def losses(scale: Scale) -> Study:
    """Auxiliary losses and other means against imbalance."""

    def run(label: str, options: tuple[str, ...] = ()) -> Run:
        return Run(label, scale.pool, options, size=scale.short)

    no_losses = (*_losses_of("vision"), *_losses_of("text"), "--moe.noise_std", "0")
    vl = ("--moe.layers", *scale.blocks_with_vl)
    vision = {
        "load": _losses_of("vision", load=1.0),
        "z": _losses_of("vision", z=1.0),
        "GShard": _losses_of("vision", gshard=1.0),
        "none": _losses_of("vision"),
    }
    others = {
        "vloss+z": _losses_of("vision", importance=0.5, load=0.5, z=1.0),
        "vloss-no-BPR": ("--moe.batch_priority", "false"),
        "none-no-BPR": (*_losses_of("vision"), "--moe.batch_priority", "false"),
        "text-vloss": _losses_of("text", importance=0.5, load=0.5),
        "text-z": _losses_of("text", z=1.0),
        "text-GShard": _losses_of("text", gshard=1.0),
        "text-none": _losses_of("text"),
        "routed-padding": ("--moe.route_padding", "true"),
        # At the capacity of the others, so that all cost the same.
        "expert-choice": (*no_losses, "--moe.routing", "expert_choice"),
        "bias": (*no_losses, "--moe.balance_bias_rate", "0.001"),
        "VL-blocks": vl,
        "VL-FFN": (
            *vl,
            *("--moe.vl", "true", "--moe.num_vl_experts", str(scale.num_experts)),
        ),
    }
    columns = ("roughness", "spikes", "load_max", "dropped_vision", "dropped_text", "dead_experts")
    return Study(
        name="losses",
        title="Auxiliary losses and the stability of training (Fig. 4)",
        runs=(
            run("vloss"),
            *(run(label, options) for label, options in (vision | others).items()),
        ),
        columns=("total", *LOSSES, *columns),
        panels=(
            Panel("training", ("train",), labels=("vloss", *vision, "vloss-no-BPR")),
            *(Panel("values", (name,)) for name in ("total", "roughness", "load_max")),
            *(Panel("values", (name,)) for name in ("dropped_vision", "dropped_text")),
        ),
        claims=(
            Claim(
                "vloss trains more evenly than the load loss or z-loss",
                "section 5, Fig. 4",
                tuple(below("roughness", "vloss", label) for label in ("load", "z")),
            ),
            Claim(
                "The load loss alone ends above vloss",
                "section 5, Fig. 4",
                (below("total", "vloss", "load"),),
            ),
            Claim(
                "z-loss hurts",
                "section 5, Fig. 4",
                (below("total", "vloss", "z"), below("total", "vloss", "vloss+z")),
            ),
            Claim(
                "BPR makes training more even",
                "section 5, Fig. 4",
                (below("roughness", "vloss", "vloss-no-BPR"),),
            ),
        ),
    )


def contrastive(scale: Scale) -> Study:
    """One shared pool after LIMoE against two, under the contrastive and under the masked losses."""
    # As examples/configs/limoe.yaml, whose thresholds are for 32 experts.
    share = scale.num_experts / 32
    limoe = (
        *("--moe.shared_router", "true", "--moe.aux_loss_coefficient", "0.04"),
        *_losses_of("vision", importance=0.5, load=0.5, global_entropy=1.0),
        *("--moe.vision_aux.global_entropy_experts", f"{20 * share:g}"),
        *("--moe.text_aux.local_entropy", "1", "--moe.text_aux.global_entropy", "1"),
        *("--moe.text_aux.global_entropy_experts", f"{9 * share:g}"),
    )
    models = {
        "dense": ("dense", ()),
        "VL-MoE": (scale.pool, ()),
        "LIMoE": (scale.pool, limoe),
    }
    kind = (
        *(
            "--objectives.kind",
            "contrastive",
            "--data.micro_texts",
            "0",
            "--data.micro_images",
            "0",
        ),
        *scale.contrastive,
    )
    masked = tuple(f"{label}-masked" for label in models)
    return Study(
        name="contrastive",
        title="Dense, VL-MoE and LIMoE-style models under contrastive and masked losses (Fig. 8, A.1)",
        runs=(
            *(Run(label, pool, (*kind, *options)) for label, (pool, options) in models.items()),
            *(Run(f"{label}-masked", pool, options) for label, (pool, options) in models.items()),
        ),
        columns=("total", "train", "overfit", "roughness", "spikes", "load_max", "dropped"),
        panels=(
            Panel("training", ("train",), title="contrastive: training", labels=tuple(models)),
            Panel("curve", ("total",), title="contrastive: held out", labels=tuple(models)),
            Panel("values", ("roughness",), labels=tuple(models)),
            Panel("training", ("train",), title="masked: training", labels=masked),
            Panel("curve", ("total",), title="masked: held out", labels=masked),
            Panel("values", ("roughness",), title="masked: roughness", labels=masked),
        ),
        claims=(
            Claim(
                "Contrastive: LIMoE trains less evenly than VL-MoE",
                "appendix A.1, Fig. 8",
                (below("roughness", "VL-MoE", "LIMoE"),),
            ),
            Claim(
                "Contrastive: both sparse models overfit, held-out above training loss",
                "appendix A.1, Fig. 8",
                tuple(
                    Part(f"held-out minus training loss of {label}", ((1.0, "overfit", label),))
                    for label in ("VL-MoE", "LIMoE")
                ),
            ),
            Claim(
                "Masked: LIMoE ends above VL-MoE (the paper's did not converge)",
                "appendix A.1",
                (below("total", "VL-MoE-masked", "LIMoE-masked"),),
            ),
        ),
    )


def dropped(scale: Scale) -> Study:
    """Which tokens find no place in an expert."""
    pool = scale.pool
    largest = scale.pools[-1]

    def more(text: str, higher: str, lower: str) -> Part:
        return Part(text, ((1.0, higher, pool), (-1.0, lower, pool)))

    return Study(
        name="dropped",
        title="Dropped tokens of texts, images and pairs (Fig. 6)",
        runs=(
            Run(pool, pool),
            *(Run(name, name) for name in (largest,) if name != pool),
            Run(f"{pool}-routed-padding", pool, ("--moe.route_padding", "true")),
        ),
        columns=(*DROPPED, *(f"eval_{name}" for name in DROPPED), "load_max"),
        panels=(
            Panel("values", DROPPED, title="in training, % of assignments"),
            Panel("values", tuple(f"eval_{name}" for name in DROPPED), title="held out, %"),
            Panel("blocks", DROPPED, title=f"{pool}, in training, by block", labels=(pool,)),
        ),
        claims=(
            Claim(
                "Images are dropped more than texts",
                "appendix A.1, Fig. 6",
                (
                    more("images minus texts, of one modality", "dropped/mim", "dropped/mlm"),
                    more("images minus texts, of pairs", "dropped/vlm_image", "dropped/vlm_text"),
                ),
            ),
            Claim(
                "Pairs (VLM) are dropped most",
                "appendix A.1, Fig. 6",
                (
                    more("texts of pairs minus texts", "dropped/vlm_text", "dropped/mlm"),
                    more("images of pairs minus images", "dropped/vlm_image", "dropped/mim"),
                ),
            ),
        ),
    )


def frozen(scale: Scale) -> Study:
    """Experts and routers frozen in fine-tuning, the paper's choice, against trained ones."""
    option = "--moe.train_experts"
    return Study(
        name="frozen",
        title="Frozen against trained experts in fine-tuning (section 4.1)",
        runs=(
            Run("frozen", scale.pool, tasks=ABLATION, finetune=(option, "false")),
            Run("trained", scale.pool, tasks=ABLATION, finetune=(option, "true")),
        ),
        columns=(*ABLATION_SCORES, "average"),
        panels=tuple(Panel("values", (score,)) for score in (*ABLATION_SCORES, "average")),
        claims=(
            Claim(
                "Frozen experts score higher on average than trained ones",
                "section 4.1, after ST-MoE (no numbers printed)",
                (above("average", "frozen", "trained"),),
            ),
        ),
        scores=ABLATION_SCORES,
    )


def _printed(model: str) -> list[float | None]:
    """The scores of a model in the paper's Tables 1 and 2, side by side."""
    tables = (TABLE_1, TABLE_2)
    return [
        score
        for table in tables
        for row in table.rows
        if row.model == model
        for score in row.scores
    ]


def downstream(scale: Scale) -> Study:
    """All tasks, dense against sparse."""
    names = tuple(task.name for task in scale.tasks)
    scores = (
        "vqa/val/vqa_official",
        *ABLATION_SCORES[:2],
        *(("coco/test/TR@1", "coco/test/IR@1") if "coco" in names else ()),
        *ABLATION_SCORES[2:],
    )
    pool = scale.pool
    printed = (
        *("vqa/test-dev", "vqa/test-std", "nlvr2/dev/accuracy", "nlvr2/test/accuracy"),
        *("coco/test/TR@1", "coco/test/IR@1", "retrieval/test/TR@1", "retrieval/test/IR@1"),
        *("imagenet/val/top1", "mnli/dev_matched/accuracy"),
    )
    paper = {"paper: BEiT-3* BASE": "BEiT-3_BASE*", "paper: VL-MoE BASE/32E": "VL-MoE_BASE/32E"}
    return Study(
        name="downstream",
        title="Fine-tuned on every task, dense against sparse (Tables 1 and 2)",
        runs=tuple(Run(label, label, tasks=names) for label in ("dense", pool)),
        columns=(
            *scores,
            "average",
            *dict.fromkeys(name for name in printed if name not in scores),
        ),
        panels=tuple(Panel("values", (score,)) for score in (*scores, "average")),
        claims=tuple(
            Claim(
                f"Experts score higher on {title}",
                f"section {section}",
                tuple(above(score, pool, "dense") for score in own),
            )
            for title, section, own in (
                ("VQA", "4.2, Table 1", scores[:1]),
                ("NLVR2", "4.2, Table 1", ABLATION_SCORES[:2]),
                (
                    *("retrieval", "4.2, Table 1"),
                    tuple(score for score in scores if score.endswith(("/TR@1", "/IR@1"))),
                ),
                ("ImageNet", "4.3, Table 2", ABLATION_SCORES[4:5]),
                ("MNLI", "4.3, Table 2", ABLATION_SCORES[5:]),
            )
        ),
        scores=scores,
        paper=tuple(
            PaperRow(label, {name: value for name, value in zip(printed, _printed(model)) if value})
            for label, model in paper.items()
        ),
    )


STUDIES: Mapping[str, Callable[[Scale], Study]] = {
    "scaling": scaling,
    "experts": experts,
    "strategy": strategy,
    "losses": losses,
    "contrastive": contrastive,
    "dropped": dropped,
    "frozen": frozen,
    "downstream": downstream,
}
