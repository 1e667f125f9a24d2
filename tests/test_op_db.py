"""PyTorch's own operator database: every operator with a forward mode, on all of its sample inputs, against torch.func.jvp.

Operators without a forward mode have a rule of ours, compared with PyTorch's backward mode or with finite differences, or raise
an error that names them. The lists below say which, and each test fails where an entry is no longer needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import FLOAT32_BOUND, FLOAT64_BOUND, relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

import frog_cuda as frog
from frog_cuda.dual import DualTensor, primal_of, tangents_of

pytest.importorskip("expecttest", reason="PyTorch's operator database needs expecttest, which make test installs")
from torch.testing._internal.common_methods_invocations import op_db


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Operations that write an element more than once, such as max_unpool2d, race with themselves on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


K = 3
pytestmark = pytest.mark.filterwarnings("ignore")  # the samples use deprecated spellings on purpose

FORWARD = [op for op in op_db if op.supports_forward_ad]
BACKWARD = [op for op in op_db if not op.supports_forward_ad and torch.float64 in op.supported_dtypes("cpu")]

#: left out of the comparison, with the reason; an entry that passes fails its test
EXCLUDED = {
    "nn_functional_batch_norm_without_cudnn": "has no samples on the CPU; nn_functional_batch_norm is the same function",
    "__rand__": "takes integers only",
    "__ror__": "takes integers only",
    "__rxor__": "takes integers only",
    "jiterator_unary": "runs on GPUs only",
    "jiterator_binary": "runs on GPUs only",
    "jiterator_4inputs_with_extra_args": "runs on GPUs only",
    "jiterator_binary_return_by_ref": "runs on GPUs only",
    "jiterator_2inputs_2outputs": "runs on GPUs only",
}

#: torch.func.jvp fails or is wrong if every floating input has tangents: those that require grad in the samples are perturbed
NOT_EVERY_INPUT = {
    "native_batch_norm": "no tangents of running statistics",
    "_native_batch_norm_legit": "no tangents of running statistics",
    "nn_functional_batch_norm": "no tangents of running statistics",
    "nn_functional_soft_margin_loss": "no tangents of the target",
    "nn_functional_binary_cross_entropy": "no tangents of the weight",
    "nn_functional_nll_loss": "takes the tangents of class weights as zero",
    "nn_functional_cross_entropy": "takes the tangents of class weights as zero",
    "nn_functional_linear_cross_entropy": "takes the tangents of class weights as zero",
}

#: the in-place variant replaces the storage, which is refused with an error that names it
NOT_IN_PLACE = {"as_strided", "as_strided_partial_views"}

#: torch.func.jvp fails on some samples, torch.autograd.forward_ad does not
NOT_THROUGH_FUNC = {"tensor_split": "torch.func wraps indices given as a tensor and cannot read them"}

#: some samples have a derivative of exactly zero (a vector of one element over its own length), of which both compute rounding
VANISHING = {"corrcoef", "nn_functional_normalize", "nn_functional_cosine_similarity", "masked_normalize"}
ROUNDING = 1e-12

#: without forward mode, and without a rule here: the call raises an error that names the operator
REFUSED = {
    "_chunk_cat",
    "_segment_reduce_lengths",
    "_segment_reduce_offsets",
    "geqrf",
    "histogram",
    "histogramdd",
    "igamma",
    "igammac",
    "linalg_ldl_factor",
    "linalg_ldl_factor_ex",
    "linalg_ldl_solve",
    "linspace_tensor_overload",
    "logspace_tensor_overload",
    "nn_functional_embedding_bag",
    "ormqr",
    "resize_",
    "resize_as_",
    "sparse_mm_reduce",
    "sparse_sampled_addmm",
    "special_airy_ai",
    "special_bessel_j0",
    "special_bessel_j1",
    "special_bessel_y0",
    "special_bessel_y1",
    "special_chebyshev_polynomial_t",
    "special_chebyshev_polynomial_u",
    "special_chebyshev_polynomial_v",
    "special_chebyshev_polynomial_w",
    "special_hermite_polynomial_h",
    "special_hermite_polynomial_he",
    "special_laguerre_polynomial_l",
    "special_legendre_polynomial_p",
    "special_modified_bessel_i0",
    "special_modified_bessel_i1",
    "special_modified_bessel_k0",
    "special_modified_bessel_k1",
    "special_scaled_modified_bessel_k0",
    "special_scaled_modified_bessel_k1",
    "special_shifted_chebyshev_polynomial_t",
    "special_shifted_chebyshev_polynomial_u",
    "special_shifted_chebyshev_polynomial_v",
    "special_shifted_chebyshev_polynomial_w",
    "special_spherical_bessel_j0",
    "special_zeta",
    "to_sparse",
    "unique",
    "unique_consecutive",
}

#: take no tensor with a derivative, so that there is nothing to perturb
NO_TENSOR = {
    "arange",
    "empty",
    "empty_permuted",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "randint",
    "randn",
    "scalar_tensor",
    "signal_windows_bartlett",
    "signal_windows_blackman",
    "signal_windows_cosine",
    "signal_windows_exponential",
    "signal_windows_gaussian",
    "signal_windows_general_cosine",
    "signal_windows_general_hamming",
    "signal_windows_hamming",
    "signal_windows_hann",
    "signal_windows_kaiser",
    "signal_windows_nuttall",
    "zeros",
}

#: the values are whatever the memory held
UNINITIALISED = {"empty_like", "new_empty", "new_empty_strided"}


@dataclass
class Case:
    """One sample: its leaves, and which of them are perturbed along ``tangents``, each (K, *shape)."""

    call: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    slots: list[int]
    tangents: list[Tensor]

    @property
    def primals(self) -> tuple[Tensor, ...]:
        return tuple(_copy(self.leaves[i]) for i in self.slots)

    def function(self) -> Callable[..., list[Any]]:
        """The sample as a function of its perturbed leaves, for one call: batch_norm writes into some of the others."""
        rest = [_copy(a) for a in self.leaves]

        def fn(*values: Tensor) -> list[Any]:
            leaves = list(rest)
            for i, v in zip(self.slots, values, strict=True):
                leaves[i] = v
            first, args, kwargs = tree_unflatten(leaves, self.spec)
            torch.manual_seed(7)
            return tree_flatten(self.call(first, *args, **kwargs))[0]

        return fn

    def tensors(self) -> Callable[..., list[Tensor]]:
        """The same, without results that are no tensors."""
        fn = self.function()
        return lambda *values: [o for o in fn(*values) if isinstance(o, Tensor)]

    @property
    def bound(self) -> float:
        """torch.cov takes float32 weights beside a float64 input; what is computed from those is exact to float32 only."""
        narrow = any(p.dtype in (torch.float32, torch.complex64) for p in self.primals)
        return FLOAT32_BOUND if narrow else FLOAT64_BOUND


def cases(op: Any, every_input: bool = True) -> Iterator[tuple[Any, Case]]:
    """All samples in float64, or complex128 where the operator takes no real input, with something to perturb."""
    dtype = torch.float64 if torch.float64 in op.supported_dtypes("cpu") else torch.complex128
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    for sample in op.sample_inputs("cpu", dtype, requires_grad=op.supports_autograd):
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        slots = [i for i, a in enumerate(leaves) if _is_differentiable(a) and (every_input or a.requires_grad)]
        leaves = [a.detach() if isinstance(a, Tensor) else a for a in leaves]
        shapes = [(leaves[i].shape, leaves[i].dtype) for i in slots]
        tangents = [torch.randn((K, *shape), dtype=dtype, generator=generator) for shape, dtype in shapes]
        if slots:
            yield sample, Case(op.op, leaves, spec, slots, tangents)


def _is_differentiable(a: Any) -> bool:
    return isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) and a.layout == torch.strided


def _copy(a: Any) -> Any:
    """A copy with the same strides inside a storage of the same size, because as_strided sees both."""
    if not isinstance(a, Tensor) or a.layout != torch.strided:
        return a
    a = a.resolve_conj().resolve_neg()
    return torch.empty(0, dtype=a.dtype).set_(a.untyped_storage().clone(), a.storage_offset(), a.shape, a.stride())


def forward_mode(case: Case, through_func: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Values, and tangents (K, *shape) of each output, one direction at a time."""
    jvp = torch.func.jvp if through_func else _forward_ad
    rows = [jvp(case.tensors(), case.primals, tuple(t[i] for t in case.tangents)) for i in range(K)]
    return rows[0][0], [torch.stack(column) for column in zip(*(tangents for _, tangents in rows), strict=True)]


