"""Readers of raw corpora: they find records and name them; workers decode and check them.

A reader yields records in a fixed order, and a `Reject` in the place of each record that it cannot
read. Text, tar and parquet files stream; annotation files that are one JSON value are held whole.
"""
