"""Laws of the counters: pure functions, uniform, independent."""

import subprocess
import sys

import pytest
import torch

from kd.data.counters import permutation, uniform


def test_values_never_change():
    """A new version that draws other numbers would break every paired comparison and cache: it must be on purpose."""
    drawn = uniform(0, 0, torch.tensor([0, 1]), 2).mul(2**24).int()
    assert drawn.tolist() == [[6369901, 8617950], [7908954, 12159322]]
    assert permutation(0, 0, 8).tolist() == [0, 6, 4, 2, 5, 7, 1, 3]


def test_an_index_draws_the_same_in_any_company():
    index = torch.tensor([7, 7, 123456789, 0])
    alone = torch.cat([uniform(3, 4, i[None], 5) for i in index])
    assert torch.equal(alone, uniform(3, 4, index, 5))


def test_more_draws_do_not_change_the_first():
    index = torch.arange(10)
    assert torch.equal(uniform(0, 0, index, 9)[:, :4], uniform(0, 0, index, 4))


def test_uniform_on_the_unit_interval():
    draws = uniform(0, 0, torch.arange(50_000), 4)
    assert draws.dtype == torch.float32 and draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)
    assert ((counts - 10_000).abs() < 400).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"stream": 1}])
def test_seeds_epochs_and_streams_are_independent(change):
    index, base = torch.arange(20_000), {"seed": 0, "epoch": 0, "stream": 0}
    one = uniform(index=index, draws=1, **base)[:, 0]
    other = uniform(index=index, draws=1, **{**base, **change})[:, 0]
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.03


def test_draws_and_neighbours_are_uncorrelated():
    draws = uniform(5, 6, torch.arange(20_000), 2)
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([draws[1:, 0], draws[:-1, 0]]))[0, 1]) < 0.03


def test_negative_and_huge_seeds_are_fine():
    for seed in (-1, 2**63, 2**70 + 1):
        assert 0 <= uniform(seed, 0, torch.tensor([0]), 1).item() < 1


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_a_permutation_has_everything_once(n):
    assert permutation(1, 2, n).sort().values.tolist() == list(range(n))


def test_permutations_differ_by_seed_and_epoch_and_repeat():
    assert torch.equal(permutation(0, 1, 100), permutation(0, 1, 100))
    assert not torch.equal(permutation(0, 1, 100), permutation(0, 2, 100))
    assert not torch.equal(permutation(0, 1, 100), permutation(1, 1, 100))


def test_importing_the_package_costs_torch_alone():
    slow = "torchvision PIL sklearn timm scipy"
    code = f"import sys, kd.data; print([m for m in '{slow}'.split() if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same_bits():
    index = torch.arange(1000)
    assert torch.equal(uniform(1, 2, index.cuda(), 3, 4).cpu(), uniform(1, 2, index, 3, 4))