def _forward_ad(fn: Callable[..., list[Tensor]], primals: Any, tangents: Any) -> tuple[list[Tensor], list[Tensor]]:
    with forward_ad.dual_level():
        outs = [forward_ad.unpack_dual(o) for o in fn(*map(forward_ad.make_dual, primals, tangents))]
        return [o.primal for o in outs], [torch.zeros_like(o.primal) if o.tangent is None else o.tangent for o in outs]


def compare(
    actual: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]], bound: float, vanish: bool
) -> None:
    assert len(actual[0]) == len(expected[0])
    for value, right in zip(actual[0], expected[0], strict=True):
        assert type(value) is Tensor and value.dtype == right.dtype
        assert relative_error(value, right) <= bound
    for i, (tangent, right) in enumerate(zip(actual[1], expected[1], strict=True)):
        assert type(tangent) is Tensor and tangent.dtype == right.dtype
        if vanish and right.numel() and right.abs().max() <= ROUNDING:
            assert tangent.abs().max() <= ROUNDING
            continue
        error = relative_error(tangent, right)
        assert error <= bound, f"tangents of output {i}: relative error {error:.3g}, bound {bound:.3g}"


def in_place(op: Any, sample: Any, values: list[Tensor]) -> bool:
    """Whether the operator's in-place variant computes what the sample does."""
    return (
        op.inplace_variant is not None
        and op.formatted_name not in NOT_IN_PLACE
        and op.supports_inplace_autograd
        and isinstance(sample.input, Tensor)
        and not sample.broadcasts_input
        and values[0].shape == sample.input.shape
        and values[0].dtype == sample.input.dtype
    )


