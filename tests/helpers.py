"""Runs functions on several processes over gloo, and takes apart what they send back.

Importing torch and megatron-core costs seconds, so processes are forked from a server that has done it. Every
call gets new ones: process groups that outlive their peers keep their gloo threads spinning.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import socket
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence
from unittest import mock

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# A model as small as the parallel layouts allow: 17 image tokens, 4 blocks, pools of different sizes.
SMALL = """
--model.num_layers 4 --model.hidden_size 64 --model.num_attention_heads 4 --model.ffn_hidden_size 128
--model.num_vl_layers 1 --model.image_size 32 --model.patch_size 8 --model.text_length 16
--model.pair_text_length 8 --model.drop_path 0.2 --model.init_std 0.05 --model.layer_scale_init 0.1 --moe.layers 2 4
--data.pixel_std 0.5 0.5 0.5
--data.micro_texts 2 --data.micro_images 2 --data.micro_pairs 2
--data.global_texts 8 --data.global_images 8 --data.global_pairs 8
--moe.num_vision_experts 8 --moe.num_text_experts 4
--moe.capacity_factor 8 --moe.eval_capacity_factor 8 --optim.lr 0.003 --optim.lr_warmup_steps 0
--train.steps 3 --train.eval_steps 1 --train.eval_interval 0 --log.interval 1 --checkpoint.save_interval 0
""".split()

LAYOUT_OPTIONS = {
    "tp": "--parallel.tensor_model_parallel_size",
    "pp": "--parallel.pipeline_model_parallel_size",
    "vpp": "--parallel.virtual_pipeline_model_parallel_size",
    "ep": "--parallel.expert_model_parallel_size",
}


class WorkerError(AssertionError):
    """A child process raised; the message has its traceback."""


@dataclass(frozen=True)
class Layout:
    """Processes and parallel sizes of one run.

    Args:
        world: number of processes.
        sizes: sizes by the names of LAYOUT_OPTIONS.
    """

    world: int
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The layout as command line options."""
        return [word for name, size in self.sizes for word in (LAYOUT_OPTIONS[name], str(size))]


def layout(world: int, **sizes: int) -> Layout:
    """A layout, as `layout(4, tp=2, ep=2)`; what is left over is data parallel."""
    return Layout(world, tuple(sizes.items()))


def free_port() -> int:
    """A TCP port that nobody listens on, from a range that other processes which run tests do not take from.

    The system hands out ports above 32768, so that none of these is taken between here and its use.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + 1_000 * (worker % 12)
    for port in random.Random(os.urandom(8)).sample(range(first, first + 1_000), 1_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port from {first} on")


def start_process(target: Callable[..., None], *arguments: Any) -> Any:
    """A process that runs a function of a module, forked from a server that has imported torch and megatron-core."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    process = context.Process(target=target, args=arguments)
    # The server of Python 3.11 does not get sys.path, and passes over what it cannot import.
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    # Layouts are tested over gloo, also where there are fewer GPUs than processes.
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=paths):
        process.start()
    return process


