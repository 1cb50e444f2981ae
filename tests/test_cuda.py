"""The GPU's neuron kernels: their source run by a C compiler as one thread, against the plain steps; NVRTC on a GPU."""

import contextlib
import copy
import ctypes
import functools
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lively import lively
from torch import nn
from torch.nn import functional as F

from sparsetrail.core import Memory
from sparsetrail.core.precision import exact, products
from sparsetrail.snn import cuda, dense, firing, kernels, unfold
from sparsetrail.snn.convolution import Conv2d
from sparsetrail.snn.encode import direct, phase
from sparsetrail.snn.engine import freeze
from sparsetrail.snn.firing import _FireNormed, _FireNormedByRule
from sparsetrail.snn.kernels import pointer
from sparsetrail.snn.net import NetSpec
from sparsetrail.snn.neuron import Neuron, NeuronSpec, fused, ruled, steps_in_c, through_time
from sparsetrail.snn.pooling import AvgPool2d, pooled
from sparsetrail.snn.routes import neuron_route
from sparsetrail.snn.surrogate import SURROGATES, Surrogate

STAND_IN = """
#include <math.h>
#define ALIGN(n)
#define KERNEL
#define DEVICE static inline
#define SHARED static
#define SYNC (void)0
#define THREAD 0
#define THREADS 1
#define PLACE 0
#define PLACES 1
"""
SPECS = [
    NeuronSpec(),
    NeuronSpec(detach_reset=False),
    NeuronSpec(reset=None, threshold=0.7),
    NeuronSpec(reset=-0.3, detach_reset=False),
    NeuronSpec(kind="lif", tau=2.5),
    NeuronSpec(kind="lif", tau=1.7, decay_input=False, reset=None, detach_reset=False),
    NeuronSpec(kind="plif", tau=2.0),
    NeuronSpec(kind="plif", tau=1.5, decay_input=False, detach_reset=False),
] + [NeuronSpec(surrogate=Surrogate(name, 1.3)) for name in SURROGATES]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    gcc = shutil.which("gcc") or shutil.which("cc")
    if gcc is None:
        pytest.skip("no C compiler on this machine to run the kernels' source")
    folder = tmp_path_factory.mktemp("cuda")

    def make(text: str) -> ctypes.CDLL:
        name = f"k{len(list(folder.glob('*.c')))}"
        (folder / f"{name}.c").write_text(STAND_IN + text.replace("#define BLOCK 128", "#define BLOCK 1"))
        command = [gcc, "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-o", str(folder / f"{name}.so")]
        subprocess.run([*command, str(folder / f"{name}.c"), "-lm"], check=True)
        return ctypes.CDLL(str(folder / f"{name}.so"))

    return make


def neuron_source(spec, steps, *, given=False):
    return cuda.source(steps_in_c(spec, given=given), torch.float64, steps)


def call(lib, name, given, size, *counts):
    values = [ctypes.c_double(v) if isinstance(v, float) else ctypes.c_void_p(v) for v in given]
    getattr(lib, name)(*values, ctypes.c_longlong(size), *map(ctypes.c_int, counts))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.surrogate.name}-{s.reset}-{s.detach_reset}")
def test_source_equals_the_plain_steps(built, spec):
    g, steps, size = torch.Generator().manual_seed(0), 5, 60
    x = torch.randn(steps, size, generator=g, dtype=torch.float64)
    push = torch.randn(steps, size, generator=g, dtype=torch.float64)
    leak = torch.tensor(0.4, dtype=torch.float64, requires_grad=True) if spec.kind == "plif" else None
    with kernels.plain():
        leaf = x.clone().requires_grad_()
        want = fused(leaf, spec, leak)
        grads = torch.autograd.grad(want, [leaf] if leak is None else [leaf, leak], push)
    lib = built(neuron_source(spec, steps))
    s, h, out = torch.full_like(x, 7), torch.full_like(x, 7), torch.full_like(x, 7)
    rates = torch.zeros(1, dtype=torch.float64)
    at = [pointer(t) for t in (x, None, None, None, None)]
    call(lib, "fire", (*at, 0.0, None, pointer(leak), pointer(s), pointer(h)), size, 1)
    assert torch.equal(s, want.detach()) and 0 < s.mean() < 1
    at = pointer(push), pointer(h), None, None, 0.0, pointer(leak), pointer(x) if spec.decay_input else None, None
    call(lib, "back", (*at, pointer(out), None if leak is None else pointer(rates)), size, 1)
    assert torch.allclose(out, grads[0], rtol=1e-13, atol=1e-15)
    if leak is not None:
        assert torch.allclose(rates[0], grads[1], rtol=1e-12)


