"""Drills: something breaks at a random place; the run must go on as if nothing had been, or say what broke."""
