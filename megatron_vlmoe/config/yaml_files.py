"""YAML of a user: plain values, each name once, and no more than its text can mean."""

from __future__ import annotations

from typing import Any

import yaml

_MOST_VALUES = 1_000_000
_DEEPEST = 100
"""Brackets in brackets; for many thousands the parser takes minutes before it comes to an end."""


def parse_yaml(text: str) -> Any:
    """The value of a text.

    Raises:
        yaml.YAMLError: it is not valid, names something twice in a section, is nested too deeply, or its aliases stand
            for too much. No other error.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except ValueError as error:  # of a date or number that looks like one and is none
        raise yaml.YAMLError(str(error)) from None
    except (AttributeError, LookupError, TypeError):  # PyYAML relies on tags, such as !!timestamp
        raise yaml.YAMLError("a value is not what its tag says") from None


class _Loader(yaml.SafeLoader):
    """Refuses a name that stands twice in one section, of which YAML would take the last, and endless integers."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= _DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _values_of(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in names[:place]:
                problem = f"{key.value} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    value: int = loader.construct_yaml_int(node)
    # ValueError for one that no message can show, which may stand there as hexadecimal digits.
    str(value)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def _values_of(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """How many values a node stands for, aliases written out. Raises MarkedYAMLError for too many."""
    if node in known:
        count = known[node]
    else:
        known[node] = _MOST_VALUES + 1  # until it is known: what holds itself has no end
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        count = known[node] = 1 + sum(_values_of(one, known) for one in inner)
    if count > _MOST_VALUES:
        problem = f"its aliases stand for more than {_MOST_VALUES} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return count
