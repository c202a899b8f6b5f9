"""Configuration: frozen dataclasses, presets, command line, and the static layouts derived from them."""
