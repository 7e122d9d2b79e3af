"""YAML as people write it, parsed without a word lost."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from .errors import UserError


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        UserError: half a sentence, behind the file's name: for what is no YAML, and for a key that stands twice in one place, of which
            YAML's own readers keep the last without a word.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, with each key once."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[Any] = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name in seen and name is not None and key.tag != "tag:yaml.org,2002:merge":
                    raise UserError(
                        f"has '{key.value}' twice, the second time in line {key.start_mark.line + 1}: keep one of them"
                    )
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ) as error:  # it has no one error
        escape = "escape character" in str(error)
        hint = r" A path such as C:\photos goes without quotes, or in single ones" if escape else ""
        raise UserError(f"is not valid YAML: {' '.join(str(error).split())}{hint}") from error
