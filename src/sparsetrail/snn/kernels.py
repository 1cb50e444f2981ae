"""CPU kernels, compiled at first use and kept: `kernels.c`, and one pair of functions for every neuron.

A neuron's kernel is generated from the same per-step functions that the plain path runs (`charge`, `discharge`, the
surrogate's derivative): they are called with symbols instead of tensors, which note the operations as C. Steps, batch
and channels are arguments, so a kind of neuron compiles once, in about a second, into
`$XDG_CACHE_HOME/sparsetrail` (or `~/.cache/sparsetrail`, or a temporary folder). Without a C compiler, with
SPARSETRAIL_KERNELS=0, or inside `plain()`, the eager path serves.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrail._files import write_atomic

SOURCE = Path(__file__).with_name("kernels.c")
REAL = {torch.float32: "float", torch.float64: "double"}
_off = [os.environ.get("SPARSETRAIL_KERNELS", "1") == "0"]


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside this block the eager path serves: for comparisons, and where a kernel is suspected."""
    before, _off[0] = _off[0], True
    try:
        yield
    finally:
        _off[0] = before


def compiler() -> str | None:
    """The C compiler: $CC, or gcc, clang or cc from the path; None where there is none."""
    return next((c for c in (os.environ.get("CC") or "gcc", "gcc", "clang", "cc") if shutil.which(c)), None)


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Do kernels serve this type here and now?"""
    return not _off[0] and dtype in REAL and library(dtype) is not None


class Shape(ctypes.Structure):
    """`shape` of kernels.c: frames and map of a convolution or pool, square kernel, and threads."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "frames", "height", "width", "channels", "kernel", "stride", "padding", "out_height", "out_width", "out",
            "threads",
        )
    ]  # fmt: skip


@functools.lru_cache(maxsize=1024)
def shape(frames: int, h: int, w: int, cin: int, cout: int, kernel: int, stride: int, padding: int, threads: int):
    """A `Shape` by reference, ready to pass."""
    ho, wo = (h + 2 * padding - kernel) // stride + 1, (w + 2 * padding - kernel) // stride + 1
    return ctypes.byref(Shape(frames, h, w, cin, kernel, stride, padding, ho, wo, cout, threads))


_POINTER, _INT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_double
_SIGNATURES = {  # of kernels.c
    "lanes": (),
    "has_bf16": (),
    "spike_conv": (_POINTER,) * 4,
    "spike_weight_grad": (_POINTER,) * 4,
    "input_grad": (_POINTER,) * 4,
    "input_grad_bf16": (_POINTER,) * 4,
    "pair_weights": (_POINTER,) * 3,
    "turn_weights": (_POINTER, _POINTER, _POINTER, _INT),
    "stem_conv": (_POINTER,) * 4,
    "stem_input_grad": (_POINTER,) * 4,
    "max_pool": (_POINTER,) * 4,
    "avg_pool": (_POINTER,) * 3,
    "pool_grad": (_POINTER,) * 4,
    "batch_stats": (_POINTER, _POINTER, _INT, _LONG, _INT, _POINTER, _POINTER, _INT),
    "norm_grad": (_POINTER, _POINTER, _POINTER, _INT, _LONG, _INT) + (_POINTER,) * 5 + (_DOUBLE, _INT),
}


@functools.cache
def library(dtype: torch.dtype) -> Any:
    """The compiled `kernels.c` for float32 or float64, or None."""
    found = _build(f"#define REAL {REAL[dtype]}\n" + SOURCE.read_text(), contract=True)
    return None if found is None else _typed(found, _SIGNATURES)


def _typed(found: ctypes.CDLL, signatures: dict[str, tuple]) -> ctypes.CDLL:
    for name, arguments in signatures.items():
        getattr(found, name).argtypes = arguments
        getattr(found, name).restype = _INT if name in ("lanes", "has_bf16") else None
    return found


