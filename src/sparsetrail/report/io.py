"""A report as bytes and as files: what is written is read back equal, and nothing unknown is let in."""

import dataclasses
import functools
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sparsetrail.core import Report
from sparsetrail.report.tables import as_csv

SCHEMA = 1
T = TypeVar("T")
RESULT = "result.json"


class ReportError(ValueError):
    """A report that cannot be read or written: what was expected, what was found, the likely fix."""


def to_json(report: Report) -> bytes:
    """The whole report as JSON, without adversarial tensors.

    NaN and infinity become null. In the free-form parts (knobs, model cards, conditions, provenance) tuples come back
    as lists, paths as strings, functions as their names; anything else that is not plain data is refused.
    """
    import msgspec

    return msgspec.json.encode({"schema": SCHEMA, **_bare(report)}) + b"\n"


def from_json(data: bytes | str) -> Report:
    """The report that `to_json` wrote; null where a number is due reads as NaN, unknown keys are refused by path."""
    import msgspec

    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReportError(
            f"expected JSON, found something else: {error}; likely fix: run the recipe again, the file is cut or edited"
        ) from None
    if not isinstance(body, dict) or "schema" not in body:
        keys = ", ".join(map(repr, list(body)[:6])) if isinstance(body, dict) else ""
        found = f"keys {keys}" if keys else "an empty object" if isinstance(body, dict) else type(body).__name__
        raise ReportError(
            f"expected a report with the key 'schema', found {found}; "
            f"likely fix: point to the {RESULT} that sparsetrail wrote"
        )
    if (schema := body.pop("schema")) != SCHEMA:
        fix = "upgrade sparsetrail" if isinstance(schema, int) and schema > SCHEMA else "run the recipe again"
        raise ReportError(f"expected schema {SCHEMA}, found {schema!r} at `$.schema`; likely fix: {fix}")
    try:
        wire = msgspec.convert(body, _wire(Report), strict=True)
    except msgspec.ValidationError as error:
        raise ReportError(
            f"expected a report of schema {SCHEMA}, found: {error}; "
            "likely fix: undo the edit, or read it with the version that wrote it"
        ) from None
    return _build(Report, wire, "$")


def load(path: str | Path) -> Report:
    """The report of a folder (its result.json) or of that file itself."""
    path = Path(path)
    file = path / RESULT if path.is_dir() else path
    try:
        data = file.read_bytes()
    except OSError as error:
        inside = sorted(str(p.parent) for p in path.glob(f"*/**/{RESULT}")) if path.is_dir() else []
        if path.is_dir() and not inside:  # records keep reports under the name of their figure
            inside = sorted(str(p) for p in path.glob("*.json"))
        more = f" (and {len(inside) - 6} more)" if len(inside) > 6 else ""
        fix = "check the path, or run the recipe that writes it"
        fix = f"name one of {', '.join(inside[:6])}{more}" if inside else fix
        raise ReportError(
            f"{file}: expected a report folder or its {RESULT}, found none ({error.strerror}); likely fix: {fix}"
        ) from None
    try:
        return from_json(data)
    except ReportError as error:
        raise ReportError(f"{file}: {error}") from None


def pack(value: Any) -> Any:
    """A core dataclass as JSON-ready data; NaN and infinity become null, adversarial tensors are left out."""
    import msgspec

    return msgspec.json.decode(msgspec.json.encode(_bare(value)))


def unpack(kind: type[T], body: Any, *, where: str = "$") -> T:
    """The dataclass of `kind` that `pack` took apart; unknown keys and wrong types are refused by path."""
    import msgspec

    try:
        return _build(kind, msgspec.convert(body, _wire(kind), strict=True), where)
    except msgspec.ValidationError as error:
        raise ReportError(f"expected a {kind.__name__}, found: {error}; likely fix: move the file away") from None


def trail_csv(report: Report) -> str:
    """The trails, one row an operation: shares 0..1, norm per image, operations counted from 0 in forward order."""
    head = ("victim", "mode", "data", "n", "steps", "order", "op", "kind", "depth", "zero", "forced", "norm", "entries")
    rows = (
        (t.victim, t.mode, t.data, t.n, t.steps, i, r.op, r.kind, r.depth, r.zero, r.forced, r.norm, r.entries)
        for t in report.trails
        for i, r in enumerate(t.rows)
    )
    return as_csv(head, rows)


def steps_csv(report: Report) -> str:
    """Zero share 0..1 of every time step (from 1), one row an operation and step; only the head if none was kept."""
    rows = (
        (t.victim, t.mode, t.data, i, r.op, r.kind, step, zero)
        for t in report.trails
        for i, r in enumerate(t.rows)
        for step, zero in enumerate(r.per_step or (), 1)
    )
    return as_csv(("victim", "mode", "data", "order", "op", "kind", "step", "zero"), rows)


def _bare(value: Any) -> Any:
    """A core value as plain data, without adversarial tensors however deep the runs lie."""
    import msgspec

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _bare(getattr(value, f.name)) for f in _fields(type(value))}
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return [_bare(part) for part in value]
    return msgspec.to_builtins(value, enc_hook=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, type) or (isinstance(value, Callable) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of torch or numpy
        return value.item()
    raise ReportError(
        f"expected plain data in a report, found {type(value).__module__}.{type(value).__qualname__}; "
        "likely fix: store a number, a string, a list or a dict of these"
    )


@functools.cache
def _wire(kind: Any) -> Any:
    """The type a value has in JSON: dataclasses become closed structs, numbers may be null, tensors are left out."""
    import msgspec

    if kind is float:
        return float | None
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields: list[Any] = []
        for f in _fields(kind):
            if f.default is not dataclasses.MISSING:
                fields.append((f.name, _wire(hints[f.name]), f.default))
            elif f.default_factory is not dataclasses.MISSING:
                fields.append((f.name, _wire(hints[f.name]), msgspec.field(default_factory=f.default_factory)))
            else:
                fields.append((f.name, _wire(hints[f.name])))
        return msgspec.defstruct(kind.__name__, fields, kw_only=True, forbid_unknown_fields=True)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple[tuple(a if a is ... else _wire(a) for a in args)]  # type: ignore[misc]
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(_wire, args))
    return dict[str, Any] if origin is not None and _is_subclass(origin, Mapping) else kind


def _is_subclass(kind: Any, of: type) -> bool:
    """`issubclass` that answers False for what is not a class."""
    return isinstance(kind, type) and issubclass(kind, of)


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return tuple(f for f in dataclasses.fields(kind) if f.name != "adversarial")


def _build(kind: Any, value: Any, path: str) -> Any:
    """The core value behind a wire value; what core itself refuses is refused with its path."""
    if kind is float:
        return math.nan if value is None else float(value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        parts = {f.name: _build(hints[f.name], getattr(value, f.name), f"{path}.{f.name}") for f in _fields(kind)}
        try:
            return kind(**parts)
        except ReportError:
            raise
        except ValueError as error:
            raise ReportError(f"{error}, at `{path}`; likely fix: undo the edit of that value") from None
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        each = (args[0] for _ in value) if args[-1] is ... else args
        return tuple(_build(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(each, value, strict=True)))
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        return None if value is None else _build(inner[0], value, path) if len(inner) == 1 else value
    return value
