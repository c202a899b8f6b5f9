"""Datasets: raw readers, preprocessing into indexed files, and what training reads from them."""
