"""CPU kernels, compiled at first use and kept: `kernels.c`, and one pair of functions for every neuron.

A neuron's kernel is generated from the same per-step functions that the plain path runs (`charge`, `discharge`, the
surrogate's derivative): they are called with symbols instead of tensors, which note the operations as C. Steps, batch
and channels are arguments, so a kind of neuron compiles once, in about a second, into
`$XDG_CACHE_HOME/sparsetrail` (or `~/.cache/sparsetrail`, or a temporary folder). Without a C compiler, with
SPARSETRAIL_KERNELS=0, or inside `plain()`, the eager path serves.
"""

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sparsetrail._files import write_atomic

SOURCE = Path(__file__).with_name("kernels.c")
REAL = {torch.float32: "float", torch.float64: "double"}
_off = contextvars.ContextVar(
    "off", default=os.environ.get("SPARSETRAIL_KERNELS", "1").lower() in ("0", "false", "off", "no")
)
_lock = threading.RLock()


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside this block, in this thread, the plain operations serve: to compare, or where a kernel is suspected."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def compilers() -> list[list[str]]:
    """The C compilers at hand, in the order they are tried: $CC with its arguments, then gcc, clang and cc."""
    try:
        asked = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quotation without an end
        asked = []
    return [c for c in (asked, ["gcc"], ["clang"], ["cc"]) if c and shutil.which(c[0])]


def switched_on() -> bool:
    """Are kernels wanted here and now?"""
    return not _off.get()


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Do kernels serve this type here and now?"""
    return switched_on() and dtype in REAL and library(dtype) is not None


def usable(*tensors: Tensor, device: str = "cpu") -> bool:
    """May a kernel be given the addresses of these? Plain dense tensors of one type, nobody tracing or transforming."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    if forward_ad._current_level >= 0:
        return False
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == device
        and t.dtype == tensors[0].dtype
        and t.layout == torch.strided
        and not t.is_neg()
        and not batched(t)
        for t in tensors
    )


def batched(t: Tensor) -> bool:
    """Does the tensor stand for many, as functorch and `is_grads_batched` have it?"""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)


def overseen(*tensors: Tensor) -> bool:
    """Must plain operations run, since somebody traces, transforms or differentiates forwards?"""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._get_tracing_state() is not None
        or any(type(t) not in (Tensor, nn.Parameter) or batched(t) for t in tensors)
    )


def serve(*tensors: Tensor | None) -> bool:
    """Do the kernels serve these tensors, outside every transformation?"""
    if torch._C._are_functorch_transforms_active():
        return False
    there = [t for t in tensors if t is not None]
    return not torch.is_autocast_enabled("cpu") and usable(*there) and available(there[0].dtype)


def watched(*modules: nn.Module | None) -> bool:
    """Must one of these modules be called, since hooks wait for it or its `forward` was replaced?"""
    if nn.modules.module._has_any_global_hook():
        return True
    return any(
        m is not None
        and (
            m._forward_hooks
            or m._forward_pre_hooks
            or m._backward_hooks
            or m._backward_pre_hooks
            or "forward" in m.__dict__
        )
        for m in modules
    )


def differentiable(grad: Tensor) -> bool:
    """Must a backward be made of operations that can be differentiated, or mapped over many gradients, themselves?"""
    return torch.is_grad_enabled() or batched(grad) or forward_ad._current_level >= 0


