"""GPU kernels of neurons, from the same per-step functions as the CPU's, and of windows over maps: CUDA C, by NVRTC.

NVRTC comes with PyTorch's CUDA builds; a kind of neuron compiles in a fraction of a second. Where it is not found, the
plain path serves and one line says so.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sparsetrail.snn.kernels import REAL, defined, say_once

BLOCK, GRID = 128, 2048  # threads of a block, and blocks at most: a thread takes several neurons where there are more

PRELUDE = r"""
#define KERNEL extern "C" __global__
#define DEVICE __device__ inline
#define SHARED __shared__
#define SYNC __syncthreads()
#define THREAD threadIdx.x
#define THREADS blockDim.x
#define PLACE blockIdx.x
#define PLACES gridDim.x
#define ALIGN(n) __align__(n)
"""

EACH = r"""
typedef long long whole;
#define EACH(i) for (whole i = PLACE * (whole)THREADS + THREAD; i < size; i += PLACES * (whole)THREADS)
"""

SOURCE = r"""
typedef REAL real;
#define SQUARE(x) ((x) * (x))
#define ABS(x) ((x) < 0 ? -(x) : (x))
#define ATLEAST(x, low) ((x) > (low) ? (x) : (x) != (x) ? (x) : (low))
#define FLAG(c) ((c) ? (real)1 : (real)0)
#define SINGLE (sizeof(real) == 4)
#define EXP(x) (SINGLE ? (real)expf((float)(x)) : (real)exp((double)(x)))
#define MULADD(a, b, c) (SINGLE ? (real)fmaf((float)(a), (float)(b), (float)(c)) : (real)fma(a, b, c))

/* BatchNorm in eval mode as one factor and one summand a channel; a missing gamma is one, a missing beta zero. */
DEVICE real factor(const real *var, const real *gamma, double eps, int c) {
    const real inv = 1 / sqrt(var[c] + (real)eps);
    return gamma ? inv * gamma[c] : inv;
}
DEVICE real summand(const real *mean, const real *beta, real scale, int c) {
    return (real)((beta ? (double)beta[c] : 0) - (double)mean[c] * (double)scale);
}

/* in [STEPS size], through BatchNorm if var is given (channel i mod C) -> spikes s (plus `plus`) and, unless h is NULL,
   charged potentials h. rate: a learnt leak, or NULL. */
KERNEL void fire(const real *in, const real *mean, const real *var, const real *gamma, const real *beta, double eps,
                 const real *plus, const real *rate, real *s, real *h, whole size, int C) {
    const real leak = rate ? *rate : 0;
    (void)leak;
    EACH(i) {
        const int c = (int)(i % C);
        const real scale = var ? factor(var, gamma, eps, c) : 1, shift = var ? summand(mean, beta, scale, c) : 0;
        real v = (real)REST, given[STEPS];
        for (int t = 0; t < STEPS; t++) given[t] = in[t * size + i];
        for (int t = 0; t < STEPS; t++) {
            const whole at = t * size;
            const real x = var ? MULADD(given[t], scale, shift) : given[t];
            const real h_ = CHARGE;
            const real s_ = SPIKE;
            v = DISCHARGE;
            s[at + i] = plus ? s_ + plus[at + i] : s_;
            if (h) h[at + i] = h_;
        }
    }
}

DEVICE real before(real h_) {
    const real s_ = SPIKE;
    return DISCHARGE;
}

/* Back through time: gradient of the spikes -> gradient of the input, and through BatchNorm if var is given.
   rates [PLACES] takes the gradient of a learnt leak; `input` is the neuron's input then. `slopes` is ds/dh where SLOPE
   reads it. */