def _build(source: str, *, contract: bool) -> ctypes.CDLL | None:
    """Compile C to a shared library in the cache and load it. `contract` allows fused multiply-adds."""
    cc = compiler()
    if cc is None:
        say_once("no C compiler found: the plain path serves, slower and the same")
        return None
    flags = ["-O3", "-march=native", f"-ffp-contract={'fast' if contract else 'off'}", "-fPIC", "-std=gnu11", "-w"]
    key = hashlib.sha256("\n".join((source, *flags, _machine(cc), torch.__version__)).encode()).hexdigest()[:24]
    for folder in folders():
        path = folder / f"{key}.so"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
                continue  # somebody else's: what lies there must not be run
            if not path.exists():
                write_atomic(path, _compile(cc, flags, source))
            return ctypes.CDLL(str(path))
        except _CannotCompile as error:
            say_once(f"{cc} failed: the plain path serves, slower and the same ({error})")
            return None
        except OSError:
            continue  # not writable, or its files may not be executed: the next folder
    say_once("no folder for compiled kernels: the plain path serves, slower and the same")
    return None


class _CannotCompile(Exception):
    pass


def _compile(cc: str, flags: list[str], source: str) -> bytes:
    """The bytes of the shared library; with OpenMP where the compiler has it, its runtime left to PyTorch's own."""
    with tempfile.TemporaryDirectory() as tmp:
        code, out = Path(tmp) / "kernels.c", Path(tmp) / "kernels.so"
        code.write_text(source)
        error = ""
        for openmp in (["-fopenmp"], []):
            try:
                done = subprocess.run(
                    [cc, *flags, *openmp, "-shared", "-o", str(out), str(code), "-lm"],
                    capture_output=True, text=True, timeout=120,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as failure:
                raise _CannotCompile(str(failure)) from None
            if done.returncode == 0:
                return out.read_bytes()
            error = done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"exit code {done.returncode}"
        raise _CannotCompile(error)


@functools.cache
def _machine(cc: str) -> str:
    """What decides the generated code: compiler version and processor."""
    version = subprocess.run([cc, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    cpu = Path("/proc/cpuinfo")
    features = next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "") \
        if cpu.exists() else platform.processor()  # fmt: skip
    return f"{version}\n{platform.machine()}\n{features}"


def folders() -> list[Path]:
    """Where compiled kernels are kept: the first of these that can be written to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsetrail"
    return [cache, Path(tempfile.gettempdir()) / f"sparsetrail-{os.getuid() if hasattr(os, 'getuid') else 'kernels'}"]


@functools.cache
def say_once(text: str) -> None:
    """One line for the reader of the log, once a process."""
    logging.getLogger("sparsetrail").warning("sparsetrail: %s", text)


# ---- neurons: per-step functions to C ------------------------------------------------------------------------------


Value = Any  # in a per-step function: a tensor, or a Symbol that stands in for one


class Symbol:
    """A value in a generated kernel; arithmetic on it writes C. Stands in for a tensor in the per-step functions."""

    dtype = None

    def __init__(self, code: str) -> None:
        self.code = code

    @classmethod
    def __torch_function__(cls, fn: Callable, _types, args=(), kwargs=None):
        made = _FUNCTIONS.get(fn.__name__)
        if made is None:
            raise TypeError(f"torch.{fn.__name__} has no C form here; add it to _FUNCTIONS")
        return Symbol(made.format(*(_code(a) for a in args)))

    def to(self, *_: Any) -> "Symbol":
        return self

    def square(self) -> "Symbol":
        return Symbol(f"SQUARE({self.code})")

    def abs(self) -> "Symbol":
        return Symbol(f"ABS({self.code})")

    def clamp(self, min: float) -> "Symbol":
        return Symbol(f"ATLEAST({self.code}, {_code(min)})")

    def __neg__(self) -> "Symbol":
        return Symbol(f"(-{self.code})")


def _operator(sign: str, swapped: bool) -> Callable:
    def apply(a: Symbol, b: Any) -> Symbol:
        left, right = (_code(b), a.code) if swapped else (a.code, _code(b))
        return Symbol(f"({left} {sign} {right})")

    return apply


for _name, _sign in (("add", "+"), ("sub", "-"), ("mul", "*"), ("truediv", "/")):
    setattr(Symbol, f"__{_name}__", _operator(_sign, False))
    setattr(Symbol, f"__r{_name}__", _operator(_sign, True))
Symbol.__rtruediv__ = lambda a, b: Symbol(f"((1 / {a.code}) * {_code(b)})")  # as a tensor's: reciprocal, then product
for _name, _sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
    setattr(Symbol, f"__{_name}__", lambda a, b, s=_sign: Symbol(f"FLAG({a.code} {s} {_code(b)})"))

_FUNCTIONS = {  # torch functions that the per-step definitions may call
    "exp": "EXP({0})",
    "sigmoid": "(1 / (1 + EXP(-{0})))",
    "full_like": "{1}",
    "ones_like": "((real)1)",
    "zeros_like": "((real)0)",
}


def _code(value: Any) -> str:
    return value.code if isinstance(value, Symbol) else f"((real){float(value).hex()})"


_NEURON = r"""
#include <math.h>
#include <stdlib.h>
#include <string.h>
typedef REAL real;
#define SAY(text) _Pragma(#text)
#define PARALLEL(n) SAY(omp parallel for num_threads(n) schedule(static))
#define SQUARE(x) ((x) * (x))
#define ABS(x) ((x) < 0 ? -(x) : (x))
#define ATLEAST(x, low) ((x) > (low) ? (x) : (x) != (x) ? (x) : (low))
#define FLAG(c) ((c) ? (real)1 : (real)0)
#define MULADD(a, b, c) (sizeof(real) == 4 ? (real)fmaf(a, b, c) : (real)fma(a, b, c))
#define CHUNK 2048 /* values whose state stays in the first cache over all steps */

/* e^x: 2^k times a polynomial in the rest; within 2 units in the last place. Vectorised, unlike a library call. */
static inline float exp_single(float x) {
    x = x > 88.37f ? 88.37f : x < -87.33f ? -87.33f : x;
    const float k = (float)(int)(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f));
    const float r = fmaf(k, 2.12194440e-4f, fmaf(k, -0.693359375f, x));
    float p = fmaf(r, 1.9875691500e-4f, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f), p = fmaf(p, r, 4.1665795894e-2f), p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f), p = fmaf(p * r, r, r + 1.0f);
    union { int i; float f; } scale = {((int)k + 127) << 23};
    return p * scale.f;
}
#define EXP(x) (sizeof(real) == 4 ? (real)exp_single((float)(x)) : (real)exp(x))

