"""The command line: `vlmoe COMMAND`, the same as `python -m megatron_vlmoe COMMAND`."""
