"""How close a forward gradient comes to the gradient (Flügel et al., arXiv 2410.17764, section 4.1 and Fig. 3).

Cosine and length of the estimate against the gradient, for k tangents in n dimensions, over many seeds: for sum, mean, both
with normalised tangents, and the orthogonal projection. The gradient is that of f(x) = x_1 + ... + x_n; which one it is plays
no part, as normal tangents have no preferred direction.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import frog_cuda as frog

from .. import ops
from ..aggregate import mean_chi
from ..aggregate import resolve as resolve_aggregate
from ..tangents import resolve as resolve_tangents
from . import UsageError, require
from .options import add_common, check_common, positive, powers_of_two
from .results import Results, Row

__all__ = ["APPROACHES", "Approach", "Quality", "add_arguments", "closed_form", "measure", "run", "sampler"]

PACKAGES = ("matplotlib.figure", "tqdm")
#: elements of tangents held at a time: 64 MiB in float32
ELEMENTS = 1 << 24

#: (index of the first sample, how many samples) -> tangents (samples, k, n)
Sampler = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Approach:
    """An aggregation, of tangents as drawn or scaled to length 1. The projection does not depend on lengths."""

    name: str
    aggregate: str
    normalized: bool = False


APPROACHES = (
    Approach("sum", "sum"),
    Approach("mean", "mean"),
    Approach("sum, normalised", "sum", True),
    Approach("mean, normalised", "mean", True),
    Approach("orthogonal", "orthogonal"),
)


@dataclass(frozen=True)
class Quality:
    """Of one approach: cosine between estimate and gradient, and ratio of their lengths; each float64 (samples, len(ks))."""

    cosine: Tensor
    ratio: Tensor


def sampler(name: str, k: int, n: int, seed: int, dtype: torch.dtype) -> Sampler:
    """Normal tangents, those of sample s drawn with ``seed + s``.

    Arguments:
        name: ``"frog"``: this library's kernels; ``"torch"``: ``torch.randn(k, n)`` of a ``torch.Generator``.
    """

    def draw(sample: int) -> Tensor:
        if name == "torch":
            return torch.randn(k, n, generator=torch.Generator().manual_seed(seed + sample)).to(dtype)
        return ops.sample_tangents(torch.tensor([seed + sample, 0]), k, n, dtype=dtype)

    def samples(first: int, count: int) -> Tensor:
        # Alone, it is not copied: at the largest sizes, a batch is one sample
        return draw(first).unsqueeze(0) if count == 1 else torch.stack([draw(s) for s in range(first, first + count)])

    return samples


@torch.no_grad()
def measure(
    draw: Sampler,
    ks: Sequence[int],
    n: int,
    samples: int,
    *,
    simulate: bool = False,
    progress: Callable[[int], object] = lambda samples: None,
) -> dict[str, Quality]:
    """Quality of the estimates by each of :data:`APPROACHES`, for every k in ``ks`` from the first k of the tangents drawn.

    One draw serves all k: ``V d`` is summed up tangent by tangent, and the Cholesky decomposition of the Gram matrix has those
    of all its leading blocks in it. With ``L L^T = G`` and ``L y = d``, the projection onto the first k tangents has the
    squared length ``y_1^2 + ... + y_k^2``, which is also its product with the gradient. For k > n it is that of the first n
    tangents, which span everything.

    Arguments:
        draw: tangents ``(samples, max(ks), n)``; so many at a time that memory stays bounded.
        ks: increasing.
        simulate: derivatives from the gradient by backprop.
        progress: is told how many samples were done.
    Raises:
        RuntimeError: the tangents of a sample are linearly dependent.
    """
    top, parts = ks[-1], []
    batch = max(1, min(samples, ELEMENTS // (top * n)))
    for first in range(0, samples, batch):
        count = min(batch, samples - first)
        v = draw(first, count)  # (b, k, n)
        x = torch.zeros(count, n, dtype=v.dtype)
        gradient = torch.ones(n, dtype=torch.float64)
        d = _derivatives(x, v, simulate).double()  # (b, k)
        parts.append([*_sums(v, d, gradient, ks), _projections(v, d, n, ks)])
        progress(count)
    sums, units, projections = (
        torch.cat(part) for part in zip(*parts, strict=True)
    )  # (samples, len(ks), 2): <g, g_hat>, |g_hat|
    length, counts = math.sqrt(n), torch.tensor(ks, dtype=torch.float64)
    found = {}
    for approach, values in zip(APPROACHES, (sums, sums, units, units, projections), strict=True):
        product, norm = values.unbind(2)
        scale = 1 / counts if approach.aggregate == "mean" else torch.ones(len(ks), dtype=torch.float64)
        found[approach.name] = Quality(product / (norm * length), norm * scale / length)
    return found


def _derivatives(x: Tensor, v: Tensor, simulate: bool) -> Tensor:
    if simulate:
        with torch.enable_grad():
            leaf = x.requires_grad_()
            (gradient,) = torch.autograd.grad(leaf.sum(1).sum(), leaf)
        return (v @ gradient.unsqueeze(2)).squeeze(2)
    _, derivatives = frog.jvp(lambda x: x.sum(1), (x,), (v.transpose(0, 1),))  # (k, b)
    return derivatives.T


def _sums(v: Tensor, d: Tensor, gradient: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """<g, g_hat> and |g_hat| of V d, as drawn and with the tangents scaled to length 1."""
    lengths = torch.linalg.vector_norm(v, dim=2).double()
    coefficients = torch.stack([d, d / lengths**2], 1)  # (b, 2, k)
    total = torch.zeros(v.shape[0], 2, v.shape[2], dtype=torch.float64)
    values, start = [], 0
    for k in ks:
        total += coefficients[:, :, start:k].to(v.dtype) @ v[:, start:k]
        values.append(torch.stack([total @ gradient, torch.linalg.vector_norm(total, dim=2)], 2))  # (b, 2, 2)
        start = k
    plain, unit = torch.stack(values, 2).unbind(1)
    return plain, unit


def _projections(v: Tensor, d: Tensor, n: int, ks: Sequence[int]) -> Tensor:
    k = min(ks[-1], n)
    # The condition of G is about ((1 + r) / (1 - r))^2 with r = sqrt(k / n): 9 at k = n / 4, where float32 does. Close to k = n
    # it has no bound.
    wide = v[:, :k].double() if n < 4 * k else v[:, :k]
    gram = torch.empty(v.shape[0], k, k, dtype=torch.float64)
    step = max(64, k // 4)
    for start in range(0, k, step):  # the lower triangle, in blocks of rows: the decomposition reads nothing else
        stop = min(start + step, k)
        gram[:, start:stop, :stop] = wide[:, start:stop] @ wide[:, :stop].mT
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.any():
        raise RuntimeError(f"{int((info > 0).sum())} samples of {k} tangents in {n} dimensions are linearly dependent")
    y = torch.linalg.solve_triangular(factor, d[:, :k].unsqueeze(2), upper=False).squeeze(2)
    squares = (y**2).cumsum(1)[:, [min(size, n) - 1 for size in ks]]
    return torch.stack([squares, squares.sqrt()], 2)


def closed_form(approach: Approach, k: int, n: int) -> tuple[float, float]:
    """Expected cosine, and expected ratio of lengths, of normal tangents.

    Exact for the projection, ``E[chi_k] / E[chi_n]``, and for k = 1. Otherwise ``<g, E g_hat> / sqrt(E |g_hat|^2)``, which is
    sqrt(k / (n + k + 1)) for the mean of normal tangents, and ``sqrt(E |g_hat|^2) / |g|``: close to the expectations, except
    where k is small and the length of g_hat varies much.
    """
    distribution = resolve_tangents("sphere" if approach.normalized else "normal")
    how: Any = resolve_aggregate(approach.aggregate)
    ratio = how.length(distribution, k, n)
    if approach.aggregate == "orthogonal":
        return ratio, ratio
    if k == 1:  # |g_hat| / |g| = |v|^2 |cos(v, g)|, where length and direction of a normal v are independent
        cosine = mean_chi(1) / mean_chi(n)
        return cosine, cosine if approach.normalized else n * cosine
    return distribution.second_moment(n) * k / math.sqrt(distribution.energy(k, n)), ratio


def rows(found: dict[str, Quality], ks: Sequence[int], n: int) -> list[Row]:
    """The table of :func:`measure`: means, standard deviations over the samples, closed forms."""
    made = []
    for approach in APPROACHES:
        quality = found[approach.name]
        for i, k in enumerate(ks):
            cosine, ratio = closed_form(approach, k, n)
            row: Row = {"approach": approach.name, "k": k, "n": n, "samples": len(quality.cosine)}
            for name, values, expected in (("cosine", quality.cosine, cosine), ("norm_ratio", quality.ratio, ratio)):
                spread = values[:, i].std(correction=min(1, len(values) - 1)).item()
                row |= {name: values[:, i].mean().item(), f"{name}_std": spread, f"{name}_closed_form": expected}
            made.append(row)
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m frog_cuda approximation``."""
    add_common(parser, seeds=1000, output="results/approximation")
    parser.add_argument("--max-k", type=positive, help="tangents: powers of two up to this (default: 1024, with --quick 256)")
    parser.add_argument(
        "--max-n", type=positive, help="dimensions: powers of two up to this (default: 16384, with --quick 1024)"
    )


