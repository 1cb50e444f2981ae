"""The run-time type checker of the tests: beartype, with an int allowed where a float is due."""

import inspect
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
SHAPES = ("Float[", "Int[", "Bool[")
_whole = jaxtyping.jaxtyped


def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    """jaxtyping's decorator where a signature names shapes, else beartype alone, at a tenth of its cost a call.

    Functions without shapes that are made within others stay as they are: they would be decorated at every call.
    """
    if fn is None:
        return lambda fn: jaxtyped(fn, typechecker=typechecker)
    types = getattr(fn, "__annotations__", {}).values()
    if not inspect.isfunction(fn) or any(isinstance(a, str) or s in str(a) for a in types for s in SHAPES):
        return _whole(fn, typechecker=typechecker)  # it also knows names that are imported for their types alone
    return fn if "<locals>" in fn.__qualname__ else check(fn)
