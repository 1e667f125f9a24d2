"""The emulation that runs CUDA kernels on the host: it computes what CUDA would, and objects to each planted fault."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu.client import InOut, KernelError, Kernels, Out, Skewed


@pytest.fixture(scope="module")
def kernels():
    kernels = Kernels("faults")
    yield kernels
    kernels.close()


def test_shuffles_barriers_and_shared_memory(kernels):
    x = torch.randn(96)
    for seed in range(5):
        (out,) = kernels.run("block_sum", x, Out((96,)), 1, seed=seed)
        torch.testing.assert_close(out, x.sum().expand(96))


def test_a_missing_barrier_shows(kernels):
    x = torch.ones(96)
    wrong = sum((kernels.run("block_sum", x, Out((96,)), 0, seed=seed)[0] != 96).any().item() for seed in range(5))
    assert wrong >= 4  # NaN, from shared memory that was not yet written


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        ("past_the_end", (Out((32,)), 33), "AddressSanitizer: heap-buffer-overflow"),  # shared memory
        ("past_the_end", (Out((31,)), 32), "AddressSanitizer: heap-buffer-overflow"),  # global memory
        ("divergent", (Out((64,)),), "divergent __syncthreads: thread"),
        ("some_wait", (Out((96,)),), "deadlock in block (0, 0, 0)"),
        ("leaves_early", (Out((32,)),), "thread 5 has left before"),
        ("half_a_warp", (Out((32,)), 0), "does not exist or has left|deadlock"),
        ("packed", (Skewed(torch.ones(32)), Out((32,))), "misaligned address"),
        ("packed", (torch.ones(32), Out((32,), skew=4)), "misaligned address"),
        ("empty_grid", (Out((32,)),), "an empty grid"),
        ("shared_bytes", (Out((32,)), 99 * 1024 + 1), "101377 bytes of shared memory on a device that has 101376"),
    ],
)
def test_a_fault_is_named(kernels, name, arguments, said):
    with pytest.raises(KernelError) as caught:
        for seed in range(3):
            kernels.run(name, *arguments, seed=seed)
    assert any(part in str(caught.value) for part in said.split("|")), str(caught.value)


def test_what_is_sound_passes(kernels):
    (out,) = kernels.run("past_the_end", Out((32,)), 32)
    assert (out == 1).all()
    (out,) = kernels.run("half_a_warp", Out((32,)), 1)
    assert out.tolist() == [i ^ 1 for i in range(16)] + list(range(16, 32))
    kernels.run("shared_bytes", Out((32,)), 99 * 1024)
    kernels.run("shared_bytes", Out((32,)), 163 * 1024, shared=163 * 1024)
    x = torch.randn(32)
    assert torch.equal(kernels.run("packed", x, Out((32,)))[0], x)


def test_copies_that_are_waited_for(kernels):
    x = torch.randn(256)
    expected = torch.where(torch.arange(256) // 4 % 2 == 0, x, 0)
    assert torch.equal(kernels.run("copied", x, Out((256,)), 1)[0], expected)
    assert kernels.run("copied", x, Out((256,)), 0)[0].isnan().all()


def test_indices_of_threads_and_blocks(kernels):
    (out,) = kernels.run("indices", InOut(torch.arange(288)))
    assert torch.equal(out, 2 * torch.arange(288) + 1)


def test_votes(kernels):
    (out,) = kernels.run("votes", Out((32,), torch.int64))
    assert (out == 1 + 4 * 0xAAAAAAAA).all()


def test_sixteen_bit_floats_convert_as_torch_does(kernels):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    half, brain = bits.view(torch.float16), bits.view(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (65536,), generator=generator).to(torch.int32).view(torch.float32)
    x[:32768] = half[:32768].float() * (1 + torch.randn(32768, generator=generator) * 2**-11)  # where float16 rounds
    x[32768:34816] = (half[:2048].float() + half[1:2049].float()) / 2  # ties
    outs = Out((65536,)), Out((65536,)), x, Out((65536,), torch.float16), Out((65536,), torch.bfloat16)
    halves, brains, to_half, to_brain = kernels.run("convert", half, brain, *outs, 65536)
    for actual, expected in (
        (halves, half.float()),
        (brains, brain.float()),
        (to_half, x.half()),
        (to_brain, x.bfloat16()),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