def run(args: argparse.Namespace) -> None:
    """Measures, writes ``approximation.csv`` and ``.json``, draws ``cosine.png`` and ``norm_ratio.png``.

    Raises:
        MissingPackages: matplotlib or tqdm are not installed.
        UsageError: an option cannot be used, or there are results in the output folder already.
    """
    tqdm = require(*PACKAGES)[-1]
    from .plots import approximation_figures

    check_common(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    samples = args.seeds or (200 if args.quick else 1000)
    ks = powers_of_two(args.max_k or (256 if args.quick else 1024))
    ns = powers_of_two(args.max_n or (1024 if args.quick else 1 << 14))
    if ks[-1] > 1 << 14 or ns[-1] > 1 << 20:
        raise UsageError(f"--max-k is {ks[-1]} and --max-n {ns[-1]}; expected at most {1 << 14} and {1 << 20}")
    settings = {"k": ks, "n": ns, "seeds": samples, "seed": args.seed, "sampler": args.sampler}
    settings |= {"simulate": args.simulate, "dtype": args.dtype}
    results = Results(args.output, "approximation", command=args.command_line, settings=settings, resume=args.resume)
    with tqdm.tqdm(total=samples * sum(_work(n) for n in ns), disable=None, unit_scale=True, unit="") as bar:
        for n in ns:
            if not results.has(n=n):
                bar.set_description(f"n = {n}")
                draw = sampler(args.sampler, ks[-1], n, args.seed, getattr(torch, args.dtype))

                def advance(done: int, work: int = _work(n)) -> None:
                    bar.update(done * work)

                found = measure(draw, ks, n, samples, simulate=args.simulate, progress=advance)
                results.add(rows(found, ks, n), complete=n == ns[-1])
            else:
                bar.update(samples * _work(n))
    figures = approximation_figures(results.rows, args.output)
    print(f"{summary(results.rows)}\n\n{results.where(figures)}")


def _work(n: int) -> int:
    """Roughly what a sample costs, for the progress bar."""
    return n + 1024


def summary(table: Sequence[Row]) -> str:
    """Cosine and ratio of lengths for some k and n, beside their closed forms."""
    top = max(row["n"] for row in table)
    lines = [f"{'n':>6} {'k':>5}  {'approach':<16}  cosine (closed form)  length (closed form)"]
    for row in table:
        if row["n"] in (64, top) and row["k"] in (1, 16, 64, 1024) and not row["approach"].startswith("sum"):
            pairs = [f"{row[name]:9.4f} ({row[name + '_closed_form']:9.4f})" for name in ("cosine", "norm_ratio")]
            lines.append(f"{row['n']:6} {row['k']:5}  {row['approach']:<16} {'  '.join(pairs)}")
    return "\n".join(lines)
