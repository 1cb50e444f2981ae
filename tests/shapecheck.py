"""The run-time type checker of the tests: beartype, with an int allowed where a float is due."""

import inspect
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
SHAPES = ("Float[", "Int[", "Bool[", "UInt8[")
_whole = jaxtyping.jaxtyped


def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    """jaxtyping's decorator where a signature names shapes, else beartype alone, at a tenth of its cost a call.

    Functions without shapes that the engine makes within others stay as they are, or they would be decorated anew at
    every call.
    """
    if fn is None:
        return lambda fn: jaxtyped(fn, typechecker=typechecker)
    types = getattr(fn, "__annotations__", {}).values()
    if not inspect.isfunction(fn) or any(isinstance(a, str) or s in str(a) for a in types for s in SHAPES):
        return _whole(fn, typechecker=typechecker)  # it also knows names that are imported for their types alone
    inner = "<locals>" in fn.__qualname__ and fn.__module__.startswith(("sparsetrail.snn", "sparsetrail.core"))
    return fn if inner else check(fn)
