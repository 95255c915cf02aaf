"""Our pytrees in `jax.export`: how the types that a program takes or returns are written into its file.

jax writes the structure of a program's arguments and results into the file, and needs to be told how for each
type that is not its own. A node's children are written by jax; here its static part becomes JSON, in which
every field stands by its name, so that a field that a later release adds takes its default when an older
file is read.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.export
import numpy as np

_PREFIX = "moe_align_jax."
# Types whose values occur in static parts, by name. They are written as their fields.
_static_types: dict[str, type] = {}


def register_static_field[T](cls: type[T]) -> type[T]:
    """For a NamedTuple or dataclass that is the value of a static field."""
    _static_types[cls.__name__] = cls
    return cls


def register_namedtuple[T](cls: type[T]) -> type[T]:
    """For a NamedTuple, which is a pytree as it stands: all its fields are children."""
    return jax.export.register_namedtuple_serialization(cls, serialized_name=_PREFIX + cls.__name__)


def register_static[T](cls: type[T]) -> type[T]:
    """For a frozen dataclass: makes it a pytree without leaves, and writes it as a static part."""
    jax.tree_util.register_static(cls)
    register_static_field(cls)
    return jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=_PREFIX + cls.__name__,
        serialize_auxdata=_dump,
        deserialize_auxdata=_load,
        from_children=lambda aux_data, children: aux_data,
    )


def register_dataclass[T](cls: type[T], data_fields: list[str], meta_fields: list[str]) -> type[T]:
    """Makes a dataclass a pytree, as `jax.tree_util.register_dataclass`, that can be written."""
    jax.tree_util.register_dataclass(cls, data_fields=data_fields, meta_fields=meta_fields)

    def dump(static: Any) -> bytes:
        fields = dict(zip(meta_fields, static, strict=True))
        return _dump({"children": data_fields, "static": fields})

    def from_children(aux_data: Any, children: Any) -> T:
        named = dict(zip(aux_data["children"], children, strict=True))
        return cls(**named, **aux_data["static"])

    return jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=_PREFIX + cls.__name__,
        serialize_auxdata=dump,
        deserialize_auxdata=_load,
        from_children=from_children,
    )


def _dump(value: Any) -> bytes:
    return json.dumps(_to_json(value)).encode()


def _load(data: bytes) -> Any:
    return _from_json(json.loads(bytes(data).decode()))


def _to_json(value: Any) -> Any:
    """None, bools, numbers and strings as they are; everything else as `[kind, contents]`."""
    if isinstance(value, (np.bool_, np.integer)):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    cls = type(value)
    if _static_types.get(cls.__name__) is cls:
        names = getattr(cls, "_fields", None) or [f.name for f in dataclasses.fields(value)]
        return [cls.__name__, {name: _to_json(getattr(value, name)) for name in names}]
    if cls in (tuple, list):
        return [cls.__name__, [_to_json(item) for item in value]]
    if cls is dict:
        return ["dict", [[_to_json(k), _to_json(v)] for k, v in value.items()]]
    raise NotImplementedError(f"moe_align_jax cannot write a static {cls.__name__} into a file")


def _from_json(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, contents = value
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(map(_from_json, contents))
    if kind == "dict":
        return {_from_json(k): _from_json(v) for k, v in contents}
    if kind not in _static_types:
        raise ValueError(f"the file holds a static {kind}, which this moe_align_jax does not know")
    return _static_types[kind](**{name: _from_json(v) for name, v in contents.items()})
