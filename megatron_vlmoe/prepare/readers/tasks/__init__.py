"""Readers of downstream tasks in the raw layouts of their publishers.

A source knows the classes of a task and the samples of each split. Making one, and asking it for a
split, looks for the files that will be needed, so that a missing one is told before any work.
"""