KERNEL void back(const real *grad, const real *h, const real *var, const real *gamma, double eps, const real *rate,
                 const real *input, const real *slopes, real *out, double *rates, whole size, int C) {
    const real leak = rate ? *rate : 0;
    (void)leak;
    double of_rate = 0;
    EACH(i) {
        const real scale = var ? factor(var, gamma, eps, (int)(i % C)) : 1;
        real state = 0, pushed[STEPS], charged[STEPS];
        for (int t = 0; t < STEPS; t++) pushed[t] = grad[t * size + i], charged[t] = h[t * size + i];
        for (int t = STEPS - 1; t >= 0; t--) {
            const whole at = t * size;
            const real h_ = charged[t], slope = SLOPE;
            const real g = pushed[t] * slope + (t < STEPS - 1 ? state * (KEPT) : 0);
            state = g * (KEEP);
            out[at + i] = var ? g * (GAIN) * scale : g * (GAIN);
            if (LEARNT && rates) {
                const real v = t ? before(charged[t ? t - 1 : 0]) : (real)REST, x = input ? input[at + i] : 0;
                of_rate += (double)(g * (LEVER));
            }
        }
    }
    if (LEARNT && rates) {
        SHARED double sums[BLOCK];
        sums[THREAD] = of_rate;
        SYNC;
        for (int n = BLOCK / 2; n; n /= 2) {
            if (THREAD < n) sums[THREAD] += sums[THREAD + n];
            SYNC;
        }
        if (!THREAD) rates[PLACE] = sums[0];
    }
}
"""

WINDOWS = r"""
typedef REAL real;
typedef unsigned char byte;
typedef struct ALIGN(LANES * sizeof(REAL)) { REAL v[LANES]; } unit;
typedef struct ALIGN(LANES) { byte v[LANES]; } bytes;
#define TAPS(a, b) for (int a = 0; a < K; a++) for (int b = 0; b < K; b++)
/* The place of output cell (p, q)'s tap (a, b) among the input's, and whether it is one. */
#define SEEN(p, q, a, b) const int h = (int)(p) * STRIDE - PADDING + (a), w = (int)(q) * STRIDE - PADDING + (b); \
    if (h >= 0 && h < H && w >= 0 && w < W)
/* The output cell (p, q) that sees input cell (h, w) by tap (a, b), if there is one. */
#define SEES(h, w, a, b) const int y = (int)(h) + PADDING - (a), x = (int)(w) + PADDING - (b), \
    p = y / STRIDE, q = x / STRIDE; if (y >= 0 && x >= 0 && y % STRIDE == 0 && x % STRIDE == 0 && p < P && q < Q)

/* Maps [n H W C] -> for each output cell what its taps see, [n P Q K K C], zero outside; size counts [n P Q C]. */
KERNEL void unfold(const unit *in, unit *out, whole size, int C, int H, int W, int P, int Q) {
    EACH(i) {
        const unsigned c = (unsigned)i % C, cell = (unsigned)i / C, q = cell % Q, p = cell / Q % P, n = cell / Q / P;
        unit *to = out + (whole)cell * (K * K * C) + c;
        TAPS(a, b) {
            unit x = {{0}};
            SEEN(p, q, a, b) x = in[(((whole)n * H + h) * W + w) * C + c];
            to[(a * K + b) * C] = x;
        }
    }
}

/* Back: each input cell's sum over the taps that see it; size counts [n H W C]. */
KERNEL void fold(const unit *in, unit *out, whole size, int C, int H, int W, int P, int Q) {
    EACH(i) {
        const unsigned c = (unsigned)i % C, cell = (unsigned)i / C, w = cell % W, h = cell / W % H, n = cell / W / H;
        unit sum = {{0}};
        TAPS(a, b) {
            SEES(h, w, a, b) {
                const unit g = in[((((whole)n * P + p) * Q + q) * (K * K) + a * K + b) * C + c];
                for (int l = 0; l < LANES; l++) sum.v[l] += g.v[l];
            }
        }
        out[i] = sum;
    }
}