class Shape(ctypes.Structure):
    """`shape` of kernels.c: frames and map of a convolution or pool, square kernel, and threads."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "frames", "height", "width", "channels", "kernel", "stride", "padding", "out_height", "out_width", "out",
            "threads", "some", "all",
        )
    ]  # fmt: skip


@functools.lru_cache(maxsize=1024)
def shape(
    frames: int, h: int, w: int, cin: int, cout: int, kernel: int, stride: int, padding: int, threads: int,
    among: tuple[int, int] = (1, 1),
):  # fmt: skip
    """A `Shape` by reference, ready to pass. The frames of a pool are so many images a step, among so many."""
    ho, wo = (h + 2 * padding - kernel) // stride + 1, (w + 2 * padding - kernel) // stride + 1
    return ctypes.byref(Shape(frames, h, w, cin, kernel, stride, padding, ho, wo, cout, threads, *among))


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
    "stem_input_grad": (_POINTER, _POINTER, _POINTER, _POINTER, _INT),
    "max_pool": (_POINTER,) * 4,
    "avg_pool": (_POINTER,) * 3,
    "pool_grad": (_POINTER,) * 4,
    "batch_stats": (_POINTER, _POINTER, _INT, _LONG, _INT, _POINTER, _POINTER, _INT),
    "norm_grad": (_POINTER, _POINTER, _POINTER, _INT, _LONG, _INT) + (_POINTER,) * 5 + (_DOUBLE, _INT),
}


def library(dtype: torch.dtype) -> Any:
    """The compiled `kernels.c` for float32 or float64, or None."""
    with _lock:
        return _library(dtype)


@functools.cache
def _library(dtype: torch.dtype) -> Any:
    found = _build(f"#define REAL {REAL[dtype]}\n" + SOURCE.read_text(), contract=True)
    return None if found is None else _typed(found, _SIGNATURES)


def _typed(found: ctypes.CDLL, signatures: dict[str, tuple]) -> ctypes.CDLL:
    for name, arguments in signatures.items():
        getattr(found, name).argtypes = arguments
        getattr(found, name).restype = _INT if name in ("lanes", "has_bf16") else None
    return found


def _build(source: str, *, contract: bool) -> ctypes.CDLL | None:
    """Compile C to a shared library in the cache and load it. `contract` allows fused multiply-adds."""
    flags = ["-O3", "-march=native", f"-ffp-contract={'fast' if contract else 'off'}", "-fPIC", "-std=gnu11", "-w"]
    errors = []
    for cc in compilers():
        try:
            key = hashlib.sha256("\n".join((source, *flags, _machine(tuple(cc)), torch.__version__)).encode())
            found = _kept(key.hexdigest()[:24], lambda cc=cc: _compile(cc, flags, source))
        except _CannotCompile as error:
            errors.append(f"{' '.join(cc)}: {error}")
            continue
        if found is not None:
            return found
        errors.append(f"{' '.join(cc)}: no folder for compiled kernels, or what it made is no library")
    why = "; ".join(errors) or "no C compiler found"
    say_once(f"{why}: the plain path serves, slower and the same")
    return None


def _kept(key: str, make: Callable[[], bytes]) -> ctypes.CDLL | None:
    """The library of a key from the first folder that can hold it; its bytes are told by its name: no damaged one."""
    for folder in folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
                continue  # somebody else's: what lies there must not be run
            there = [p for p in folder.glob(f"{key}-*.so") if p.name == _named(key, p.read_bytes())]
            if there:
                return ctypes.CDLL(str(there[0]))
            code = make()
            return ctypes.CDLL(str(write_atomic(folder / _named(key, code), code)))
        except OSError:
            continue  # not writable, or its files may not be run
    return None


def _named(key: str, code: bytes) -> str:
    return f"{key}-{hashlib.sha256(code).hexdigest()[:16]}.so"


class _CannotCompile(Exception):
    pass


def _compile(cc: list[str], flags: list[str], source: str) -> bytes:
    """The bytes of the shared library; with OpenMP where the compiler has it, its runtime left to PyTorch's own."""
    with tempfile.TemporaryDirectory() as tmp:
        code, out = Path(tmp) / "kernels.c", Path(tmp) / "kernels.so"
        code.write_text(source)
        error = ""
        for openmp in (["-fopenmp"], []):
            command = [*cc, *flags, *openmp, "-shared", "-o", str(out), "-x", "c", str(code), "-lm"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            except (OSError, subprocess.TimeoutExpired) as failure:
                raise _CannotCompile(str(failure)) from None
            if done.returncode == 0 and out.exists():
                return out.read_bytes()
            error = done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"exit code {done.returncode}"
        raise _CannotCompile(error)


@functools.cache
def _machine(cc: tuple[str, ...]) -> str:
    """What decides the generated code: compiler, its version, and the processor."""
    try:
        done = subprocess.run([*cc, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise _CannotCompile(str(failure)) from None
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return "\n".join((*cc, done.stdout.partition("\n")[0], platform.machine(), features))


def folders() -> list[Path]:
    """Where compiled kernels are kept: the first of these that can be written to."""
    own = f"sparsetrail-{os.getuid() if hasattr(os, 'getuid') else 'kernels'}"
    found = []
    with contextlib.suppress(OSError):  # none can be written to
        found.append(Path(tempfile.gettempdir()) / own)
    with contextlib.suppress(RuntimeError):  # no home
        found.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsetrail")
    return found


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
        if made is None or kwargs:
            raise TypeError(f"torch.{fn.__name__} has no C form here, or not with keywords; see kernels._FUNCTIONS")
        return Symbol(made.format(*(_code(a) for a in args)))

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("a step that decides by a value in Python has no C form; multiply by the comparison")

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
for _name, _sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("eq", "=="), ("ne", "!=")):
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

/* e^x: 2^k times a polynomial in the rest; within 2 units in the last place. Vectorised, unlike a library call. Zero,
   subnormal and infinite where e^x is in float: a surrogate's exact zeros are counted. */
static inline float exp_single(float given) {
    const float x = given > 89.0f ? 89.0f : given > -105.0f ? given : -105.0f; /* also takes NaN out of the way */
    const int n = (int)(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f));
    const float k = (float)n, r = fmaf(k, 2.12194440e-4f, fmaf(k, -0.693359375f, x));
    float p = fmaf(r, 1.9875691500e-4f, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f), p = fmaf(p, r, 4.1665795894e-2f), p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f), p = fmaf(p * r, r, r + 1.0f);
    union { int i; float f; } half = {(n / 2 + 127) << 23}, rest = {(n - n / 2 + 127) << 23}; /* 2^-151 is no float */
    const float y = p * half.f * rest.f;
    return given != given ? given : given > 88.7228f ? INFINITY : given < -103.972f ? 0 : y;
}
#define EXP(x) (sizeof(real) == 4 ? (real)exp_single((float)(x)) : (real)exp(x))

