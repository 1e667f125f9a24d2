"""Whether the rows of layers' outputs are those of the samples, which a derivative for each sample takes for granted.

A layer that works on positions (an embedding of ``arange(T)``, any layer of a model that puts the sequence first) returns as
many rows as a sequence has. Where that is not the number of samples, counting tells. Where it is by chance, only a pass does:
it perturbs all rows but the first, which must leave the first sample's loss as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from .dual import perturbed, primal_of
from .hooks import Perturb
from .segments import Segment

#: their definition puts samples first
_SAMPLES_FIRST = (_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm)


def check_numbers(segments: list[Segment], batch: int) -> None:
    """With a loss for each sample, outputs have a row for each, or a single one that all samples share, as the embedding of
    positions has.

    Raises:
        ValueError: an output has another number of rows.
    """
    for s in segments:
        if s.batch not in (1, batch):
            raise ValueError(
                f"layers: the output of {s.piece.name} has {s.batch} rows, but there are {batch} losses; per-sample "
                "derivatives need one row per sample, or a single one that all samples share (unsqueeze(0)), or "
                "per_sample=False"
            )


def doubtful(segments: list[Segment], batch: int, shared: bool) -> Iterator[Segment]:
    """Those whose rows may be something else than samples: another axis, which may be that of the samples, is as long; or the
    rows of an embedding were looked up by a vector."""
    for s in segments if batch > 1 else ():
        sample = s.piece.shape if shared else s.piece.shape[1:]
        layer = s.group.output
        if s.batch != batch or isinstance(layer, _SAMPLES_FIRST):
            continue
        if batch in sample[:-1] or (isinstance(layer, nn.Embedding) and len(sample) == 1):
            yield s


def using_batch_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """Batch norms by name that now make the loss of a sample depend on the others, whatever the rows are."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)}


def check_apart(segments: list[Segment], derivatives: Callable[[Perturb], Tensor]) -> None:
    """Checks those segments.

    Arguments:
        derivatives: of a pass with one tangent, (1, B); takes what perturbs the output of each layer.
    Raises:
        ValueError: the loss of the first sample depends on other rows than the first.
    """

    def depends(places: Container[int]) -> bool:
        def perturb(segment: Segment, y: Tensor) -> Tensor:
            value = primal_of(y)
            v = torch.zeros(value.shape)
            if segment.piece.offset in places:  # No constant: layer norm takes that for nothing
                v[1:] = torch.randn(v[1:].shape, generator=torch.Generator().manual_seed(segment.piece.offset))
            return perturbed(y, v.to(value).unsqueeze(0))

        return bool(derivatives(perturb)[0, 0] != 0)

    offsets = {s.piece.offset: s for s in segments}
    if not depends(offsets):
        return
    # One that does so by itself; where only several together do, which hardly can be, all
    names = next((s.piece.name for at, s in offsets.items() if depends([at])), ", ".join(s.piece.name for s in segments))
    raise ValueError(
        f"layers: the loss of sample 0 depends on rows of the output of {names} that would belong to other samples; its first "
        "axis does not seem to be that of the samples. Per-sample derivatives need samples first, or a single row that all "
        "share (unsqueeze(0)), or per_sample=False"
    )