/* y [frames rows C] read at frame[t], scaled to a y + b per channel if a is given -> spikes s (plus `plus`) and
   charged potentials h [steps rows C]; h and plus may be NULL, h may lie over y if every step has its frame. */
void fire(const real *y, const int *frame, const real *a, const real *b, const real *plus, real *s, real *h, int steps,
          long rows, int C, int threads) {
    const long size = rows * C, per = CHUNK / C > 0 ? CHUNK / C : 1;
    PARALLEL(threads)
    for (long first = 0; first < rows; first += per) {
        const long n = rows - first < per ? rows - first : per;
        real state[n * C], now[n * C];
        for (long i = 0; i < n * C; i++) state[i] = (real)REST;
        for (int t = 0; t < steps; t++) {
            const real *in = y + frame[t] * size + first * C;
            const long at = t * size + first * C;
            real *out = s + at;
            if (a) {
                for (long r = 0; r < n; r++)
                    for (int c = 0; c < C; c++) now[r * C + c] = MULADD(in[r * C + c], a[c], b[c]);
                in = now;
            }
            for (long i = 0; i < n * C; i++) {
                const real x = in[i], v = state[i];
                const real h_ = CHARGE;
                const real s_ = SPIKE;
                state[i] = DISCHARGE;
                out[i] = s_;
                now[i] = h_;
            }
            if (h) memcpy(h + at, now, sizeof(real) * (size_t)(n * C));
            if (plus)
                for (long i = 0; i < n * C; i++) out[i] += plus[at + i];
        }
    }
}

