"""What `vlmoe check` looks at before a run is started: one line per check, on every node where nodes may differ."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_vlmoe.config.errors import UserError
from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.tensors import SafetensorsFolder
from megatron_vlmoe.data.batches import PretrainData
from megatron_vlmoe.data.sums import data_files
from megatron_vlmoe.finetune.options import checkpoint_of
from megatron_vlmoe.finetune.prepared import PreparedTask
from megatron_vlmoe.planning.estimate import checkpoint_bytes
from megatron_vlmoe.runtime.ranks import environment_rank, environment_world_size, gpu_of_process
from megatron_vlmoe.runtime.run_lock import LOCK_FILE, holder_text
from megatron_vlmoe.runtime.sums import SUMS_FILE, differing_files
from megatron_vlmoe.train.checkpoint_files import find_checkpoint, saved_common
from megatron_vlmoe.train.checkpoint_sums import check_files
from megatron_vlmoe.train.run_files import is_hugging_face

Level = Literal["ok", "warning", "error"]
# Loader workers hand batches over in it; containers have 64 MB by themselves.
ENOUGH_SHARED_MEMORY = 1e9
NETWORK_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: how bad it is, what was checked, and what was found."""

    level: Level
    check: str
    text: str

    def line(self) -> str:
        """`ok       data: 12 files, 3.40 GB, all as their manifests say`."""
        return f"{self.level:<8} {self.check}: {self.text}"


def preflight(config: RunConfig, command: str, quick: bool, ranks_per_node: int) -> list[Finding]:
    """All checks of a run; of several processes every one must call it.

    Rank 0 reads the files, the first rank of every node looks at its machine, and all ranks try the network.

    Args:
        config: of pretraining, fine-tuning or evaluation, checked by itself.
        command: that is to run: `pretrain-random` reads no data, `evaluate` trains on none and writes no checkpoint.
        quick: compares sizes of files and does not read them.
        ranks_per_node: processes that a node is to run.

    Returns:
        On rank 0 everything, with the name of the node before what another node found; on other ranks nothing.
    """
    found: list[Finding] = []
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        found += [*_machine(ranks_per_node), *_names()]
    if environment_world_size() > 1:
        found.append(_collective())
        if not dist.is_initialized():
            return found
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (socket.gethostname(), found))
        own, found = socket.gethostname(), []
        for host, findings in gathered:
            for finding in findings:
                if host != own:
                    finding = Finding(finding.level, f"{host}: {finding.check}", finding.text)
                if finding not in found:
                    found.append(finding)
        # The others need not wait for what rank 0 reads.
        dist.destroy_process_group()
    if environment_rank():
        return []
    is_training = command != "evaluate"
    if command != "pretrain-random":
        config, findings = _data(config, is_training, quick)
        found += findings
    found += _checkpoint(config, quick)
    if is_training and config.checkpoint.save:
        found += _save_folder(config)
    return found


def _machine(ranks_per_node: int) -> Iterator[Finding]:
    count = torch.cuda.device_count()
    if not count:
        yield Finding("warning", "GPUs", "none visible: this would train on the CPU")
    elif count < ranks_per_node:
        yield Finding("error", "GPUs", f"{count} visible for {ranks_per_node} processes of a node")
    else:
        text = f"{count} x {torch.cuda.get_device_name()} for {ranks_per_node} process(es)"
        yield Finding("ok", "GPUs", text)
    try:
        size = shutil.disk_usage("/dev/shm").total
        few = size < ENOUGH_SHARED_MEMORY
        text = f"{size / 1e9:.2f} GB" + (
            ", little for loader workers (docker run --shm-size, or --data.num_workers 0)"
            if few
            else ""
        )
        yield Finding("warning" if few else "ok", "/dev/shm", text)
    except OSError as error:
        yield Finding("warning", "/dev/shm", f"{error.strerror}; loader workers need it")


def _names() -> Iterator[Finding]:
    for name in dict.fromkeys((socket.gethostname(), os.environ.get("MASTER_ADDR", ""))):
        if not name:
            continue
        try:
            address = socket.getaddrinfo(name, None)[0][4][0]
            yield Finding("ok", "network", f"{name} is {address}")
        except (OSError, UnicodeError) as error:
            # A name with an empty or very long part is not even looked up.
            why = error.strerror if isinstance(error, OSError) else "it cannot be a host name"
            yield Finding("error", "network", f"{name} has no address ({why})")
    there = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        # NCCL takes beginnings of names; what begins with ^ leaves interfaces out.
        value = os.environ.get(variable, "")
        wanted = [] if value.startswith("^") else value.lstrip("=").split(",")
        missing = [w for w in wanted if w and not any(name.startswith(w) for name in there)]
        if missing:
            text = f"{variable} names {missing[0]}, but the interfaces are {', '.join(there)}"
            yield Finding("error", "network", text)


