"""`python -m megatron_vlmoe COMMAND ...`."""

from megatron_vlmoe.commands.main import main

# dist_checkpointing starts helper processes, which import this file again.
if __name__ == "__main__":
    raise SystemExit(main())
