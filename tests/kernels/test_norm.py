"""The processor's norm gives torch's, and is taken only without autograd."""

import pytest
import torch
import torch.nn.functional as F

from mogul.kernels.cpu.norm import rms_norm_cpu, takes_rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 12), (1, 1, 12), (3, 5, 2, 576)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_equal_to_torch(dtype, shape, scale):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng, dtype=dtype) * scale
    weight = torch.randn(shape[-1], generator=rng, dtype=dtype)
    before = x.clone()
    found = rms_norm_cpu(x, weight, 1e-5)
    want = F.rms_norm(x.double(), weight.shape, weight.double(), 1e-5).to(dtype)
    torch.testing.assert_close(found, want, rtol=2e-6 if dtype is torch.float32 else 1e-13, atol=0)
    assert torch.equal(x, before)


def test_a_row_of_zeros_stays():
    assert torch.equal(rms_norm_cpu(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


def test_taken_only_without_autograd_and_in_one_dtype():
    x, weight = torch.randn(2, 8), torch.randn(8)
    assert not takes_rms_norm(x, weight)  # autograd is on
    with torch.no_grad():
        assert takes_rms_norm(x, weight)
        assert not takes_rms_norm(x, weight.double())
        assert not takes_rms_norm(x.bfloat16(), weight.bfloat16())
        assert not takes_rms_norm(x.to("meta"), weight.to("meta"))


def test_the_model_gives_the_same_with_and_without_it():
    from mogul.models.moge.norm import MogeRMSNorm

    norm = MogeRMSNorm(8, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 8)
    with torch.no_grad():
        plain = norm(x)
    torch.testing.assert_close(norm(x), plain)
