"""HTML pages from templates: one file that needs nothing else, in one style."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from megatron_vlmoe.runtime.files import write_text_atomic


def write_page(
    path: Path, template: Path, filters: dict[str, Callable[..., Any]], **values: Any
) -> None:
    """Writes the page that a template makes of values; the file appears whole or not at all.

    All texts are escaped. A template has the common style by ``{% include "page.css" %}``.

    Args:
        path: the page.
        template: a Jinja file.
        filters: what the template calls as ``value | NAME``.
        values: what it knows by name.

    Raises:
        FileError: the page cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    write_text_atomic(path, environment.get_template(template.name).render(values) + "\n")
