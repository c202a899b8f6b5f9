"""Masked data modelling objectives and their total."""