/* The same for maps of few channels, [K K C n P Q], so that neighbours write next to each other; size [K n P Q]. */
KERNEL void unfold_few(const real *in, real *out, whole size, int C, int H, int W, int P, int Q) {
    EACH(i) {
        const unsigned cells = (unsigned)size / K, cell = (unsigned)i % cells, q = cell % Q, p = cell / Q % P;
        const unsigned n = cell / Q / P, a = (unsigned)i / cells;
        for (int b = 0; b < K; b++)
            for (int c = 0; c < C; c++) {
                real x = 0;
                SEEN(p, q, a, b) x = in[(((whole)n * H + h) * W + w) * C + c];
                out[((whole)(a * K + b) * C + c) * cells + cell] = x;
            }
    }
}

/* Pools of maps [n H W C]: the largest of a window and which tap it was, the first of several; or, without `taps`, the
   mean, padding included. Not-a-number is the largest. size counts [n P Q C]. */
KERNEL void pool(const unit *in, unit *out, bytes *taps, whole size, int C, int H, int W, int P, int Q) {
    EACH(i) {
        const unsigned c = (unsigned)i % C, cell = (unsigned)i / C, q = cell % Q, p = cell / Q % P, n = cell / Q / P;
        unit best = {{0}};
        bytes at = {{0}};
        int first = 1;
        TAPS(a, b) {
            SEEN(p, q, a, b) {
                const unit x = in[(((whole)n * H + h) * W + w) * C + c];
                for (int l = 0; l < LANES; l++) {
                    if (!taps) best.v[l] += x.v[l];
                    else if (first || x.v[l] > best.v[l] || x.v[l] != x.v[l]) best.v[l] = x.v[l], at.v[l] = a * K + b;
                }
                first = 0;
            }
        }
        for (int l = 0; l < LANES && !taps; l++) best.v[l] /= K * K;
        out[i] = best;
        if (taps) taps[i] = at;
    }
}

/* Back: each input cell's sum over the windows that took it; size counts [n H W C]. */
KERNEL void unpool(const unit *grad, unit *out, const bytes *taps, whole size, int C, int H, int W, int P, int Q) {
    EACH(i) {
        const unsigned c = (unsigned)i % C, cell = (unsigned)i / C, w = cell % W, h = cell / W % H, n = cell / W / H;
        unit sum = {{0}};
        TAPS(a, b) {
            SEES(h, w, a, b) {
                const whole from = (((whole)n * P + p) * Q + q) * C + c;
                const unit g = grad[from];
                for (int l = 0; l < LANES; l++) {
                    if (!taps) sum.v[l] += g.v[l] / (K * K);
                    else if (taps[from].v[l] == a * K + b) sum.v[l] += g.v[l];
                }
            }
        }
        out[i] = sum;
    }
}
"""


class CudaError(Exception):
    """NVRTC or the driver is not there, or refused."""


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "").partition(".")[0]
    own = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"  # knows where PyTorch's own NVRTC lies
    names = (
        [str(own), f"libnvrtc.so.{major}", "libnvrtc.so"] if sys.platform != "win32" else [f"nvrtc64_{major}0_0.dll"]
    )
    for name in names:
        try:
            found = ctypes.CDLL(name)
            _ = found.nvrtcCreateProgram
            return found
        except (OSError, AttributeError):
            continue
    raise CudaError("NVRTC was not found")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise CudaError("the CUDA driver was not found") from error


def compile_source(source: str, capability: str) -> bytes:
    """Machine code of CUDA C for a compute capability such as 90. CudaError with the compiler's first line."""
    lib, program = _nvrtc(), ctypes.c_void_p()
    options = [f"--gpu-architecture=sm_{capability}", "--std=c++17", "--fmad=false"]  # sums as the CPU's kernels round
    if lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"neuron.cu", 0, None, None):
        raise CudaError("NVRTC took no program")
    try:
        failed = lib.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        )
        size = ctypes.c_size_t()
        if failed:
            lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            lib.nvrtcGetProgramLog(program, log)
            raise CudaError((log.value.decode().splitlines() or [f"NVRTC error {failed}"])[0])
        lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