def _collective() -> Finding:
    """Sums a one of every rank, as training would: over NCCL where there are GPUs, else over gloo."""
    on_gpu = torch.cuda.is_available()
    try:
        if on_gpu:
            torch.cuda.set_device(gpu_of_process(torch.cuda.device_count()))
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=NETWORK_TIMEOUT)
        value = torch.ones(1, device="cuda" if on_gpu else "cpu")
        dist.all_reduce(value)
        ranks = int(value.item())
    except (UserError, RuntimeError, ValueError, OSError) as error:
        return Finding("error", "network", f"no collective: {' '.join(str(error).split())[:300]}")
    level: Level = "ok" if ranks == dist.get_world_size() else "error"
    return Finding(level, "network", f"{ranks} rank(s) over {'NCCL' if on_gpu else 'gloo'}")


def _data(config: RunConfig, is_training: bool, quick: bool) -> tuple[RunConfig, list[Finding]]:
    """Opens datasets and tokenizers as training does, and reads the files; the configuration with sizes filled in."""
    try:
        if isinstance(config, FinetuneConfig):
            config = PreparedTask.open(config, is_training).config
        else:
            config = PretrainData.open(config).config
        files = data_files(config, is_training)
    except UserError as error:
        return config, [Finding("error", "data", str(error))]
    sums = {path: record.sha256 for path, record in files.items()}
    if flaws := [] if quick else differing_files(sums):
        errors = [f"{path}: {why} than its manifest says" for path, why in flaws]
        return config, [Finding("error", "data", error) for error in errors]
    size = sum(record.size for record in files.values()) / 1e9
    all_as = "sizes" if quick else "contents"
    text = f"{len(files)} files, {size:.2f} GB, with the {all_as} that their manifests say"
    names = [name for name in (config.data.text_tokenizer, config.data.image_tokenizer) if name]
    tokenizers = [Finding("ok", "tokenizer", f"{name} fits the data") for name in names]
    return config, [Finding("ok", "data", text), *tokenizers]


def _checkpoint(config: RunConfig, quick: bool) -> Iterator[Finding]:
    """The checkpoint that the run would load."""
    options = config.checkpoint
    try:
        path = find_checkpoint(options.save, options.step) if options.save else None
        if path is None and options.load:
            path = checkpoint_of(options.load, options.step)
        if path is None:
            yield Finding("ok", "checkpoint", "none: the run starts from initial weights")
            return
        if quick:
            yield Finding("ok", "checkpoint", f"{path}, not read")
        elif is_hugging_face(path):
            SafetensorsFolder(path).verify_checksums()
            yield Finding(
                "ok", "checkpoint", f"{path}, all files as {SUMS_FILE} says, if it is there"
            )
        else:
            with _without_log():
                check_files(path, lambda: saved_common(path))
            if (path / SUMS_FILE).is_file():
                yield Finding("ok", "checkpoint", f"{path}, all files as {SUMS_FILE} says")
            else:
                text = f"{path} has no {SUMS_FILE}, as an earlier version wrote it: not verified"
                yield Finding("warning", "checkpoint", text)
    except UserError as error:
        yield Finding("error", "checkpoint", str(error))


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """What is said as a line of the log is a finding here."""
    log = logging.getLogger("megatron_vlmoe")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _save_folder(config: RunConfig) -> Iterator[Finding]:
    save = Path(config.checkpoint.save)
    try:
        holder = holder_text(save)
    except OSError as error:
        yield Finding("error", "--save", f"{save}: {LOCK_FILE}: {error.strerror}")
        return
    if holder:
        yield Finding("warning", "--save", f"{save}: has a {LOCK_FILE} of {holder}")
    there = next(
        folder for folder in (save.absolute(), *save.absolute().parents) if folder.exists()
    )
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding("error", "--save", f"{there}: not a folder that can be written")
        return
    precision: Precision = "bf16" if config.train.precision == "auto" else config.train.precision
    try:
        size = checkpoint_bytes(config, precision).stored
    except UserError as error:
        yield Finding("error", "--save", str(error))
        return
    free = shutil.disk_usage(there).free
    kept = config.checkpoint.keep_last + 1
    text = f"{free / 1e9:.1f} GB free in {there}, a checkpoint has {size / 1e9:.2f} GB"
    if free < size:
        yield Finding("error", "--save", text)
    elif free < kept * size:
        yield Finding("warning", "--save", f"{text}, and up to {kept} are there at once")
    else:
        yield Finding("ok", "--save", text)
