"""What makes a CPU fast computes the same, and gives memory back."""

import copy
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

import race_linear


@pytest.fixture
def by_onednn(monkeypatch):
    """As on a processor for which oneDNN is faster, whatever this one is; counts the products that it makes."""
    monkeypatch.setattr(race_linear, "onednn_is_faster", lambda: True)
    made, convolution = [], race_linear.F.conv2d
    monkeypatch.setattr(race_linear.F, "conv2d", lambda *tensors: made.append(1) or convolution(*tensors))
    return made


def alike(*sizes, **settings) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(*sizes, **settings)
    model = nn.Sequential(copy.deepcopy(plain))
    race_linear.use_in(model)
    assert type(model[0]) is race_linear.Linear and model.state_dict().keys() == {"0.weight", "0.bias"}
    return plain, model[0]


@pytest.mark.parametrize("shape", [(1, 1100, 512), (1100, 512), (4, 300, 512)])
def test_products_by_onednn_are_those_of_linear(by_onednn, shape):
    plain, ours = alike(512, 768)
    theirs, mine = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    expected, found = plain(theirs), ours(mine)
    assert found.shape == expected.shape and found.is_contiguous()
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(found, ours(mine))  # the same bits each time
    gradient = torch.randn(expected.shape)
    expected.backward(gradient)
    found.backward(gradient)
    pairs = ((mine, theirs), (ours.weight, plain.weight), (ours.bias, plain.bias))
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4) for a, b in pairs)
    with torch.inference_mode():
        assert torch.equal(ours(mine), found)
    assert len(by_onednn) == 3


def test_few_tokens_small_weights_and_other_precisions_stay_with_linear(by_onednn):
    _, ours = alike(512, 768)
    ours(torch.randn(race_linear.ROWS - 1, 512))
    alike(64, 64)[1](torch.randn(2048, 64))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(1100, 512)).dtype == torch.bfloat16
    ours.double()(torch.randn(1100, 512, dtype=torch.float64))
    assert not by_onednn


@pytest.mark.parametrize(
    "vendor, capability, expected",
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_which_processors_get_onednn(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert race_linear.onednn_is_faster.__wrapped__() is expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_memory_is_kept_between_uses_and_then_given_back():
    """Page faults of 64 MB made and dropped ten times, and what the process holds afterwards."""
    code = (
        "import ctypes, resource, numpy\n"
        "from pathlib import Path\n"
        "from race_memory import memory_kept\n"
        "ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)\n"  # PR_SET_THP_DISABLE: pages of one size
        "def held(): return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): numpy.ones(8 << 20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults()\n"
        "before, outside = held(), faults()\n"
        "with memory_kept(): inside = faults()\n"
        "print(outside, inside, held() - before, faults())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    outside, inside, more, afterwards = map(int, run.stdout.split())
    assert inside < 0.2 * outside  # the first of ten, at most
    assert more < 8 << 20 and afterwards > 0.9 * outside