class Program:
    """Kernels on one device, launched on the current stream: addresses, a size, and further whole numbers."""

    names: tuple[bytes, ...]

    def __init__(self, code: bytes, device: int) -> None:
        self.device, self.code = device, code
        self.context, self.module, self.functions = ctypes.c_void_p(), ctypes.c_void_p(), {}
        place = ctypes.c_int()
        torch.cuda.init()
        _check(_driver().cuDeviceGet(ctypes.byref(place), device))
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(self.context), place))  # PyTorch's; never let go
        with self._current():
            _check(_driver().cuModuleLoadData(ctypes.byref(self.module), self.code))
            for name in self.names:
                found = ctypes.c_void_p()
                _check(_driver().cuModuleGetFunction(ctypes.byref(found), self.module, name))
                self.functions[name] = found

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Inside this block the device's context is the driver's: a thread may have that of another, or none yet."""
        _check(_driver().cuCtxPushCurrent_v2(self.context))
        try:
            yield
        finally:
            _driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _launch(self, name: bytes, given: tuple[int | float | None, ...], size: int, *counts: int) -> None:
        values = [ctypes.c_double(v) if isinstance(v, float) else ctypes.c_void_p(v) for v in given]
        values += [ctypes.c_longlong(size), *map(ctypes.c_int, counts)]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        grid = min(GRID, max(1, -(-size // BLOCK)))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        with self._current():
            _check(_driver().cuLaunchKernel(self.functions[name], grid, 1, 1, BLOCK, 1, 1, 0, stream, arguments, None))


class NeuronKernels(Program):
    """`fire` and `back` with the arguments of the CPU's kernels.

    Every step must have a frame of its own, `fire` takes all rows, and `rates` has room for GRID sums.
    """

    names = b"fire", b"back"

    def fire(self, y, _frame, _a, _b, plus, rate, s, h, _steps, rows, _whole, channels, _threads) -> None:
        self._launch(b"fire", (y, None, None, None, None, 0.0, plus, rate, s, h), rows * channels, channels)

    def back(
        self, grad, h, _frame, _last, _scale, _y, _mean, _inv, rate, x, slopes, out, _sums, rates, _steps, rows,
        channels, _threads,
    ) -> None:  # fmt: skip
        self._launch(b"back", (grad, h, None, None, 0.0, rate, x, slopes, out, rates), rows * channels, channels)

    def fire_normed(self, y, mean, var, gamma, beta, eps: float, plus, s, h, rows: int, channels: int) -> None:
        """`fire` on BatchNorm's output, in eval mode."""
        self._launch(b"fire", (y, mean, var, gamma, beta, eps, plus, None, s, h), rows * channels, channels)

    def back_normed(self, grad, h, var, gamma, eps: float, out, rows: int, channels: int) -> None:
        """`back`, through that BatchNorm too."""
        self._launch(b"back", (grad, h, var, gamma, eps, None, None, None, out, None), rows * channels, channels)


