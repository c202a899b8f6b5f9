"""The former spelling of `vlmoe pretrain-random`: python -m megatron_vlmoe.train.random_pretrain."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "pretrain-random")
    runpy.run_module("megatron_vlmoe", run_name="__main__", alter_sys=True)
