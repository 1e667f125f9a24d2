from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from against_func import check, compare, draw, dual, expected
from torch import nn

from frog_cuda.dual import DualTensor


def test_an_operation_without_a_forward_rule_is_named():
    x, y = dual(draw(3)), torch.ones(3, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"aten\.soft_margin_loss.*forward AD"):
        torch.ops.aten.soft_margin_loss_backward(torch.ones(3).double(), x, y, 1)
    with pytest.raises(NotImplementedError, match=r"aten\.scatter\.reduce"):
        x.scatter(0, torch.tensor([0]), x[:1], reduce="multiply")


def test_errors_of_the_operation_itself_are_pytorchs():
    with pytest.raises(RuntimeError, match="must match the size|size of tensor"):
        dual(draw(3)) * draw(4)
    with pytest.raises(IndexError):
        dual(draw(3)).amax(2)


@pytest.fixture
def custom_op():
    library = torch.library.Library("frog_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    library.define("thrice(Tensor x) -> Tensor")
    library.impl("thrice", lambda x: x * 3, "CompositeImplicitAutograd")
    yield torch.ops.frog_test
    library._destroy()


def test_custom_operators_without_a_derivative_are_refused(custom_op):
    """PyTorch itself answers zero: the trap this guards against."""
    x, t = draw(3), draw(1, 3, seed=2)
    assert torch.count_nonzero(torch.func.jvp(custom_op.twice, (x,), (t[0],))[1]) == 0
    with pytest.raises(NotImplementedError, match=r"frog_test\.twice.*zero"):
        custom_op.twice(DualTensor(x, t))
    assert torch.equal(custom_op.thrice(DualTensor(x, t)).tangents, 3 * t)


def test_frog_cudas_own_operators_refuse_a_dual(custom_op):
    x = dual(draw(3, 4))
    with pytest.raises(NotImplementedError, match="softmax_jvp"):
        torch.ops.frog_cuda.softmax_jvp(x, x.tangents, 1)


def test_batch_norm_updates_its_statistics_once():
    x = draw(7, 5)
    reference, norm = (nn.BatchNorm1d(5, dtype=torch.float64) for _ in range(2))
    reference(x)
    out = norm(dual(x))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(norm, name), getattr(reference, name), rtol=1e-12)
        assert type(getattr(norm, name)) is torch.Tensor
    (value,), (moved,) = expected(lambda x: F.batch_norm(x, None, None, training=True), [x], [dual(x).tangents])
    compare(out, value, moved)


def test_fallback_inside_inference_mode_and_autocast_free_contexts():
    x, t = draw(5, 4), draw(2, 5, 4, seed=2)
    want = torch.stack([torch.func.jvp(lambda x: F.layer_norm(x, (4,)).amax(1), (x,), (v,))[1] for v in t])
    for context in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with context:
            assert torch.allclose(F.layer_norm(DualTensor(x.clone(), t.clone()), (4,)).amax(1).tangents, want, atol=1e-12)


def test_several_threads():
    """PyTorch counts the levels of its forward mode for all threads together."""

    def fn(x):
        return torch.logcumsumexp(F.mish(x), 1).cumprod(1)

    x, t = draw(5, 4), draw(2, 5, 4, seed=2)
    (value,), (moved,) = expected(fn, [x], [t])
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: fn(DualTensor(x.clone(), t.clone())), range(200)):
            compare(out, value, moved)


def test_straight_layers_of_a_network():
    check(lambda x: F.layer_norm(x, (33,)) + F.group_norm(x, 3) + F.normalize(x), draw(7, 33))
    check(lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 2).sum(), draw(2, 3, 6, 6))
    check(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), draw(1, 2, 3, 3))
