"""Every operator, and arguments to call it with, for the tests that all operators must pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from frog_cuda import ops

NAMES = {
    "distribution": {code: name for name, code in ops.DISTRIBUTIONS.items()},
    "function": {code: name for name, code in ops.POINTWISE.items()},
    "activation": {code: name for name, code in ops.POINTWISE.items()},
    "reduction": {code: name for name, code in ops.REDUCTIONS.items()},
}


def schemas(namespace: str = "frog_cuda") -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix(f"{namespace}::") for n in names if n.startswith(f"{namespace}::"))


def _rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def _state() -> Tensor:
    return torch.tensor([3, 1])


def _spd(*shape: int, dtype: torch.dtype) -> Tensor:
    v = _rand(*shape[:-1], 9, dtype=dtype)
    return v @ v.mT


#: name -> dtype -> arguments by the schema's names
SAMPLES: dict[str, Callable[[torch.dtype], list[dict[str, Any]]]] = {
    "sample_tangents": lambda dtype: [
        dict(state=_state(), k=3, numel=70, offset=5, first=1, distribution=d, dtype=dtype) for d in (0, 1)
    ],
    "tangent_gram": lambda dtype: [dict(state=_state(), k=3, numel=70, offset=5, first=0, distribution=0)],
    "gram": lambda dtype: [dict(tangents=_rand(3, 70, dtype=dtype)), dict(tangents=_rand(70, 3, dtype=dtype).T)],
    "sample_blocks": lambda dtype: [
        dict(state=_state(), k=3, numels=[70, 0, 5], offsets=[5, 9, 300], first=1, distribution=d, dtype=dtype) for d in (0, 1)
    ],
    "gram_blocks": lambda dtype: [
        dict(blocks=_rand(3 * 75, dtype=dtype), k=3, numels=[70, 0, 5]),
        dict(blocks=_rand(2 * 3 * 75, dtype=dtype)[::2], k=3, numels=[70, 5]),
    ],
    "combine_blocks": lambda dtype: [
        dict(blocks=_rand(3 * 75, dtype=dtype), k=3, numels=[70, 0, 5], coefficients=_rand(3)),
        dict(blocks=_rand(2 * 3 * 75, dtype=dtype)[::2], k=3, numels=[70, 5], coefficients=_rand(3, dtype=dtype)),
    ],
    "low_rank_combine": lambda dtype: [
        dict(factors=_rand(6 * 27, dtype=dtype), k=3, r=2, heights=[7, 0], widths=[17, 3], coefficients=_rand(3)),
        dict(factors=_rand(2 * 3 * 28, dtype=dtype)[::2], k=3, r=1, heights=[9, 5], widths=[1, 13], coefficients=_rand(3)),
    ],
    "tangent_combine": lambda dtype: [
        dict(state=_state(), coefficients=_rand(3, dtype=dtype), numel=70, offset=5, first=1, distribution=0, dtype=dtype)
    ],
    "tangent_combine_samples": lambda dtype: [
        dict(state=_state(), coefficients=c, numel=20, offset=5, first=1, distribution=0, dtype=dtype)
        for c in (_rand(3, 4, dtype=dtype), _rand(4, 3, dtype=dtype).T)
    ],
    "tangent_axpy_": lambda dtype: [
        dict(self=target, state=_state(), coefficients=_rand(3), alpha=0.5, offset=5, first=1, distribution=0)
        for target in (_rand(7, 10, dtype=dtype), _rand(10, 7, dtype=dtype).T)
    ],
    "tangent_sgd_": lambda dtype: [
        dict(
            self=target,
            buffer=buffer,
            state=_state(),
            coefficients=_rand(3),
            lr=0.5,
            momentum=0.0 if buffer is None else 0.9,
            dampening=0.0,
            weight_decay=0.1,
            nesterov=buffer is not None,
            fresh=False,
            offset=5,
            first=1,
            distribution=0,
        )
        for target, buffer in (
            (_rand(7, 10, dtype=dtype), _rand(10, 7, dtype=dtype).T),
            (_rand(10, 7, dtype=dtype).T, _rand(7, 10, dtype=dtype)),
            (_rand(7, 10, dtype=dtype), None),
        )
    ],
    "cholesky_project": lambda dtype: [
        dict(gram=_spd(3, 3, dtype=dtype), derivatives=_rand(3, 4, dtype=dtype), rtol=1e-7),
        dict(gram=_spd(2, 3, 3, dtype=dtype), derivatives=_rand(2, 3, 4, dtype=dtype), rtol=1e-7),
    ],
    "linear_jvp": lambda dtype: [
        _linear(dtype, sampled=False),
        _linear(dtype, sampled=True),
        _linear(dtype, sampled=False)
        | dict(dweight=None, left=_rand(4, 2, 5, dtype=dtype), right=_rand(4, 7, 2, dtype=dtype).mT),
    ],
    "pointwise_jvp": lambda dtype: [
        dict(x=_rand(5, 7, dtype=dtype), dx=_rand(3, 5, 7, dtype=dtype), activity=None, function=5, alpha=0.0, beta=0.0),
        dict(x=_rand(7, 5, dtype=dtype).T, dx=None, activity=_rand(3, 7, dtype=dtype), function=2, alpha=0.0, beta=0.0),
    ],
    "tangent_sum": lambda dtype: [
        dict(a=_rand(3, 5, 7, dtype=dtype), va=_rand(3, 7, dtype=dtype), b=None, vb=None, alpha=1.0),
        dict(
            a=_rand(5, 7, 3, dtype=dtype).permute(2, 0, 1),
            va=None,
            b=_rand(3, 5, 7, dtype=dtype),
            vb=_rand(3, 5, 7, dtype=dtype),
            alpha=-2.0,
        ),
    ],
    "convolution_jvp": lambda dtype: [
        dict(
            x=_rand(2, 4, 5, 6, dtype=dtype),
            dx=_rand(3, 2, 4, 5, 6, dtype=dtype),
            weight=_rand(4, 2, 3, 3, dtype=dtype),
            bias=_rand(4, dtype=dtype),
            stride=[2, 1],
            padding=[1, 1],
            dilation=[1, 1],
            transposed=transposed,
            output_padding=[0, 0],
            groups=2,
        )
        for transposed in (False, True)
    ],
    "narrow_convolution": lambda dtype: [
        dict(
            x=_rand(2, 4, 5, 6, dtype=dtype),
            weight=_rand(3, 4, 3, 2, dtype=dtype),
            stride=[2, 1],
            padding=[1, 0],
            dilation=[1, 2],
        ),
        dict(x=_rand(2, 6, 4, dtype=dtype).mT, weight=_rand(1, 4, 3, dtype=dtype), stride=[1], padding=[1], dilation=[1]),
    ],
    "sampled_convolution_": lambda dtype: [
        dict(
            self=target,
            x=_rand(2, 4, 5, 6, dtype=dtype),
            state=_state(),
            kernel=[3, 2],
            stride=[2, 1],
            padding=[1, 0],
            dilation=[1, 2],
            transposed=transposed,
            output_padding=[1, 0] if transposed else [0, 0],
            groups=groups,
            offset=5,
            first=1,
            distribution=0,
            add=True,
        )
        for target, transposed, groups in (
            (_rand(3, 2, 7, 3, 4, dtype=dtype), False, 1),
            (_rand(2, 7, 3, 3, 4, dtype=dtype).transpose(0, 2).transpose(1, 2), False, 1),
            (_rand(3, 2, 6, 10, 8, dtype=dtype), True, 2),
        )
    ],
    "embedding_jvp": lambda dtype: [
        dict(indices=indices, weight=_rand(5, 7, dtype=dtype), k=3, **tangents)
        for indices in (torch.tensor([[0, 4, 4], [1, 0, 2]]), torch.tensor([3, 1], dtype=torch.int32))
        for tangents in (
            dict(dweight=_rand(3, 7, 5, dtype=dtype).mT, state=None, first=0, distribution=0, weight_offset=None, dtype=None),
            dict(dweight=None, state=_state(), first=1, distribution=1, weight_offset=10, dtype=dtype),
        )
    ],
    "softmax_jvp": lambda dtype: [
        dict(x=_rand(5, 7, dtype=dtype), dx=_rand(3, 5, 7, dtype=dtype), dim=1),
        dict(x=_rand(7, 5, dtype=dtype).T, dx=_rand(3, 5, 7, dtype=dtype), dim=0),
    ],
    "log_softmax_jvp": lambda dtype: [
        dict(x=_rand(5, 7, dtype=dtype), dx=_rand(3, 5, 7, dtype=dtype), dim=-1),
        dict(x=_rand(7, 5, dtype=dtype).T, dx=_rand(3, 5, 7, dtype=dtype), dim=0),
    ],
    "max_pool_jvp": lambda dtype: [
        dict(
            x=x,
            dx=dx,
            kernel=[3, 2],
            stride=[2, 2],
            padding=[1, 0],
            dilation=[1, 2],
            ceil_mode=want_indices,
            want_indices=want_indices,
        )
        for x, dx, want_indices in (
            (_rand(2, 4, 7, 6, dtype=dtype), _rand(3, 2, 4, 7, 6, dtype=dtype), False),
            (_rand(2, 7, 6, 4, dtype=dtype).permute(0, 3, 1, 2), _rand(2, 4, 7, 6, 3, dtype=dtype).movedim(-1, 0), True),
        )
    ],
    "attention_jvp": lambda dtype: [
        dict(
            query=_rand(2, 4, 5, 6, dtype=dtype),
            dquery=_rand(3, 2, 4, 5, 6, dtype=dtype),
            key=_rand(2, 2, 7, 6, dtype=dtype),
            dkey=_rand(3, 2, 2, 7, 6, dtype=dtype),
            value=_rand(2, 2, 8, 7, dtype=dtype).mT,
            dvalue=_rand(3, 2, 2, 7, 8, dtype=dtype),
            mask=mask,
            is_causal=False,
            scale=0.4,
        )
        for mask in (_rand(5, 7, dtype=dtype), _rand(5, 7) > 0.3)
    ],
    "normalization_jvp": lambda dtype: [
        dict(
            x=_rand(5, 7, dtype=dtype),
            dx=_rand(3, 5, 7, dtype=dtype),
            weight=_rand(7, dtype=dtype),
            dweight=_rand(3, 7, dtype=dtype),
            bias=_rand(7, dtype=dtype),
            dbias=_rand(3, 7, dtype=dtype),
            **statistics,
        )
        for statistics in (
            dict(mean=None, var=None, outer=1, groups=5, weight_groups=1, centred=True, eps=1e-5),
            dict(mean=_rand(7), var=_rand(7), outer=5, groups=7, weight_groups=7, centred=True, eps=1e-5),
        )
    ],
    "linear_rows": lambda dtype: [
        dict(x=_rand(5, 7, dtype=dtype), weight=_rand(3, 7, dtype=dtype)),
        dict(x=_rand(7, 2, 5, dtype=dtype).movedim(0, -1), weight=_rand(7, 3, dtype=dtype).T),
    ],
    "linear_gradient": lambda dtype: [
        dict(gradient=_rand(5, 7, dtype=dtype), x=_rand(5, 3, dtype=dtype)),
        dict(gradient=_rand(7, 5, dtype=dtype).T, x=_rand(3, 5, dtype=dtype).T),
    ],
    "cross_entropy_jvp": lambda dtype: [
        dict(
            logits=_rand(5, 7, dtype=dtype),
            dlogits=_rand(3, 5, 7, dtype=dtype),
            target=torch.tensor([0, 6, -100, 2, 2]),
            weight=_rand(7, dtype=dtype),
            ignore_index=-100,
            label_smoothing=0.1,
            reduction=reduction,
        )
        for reduction in range(3)
    ],
    "mse_jvp": lambda dtype: [
        dict(
            input=_rand(5, 7, dtype=dtype),
            dinput=_rand(3, 5, 7, dtype=dtype),
            target=_rand(7, 5, dtype=dtype).T,
            dtarget=_rand(3, 5, 7, dtype=dtype),
        )
    ],
    "bce_jvp": lambda dtype: [
        dict(
            input=_rand(5, 7, dtype=dtype),
            dinput=_rand(3, 5, 7, dtype=dtype),
            target=_rand(7, 5, dtype=dtype).T,
            weight=_rand(7, dtype=dtype),
            pos_weight=_rand(5, 1, dtype=dtype),
            with_logits=True,
        )
    ],
}


def _linear(dtype: torch.dtype, sampled: bool) -> dict[str, Any]:
    return dict(
        x=_rand(2, 3, 7, dtype=dtype),
        dx=_rand(4, 2, 3, 7, dtype=dtype),
        weight=_rand(5, 7, dtype=dtype),
        bias=_rand(5, dtype=dtype),
        dweight=None if sampled else _rand(4, 5, 7, dtype=dtype),
        dbias=None if sampled else _rand(4, 5, dtype=dtype),
        activity=_rand(4, 3, 5, dtype=dtype),
        state=_state() if sampled else None,
        k=4,
        first=2,
        distribution=1,
        weight_offset=10 if sampled else None,
        bias_offset=50 if sampled else None,
        activation=1,
        alpha=0.0,
        beta=0.0,
        want_gram=sampled,
    )


def direct(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.frog_cuda, name)


def face(name: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        named = {key: NAMES[key][value] if key in NAMES else value for key, value in arguments.items()}
        return getattr(ops, name)(**named)

    return call


WAYS = pytest.mark.parametrize("way", [direct, face])


def _cases(wanted: Callable[[Any], bool]) -> list[Any]:
    """(operator, arguments, one of them that is a tensor and wanted), for all operators, samples and such arguments"""
    return [
        pytest.param(name, i, key, id=f"{name}-{i}-{key}")
        for name in schemas()
        for i, arguments in enumerate(SAMPLES[name](torch.float32) if name in SAMPLES else [])
        for key, value in arguments.items()
        if isinstance(value, Tensor) and wanted(value)
    ]


FLOATING = pytest.mark.parametrize("name, i, key", _cases(Tensor.is_floating_point))
TENSORS = pytest.mark.parametrize("name, i, key", _cases(lambda t: True))