class Windows(Program):
    """Square windows over channels-last maps [n h w c], with p times q places: convolutions unfolded, and pools."""

    names = b"unfold", b"fold", b"unfold_few", b"pool", b"unpool"

    def __init__(self, code: bytes, device: int, lanes: int) -> None:
        super().__init__(code, device)
        self.lanes = lanes

    def unfold(self, x: int, out: int, size: tuple[int, int, int, int, int, int]) -> None:
        """What every place sees [n p q k k c]; size n, c, h, w, p, q."""
        self._over(b"unfold", (x, out), size, places=True)

    def fold(self, columns: int, out: int, size: tuple[int, int, int, int, int, int]) -> None:
        """The sums of that in the cells it came from."""
        self._over(b"fold", (columns, out), size, places=False)

    def unfold_few(self, x: int, out: int, size: tuple[int, int, int, int, int, int], kernel: int) -> None:
        """What every place sees, as [k k c n p q]."""
        n, c, h, w, p, q = size
        self._launch(b"unfold_few", (x, out), kernel * n * p * q, c, h, w, p, q)

    def pool(self, x: int, out: int, taps: int | None, size: tuple[int, int, int, int, int, int]) -> None:
        """The largest and, in bytes, which it was; the mean without `taps`."""
        self._over(b"pool", (x, out, taps), size, places=True)

    def unpool(self, grad: int, out: int, taps: int | None, size: tuple[int, int, int, int, int, int]) -> None:
        """The gradient of the map from that of its pool."""
        self._over(b"unpool", (grad, out, taps), size, places=False)

    def _over(self, name: bytes, given: tuple[int | None, ...], size: tuple[int, ...], *, places: bool) -> None:
        n, c, h, w, p, q = size
        c //= self.lanes
        self._launch(name, given, n * c * (p * q if places else h * w), c, h, w, p, q)


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"CUDA driver error {result}")


@functools.cache
def usable() -> bool:
    """Are NVRTC and the driver there? Says so once where not."""
    try:
        _nvrtc(), _driver()
    except CudaError as error:
        say_once(f"{error}: neurons on a GPU take the plain path, slower and the same")
        return False
    return torch.version.hip is None


def source(parts: dict[str, Any], dtype: torch.dtype, steps: int) -> str:
    """CUDA C of a neuron given by its steps, `neuron.steps_in_c`, for sequences of one length."""
    return f"#define REAL {REAL[dtype]}\n#define STEPS {steps}\n#define BLOCK {BLOCK}\n{defined(parts)}{EACH}{SOURCE}"


def neuron(parts: dict[str, Any], dtype: torch.dtype, steps: int, device: int) -> NeuronKernels | None:
    """The kernels of a neuron for sequences of one length on one device; None, and one line, where it cannot be."""
    otherwise = "neurons on a GPU take the plain path, slower and the same"
    return _made(lambda code: NeuronKernels(code, device), source(parts, dtype, steps), device, otherwise)


def windows_source(dtype: torch.dtype, kernel: int, stride: int, padding: int, lanes: int) -> str:
    """CUDA C of the kernels for one kind of window; `lanes` channels are moved at once."""
    named = {"REAL": REAL[dtype], "K": kernel, "STRIDE": stride, "PADDING": padding, "LANES": lanes}
    return "".join(f"#define {name} {value}\n" for name, value in named.items()) + EACH + WINDOWS


def windows(
    dtype: torch.dtype, channels: int, kernel: int, stride: int, padding: int, device: torch.device
) -> Windows | None:
    """Those kernels for so many channels on one device; None, and one line, where they cannot be."""
    lanes = 16 // dtype.itemsize
    return _windows(dtype, kernel, stride, padding, lanes if channels % lanes == 0 else 1, device.index)


def aligned(t: torch.Tensor) -> torch.Tensor:
    """The tensor where several channels can be moved at once: a view may begin anywhere."""
    return t.clone() if t.data_ptr() % 16 else t


@functools.cache
def _windows(dtype: torch.dtype, kernel: int, stride: int, padding: int, lanes: int, device: int) -> Windows | None:
    text = windows_source(dtype, kernel, stride, padding, lanes)
    otherwise = "convolutions and pools on a GPU are PyTorch's, slower and the same"
    return _made(lambda code: Windows(code, device, lanes), text, device, otherwise)


def _made(load: Callable[[bytes], Any], text: str, device: int, otherwise: str) -> Any:
    if not usable():
        return None
    try:
        major, minor = torch.cuda.get_device_capability(device)
        return load(compile_source(PRELUDE + text, f"{major}{minor}"))
    except (CudaError, RuntimeError) as error:
        say_once(f"{error}: {otherwise}")
        return None
