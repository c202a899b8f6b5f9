"""Devices, process groups, files and the CPU runtime: the only package with process-wide state."""