def check_forward_mode(op: Any, *, every_input: bool, through_func: bool, vanish: bool) -> None:
    seen = False
    for sample, case in cases(op, every_input):
        seen = True
        expected = forward_mode(case, through_func)
        compare(frog.jvp(case.tensors(), case.primals, case.tangents), expected, case.bound, vanish)
        if in_place(op, sample, expected[0]):
            case.call = lambda x, *args, **kwargs: op.inplace_variant(x.clone(), *args, **kwargs)
            compare(frog.jvp(case.tensors(), case.primals, case.tangents), expected, case.bound, vanish)
    assert seen, "no sample has a differentiable input"


def parameters(ops: list[Any]) -> list[Any]:
    """One test per operator; strict: an operator that is left out but passes is an error."""
    marks = {name: [pytest.mark.xfail(strict=True, reason=reason)] for name, reason in EXCLUDED.items()}
    return [pytest.param(op, id=op.formatted_name, marks=marks.get(op.formatted_name, [])) for op in ops]


@pytest.mark.parametrize("op", parameters(FORWARD))
def test_equals_forward_mode(op: Any) -> None:
    name = op.formatted_name
    check_forward_mode(
        op, every_input=name not in NOT_EVERY_INPUT, through_func=name not in NOT_THROUGH_FUNC, vanish=name in VANISHING
    )


@pytest.mark.parametrize("name", sorted(NOT_EVERY_INPUT) + sorted(NOT_THROUGH_FUNC) + sorted(VANISHING))
def test_every_allowance_is_needed(name: str) -> None:
    (op,) = [op for op in FORWARD if op.formatted_name == name]
    with pytest.raises((AssertionError, RuntimeError)):
        check_forward_mode(op, every_input=True, through_func=True, vanish=False)


