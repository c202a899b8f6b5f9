"""Losses over predicted positions, classes and similarities."""
