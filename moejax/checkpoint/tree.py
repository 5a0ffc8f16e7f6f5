"""Names of the leaves of a tree, under which they are stored."""

from typing import Any

import jax


def flatten(tree: Any) -> dict[str, Any]:
    """``{path: leaf}`` with slash-separated paths that name every container key."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_part(k) for k in path if _part(k)): leaf for path, leaf in leaves}


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            text = str(getattr(key, attribute))
            return (
                "" if text in ("value", "raw_value") else text
            )  # the inside of an nnx.Variable is no level of its own
    return str(key)
