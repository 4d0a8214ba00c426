"""What the tests share: devices, random operands, the float64 reference."""

import pytest
import stand_in
import torch
import torch.nn.functional as F

from swiglu import _steps

# Relative error against float64, as `DType::tolerance` has it.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 3e-4, torch.bfloat16: 2e-3}

torch.set_num_threads(1)  # the operands are small, and other programs may want the cores

HAS_GPU = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def fresh_start():
    torch.manual_seed(0)
    torch.compiler.reset()  # one test's graphs do not count towards another's limit


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory):
    """Neither this machine's tuning nor its cache decides what is tested."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("swiglu")
    patch.setenv("SWIGLU_DB", str(folder / "db"))
    patch.setenv("SWIGLU_CUBIN_CACHE", str(folder / "cubin"))
    yield
    patch.undo()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def launched(monkeypatch, device):
    """The names of the steps that were launched: on a GPU the real ones, on the CPU the stand-in."""
    names = []
    native = _steps._native.step if device == "cuda" else stand_in.step
    monkeypatch.setattr(_steps._native, "step", lambda *given: names.append(given[4]) or native(*given))
    if device == "cpu":
        monkeypatch.setattr(_steps, "run_on", lambda device: True)
    return names


def operands(m, n, k, dtype=torch.float32, device="cpu", bias=False):
    """x of the shape `m` (a number or leading dimensions), gate, up and, if asked for, both biases."""
    leading = m if isinstance(m, tuple) else (m,)
    x = torch.randn(*leading, k, device=device).to(dtype)
    gate, up = (torch.randn(n, k, device=device).div(max(k, 1) ** 0.5).to(dtype) for _ in range(2))
    biases = [torch.randn(n, device=device).to(dtype) for _ in range(2)] if bias else [None, None]
    return [x, gate, up, *biases]


def reference(x, gate, up, gate_bias=None, up_bias=None):
    wide = [None if t is None else t.detach().double() for t in (x, gate, up, gate_bias, up_bias)]
    x, gate, up, gate_bias, up_bias = wide
    return F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)


def relative_error(got, expected):
    return ((got.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def assert_right(z, *inputs):
    expected = reference(*inputs)
    assert z.shape == expected.shape
    assert z.dtype == inputs[0].dtype and z.device == inputs[0].device
    assert z.isfinite().all()
    if z.numel():
        # The rounding of few elements does not average out.
        few = torch.finfo(z.dtype).eps / 2 if z.numel() < 64 else 0
        assert relative_error(z, expected) <= max(TOLERANCE[z.dtype], few)


def kept_numbers(call, given):
    """How many numbers ``call()`` keeps for its backward, besides the tensors in ``given``."""
    given, sizes = {tensor.data_ptr() for tensor in given}, []

    def pack(tensor):
        if tensor.data_ptr() not in given:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes)