/* y [frames rows C] read at frame[t], scaled to a y + b per channel if a is given -> spikes s (plus `plus`) and
   charged potentials h [steps rows C]; h and plus may be NULL, h may lie over y if every step has its frame. rate: a
   learnt leak, or NULL. The rows are some of `whole` in y, plus and h, all of them in s. */
void fire(const real *y, const int *frame, const real *a, const real *b, const real *plus, const real *rate, real *s,
          real *h, int steps, long rows, long whole, int C, int threads) {
    const real leak = rate ? *rate : 0;
    const long size = whole * C, per = CHUNK / C > 0 ? CHUNK / C : 1;
    PARALLEL(threads)
    for (long first = 0; first < rows; first += per) {
        const long n = rows - first < per ? rows - first : per;
        real state[n * C], now[n * C];
        for (long i = 0; i < n * C; i++) state[i] = (real)REST;
        for (int t = 0; t < steps; t++) {
            const real *in = y + frame[t] * size + first * C;
            const long at = t * size + first * C;
            real *out = s + t * rows * C + first * C;
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

/* The potential that a charged one left behind. */
static inline real before(real h_) {
    const real s_ = SPIKE;
    return DISCHARGE;
}

/* Back through time: gradient of the spikes -> gradient of the input, per frame [frames rows C], times scale[c];
   `out` may lie over `grad` if every step has its frame. last[t] marks the last step that shows a frame. With `y`, sums
   [threads 2 C] take the sums over everything of g and of g (y - mean) inv, g before scale. rates [threads] take the
   gradient of a learnt leak *rate; x is the neuron's input then. `slopes` is ds/dh where SLOPE reads it there. */
void back(const real *grad, const real *h, const int *frame, const int *last, const real *scale, const real *y,
          const real *mean, const real *inv, const real *rate, const real *input, const real *slopes, real *out,
          double *sums, double *rates, int steps, long rows, int C, int threads) {
    const real leak = rate ? *rate : 0;
    (void)leak;
    const long size = rows * C, per = CHUNK / C > 0 ? CHUNK / C : 1, chunks = (rows + per - 1) / per;
    PARALLEL(threads)
    for (int k = 0; k < threads; k++) {
        double *total = sums ? sums + (long)k * 2 * C : NULL;
        real *near = malloc(sizeof(real) * 2 * (size_t)C);
        for (long chunk = chunks * k / threads; chunk < chunks * (k + 1) / threads; chunk++) {
            const long first = chunk * per, n = rows - first < per ? rows - first : per;
            real state[n * C], now[n * C];
            double of_rate = 0;
            for (long i = 0; i < n * C; i++) state[i] = 0;
            memset(near, 0, sizeof(real) * 2 * (size_t)C);
            for (int t = steps - 1; t >= 0; t--) {
                const long at = t * size + first * C, to = frame[t] * size + first * C;
                for (long i = 0; i < n * C; i++) {
                    const real h_ = h[at + i], slope = SLOPE;
                    const real g = grad[at + i] * slope + (t < steps - 1 ? state[i] * (KEPT) : 0);
                    state[i] = g * (KEEP);
                    now[i] = g * (GAIN);
                    if (LEARNT) {
                        const real v = t ? before(h[at - size + i]) : (real)REST, x = input ? input[at + i] : 0;
                        of_rate += (double)(g * (LEVER));
                    }
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
            if (rates) rates[k] += of_rate;
        }
        free(near);
    }
}
"""
_NEURON_SIGNATURES = {
    "fire": (_POINTER,) * 8 + (_INT, _LONG, _LONG, _INT, _INT),
    "back": (_POINTER,) * 14 + (_INT, _LONG, _INT, _INT),
}


def defined(parts: dict[str, Any]) -> str:
    """The steps of a neuron, `neuron.steps_in_c`, as C macros."""
    return "".join(f"#define {k} {_code(v)}\n" for k, v in parts.items())


def neuron(parts: dict[str, Any], dtype: torch.dtype) -> Any:
    """The kernels `fire` and `back` of a neuron given by its steps, `neuron.steps_in_c`; None without a compiler."""
    names = defined(parts)
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
