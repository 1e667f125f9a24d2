"""A step of :class:`frog_cuda.ForwardGradient` spread over processes.

The k tangents are cut into contiguous slices, one for each rank. A rank propagates its slice; the directional derivatives, k
numbers, are all that the others need, because every rank can draw every tangent. Flügel et al., arXiv 2410.17764, outlook.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._checks import check_count, is_real
from ..activity import ActivityPerturbation
from ..aggregate import Aggregate
from ..estimate import Estimate, check_finite
from ..forward_gradient import ForwardGradient
from ..sgd import Sgd
from ..share import Share, from_limbs, limbs
from ..tangents import Piece
from ..weight import WeightPerturbation
from .channel import Channel, RankLost, pack, unpack_

__all__ = ["TangentParallel"]

_log = logging.getLogger(__name__)


class TangentParallel:
    """The steps of ``fg``, its k tangents spread over the ranks of a process group.

    Used as ``fg`` itself: ``loss = parallel(input, target)`` on every rank, then ``optimizer.step()`` on every rank; or
    ``parallel.derivatives(input, target)`` and ``parallel.update_(lr)``. All ranks end each step with the same parameters, to
    the bit; on CPUs they are those of a single process (docs/distributed.md says where to rounding only). The process group
    comes from ``torch.distributed.init_process_group``, as under torchrun.

    With a mesh (data, tangent), ranks of one data shard take the same batch, and other shards take other ones of the same size.
    Weight perturbation: the derivatives are averaged over the shards, k numbers. Activity perturbation: the layers' gradients
    are summed over the shards, which sends as many bytes as data-parallel backprop does. The result is that of a single process
    on the whole batch, to rounding. As in DistributedDataParallel, a shard's BatchNorm normalises with the shard's own
    statistics, and the buffers of the first shard are everyone's at the start of each step.

    At the start, parameters and buffers of the first rank are copied to all.

    Arguments:
        fg: with the same arguments, seed and step on every rank; without ``cuda_graph``.
        mesh: a DeviceMesh of one axis (tangents), or of two: named "data" and "tangent", or else in this order.
        group: a process group, as a mesh of one axis; None of both means all ranks.
        combine: how each rank gets the estimate. ``"replay"``: it draws all k tangents of all parameters, and nothing is sent.
            ``"slices"``: it draws those of some parameters, and the results are gathered (weight perturbation only).
            ``"auto"``: what a measurement in the first step says is faster; ``rule`` then tells why. The bits are the same.
        check_every: a checksum of each parameter is compared at the start of every so many steps; None means never.
        timeout: seconds after which a rank that does not answer counts as lost.
        broadcast_buffers: with several data shards, copy the first shard's buffers to all at the start of each step.
    Attributes:
        rule: the cost rule of ``combine``, in words; None before the first estimate is combined.
    Raises:
        RuntimeError: there is no process group, or this process is not part of it.
        TypeError, ValueError: an argument is not accepted, or is not the same on all ranks; the message says which.
        RankLost: a rank did not take part.
    """

    def __init__(
        self,
        fg: ForwardGradient,
        *,
        mesh: DeviceMesh | None = None,
        group: dist.ProcessGroup | None = None,
        combine: str = "auto",
        check_every: int | None = 100,
        timeout: float = 60.0,
        broadcast_buffers: bool = True,
    ) -> None:
        if not isinstance(fg, ForwardGradient):
            raise TypeError(f"fg is of type {type(fg).__name__}; expected a ForwardGradient")
        if fg._graphs is not None:
            raise ValueError("fg: was made with cuda_graph=True; a graph cannot hold a step that waits for other ranks")
        if combine not in ("auto", "replay", "slices"):
            raise ValueError(f"combine is {combine!r}; accepted are 'auto', 'replay' and 'slices'")
        if combine == "slices" and isinstance(fg._method, ActivityPerturbation):
            raise ValueError("combine is 'slices'; perturbed activities take 'auto' or 'replay'")
        if not is_real(timeout) or not 0 < timeout < float("inf"):
            raise ValueError(f"timeout is {timeout!r}; expected a number of seconds > 0")
        self.fg, self.combine, self.broadcast_buffers = fg, combine, broadcast_buffers
        self.check_every = None if check_every is None else check_count("check_every", check_every)
        everyone, tangent, data = _grid(mesh, group)
        if len(data) > 1:
            _check_shards(fg)
        device = fg._method.device
        self._everyone = Channel(everyone, device, timeout)
        self._tangent = self._everyone if tangent == everyone else Channel(tangent, device, timeout)
        self._data = self._everyone if data == everyone else Channel(data, device, timeout)
        self._share = _Exchange(fg, self._everyone, self._tangent, self._data)
        self.rule: str | None = None
        self._slices = combine == "slices"
        if combine != "auto" or isinstance(fg._method, ActivityPerturbation):
            self._decided(f"combine={combine!r}" if combine != "auto" else "gradients of layers are computed on every rank")
        self._check_same_arguments()
        with torch.no_grad():
            for tensor in [*fg.model.parameters(), *fg.model.buffers()]:
                self._everyone.broadcast_(tensor.detach(), "copying the first rank's parameters and buffers")

    @property
    def last(self) -> Estimate | None:
        """As in :class:`~frog_cuda.ForwardGradient`, the same on all ranks of a data shard."""
        return self.fg.last

    def __call__(self, input: Any, target: Any) -> Tensor:
        """Adds the gradient estimate to ``.grad`` on every rank and returns the mean loss over all shards.

        Raises:
            what :class:`~frog_cuda.ForwardGradient` raises, on the rank where it happens; the others raise RuntimeError that
            names that rank. No ``.grad`` is touched then.
            ValueError: seed, step or number of rows are not the same on all ranks, or the loss differs within a data shard.
            RankLost: a rank did not answer within ``timeout``.
            RuntimeError: the parameters of a rank are not those of the others; names rank and parameter.
        """
        loss = self.derivatives(input, target)
        self.accumulate_()
        return loss

    def derivatives(self, input: Any, target: Any) -> Tensor:
        """The forward pass alone; same arguments and errors as a call. :meth:`accumulate_` or :meth:`update_` go on."""
        fg = self.fg
        self._share.met = False
        try:
            if self.check_every is not None and fg.step % self.check_every == 0:
                self.check()
            if self.broadcast_buffers and self._data.size > 1:
                self._share_buffers()
            tangents, inputs, estimate = fg._propagate(input, target, self._share)
        except RankLost:
            raise
        except Exception:
            self._share.give_up()
            raise
        fg._took(tangents, inputs, estimate)
        return estimate.loss

    def gradients(self) -> dict[str, Tensor]:
        """The estimate of the latest call by parameter name, the same on every rank."""
        fg = self.fg
        if isinstance(fg._method, ActivityPerturbation):
            found = fg.gradients()
            if self._data.size > 1:
                self._sum_over_shards(found)
            return found
        if not self._by_slices():
            return fg.gradients()
        estimate, tangents = fg._latest("gradients")
        method, parts = fg._method, self._parts()
        found = {p.name: torch.empty_like(method.parameters[p.name], requires_grad=False) for p in method.used}
        with torch.no_grad():
            for name, g in method.gradients(tangents, estimate, parts[self._everyone.rank]):
                found[name].copy_(g)
            self._exchange_parts(parts, lambda piece: [found[piece.name]])
        return found

    def accumulate_(self) -> None:
        """Adds the estimate of the latest call to ``.grad``."""
        self.fg._add_to_grad(self.gradients())

    def update_(
        self,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        """As :meth:`frog_cuda.ForwardGradient.update_`; weight perturbation only. Every rank holds all of the momentum, so that
        any of them can be resumed from the state of any other; with ``combine="slices"`` it is sent along with the parameters.
        """
        sgd, method = Sgd(lr, momentum, dampening, weight_decay, nesterov), self.fg._method
        if not isinstance(method, WeightPerturbation) or not self._by_slices():
            self.fg._update_(sgd, None)
            return
        parts, parameters = self._parts(), method.parameters
        self.fg._update_(sgd, parts[self._everyone.rank])
        with torch.no_grad():
            # those of other ranks' parameters are to be overwritten, whatever is in them
            buffers = {piece.name: method.momentum.buffer(piece.name, sgd)[0] for piece in method.used}
            moved = {n: [parameters[n].detach(), *([] if b is None else [b])] for n, b in buffers.items()}
            self._exchange_parts(parts, lambda piece: moved[piece.name])
        for name, buffer in buffers.items():
            method.momentum.keep(name, buffer)

    def check(self) -> None:
        """Compares a checksum of each parameter among all ranks. Every rank calls it, and all raise where one differs.

        Raises:
            RuntimeError: names rank and parameter.
        """
        named = list(self.fg.model.named_parameters())
        own = torch.tensor([_checksum(p) for _, p in named], dtype=torch.int64)
        bounds = self._everyone.max(torch.stack((own, ~own)), "comparing parameters")
        if torch.equal(bounds[0], ~bounds[1]):
            return
        every = self._everyone.gather(own, "comparing parameters")
        frequent = every.mode(0).values
        most = (every == frequent).sum(0) * 2 > self._everyone.size
        usual = torch.where(most, frequent, every[0])  # what most ranks hold, or the first one
        wrong = [
            f"{name} on rank {self._everyone.ranks[r]}"
            for i, (name, _) in enumerate(named)
            for r in _others(every[:, i], usual[i])
        ]
        raise RuntimeError(
            f"TangentParallel: at step {self.fg.step} parameters differ among the ranks: {', '.join(wrong[:8])}"
            f"{' and more' if len(wrong) > 8 else ''}; was one changed by hand, or does an optimizer differ?"
        )

    def state_dict(self) -> dict[str, Any]:
        """That of ``fg``, the same on every rank."""
        return self.fg.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken. Every rank calls it.

        Raises:
            TypeError, ValueError: as in :class:`~frog_cuda.ForwardGradient`, or the ranks were given different states; nothing
            is changed then.
        """
        before = self.fg.state_dict()
        self.fg.load_state_dict(state)
        try:
            self._check_same_arguments()
        except ValueError:
            self.fg.load_state_dict(before)
            raise

    def _check_same_arguments(self) -> None:
        fg, method = self.fg, self.fg._method
        activity = (method.shared, method.per_sample) if isinstance(method, ActivityPerturbation) else None
        buffers = method.momentum.buffers if isinstance(method, WeightPerturbation) else {}
        guides = fg._memory.guides if fg._memory is not None else ()
        described = {
            "k": fg.k,
            "seed": fg.seed,
            "step": fg.step,
            "the parameters": [(n, tuple(p.shape), p.dtype) for n, p in method.parameters.items()],
            "an option of fg": (type(method).__name__, activity, fg.tangent_dtype, fg.scaling_correction),
            "tangents": fg.distribution if not hasattr(fg.distribution, "source") else "supplied",
            "aggregate": fg.aggregate if isinstance(fg.aggregate, Aggregate) else "custom",
            # sorted: with combine="slices" each rank makes the buffers of its own parameters first
            "the momentum": sorted((name, _checksum(buffer)) for name, buffer in buffers.items()),
            "a previous estimate": [(guide.scale, _checksum(guide.vector)) for guide in guides],
            "an option of TangentParallel": (self.combine, self.check_every, self.broadcast_buffers),
        }
        own = torch.tensor([v if isinstance(v, int) else zlib.crc32(repr(v).encode()) for v in described.values()])
        every = self._everyone.gather(own, "comparing arguments")
        for i, (name, value) in enumerate(described.items()):
            for r in _others(every[:, i], every[0, i]):
                pair = self._everyone.ranks[0], self._everyone.ranks[r]
                values = f": {every[0, i]} and {every[r, i]}" if isinstance(value, int) else ""
                raise ValueError(f"TangentParallel: {name} differs between rank {pair[0]} and rank {pair[1]}{values}")

    def _share_buffers(self) -> None:
        buffers = list(self.fg.model.buffers())
        if buffers:
            packed = pack(buffers)
            self._data.broadcast_(packed, "copying the first shard's buffers")
            with torch.no_grad():
                unpack_(packed, buffers)

    def _sum_over_shards(self, found: dict[str, Tensor]) -> None:
        for dtype in sorted({g.dtype for g in found.values()}, key=str):
            names = [name for name, g in found.items() if g.dtype == dtype]
            summed = self._data.sum(torch.cat([found[n].flatten() for n in names]), "summing gradients over data shards")
            for name, g in zip(names, summed.split([found[n].numel() for n in names]), strict=True):
                found[name] = g.view(found[name].shape)

    def _parts(self) -> list[list[Piece]]:
        assert isinstance(self.fg._method, WeightPerturbation)
        return deal(self.fg._method.used, self._everyone.size)

    def _exchange_parts(self, parts: list[list[Piece]], tensors_of: Callable[[Piece], list[Tensor]]) -> None:
        """Gives each rank the others' parts of the tensors, which it overwrites."""
        channel, tensors = self._everyone, [[t for piece in part for t in tensors_of(piece)] for part in parts]
        longest = max(sum(t.numel() * t.element_size() for t in part) for part in tensors)
        own = torch.zeros(longest, dtype=torch.uint8, device=self.fg._method.device)
        packed = pack(tensors[channel.rank])
        own[: packed.numel()] = packed
        for r, received in enumerate(channel.gather(own, "gathering slices of the estimate")):
            if r != channel.rank:
                unpack_(received, tensors[r])

    def _by_slices(self) -> bool:
        estimate, _ = self.fg._latest("gradients")
        if estimate.base_coefficients is None or estimate.computed is not None or self._everyone.size == 1:
            return False
        if self.rule is None:
            self._measure(estimate)
        return self._slices

    def _measure(self, estimate: Estimate) -> None:
        """The cost rule: what drawing all tangents takes, against drawing a part and gathering the rest."""
        method, channel = self.fg._method, self._everyone
        _, tangents = self.fg._latest("gradients")
        assert isinstance(method, WeightPerturbation) and estimate.base_coefficients is not None
        parts, coefficients = self._parts(), estimate.base_coefficients
        largest = max(method.used, key=lambda p: p.numel)
        dtype = method.parameters[largest.name].dtype
        sample = torch.zeros(1 << 20, dtype=torch.uint8, device=method.device)
        drawing = _seconds(lambda: tangents.combine(largest, coefficients, dtype)) / largest.numel
        sending = _seconds(lambda: channel.gather(sample, "measuring")) / (sample.numel() * (channel.size - 1))
        drawing, sending = channel.max(torch.tensor([drawing, sending], dtype=torch.float64), "measuring").tolist()
        n = sum(p.numel for p in method.used)
        longest = max(sum(p.numel for p in part) for part in parts)
        received = longest * dtype.itemsize * (channel.size - 1)
        replay, slices = n * drawing, longest * drawing + received * sending
        self._slices = slices < replay
        self._decided(
            f"combine={'slices' if self._slices else 'replay'!r}: replaying {n} parameters takes {replay * 1e3:.3g} ms a step; "
            f"the largest of {channel.size} slices has {longest} and takes {longest * drawing * 1e3:.3g} ms, and "
            f"{received} bytes from the others take {received * sending * 1e3:.3g} ms"
        )

    def _decided(self, rule: str) -> None:
        self.rule = rule
        if self._everyone.rank == 0:
            _log.info(rule)