class Workers:
    """Starts processes that run a function together.

    Args:
        size: most processes of a call.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def run(
        self,
        where: Layout | int,
        function: Callable[..., Any],
        *arguments: Any,
        timeout: float = 400.0,
    ) -> list[Any]:
        """Calls `function(*arguments)` on new processes with rank and world size in the environment.

        Args:
            where: layout or number of processes.
            function: at the top level of a module; it initializes what it needs, process groups are
                destroyed after it.
            *arguments: sent to every process.
            timeout: seconds until all processes are killed.

        Returns:
            What each rank returned.

        Raises:
            WorkerError: with the traceback of the first child that raised, or naming those that hang.
        """
        world = where if isinstance(where, int) else where.world
        assert world <= self.size, f"{world} processes asked of {self.size}"
        port = free_port()
        children = []
        for rank in range(world):
            ours, theirs = multiprocessing.Pipe()
            process = start_process(_child, theirs, rank, world, port, function, arguments)
            theirs.close()
            children.append((process, ours))
        try:
            return _collect(children, timeout)
        finally:
            for process, pipe in children:
                pipe.close()
                process.join(timeout=10)
                process.kill()
                process.join()


def _collect(children: Sequence[tuple[Any, Connection]], timeout: float) -> list[Any]:
    """What every child sends; the first error ends all."""
    world = len(children)
    results: list[Any] = [None] * world
    missing = set(range(world))
    deadline = time.monotonic() + timeout
    while missing:
        pipes = {children[rank][1]: rank for rank in missing}
        ready = multiprocessing.connection.wait(list(pipes), deadline - time.monotonic())
        if not ready:
            raise WorkerError(
                f"ranks {sorted(missing)} of {world} did not finish in {timeout:.0f} s"
            )
        for pipe in ready:
            rank = pipes[pipe]  # type: ignore[index]
            try:
                good, value = children[rank][1].recv()
            except EOFError:
                raise WorkerError(f"rank {rank} died") from None
            if not good:
                # The others may wait for this rank for ever.
                raise WorkerError(f"rank {rank} raised:\n{value}")
            results[rank] = value
            missing.remove(rank)
    return results


def _child(
    pipe: Connection,
    rank: int,
    world: int,
    port: int,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    """Runs the function of one rank and sends its result or its traceback."""
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        from megatron_vlmoe.runtime.distributed import destroy

        result = function(*arguments)
        destroy()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def small_config(*arguments: str, where: Layout = Layout(1)) -> Any:
    """The configuration of the small model with options on top, validated for a layout."""
    from megatron_vlmoe.config.command_line import parse_run
    from megatron_vlmoe.planning.validate import validate

    words = ["--preset", "tiny-8e", *SMALL, *where.arguments, *arguments]
    config = parse_run("pretrain", words).config
    config = with_random_vocabulary(config)
    validate(config, where.world)
    return config


def with_random_vocabulary(config: Any, caption_slots: int = 3) -> Any:
    """Fills in what the data would decide: vocabularies, of which one needs padding, and numbers of masked slots."""
    model = replace(config.model, vocab_size=300, visual_vocab_size=256)
    patches = config.objectives.num_masked_patches or int(0.4 * config.model.num_patches)
    objectives = replace(
        config.objectives, num_masked_patches=patches, caption_mask_slots=caption_slots
    )
    return replace(config, model=model, objectives=objectives)


Shard = tuple[tuple[int, ...], tuple[int, ...], Array]
"""Global shape, offset of this part, and the part."""


def assemble(ranks: Sequence[Mapping[str, Sequence[Shard]]]) -> dict[str, Array]:
    """Whole tensors from the shards of all ranks.

    Raises:
        AssertionError: if two ranks hold different bits of the same element, or no rank holds an element.
    """
    whole: dict[str, Array] = {}
    known: dict[str, Array] = {}
    for rank, shards in enumerate(ranks):
        for key, parts in shards.items():
            for shape, offset, value in parts:
                if key not in whole:
                    whole[key] = np.zeros(shape, value.dtype)
                    known[key] = np.zeros(shape, bool)
                assert whole[key].shape == shape, f"{key}: {shape} on rank {rank}"
                part = tuple(slice(o, o + n) for o, n in zip(offset, value.shape))
                seen = known[key][part]
                equal = whole[key][part][seen] == value[seen]
                assert equal.all(), f"{key}: {(~equal).sum()} elements of rank {rank} differ"
                whole[key][part] = value
                known[key][part] = True
    for key, mask in known.items():
        assert mask.all(), f"{key}: {(~mask).sum()} elements are on no rank"
    return whole


def assert_close(
    actual: Mapping[str, Any], expected: Mapping[str, Any], what: str, tolerance: float = 1e-5
) -> None:
    """Same keys, and every tensor equal within `tolerance` of the expected tensor's largest entry."""
    assert actual.keys() == expected.keys(), f"{what}: {actual.keys() ^ expected.keys()}"
    errors = []
    for key in expected:
        left, right = np.asarray(actual[key], float), np.asarray(expected[key], float)
        scale = np.abs(right).max(initial=0.0)
        error = np.abs(left - right).max(initial=0.0)
        if not error <= tolerance * scale:
            errors.append(f"{key}: off by {error:.3g}, largest entry {scale:.3g}")
    assert not errors, f"{what}: {len(errors)} of {len(expected)} differ: " + "; ".join(errors[:8])


def assert_identical(actual: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Same keys and the same bits."""
    assert actual.keys() == expected.keys(), f"{what}: {actual.keys() ^ expected.keys()}"
    different = [key for key in expected if not np.array_equal(actual[key], expected[key])]
    assert not different, f"{what}: {len(different)} of {len(expected)} differ: {different[:5]}"