@pytest.mark.parametrize("name", sorted(NOT_IN_PLACE))
def test_in_place_variants_left_out_are_refused(name: str) -> None:
    (op,) = [op for op in FORWARD if op.formatted_name == name]
    _, case = next(cases(op))
    case.call = op.inplace_variant
    with pytest.raises(NotImplementedError, match=op.inplace_variant.__name__):
        frog.jvp(case.tensors(), case.primals, case.tangents)


@pytest.mark.parametrize("op", parameters(BACKWARD))
def test_without_forward_mode(op: Any) -> None:
    name = op.formatted_name
    seen, refused = False, False
    for sample, case in cases(op, every_input=not op.supports_autograd):
        seen = True
        case.call = lambda *args, sample=sample, **kwargs: sample.output_process_fn_grad(
            op.gradcheck_wrapper(op.op, *args, **kwargs)  # makes matrices symmetric, probabilities sum to one, ...
        )
        duals = [DualTensor(p, t.clone()) for p, t in zip(case.primals, case.tangents, strict=True)]
        try:
            outs = case.function()(*duals)
        except NotImplementedError as error:
            assert names_an_operator(str(error)), error
            refused = True
            continue
        if name not in UNINITIALISED:
            same_values(outs, case.function()(*case.primals))
            (check_against_backward_mode if op.supports_autograd else check_against_differences)(case, outs)
        else:
            assert all(not tangents_of(o).any() for o in outs)
    assert refused == (name in REFUSED)
    assert seen == (name not in NO_TENSOR)


def names_an_operator(message: str) -> bool:
    namespace, name, overload = message.split(":")[0].split(".")
    return hasattr(getattr(getattr(torch.ops, namespace), name), overload)


def same_values(outs: list[Any], plain: list[Any]) -> None:
    assert len(outs) == len(plain)
    for out, right in zip(map(primal_of, outs), plain, strict=True):
        assert type(out) is type(right)
        if isinstance(out, Tensor):
            torch.testing.assert_close(out, right, rtol=FLOAT64_BOUND, atol=0, equal_nan=True)
        else:
            assert out == right


def check_against_backward_mode(case: Case, outs: list[Any]) -> None:
    """<u, J v> = <J^T u, v> for one random u and the tangents v."""
    inputs = [p.requires_grad_() for p in case.primals]
    results = case.function()(*inputs)
    pairs = [(o, r) for o, r in zip(outs, results, strict=True) if isinstance(r, Tensor) and r.requires_grad]
    generator = torch.Generator().manual_seed(11)
    weights = [torch.randn(r.shape, dtype=torch.float64, generator=generator).to(r.dtype) for _, r in pairs]
    slopes = torch.autograd.grad([r for _, r in pairs], inputs, weights, allow_unused=True, materialize_grads=True)
    expected, scale = torch.zeros(K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    for slope, tangents in zip(slopes, case.tangents, strict=True):
        terms = (slope * tangents).reshape(K, -1)
        expected, scale = expected + terms.sum(1), scale + terms.abs().sum(1)
    actual, bound = torch.zeros(K, dtype=torch.float64), FLOAT64_BOUND
    for (out, result), weight in zip(pairs, weights, strict=True):
        bound = max(bound, 4 * torch.finfo(result.dtype).eps)  # one rounding each way, of casts to a lower precision
        tangents = tangents_of(out)
        if tangents is not None:
            actual += (tangents.to(torch.complex128) * weight.conj()).real.reshape(K, -1).sum(1)
    assert ((actual - expected).abs() <= bound * scale + ROUNDING).all()


def check_against_differences(case: Case, outs: list[Any], step: float = 1e-6) -> None:
    """Central differences; most of these operators are step functions, counts or random draws, with a derivative of zero."""
    for i in range(K):
        ahead, behind = (
            case.function()(*(p + s * t[i] for p, t in zip(case.primals, case.tangents, strict=True))) for s in (step, -step)
        )
        for out, a, b in zip(outs, ahead, behind, strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                slope = (a.double() - b.double()) / (2 * step)
                tangents = tangents_of(out)
                actual = torch.zeros_like(slope) if tangents is None else tangents[i].double()
                torch.testing.assert_close(actual, slope, rtol=1e-5, atol=1e-5, equal_nan=True)