class _Exchange(Share):
    """The share of a rank: a slice of the tangents on a shard of the rows."""

    def __init__(self, fg: ForwardGradient, everyone: Channel, tangent: Channel, data: Channel) -> None:
        self._fg, self._everyone, self._tangent, self._data = fg, everyone, tangent, data
        self.shards = data.size
        #: whether the ranks have told each other in this step that they came through their passes
        self.met = True

    def span(self, k: int) -> tuple[int, int]:
        begin, count = self._slice(k, self._tangent.rank)
        # With no tangent of its own, a rank still needs the loss and moves running statistics; another rank's tangent makes it
        # do so by the same arithmetic.
        return (begin, count) if count else (k - 1, 1)

    def _slice(self, k: int, rank: int) -> tuple[int, int]:
        """As even as can be; the first ones are the longer ones."""
        least, more = divmod(k, self._tangent.size)
        return rank * least + min(rank, more), least + (rank < more)

    def give_up(self) -> None:
        """Tells the others that this rank has raised an error, unless they are past waiting for it."""
        if not self.met:
            self._meet(0, failed=True)

    def _meet(self, rows: int, failed: bool = False) -> None:
        self.met = True
        mine = self._everyone.ranks[self._everyone.rank] + 1 if failed else 0
        # The complement has its largest value where a number is smallest: one operation finds both bounds
        own = torch.tensor([self._fg.seed, self._fg.step, rows])
        told = self._everyone.max(torch.cat((torch.tensor([mine]), own, ~own)), f"step {self._fg.step}")
        if failed:
            return
        worst, most, least = int(told[0]), told[1:4].tolist(), (~told[4:]).tolist()
        if worst:
            raise RuntimeError(
                f"TangentParallel: rank {worst - 1} raised an error in step {self._fg.step}; its own message says which. No "
                "rank takes the step"
            )
        for name, low, high, here in zip(("seed", "step", "number of rows"), least, most, own.tolist(), strict=True):
            if low != high:
                raise ValueError(f"TangentParallel: the {name} differs among the ranks: from {low} to {high}, here {here}")

    def gather(self, derivatives: Tensor, loss: Tensor, k: int) -> Tensor:
        tail = derivatives.shape[1:]
        rows = tail.numel()
        check_finite("directional derivatives", derivatives)
        self._meet(rows)
        channel, count = self._tangent, self._slice(k, self._tangent.rank)[1]
        own = torch.zeros(1 + self._slice(k, 0)[1] * rows, dtype=torch.float64, device=derivatives.device)
        own[0] = loss
        own[1 : 1 + count * rows] = derivatives[:count].flatten()
        every = channel.gather(own, f"exchanging derivatives of step {self._fg.step}")
        self._check_losses(every[:, 0].tolist(), loss.dtype)
        slices = [every[r, 1 : 1 + self._slice(k, r)[1] * rows].view(-1, *tail) for r in range(channel.size)]
        return torch.cat(slices).to(derivatives.dtype)

    def _check_losses(self, losses: list[float], dtype: torch.dtype) -> None:
        for r, loss in enumerate(losses):
            if abs(loss - losses[0]) > 100 * torch.finfo(dtype).eps * abs(losses[0]):
                ranks = self._tangent.ranks[0], self._tangent.ranks[r]
                raise ValueError(
                    f"TangentParallel: the loss is {losses[0]} on rank {ranks[0]} but {loss} on rank {ranks[1]}; ranks that "
                    "share the tangents need the same batch, the same buffers, and in dropout the same random numbers"
                )

    def average(self, loss: Tensor, derivatives: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.shards == 1:
            return loss, derivatives
        parts = [loss.reshape(1).double()] if derivatives is None else [loss.reshape(1).double(), derivatives.double()]
        mean = self._data.sum(torch.cat(parts), f"averaging step {self._fg.step} over data shards") / self.shards
        return mean[0].to(loss.dtype), None if derivatives is None else mean[1:].to(derivatives.dtype)

    def gram(self, pieces: Sequence[Piece], gram_of: Callable[[Piece], Tensor]) -> Tensor:
        k, device = self._fg.k, self._fg._method.device
        own = deal(pieces, self._everyone.size)[self._everyone.rank]
        sums = torch.zeros((3, k, k), dtype=torch.float64, device=device)
        rows, columns = torch.tril_indices(k, k, device=device)
        if own:
            sums = limbs([gram_of(p) for p in own])
        lower = self._everyone.sum(sums[:, rows, columns], f"summing Gram matrices of step {self._fg.step}")
        sums[:, rows, columns] = lower
        return from_limbs(sums)


def deal(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """``count`` parts of nearly equal numbers of elements: the largest piece left goes to the smallest part."""
    parts: list[list[Piece]] = [[] for _ in range(count)]
    sizes = [0] * count
    for piece in sorted(pieces, key=lambda p: (-p.numel, p.offset)):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(piece)
        sizes[smallest] += piece.numel
    return parts


def _grid(mesh: DeviceMesh | None, group: dist.ProcessGroup | None) -> tuple[list[int], list[int], list[int]]:
    """Ranks of the default group: all that take part, those with this rank's rows, those with this rank's tangents."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "TangentParallel: there is no process group; start with torchrun and call torch.distributed.init_process_group"
        )
    here = dist.get_rank()
    if mesh is not None and group is not None:
        raise ValueError("mesh and group were both given; expected one of them, or none")
    if mesh is None:
        if group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives those it leaves out, an int
            raise RuntimeError(f"TangentParallel: this process, rank {here}, is not part of the group")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group is of type {type(group).__name__}; expected a torch.distributed.ProcessGroup")
        ranks = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
        grid = torch.tensor([ranks])
    else:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh is of type {type(mesh).__name__}; expected a torch.distributed.device_mesh.DeviceMesh")
        names = mesh.mesh_dim_names
        if mesh.ndim > 2 or (names and mesh.ndim == 2 and set(names) != {"data", "tangent"}):
            raise ValueError(f"mesh has axes {names or mesh.ndim}; expected one axis, or two named 'data' and 'tangent'")
        grid = mesh.mesh if mesh.ndim == 2 else mesh.mesh.unsqueeze(0)
        grid = grid.T if names and mesh.ndim == 2 and names[0] == "tangent" else grid
    at = (grid == here).nonzero().tolist()
    if not at:
        raise RuntimeError(f"TangentParallel: this process, rank {here}, is not among the ranks {grid.flatten().tolist()}")
    (row, column) = at[0]
    return grid.flatten().tolist(), grid[row].tolist(), grid[:, column].tolist()


def _check_shards(fg: ForwardGradient) -> None:
    method = fg._method
    if isinstance(method, ActivityPerturbation):
        if not method.shared:
            raise ValueError("fg: shared_across_batch=False draws tangents by row, which does not go with several data shards")
        if not isinstance(fg.aggregate, Aggregate):
            raise ValueError("fg: a custom aggregation of activities does not go with several data shards")


def _others(values: Tensor, usual: Tensor) -> list[int]:
    return (values != usual).nonzero().flatten().tolist()


def _checksum(p: Tensor) -> int:
    return zlib.crc32(p.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


def _seconds(run: Callable[[], Tensor]) -> float:
    """Of the second of two runs; the first one readies what is readied once."""
    for _ in range(2):
        begin = time.perf_counter()
        out = run()
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        seconds = time.perf_counter() - begin
    return seconds
