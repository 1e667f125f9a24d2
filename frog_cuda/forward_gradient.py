"""Forward gradients of models and of functions: perturb, propagate, project, combine.

Flügel et al., "Beyond Backpropagation: Optimization with Multi-Tangent Forward Gradients", arXiv 2410.17764.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import aggregate as aggregations
from . import cuda_graph as graphs
from . import float8
from . import tangents as distributions
from ._checks import check_count, check_flag, check_seed, check_step, flat, warn
from .activity import ActivityPerturbation
from .aggregate import Aggregate, Orthogonal, scaling_correction
from .chunk_size import check_chunk_size
from .custom_functions import intercepted
from .dual import DualTensor
from .estimate import Estimate, check_loss, read_loss, solve
from .guides import Memory
from .layers import activity_groups, select
from .sgd import Sgd
from .share import ALONE, Share
from .stopping import stopping_at_no_grad
from .surroundings import Structure, as_written, surroundings
from .tangents import Piece, TangentSet
from .weight import Inputs, Step, WeightPerturbation, inputs_of

__all__ = ["ForwardGradient", "forward_gradient"]


class ForwardGradient:
    """Gradient estimates of a model's loss from forward passes alone.

    ``loss = fg(input, target)`` runs one forward pass that carries the value and k tangents, and adds the gradient estimate to
    the ``.grad`` of the parameters, as ``loss.backward()`` would. Any :class:`torch.optim.Optimizer` goes on from there. The
    model stays as it is: parameters, buffers and state_dict are its own.

    Arguments:
        model: any module; batch first where activities are perturbed. Frozen parameters (``requires_grad=False``) are left
            alone.
        loss_fn: ``(output, target)`` -> a scalar, or one loss per sample ``(B,)`` such as
            ``cross_entropy(..., reduction="none")``, whose mean is then the loss.
        k: number of tangents, >= 1.
        perturb: ``"weight"``: one tangent vector over all parameters (n = number of parameters). ``"activity"``: over the
            outputs of layers (n = number of outputs of a sample); parameters get a layer-local gradient.
        layers: which modules: names, a predicate ``(name, module) -> bool``, or lists of names as groups. Activity: the output
            of each module (of the last one of a group) is perturbed; the default is every innermost module that owns trainable
            parameters. Weight: the parameters of these modules; the default is all. A parameter that no inner module owns, such
            as a class token, goes by its own name: ``[["class_token", "layers.0"], ["layers.1"]]``.
        tangents: a name, an object of :mod:`frog_cuda.tangents`, a callable, or tensors used as they are:
            ``{name: (k, *shape)}`` with a parameter's shape, or for activities the shape of an output without its batch axis.
            Tensors are not copied, and must not change between the forward pass and the estimate.
        aggregate: a name or an object of :mod:`frog_cuda.aggregate`, or a callable ``(tangents, derivatives) -> gradient``.
        tangent_dtype: floating dtype of the tangents; None means that of the parameters or outputs. ``torch.float8_e4m3fn``:
            in bfloat16, but multiplied with the weights of linear layers in 8 bits, see :mod:`frog_cuda.float8`.
        per_sample: activity only. With losses ``(B,)``, each sample has its own directional derivatives, (k, B), and its own
            projection. Exact unless a sample's loss depends on other samples (BatchNorm in train mode): cross terms are missed
            then, and False gives one derivative per tangent for the batch. A scalar loss always works as False does.
        shared_across_batch: activity only. All samples share their tangents; False draws them for each sample. Batch
            normalisation in train mode takes out what all samples share, and a warning then asks for False.
        chunk_size: at most so many tangents in one pass, to bound the memory; the tangents and the result stay the same.
            ``"auto"``: as many as fit ``memory_budget``. At the first call with a shape of input and target this is measured by
            some passes more, with 1 tangent, with 2, and with what follows from those; see :mod:`frog_cuda.chunk_size`.
        memory_budget: bytes that a step's forward passes may take beside what is there, for ``chunk_size="auto"``; None means
            half of what the device has free when it is measured. Tensors are counted. What allocators hold back and libraries'
            workspaces come on top: on CPUs, processes were seen to grow by up to 2.4 times as much.
        scaling_correction: scale the estimate to the expected length of the gradient, see
            :func:`frog_cuda.aggregate.scaling_correction`.
        seed: 64-bit integer. Tangents are a pure function of seed, step, tangent and element.
        cuda_graph: on a GPU, capture a whole call as a CUDA graph, one for each shape of input and target, and replay it from
            the third call with a shape on; ``.grad`` and ``last`` are then overwritten in place. Model and loss must not read
            values from the device.
    Attributes:
        step: number of calls so far; draws the next tangents.
        last: :class:`frog_cuda.estimate.Estimate` of the latest call, or None.
        chosen_chunk_size: what ``chunk_size="auto"`` came to in the latest call; None before, and with any other chunk_size.
    Raises:
        TypeError, ValueError: an argument is not accepted; the message names it and what is.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> fg = ForwardGradient(model, nn.CrossEntropyLoss(reduction="none"), k=4)
    >>> loss = fg(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    >>> model[0].weight.grad.shape
    torch.Size([8, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        *,
        k: int,
        perturb: str = "activity",
        layers: Any = None,
        tangents: Any = "normal",
        aggregate: Any = "orthogonal",
        tangent_dtype: torch.dtype | None = None,
        per_sample: bool = True,
        shared_across_batch: bool = True,
        chunk_size: int | str | None = None,
        memory_budget: int | None = None,
        scaling_correction: bool = False,
        seed: int = 0,
        cuda_graph: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is of type {type(model).__name__}; expected a torch.nn.Module")
        scripted = [name or "the model itself" for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
        if scripted:
            raise TypeError(
                f"model: {scripted[0]} is TorchScript, which carries no tangents; expected modules as they were before "
                "torch.jit.script or torch.jit.trace"
            )
        if not callable(loss_fn):
            raise TypeError(f"loss_fn is of type {type(loss_fn).__name__}; expected a callable (output, target) -> loss")
        if tangent_dtype is not None and tangent_dtype not in float8.ACCEPTED:
            accepted = ", ".join(map(str, float8.ACCEPTED))
            raise ValueError(f"tangent_dtype is {tangent_dtype!r}; accepted are {accepted} and None")
        self.model, self.loss_fn, self.k = model, loss_fn, check_count("k", k)
        self.distribution, self.aggregate = distributions.resolve(tangents), aggregations.resolve(aggregate)
        self.chunk_size, self._chunks = check_chunk_size(chunk_size, memory_budget)
        self.chosen_chunk_size: int | None = None
        self.tangent_dtype, self.scaling_correction = tangent_dtype, check_flag("scaling_correction", scaling_correction)
        per_sample, shared_across_batch = (
            check_flag("per_sample", per_sample),
            check_flag("shared_across_batch", shared_across_batch),
        )
        self.seed, self.step = check_seed(seed), 0
        self.last: Estimate | None = None
        _check_together(self.aggregate, self.distribution, scaling_correction)
        self._memory: Memory | None = None
        self._method: WeightPerturbation | ActivityPerturbation
        if perturb == "weight":
            self._method = WeightPerturbation(model, None if layers is None else select(model, layers))
            self.distribution.check(self.k, self._method.total)
            if isinstance(self.distribution, distributions.Guided) and self.distribution.previous:
                self._memory = Memory(self.distribution.previous, self._method.pieces)
        elif perturb == "activity":
            if isinstance(self.distribution, distributions.Guided):
                raise ValueError(
                    "tangents: Guided is for perturb='weight'; estimates for activities belong to the samples of one batch and "
                    "tell nothing about the next"
                )
            if isinstance(self.distribution, distributions.LowRank):
                raise ValueError("tangents: LowRank is for perturb='weight'; tangents of activities are no matrices")
            self._method = ActivityPerturbation(model, activity_groups(model, layers), shared_across_batch, per_sample)
        else:
            raise ValueError(f"perturb is {perturb!r}; accepted are 'activity' and 'weight'")
        self._structure = Structure(model)
        if isinstance(loss_fn, nn.Module):
            known = {id(p) for p in model.parameters()}
            left = [name for name, p in loss_fn.named_parameters() if p.requires_grad and id(p) not in known]
            if left:
                warn(
                    f"loss_fn: its parameters {', '.join(left)} are none of the model's and get no gradient; make the loss a "
                    "part of the model, or freeze them"
                )
        self._tangents: TangentSet | None = None
        self._inputs: Inputs = ((), {})
        self._graphs: graphs.GraphedSteps | None = None
        if check_flag("cuda_graph", cuda_graph):
            graphs.check(self.distribution, self._method.device, self.k, self.chunk_size)
            self._graphs = graphs.GraphedSteps(self)

    def __call__(self, input: Any, target: Any) -> Tensor:
        """Adds the gradient estimate to ``.grad`` and returns the mean loss, 0-dim and detached.

        Arguments:
            input: what the model takes: a tuple (positional arguments), a mapping (keyword arguments, such as a tokenizer's
                result), or anything else as its one argument: a tensor, or a named tuple such as a PackedSequence.
            target: handed to ``loss_fn`` as it is.
        Raises:
            ValueError: loss neither a scalar nor (B,), not depending on what is perturbed, or layers' outputs whose rows are
                not those of the samples, see :mod:`frog_cuda.rows`.
            FloatingPointError: the loss or a derivative is NaN or infinite. No ``.grad`` is touched where anything is raised.
            RuntimeError: parameters or modules of the model were replaced, or ``requires_grad`` has changed.
            NotImplementedError: neither a rule nor PyTorch's forward mode knows an operation; names it and the module that
                called it.
        """
        if self._graphs is not None:
            check_step(self.step)
            graphed = self._graphs(input, target)
            if graphed is not None:
                return graphed
        loss = self.derivatives(input, target)
        self.accumulate_()
        return loss

    def derivatives(self, input: Any, target: Any) -> Tensor:
        """The forward pass alone: fills ``last`` and counts the step, but touches no ``.grad``. Same arguments and errors as a
        call; :meth:`accumulate_` or :meth:`update_` go on from there."""
        self._took(*self._propagate(input, target))
        assert self.last is not None
        return self.last.loss

    def _propagate(self, input: Any, target: Any, share: Share = ALONE) -> tuple[TangentSet, Inputs, Estimate]:
        """The forward passes of the present step along all tangents, or a process's share of them."""
        inputs = inputs_of(input)
        check_step(self.step)
        self._structure.check()
        if self.last is not None and self.last.trace is not None:
            self.last.trace.release()
        with surroundings(self._structure, self._method.device):
            tangents = self.tangent_set(inputs)
            return tangents, inputs, self._estimate(tangents, inputs, target, share)

    def _estimate(self, tangents: TangentSet, inputs: Inputs, target: Any, share: Share = ALONE) -> Estimate:
        """The forward passes along ``tangents``, and the projection; changes nothing of this object's but the chosen chunk."""
        step = Step(tangents, self.loss_fn, inputs, target, float8.carried(self.tangent_dtype))
        with float8.products(self.tangent_dtype, self._method.device):
            chunk_size = self.chunk_size
            if isinstance(chunk_size, str):
                chunk_size = self.chosen_chunk_size = self._chunks.choose(self._method, step)
            return self._method.derivatives(
                step, self.aggregate, chunk_size=chunk_size, correct_length=self.scaling_correction, share=share
            )

    def _took(self, tangents: TangentSet, inputs: Inputs, estimate: Estimate) -> None:
        """Makes ``estimate`` the latest and counts the step."""
        if self._memory is not None:
            estimate.computed = self._memory.take(self._gradients_of(tangents, estimate, inputs))
        self._tangents, self._inputs, self.last = tangents, inputs, estimate
        self.step += 1

    def tangent_set(self, inputs: Inputs) -> TangentSet:
        """The tangents of the present step."""
        if isinstance(self._method, ActivityPerturbation):
            return self._method.tangent_set(self.distribution, self.k, self.seed, self.step, inputs)
        remembered = None if self._memory is None else self._memory.guides
        return self._method.tangent_set(self.distribution, self.k, self.seed, self.step, remembered)

    def gradients(self) -> dict[str, Tensor]:
        """The estimate of the latest call by parameter name. Parameters that did not take part are missing.

        Raises:
            RuntimeError: there was no call yet, or supplied tangents were modified in place since.
        """
        estimate, tangents = self._latest("gradients")
        return self._gradients_of(tangents, estimate, self._inputs)

    def _gradients_of(self, tangents: TangentSet, estimate: Estimate, inputs: Inputs) -> dict[str, Tensor]:
        """What :meth:`gradients` returns, of an estimate that was just made."""
        with torch.no_grad(), surroundings(self._structure, self._method.device):
            if isinstance(self._method, ActivityPerturbation):
                if not estimate.trace.segments:
                    raise RuntimeError("gradients: the call after the latest estimate failed; what it was made of is gone")
                return dict(self._method.gradients(tangents, estimate, inputs))
            return dict(self._method.gradients(tangents, estimate))

    def accumulate_(self) -> None:
        """Adds the estimate of the latest call to ``.grad``."""
        self._add_to_grad(self.gradients())

    @torch.no_grad()
    def _add_to_grad(self, gradients: dict[str, Tensor]) -> None:
        parameters = self._method.parameters
        for name, g in gradients.items():
            p = parameters[name]
            p.grad = g if p.grad is None else p.grad.add_(g)

    def update_(
        self,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        """A step of :class:`torch.optim.SGD` without any ``.grad``, in place, replaying the tangents of the latest call.

        ``p -= lr * estimate``, or with the other options what they mean there. Drawn tangents are replayed in the pass that
        reads and writes a parameter and its momentum. The momentum, a tensor like each parameter, is made at the first step
        that needs it and is part of :meth:`state_dict`.

        Raises:
            RuntimeError: there was no call yet, supplied tangents were modified in place since, or activities are perturbed,
                whose gradients are not replayed.
            TypeError, ValueError: an option is not accepted, see :class:`frog_cuda.sgd.Sgd`.
        """
        self._update_(Sgd(lr, momentum, dampening, weight_decay, nesterov), None)

    @torch.no_grad()
    def _update_(self, sgd: Sgd, only: Collection[Piece] | None) -> None:
        estimate, tangents = self._latest("update_")
        if not isinstance(self._method, WeightPerturbation):
            raise RuntimeError("update_: only for perturb='weight'; with activities use .grad and an optimizer")
        self._method.update_(tangents, estimate, sgd, only)

    def _latest(self, what: str) -> tuple[Estimate, TangentSet]:
        if self.last is None or self._tangents is None:
            raise RuntimeError(f"{what}: no gradient was estimated yet; call the object with input and target first")
        if self.last.custom is None:
            self._tangents.check_unchanged(what)
        return self.last, self._tangents

    def __repr__(self) -> str:
        how = "weight" if isinstance(self._method, WeightPerturbation) else "activity"
        options = f"k={self.k}, perturb={how!r}, tangents={self.distribution}, aggregate={self.aggregate}"
        return f"ForwardGradient({type(self.model).__name__}, {options}, seed={self.seed}, step={self.step})"

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have no latest estimate: model, options and step."""
        state = self.__dict__ | {"last": None, "_tangents": None, "_inputs": ((), {})}
        if self._graphs is not None:
            state["_graphs"] = graphs.GraphedSteps(self)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Seed and step, the estimates that ``tangents.Guided(previous)`` remembers, and the momentum that :meth:`update_` has
        gathered: with them, a resumed run repeats the uninterrupted one bit for bit. Later steps do not change it."""
        state: dict[str, Any] = {"seed": self.seed, "step": self.step}
        if self._memory is not None:
            state["previous"] = self._memory.state()
        if isinstance(self._method, WeightPerturbation) and self._method.momentum.buffers:
            state["momentum"] = self._method.momentum.state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken, without momentum where there was none.

        Raises:
            TypeError, ValueError: something is missing or not accepted; nothing is changed then.
        """
        previous = self._memory is not None
        momentum = self._method.momentum if isinstance(self._method, WeightPerturbation) else None
        given = set(state) - ({"momentum"} if momentum is not None else set())
        if given != {"seed", "step"} | ({"previous"} if previous else set()):
            expected = "'previous', 'seed' and 'step'" if previous else "'seed' and 'step'"
            raise ValueError(f"load_state_dict: state has keys {sorted(state)}; expected {expected}")
        seed, step = check_seed(state["seed"]), check_step(state["step"])
        buffers = momentum.read(state.get("momentum", {})) if momentum is not None else {}
        if self._memory is not None:
            self._memory.load(state["previous"], self._method.device)
        if momentum is not None:
            momentum.buffers = buffers
        self.seed, self.step = seed, step


def forward_gradient(
    fn: Callable[[Tensor], Any],
    x: Tensor,
    *,
    k: int,
    tangents: Any = "normal",
    aggregate: Any = "orthogonal",
    scaling_correction: bool = False,
    seed: int = 0,
    step: int = 0,
    simulate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Value and forward gradient of a scalar function, such as the closed-form ones of section 4.2.

    Arguments:
        fn: takes a tensor like ``x``, returns a scalar tensor.
        x: real floating point, any shape; its k tangents are stored, k times its size.
        k, tangents, aggregate, scaling_correction, seed: as in :class:`ForwardGradient`; supplied tangents are
            ``(k, *x.shape)``.
        step: number of the draw; a loop counts it up.
        simulate: take the directional derivatives from the true gradient by backprop, as the paper did.
    Returns:
        ``fn(x)``, 0-dim; the estimate, shaped like ``x``.
    Raises:
        TypeError, ValueError: as in :class:`ForwardGradient`.  FloatingPointError: value or derivative NaN or infinite.

    >>> x = torch.full((3,), 2.0, dtype=torch.float64)
    >>> value, estimate = forward_gradient(lambda x: (x**2).sum(), x, k=3)
    >>> torch.allclose(estimate, 2 * x)
    True
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {what}; expected a real floating point tensor")
    if x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)} and no element; nothing to perturb")
    k, n, how = check_count("k", k), x.numel(), aggregations.resolve(aggregate)
    piece = Piece("x", tuple(x.shape), 0)
    distribution = distributions.resolve(tangents)
    _check_together(how, distribution, check_flag("scaling_correction", scaling_correction))
    drawn = TangentSet(distribution, k, check_seed(seed), check_step(step), x.device, n, [piece])
    base = drawn.draw(piece, x.dtype)
    if check_flag("simulate", simulate):
        value, derivatives = _backprop(fn, x, base)
    else:
        with torch.no_grad(), stopping_at_no_grad(), intercepted(), as_written():
            value, derivatives = read_loss(fn(DualTensor(x, base)), "fn")
    if value.dim() != 0:
        raise ValueError(f"fn returned shape {tuple(value.shape)}; expected a scalar ()")
    with torch.no_grad():
        estimate = solve(
            drawn,
            how,
            value,
            derivatives,
            lambda: drawn.gram(piece),
            lambda: flat(base),
            n,
            scaling_correction,
        )
        if estimate.custom is not None:
            return value, estimate.custom.view(x.shape)
        assert estimate.base_coefficients is not None
        return value, (estimate.base_coefficients.to(x.dtype) @ flat(base)).view(x.shape)


def _backprop(fn: Callable[[Tensor], Any], x: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = fn(leaf)
        check_loss(value, "fn")
        if value.dim() != 0:
            raise ValueError(f"fn returned shape {tuple(value.shape)}; expected a scalar ()")
        if not value.requires_grad:
            raise ValueError("fn: the result does not depend on anything that is perturbed")
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), flat(base) @ gradient.flatten()


def _check_together(how: Any, distribution: distributions.Distribution, correct_length: bool) -> None:
    """Raises now, not in the first step, where the aggregation does not suit the tangents or the length correction has no
    closed form."""
    if isinstance(distribution, distributions.Guided) and isinstance(how, Aggregate) and not isinstance(how, Orthogonal):
        raise ValueError(
            f"aggregate is {type(how).__name__}; Guided tangents go with 'orthogonal' or a callable, because chosen directions "
            "bias what does not heed their angles"
        )
    if not correct_length:
        return
    if not isinstance(how, Aggregate):
        raise ValueError("scaling_correction: no closed form for a custom aggregation")
    scaling_correction(how, distribution, 1, 2)
