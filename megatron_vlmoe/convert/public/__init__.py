"""The public checkpoints that can be imported, by the layout of their tensors."""

from __future__ import annotations

from typing import Literal, get_args

FamilyName = Literal["vlmo", "beit3", "beit2"]
FAMILY_NAMES: tuple[FamilyName, ...] = get_args(FamilyName)