/* Back through time: gradient of the spikes -> gradient of the input, per frame [frames rows C], times scale[c];
   `out` may lie over `grad` if every step has its frame. last[t] marks the last step that shows a frame. With `y`, sums
   [threads 2 C] take the sums over everything of g and of g (y - mean) inv, g before scale. */
void back(const real *grad, const real *h, const int *frame, const int *last, const real *scale, const real *y,
          const real *mean, const real *inv, real *out, double *sums, int steps, long rows, int C, int threads) {
    const long size = rows * C, per = CHUNK / C > 0 ? CHUNK / C : 1, chunks = (rows + per - 1) / per;
    PARALLEL(threads)
    for (int k = 0; k < threads; k++) {
        double *total = sums ? sums + (long)k * 2 * C : NULL;
        real *near = malloc(sizeof(real) * 2 * (size_t)C);
        for (long chunk = chunks * k / threads; chunk < chunks * (k + 1) / threads; chunk++) {
            const long first = chunk * per, n = rows - first < per ? rows - first : per;
            real state[n * C], now[n * C];
            for (long i = 0; i < n * C; i++) state[i] = 0;
            memset(near, 0, sizeof(real) * 2 * (size_t)C);
            for (int t = steps - 1; t >= 0; t--) {
                const long at = t * size + first * C, to = frame[t] * size + first * C;
                for (long i = 0; i < n * C; i++) {
                    const real h_ = h[at + i], slope = SLOPE;
                    const real g = grad[at + i] * slope + state[i] * (KEPT);
                    state[i] = g * (KEEP);
                    now[i] = g * (GAIN);
                }
                if (y)
                    for (long r = 0; r < n; r++)
                        for (int c = 0; c < C; c++) {
                            near[c] += now[r * C + c];
                            near[C + c] += now[r * C + c] * ((y[to + r * C + c] - mean[c]) * inv[c]);
                        }
                if (scale)
                    for (long r = 0; r < n; r++)
                        for (int c = 0; c < C; c++) now[r * C + c] *= scale[c];
                if (last[t]) memcpy(out + to, now, sizeof(real) * (size_t)(n * C));
                else
                    for (long i = 0; i < n * C; i++) out[to + i] += now[i];
            }
            if (y)
                for (int c = 0; c < 2 * C; c++) total[c] += (double)near[c];
        }
        free(near);
    }
}
"""
_NEURON_SIGNATURES = {
    "fire": (_POINTER,) * 7 + (_INT, _LONG, _INT, _INT),
    "back": (_POINTER,) * 10 + (_INT, _LONG, _INT, _INT),
}


def neuron(parts: dict[str, Any], dtype: torch.dtype) -> Any:
    """The kernels `fire` and `back` of a neuron given by its steps, `neuron.steps_in_c`; None without a compiler."""
    names = "".join(f"#define {k} {_code(v)}\n" for k, v in parts.items())
    found = _build(f"#define REAL {REAL[dtype]}\n{names}{_NEURON}", contract=False)
    return None if found is None else _typed(found, _NEURON_SIGNATURES)


def pointer(t: Tensor | None) -> int | None:
    """Where a tensor's values begin."""
    return None if t is None else t.data_ptr()


@functools.cache
def frames(order: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """For the frame shown at each step: the table itself, and a mark at the last step that shows it, int32."""
    last = {f: t for t, f in enumerate(order)}
    with torch.inference_mode(False):
        mark = [int(last[f] == t) for t, f in enumerate(order)]
        return torch.tensor(order, dtype=torch.int32, device="cpu"), torch.tensor(mark, dtype=torch.int32, device="cpu")
