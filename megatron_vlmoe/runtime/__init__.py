"""Devices, process groups, keyed random draws and the CPU runtime: the only room with process-wide state."""
