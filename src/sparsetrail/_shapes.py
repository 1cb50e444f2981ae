"""Shape annotations: jaxtyping where it is installed, otherwise the plain type (a bare machine).

Legend used throughout: t time steps, n images, c channels, h rows, w columns, k classes, m = t * n folded.
"""

try:
    from jaxtyping import Bool, Float, Int, UInt8
except ImportError:

    class _Plain:
        def __class_getitem__(cls, item):  # Float[Tensor, "n c"] -> Tensor
            return item[0]

    Bool = Float = Int = UInt8 = _Plain  # type: ignore[assignment,misc]

__all__ = ["Bool", "Float", "Int", "UInt8"]
