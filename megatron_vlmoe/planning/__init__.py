"""Arithmetic about a run before it runs: checks, parameters, FLOPs, memory."""
