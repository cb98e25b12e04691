"""Reads YAML text into plain values, and refuses text that would expand without end or that holds what no key can be.

Called by config/load for files and for the values of overrides.
"""

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import CollectionNode, Node, ScalarNode

from lmu_dist.config.explain import dotted
from lmu_dist.config.types import ConfigError

MAX_BYTES = 1_000_000  # of a file
MAX_DEPTH = 20  # of sections and lists inside each other; a configuration needs six
MAX_VALUES = 100_000  # of a file after its aliases are replaced by what they stand for
MAX_INTEGER_BITS = 1024  # Python refuses to print longer numbers


def load_yaml(text: str, source: str) -> Any:
    """The value of YAML text, of plain types with words as keys. Raises ConfigError with one line that starts with `source`."""
    yaml = YAML(typ="safe", pure=True)  # YAML 1.2: 1e-3 is a number, a key given twice is an error
    try:
        node: Any = yaml.compose(text)
        if node is not None:
            _expanded_size(node, {}, 0)
        value = yaml.load(text)
    except _TooLargeError as e:
        raise ConfigError(f"{source}: {e}") from e
    except RecursionError as e:
        raise ConfigError(f"{source}: values are nested more than {MAX_DEPTH} deep; write sections and lists only") from e
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = " ".join(str(e.problem or e.context).split())
        raise ConfigError(f"{source} is not valid YAML{at}: {problem}") from e
    except (YAMLError, ValueError, ArithmeticError, TypeError, AttributeError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        reason = "a number has too many digits" if "integer string conversion" in reason else reason
        raise ConfigError(f"{source} is not valid YAML: {reason}") from e
    _check_plain(value, (), source)
    return value


class _TooLargeError(Exception):
    """The text expands to more than the limits allow."""


def _expanded_size(node: Node, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for when aliases are replaced, found without replacing them. Raises _TooLargeError."""
    if depth > MAX_DEPTH:  # also of an alias inside of what it stands for
        raise _TooLargeError(f"values are nested more than {MAX_DEPTH} deep; write sections and lists only")
    if isinstance(node, ScalarNode) or not isinstance(node, CollectionNode):
        return 1
    if id(node) not in known:
        children = [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_expanded_size(child, known, depth + 1) for child in children)
    if known[id(node)] > MAX_VALUES:
        raise _TooLargeError(f"its aliases (*name) expand to more than {MAX_VALUES:,} values; write fewer of them")
    return known[id(node)]


def _check_plain(value: Any, path: tuple[Any, ...], source: str) -> None:
    """Raises ConfigError unless a value has types that JSON has too."""
    at = f"{source}: {dotted(path)}: " if path else f"{source}: "
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{source}: {dotted((*path, str(key)))}: a key must be a word, not {key!r}; put it in quotes")
            _check_plain(inner, (*path, key), source)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_plain(inner, (*path, i), source)
    elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise ConfigError(f"{at}the number has more than {MAX_INTEGER_BITS} bits; write a smaller one")
    elif isinstance(value, str):
        if not _is_unicode(value):
            raise ConfigError(f"{at}the text is not valid UTF-8; save or type it as UTF-8")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise ConfigError(f"{at}{value!s:.60} is a {type(value).__name__} in YAML; to mean text, put it in quotes")


def _is_unicode(text: str) -> bool:
    """Whether the text can be encoded: an argument of a command that is no UTF-8 has characters that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