def test_given_slopes(built):
    g, spec = torch.Generator().manual_seed(0), NeuronSpec(detach_reset=False)
    h, push, slopes = (torch.randn(4, 30, generator=g, dtype=torch.float64) for _ in range(3))
    want, _ = through_time(push, None, h, None, None, spec, slopes)
    out = torch.empty_like(h)
    at = pointer(push), pointer(h), None, None, 0.0, None, None, pointer(slopes)
    call(built(neuron_source(spec, 4, given=True)), "back", (*at, pointer(out), None), 30, 1)
    assert torch.allclose(out, want, rtol=1e-13, atol=1e-15)


def test_source_with_batch_norm_and_another_map(built):
    g, spec, steps, rows, c = torch.Generator().manual_seed(0), NeuronSpec(), 4, 6, 5
    x, plus, push = (torch.randn(steps, rows, c, generator=g, dtype=torch.float64) for _ in range(3))
    norm = nn.BatchNorm1d(c).double().eval()
    for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        t.data = torch.rand(c, generator=g, dtype=torch.float64) + 0.3
    leaf = x.clone().requires_grad_()
    with kernels.plain():
        want = fused(norm(leaf.flatten(0, 1)).view_as(x), spec) + plus
        (grad,) = torch.autograd.grad(want, leaf, push)
    lib, s, h, out = built(neuron_source(spec, steps)), *(torch.empty_like(x) for _ in range(3))
    at = [pointer(t) for t in (x, norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    call(lib, "fire", (*at, norm.eps, pointer(plus), None, pointer(s), pointer(h)), rows * c, c)
    assert torch.allclose(s, want.detach(), rtol=0, atol=1e-12)
    at = [pointer(t) for t in (push, h, norm.running_var, norm.weight)]
    call(lib, "back", (*at, norm.eps, None, None, None, pointer(out), None), rows * c, c)
    assert torch.allclose(out, grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("plus", [True, False])
def test_gradients_of_gradients_through_the_pass_with_batch_norm(built, affine, plus):
    """The autograd around the kernels, which a C compiler's stand in for: first derivatives by them, others around."""
    g, spec, steps, c = torch.Generator().manual_seed(0), NeuronSpec(detach_reset=False), 3, 4
    norm = nn.BatchNorm2d(c, affine=affine).double().eval().requires_grad_(False)
    for t in (norm.running_mean, norm.running_var, *([norm.weight, norm.bias] if affine else [])):
        t.data = torch.rand(c, generator=g, dtype=torch.float64) + 0.3
    lib, calls = built(neuron_source(spec, steps)), []

    class Run:
        def fire_normed(self, y, mean, var, gamma, beta, eps, plus, s, h, rows, channels):
            call(lib, "fire", (y, mean, var, gamma, beta, eps, plus, None, s, h), rows * channels, channels)

        def back_normed(self, grad, h, var, gamma, eps, out, rows, channels):
            calls.append("back")
            call(lib, "back", (grad, h, var, gamma, eps, None, None, None, out, None), rows * channels, channels)

    y, more = (torch.randn(steps * 2, c, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    y, more = (t.to(memory_format=torch.channels_last).requires_grad_() for t in (y, more))
    leaves = [y, more] if plus else [y]

    def ours():
        return _FireNormed.apply(y, more if plus else None, norm, spec, steps, Run())[0]

    def reference():
        with kernels.plain():
            s = fused(norm(y).unflatten(0, (steps, -1)), spec).flatten(0, 1)
        return s + more if plus else s

    found = []
    for f in (ours, reference):
        out = f()
        first = torch.autograd.grad(out.pow(3).sum(), leaves, retain_graph=True)
        linear = torch.autograd.grad(out.sum(), y, create_graph=True)[0]
        again = torch.autograd.grad(linear.pow(2).sum(), y)[0]
        pushes = torch.stack([torch.ones_like(out), out.detach().square()])
        many = torch.autograd.grad(f(), y, pushes, is_grads_batched=True)[0]
        found.append((out.detach(), *first, linear.detach(), again, many))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*found, strict=True))
    assert found[1][-2].abs().max() > 1e-3 and calls == ["back"]


@pytest.mark.parametrize("text", ["rga", "bptr", "hart", "pdsg", "assg"])
def test_a_rule_behind_the_pass_with_batch_norm_has_its_forward_to_the_bit(built, text):
    """On a GPU routes take the victim's own pass; here a C compiler stands in for its kernels."""
    g, spec, steps, c = torch.Generator().manual_seed(0), NeuronSpec(), 3, 4
    norm = nn.BatchNorm2d(c).double().eval().requires_grad_(False)
    for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        t.data = torch.rand(c, generator=g, dtype=torch.float64) + 0.3
    lib = built(neuron_source(spec, steps))

    class Run:
        def fire_normed(self, y, mean, var, gamma, beta, eps, plus, s, h, rows, channels):
            call(lib, "fire", (y, mean, var, gamma, beta, eps, plus, None, s, h), rows * channels, channels)

    y, more, push = (torch.randn(steps * 2, c, 3, 2, generator=g, dtype=torch.float64) for _ in range(3))
    y, more = (t.to(memory_format=torch.channels_last).requires_grad_() for t in (y, more))
    own = _FireNormed.apply(y, more, norm, spec, steps, Run())[0]
    route = neuron_route(text)

    def rule():
        memory = Memory() if route.remembers else None
        if memory is not None:
            memory.begin(2)
        return route.rule(memory)

    with kernels.plain(), ruled(rule()):
        s = Neuron(spec)(norm(y).unflatten(0, (steps, -1))).flatten(0, 1) + more
        want = torch.autograd.grad(s, [y, more], push)
    by = rule()
    out = _FireNormedByRule.apply(y, more, norm, by.respec(spec), steps, Run(), by, by.number())[0]
    found = torch.autograd.grad(out, [y, more], push)
    assert torch.equal(out, own) and want[0].abs().max() > 1e-3
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(found, want, strict=True))
    (alone,) = torch.autograd.grad(
        _FireNormedByRule.apply(y.detach(), more, norm, spec, steps, Run(), by, 0)[0], more, push
    )
    assert torch.equal(alone, push)


WINDOWS = [(3, 1, 1), (3, 2, 1), (1, 2, 0), (7, 2, 3), (2, 3, 0), (5, 3, 2)]


def by_pytorch(kernel, stride, padding):
    """Stand-ins of `unfolded` and `folded`: channels last in a row, as the kernels have them."""

    def unfolded(x, weight, window):
        found = F.unfold(x.detach(), kernel, padding=padding, stride=stride).transpose(1, 2)  # [n, cells, c k k]
        return found.reshape(-1, x.shape[1], kernel**2).transpose(1, 2).flatten(1)

    def folded(columns, size, weight, window):
        n, c, h, w = size
        turned = columns.reshape(-1, kernel**2, c).transpose(1, 2).reshape(n, -1, c * kernel**2).transpose(1, 2)
        return F.fold(turned, (h, w), kernel, padding=padding, stride=stride)

    return unfolded, folded


@pytest.mark.parametrize("kernel, stride, padding", WINDOWS)
@pytest.mark.parametrize("channels, lanes", [(3, 1), (4, 2)])
def test_source_of_unfolded_maps(built, kernel, stride, padding, channels, lanes):
    lib = built(cuda.windows_source(torch.float64, kernel, stride, padding, lanes))
    x = torch.randn(2, channels, 8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unfolded, folded = by_pytorch(kernel, stride, padding)
    want = unfolded(x, None, None)
    p, q = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:])
    sizes = (channels // lanes, *x.shape[2:], p, q)
    last, found = x.permute(0, 2, 3, 1).contiguous(), torch.full_like(want, 7)
    call(lib, "unfold", (pointer(last), pointer(found)), 2 * p * q * sizes[0], *sizes)
    assert torch.equal(found, want) and want.shape == (2 * p * q, kernel**2 * channels)
    out = torch.full_like(last, 7)
    call(lib, "fold", (pointer(want), pointer(out)), 2 * 8 * 9 * sizes[0], *sizes)
    assert torch.allclose(out.permute(0, 3, 1, 2), folded(want, x.shape, None, None), rtol=1e-13)
    if lanes == 1:
        turned, found = want.T.contiguous(), torch.full_like(want.T, 7).contiguous()
        call(lib, "unfold_few", (pointer(last), pointer(found)), kernel * 2 * p * q, *sizes)
        assert torch.equal(found, turned)


@pytest.mark.parametrize("most", [True, False], ids=["max", "average"])
@pytest.mark.parametrize("kernel, stride, padding", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)])
@pytest.mark.parametrize("channels, lanes", [(3, 1), (4, 2)])
def test_source_of_pools(built, most, kernel, stride, padding, channels, lanes):
    lib = built(cuda.windows_source(torch.float64, kernel, stride, padding, lanes))
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, channels, 8, 9, generator=g, dtype=torch.float64)
    for x in ((noise > 0.5).double(), noise, noise.masked_fill(noise > 1.5, torch.nan)):  # ties, none, not a number
        leaf = x.clone().requires_grad_()
        pool = F.max_pool2d if most else F.avg_pool2d
        want = pool(leaf, kernel, stride, padding)
        push = torch.randn(want.shape, generator=g, dtype=torch.float64)
        (grad,) = torch.autograd.grad(want, leaf, push)
        sizes = (channels // lanes, 8, 9, *want.shape[2:])
        last, out, back = (t.permute(0, 2, 3, 1).contiguous() for t in (x, torch.empty_like(push), torch.empty_like(x)))
        taps = torch.full(out.shape, 99, dtype=torch.uint8) if most else None
        call(lib, "pool", (pointer(last), pointer(out), pointer(taps)), out.numel() // lanes, *sizes)
        assert torch.allclose(out.permute(0, 3, 1, 2), want, rtol=1e-13, equal_nan=True)
        last = push.permute(0, 2, 3, 1).contiguous()
        call(lib, "unpool", (pointer(last), pointer(back), pointer(taps)), back.numel() // lanes, *sizes)
        assert torch.allclose(back.permute(0, 3, 1, 2), grad, rtol=1e-13, atol=1e-15)


@pytest.fixture
def windows(built, monkeypatch):
    """`cuda.windows` whose kernels a C compiler made; which were asked for."""
    asked = []

    def launch(self, name, given, size, *counts):
        asked.append(name.decode())
        call(self.lib, name.decode(), given, size, *counts)

    def make(dtype, kernel, stride, padding, lanes, device):
        made = object.__new__(cuda.Windows)
        made.lanes, made.lib = lanes, built(cuda.windows_source(dtype, kernel, stride, padding, lanes))
        return made

    monkeypatch.setattr(cuda.Windows, "_launch", launch)
    monkeypatch.setattr(cuda, "_windows", functools.cache(make))
    return asked


@pytest.mark.parametrize("kernel, stride, padding", WINDOWS)
@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize("channels", [3, 5, 8])
def test_convolutions_by_unfolded_maps(windows, kernel, stride, padding, rough, room, channels):
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(channels, 6, kernel, stride, padding, bias=False).double()
    x = torch.randn(2, channels, 8, 9, generator=g, dtype=torch.float64).requires_grad_()
    push = torch.randn(conv(x).shape, generator=g, dtype=torch.float64)

    def ours(half=False):
        return unfold._Unfolded.apply(x, conv.weight, unfold._How(stride, padding, rough, half, room))

    found = []
    for f in (ours, lambda: conv(x)):
        leaves, y = [x, conv.weight], f()
        first = torch.autograd.grad(y, leaves, push, retain_graph=True)
        (again,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append((y.detach(), *first, *torch.autograd.grad(again.pow(2).sum(), leaves)))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*found, strict=True))
    many = channels > unfold.FEW
    one, skips = "unfold" if many else "unfold_few", stride > 1
    dx, dw = skips or not rough, rough or (skips and many)
    want = {one} if not rough or dw else set()
    assert set(windows) == ((want | ({"fold"} if dx else set())) if room else set())
    (_, dx, *_), z = found[1], ours(half=True)
    near, same = torch.autograd.grad(z, [x, conv.weight], push)
    assert torch.equal(z, found[0][0]) and torch.equal(same, found[0][2])
    assert 1e-4 < (near - dx).norm() / dx.norm() < 1e-2  # eight bits
    z = ours()
    with torch.autocast("cpu", torch.bfloat16):  # of a forward without
        assert torch.equal(torch.autograd.grad(z, x, push)[0], found[0][1])
    with torch.no_grad():
        z = ours()
    z += 1  # no view
    assert not unfold.suits(x, conv, conv.weight)  # on a CPU the engine has other kernels


@pytest.mark.parametrize("most", [True, False], ids=["max", "average"])
@pytest.mark.parametrize("channels", [3, 8])
def test_pools_by_windows(windows, monkeypatch, most, channels):
    """The engine's pools of a GPU, on a CPU that says it is one."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    pool = (nn.MaxPool2d if most else nn.AvgPool2d)(3, 2, 1)
    x = (torch.rand(4, channels, 9, 6, generator=torch.Generator().manual_seed(0)) > 0.5).double().requires_grad_()
    found = []
    for f in (lambda v: pooled(v, pool), pool):
        y = f(x)
        (plain,) = torch.autograd.grad(y.pow(3).sum(), x, retain_graph=True)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        found.append([t.detach() for t in (y, plain, first, second)])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*found, strict=True))
    assert windows == ["pool", "unpool", "unpool"]


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_a_network_by_the_convolutions_and_pools_of_a_gpu(windows, monkeypatch, pool):
    """On a CPU that says it is a GPU: which layers take which way, and that all of them are right together."""
    u = phase(steps=3)(torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255)
    net = lively(NetSpec(width=0.125, steps=3, pool=pool), u).double()
    y, leaf = torch.arange(4), u.double().requires_grad_()

    def found(net, leaves):
        z = net(leaf)
        return [z.detach(), *torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), leaves)]

    want = [found(net, [leaf, *net.parameters()]), found(freeze(net), [leaf])]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(Conv2d, "served", lambda self, x, weight: False)
    for name in ("_can_fire", "_fire_normed"):
        monkeypatch.setattr(firing, name, lambda *_: None)  # neurons by themselves; their kernels are above
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ours = [found(net, [leaf, *net.parameters()]), found(freeze(net), [leaf])]
    assert set(windows) == {"unfold", "unfold_few", "fold", "pool", "unpool"}
    for a, b in zip([*ours[0], *ours[1]], [*want[0], *want[1]], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9 * float(b.abs().max()))
    z, near = found(freeze(net, half=True), [leaf])
    assert torch.equal(z, ours[1][0]) and not torch.equal(near, ours[1][1])
    assert F.cosine_similarity(near.flatten(), ours[1][1].flatten(), 0) > 0.99


@pytest.mark.parametrize("rough", [False, True])
def test_gradients_are_in_float32_where_their_forward_was(windows, monkeypatch, rough):
    """Whatever somebody sets in between; on a CPU that says it is a GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(Conv2d, "served", lambda self, x, weight: False)
    seen = []
    for room, name in ((unfold, "unfolded"), (dense, "_seen")):
        f = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *a, f=f: seen.append(exact()) or f(*a))
    for side, conv in ((9, Conv2d(8, 8, 3, 2, 1, bias=False)), (2, Conv2d(8, 8, 3, 1, 1, bias=False))):
        x = torch.rand(2, 8, side, side).requires_grad_()
        with products(rough):
            y = conv(x)
        seen.clear()
        with products(True):
            torch.autograd.grad(y.sum(), [x, conv.weight])
            assert seen == [not rough] and not exact()


def test_per_sample_gradients_through_the_average_pool_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x, found = torch.randn(3, 4, 9, 9, dtype=torch.float64), []
    for pool in (AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)):
        each = torch.func.grad(lambda v, pool=pool: pool(v[None]).pow(3).sum())
        found.append(torch.func.vmap(each)(x))
    assert torch.allclose(*found)


@pytest.mark.parametrize(
    "code", [direct(steps=4), phase(steps=5, bits=2), phase(steps=5, bits=3)], ids=lambda c: c.name
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frames_shown_again_go_through_the_first_layer_once_on_a_gpu_too(windows, monkeypatch, code, mode):
    """On a CPU that says it is a GPU; where less than half are shown again they all go through."""
    x = (torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255).double()
    net = lively(NetSpec(width=0.125, steps=code.steps), code(x.float())).double().train(mode == "train")
    y, leaf, seen = torch.arange(3), x.requires_grad_(), []

    def found(scores):
        own = copy.deepcopy(net)
        z = scores(own)
        grads = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), [leaf, *own.parameters()])
        return [z.detach(), *grads, *(b.double() for b in own.buffers())]

    with kernels.plain():
        want = found(lambda own: own(code(leaf)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(Conv2d, "served", lambda self, x, weight: False)
    for name in ("_can_fire", "_fire_normed"):
        monkeypatch.setattr(firing, name, lambda *_: None)
    convolve = unfold.convolve
    monkeypatch.setattr(unfold, "convolve", lambda x, *a, **k: seen.append(tuple(x.shape[:2])) or convolve(x, *a, **k))
    ours = found(lambda own: own.scores(leaf, code))
    distinct = len(set(code.frames))
    assert seen[0] == (3 * (distinct if 2 * distinct <= code.steps else code.steps), 3)
    for a, b in zip(ours, want, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9 * float(b.abs().max()))


class Driver:
    """What is asked of CUDA's driver; a launch fails on demand."""

    def __init__(self):
        self.asked, self.launch = [], 0

    def __getattr__(self, name):
        def call(*_):
            self.asked.append(name)
            return self.launch if name == "cuLaunchKernel" else 0

        return call


def test_a_launch_has_its_devices_context_and_gives_the_callers_back(monkeypatch):
    """A thread of autograd may have none yet, another device's is current where the tensor lies elsewhere."""
    driver, asked = Driver(), []
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: (asked.append(d), SimpleNamespace(cuda_stream=7))[1])
    made = cuda.NeuronKernels(b"", 1)
    assert driver.asked[:3] == ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2"]
    assert driver.asked[-1] == "cuCtxPopCurrent_v2"
    whole = ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    for driver.launch in (0, 201):
        driver.asked.clear()
        with contextlib.nullcontext() if not driver.launch else pytest.raises(RuntimeError, match="driver error 201"):
            made.fire_normed(*[None] * 5, 1e-5, None, None, None, 3, 2)
        assert driver.asked == whole and asked[-1] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_backward_in_a_fresh_thread():
    script = (
        "import torch; from sparsetrail.snn.neuron import NeuronSpec, fused; "
        "x = torch.ones(4, 30, device='cuda', requires_grad=True); s = fused(x, NeuronSpec()); "
        "print(float(torch.autograd.grad(s, x, torch.ones_like(s))[0].sum()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("spec", SPECS[:9], ids=lambda s: f"{s.kind}-{s.surrogate.name}-{s.reset}-{s.detach_reset}")
def test_on_a_gpu(spec, dtype):
    g = torch.Generator().manual_seed(0)
    x, push = (torch.randn(6, 300, 7, generator=g, dtype=torch.float64).to("cuda", dtype) for _ in range(2))
    results = []
    for plainly in (True, False):
        leak = torch.tensor(0.4, dtype=dtype, device="cuda", requires_grad=True) if spec.kind == "plif" else None
        leaf = x.clone().requires_grad_()
        with kernels.plain() if plainly else torch.enable_grad():
            s = fused(leaf, spec, leak)
            results.append([s, *torch.autograd.grad(s, [leaf] if leak is None else [leaf, leak], push)])
    close = 1e-12 if dtype == torch.float64 else 1e-5
    assert cuda.usable() and torch.equal(results[0][0], results[1][0])
    for a, b in zip(*(r[1:] for r in results), strict=True):
        assert (a - b).abs().max() <= close * a.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_frozen_network_on_a_gpu():
    u = phase(steps=4)(torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255)
    net = lively(NetSpec(width=0.25, steps=4), u).double().cuda()
    leaf, other = (u.double().cuda().requires_grad_() for _ in range(2))
    z, want = freeze(net)(leaf), net(other)
    assert torch.allclose(z, want, atol=1e-9)
    (a,), (b,) = torch.autograd.grad(z.sum(), leaf), torch.autograd.grad(want.sum(), other)
    assert torch.allclose(a, b, atol=1e-9 * b.abs().max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("kernel, stride, padding", WINDOWS)
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_unfolded_maps_on_a_gpu(kernel, stride, padding, channels, tf32, dtype):
    g = torch.Generator().manual_seed(0)
    conv = Conv2d(channels, 24, kernel, stride, padding).double()
    x = torch.randn(3, channels, 10, 9, generator=g, dtype=torch.float64)
    push = torch.randn(conv(x).shape, generator=g, dtype=torch.float64)
    found = []
    for where, kind in (("cpu", torch.float64), ("cuda", dtype)):
        there, leaf = copy.deepcopy(conv).to(where, kind), x.to(where, kind).requires_grad_()
        with products(tf32):
            assert unfold.suits(leaf, there, there.weight) == (where == "cuda")
            y = there(leaf)
            grads = torch.autograd.grad(y, [leaf, there.weight, there.bias], push.to(where, kind))
        found.append([t.detach().cpu().double() for t in (y, *grads)])
    close = 1e-12 if dtype == torch.float64 else 2e-3 if tf32 else 2e-6
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= close * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("most", [True, False], ids=["max", "average"])
@pytest.mark.parametrize("channels", [3, 16])
def test_pools_on_a_gpu(most, channels):
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(6, channels, 9, 12, generator=g) > 0.5).double()
    pool = (nn.MaxPool2d if most else AvgPool2d)(3, 2, 1)
    found = []
    for where in ("cpu", "cuda"):
        leaf = x.to(where).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = pooled(leaf, pool) if where == "cuda" else pool(leaf)
        assert where == "cpu" or type(y.grad_fn).__name__ == "_PooledBackward"
        (plain,) = torch.autograd.grad(y.pow(3).sum(), leaf, retain_graph=True)
        (first,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        found.append([t.detach().cpu() for t in (y, first, second, plain)])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*found, strict=True))
