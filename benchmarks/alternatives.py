"""What a user would pick instead of this package, for one gradient: MeZO, PyTorch's forward mode, JAX, torch.compile."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from cases import MORE, OURS, REFERENCES, Activity, Backprop, Method, Unsuitable, WeightLowRank, WeightNormal, distance
from problems import Problem
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


class MeZO(Method):
    """Two-point zeroth-order estimate with seed replay (Malladi et al., arXiv 2305.17333, algorithm 1): a central difference
    along a normal vector that is drawn again from its seed, never stored; parameters change in place. k > 1: the mean."""

    name = "MeZO"
    epsilon = 1e-3
    #: of the float64 check and its epsilon: small, because each kink of a ReLU between the two points adds to the error
    bound, small_epsilon, unlucky_in_float64 = 1e-3, 1e-10, True
    #: relative error of a loss in float32, which the difference multiplies by 1 / epsilon
    LOSS_ERROR = 1e-5

    def __init__(self, problem: Problem, k: int) -> None:
        super().__init__(problem, k)
        self.step, self.generator = 0, torch.Generator(problem.x.device)

    def __call__(self) -> None:
        self.step += 1
        self.differences = []
        with torch.no_grad():
            for seed in self.seeds():
                self._add(seed, self.epsilon)
                above = self.evaluate()
                self._add(seed, -2 * self.epsilon)
                below = self.evaluate()
                self._add(seed, self.epsilon)
                self.differences.append((above - below).item() / (2 * self.epsilon))
            self.problem.model.zero_grad()
            for p in self.problem.parameters.values():
                p.grad = torch.zeros_like(p)
            for seed, d in zip(self.seeds(), self.differences):
                for p, z in self.directions(seed):
                    p.grad.add_(z, alpha=d / self.k)

    def seeds(self) -> range:
        return range(self.step * self.k, (self.step + 1) * self.k)

    def directions(self, seed: int):
        """Each parameter with its part of the vector of this seed."""
        self.generator.manual_seed(seed)
        for p in self.problem.parameters.values():
            yield p, torch.randn(p.shape, generator=self.generator, device=p.device).to(p.dtype)

    def _add(self, seed: int, alpha: float) -> None:
        for p, z in self.directions(seed):
            p.add_(z, alpha=alpha)

    def evaluate(self) -> Tensor:
        return self.problem.loss()

    def _error(self) -> float:
        """In float64 with a small epsilon: against the exact derivatives. In float32: the differences against the same in
        float64, which they may miss by a loss's rounding over epsilon."""
        true = self.problem.true_gradients()
        double = next(iter(true.values())).dtype == torch.float64
        if double:
            self.epsilon = self.small_epsilon
        else:
            self.problem.restore()
        loss = self.problem.loss().item()
        self()
        expected = {name: torch.zeros_like(g, dtype=torch.float64) for name, g in true.items()}
        exact = []
        for seed, d in zip(self.seeds(), self.differences):
            parts = [(z * g).sum().item() for (_, z), g in zip(self.directions(seed), true.values())]
            exact.append(sum(parts))
            for (_, z), e in zip(self.directions(seed), expected.values()):
                e.add_(z, alpha=d / self.k)
        combination = distance(self.gradients(), expected)
        self.derivative_error = derivative_error(torch.tensor(self.differences), torch.tensor(exact), true)
        if double:
            return max(combination, self.derivative_error)
        twin = MeZO(self.problem.in_float64(), self.k)
        with torch.no_grad():
            for seed, d in zip(list(self.seeds())[:2], self.differences):
                twin._add(seed, self.epsilon)
                above = twin.evaluate().item()
                twin._add(seed, -2 * self.epsilon)
                wide = (above - twin.evaluate().item()) / (2 * self.epsilon)
                twin._add(seed, self.epsilon)
                if not abs(d - wide) <= self.LOSS_ERROR * abs(loss) / self.epsilon:
                    return float("inf")
        return combination


class VmapJvp(Method):
    """What PyTorch offers: ``vmap(jvp)`` over stored normal tangents of every parameter, mean aggregation."""

    name = "vmap(jvp)"
    stores_tangents = True

    def __call__(self) -> None:
        k = self.k
        with torch.no_grad():
            tangents = self.draw()
            self.derivatives = self.evaluate(tangents)
            for name, q in self.problem.parameters.items():
                q.grad = ((self.derivatives / k) @ tangents[name].flatten(1)).view_as(q)

    def draw(self) -> dict[str, Tensor]:
        parameters = self.problem.parameters.items()
        return {name: torch.randn(self.k, *p.shape, dtype=p.dtype, device=p.device) for name, p in parameters}

    def evaluate(self, tangents: dict[str, Tensor]) -> Tensor:
        values = {name: p.detach() for name, p in self.problem.parameters.items()}
        with sdpa_kernel(SDPBackend.MATH):  # forward mode has no rule for the others
            return vmap(lambda v: jvp(self.problem.loss, (values,), (v,))[1])(tangents)

    def _error(self) -> float:
        torch.manual_seed(4)
        self()
        torch.manual_seed(4)
        return mean_error(self.gradients(), self.derivatives, self.draw(), self.problem.true_gradients())


class ForwardAdLoop(Method):
    """k passes of ``torch.autograd.forward_ad``, one stored tangent at a time, mean aggregation."""

    name = "loop of forward_ad"

    def __call__(self) -> None:
        self.problem.model.zero_grad()
        self.derivatives = torch.zeros(self.k, dtype=next(iter(self.problem.parameters.values())).dtype)
        with torch.no_grad():
            for i in range(self.k):
                tangents = self.draw()
                d = self.evaluate(tangents)
                self.derivatives[i] = d
                for name, q in self.problem.parameters.items():
                    share = tangents[name].mul_(d / self.k)
                    q.grad = share if q.grad is None else q.grad.add_(share)

    def draw(self) -> dict[str, Tensor]:
        return {name: torch.randn_like(p) for name, p in self.problem.parameters.items()}

    def evaluate(self, tangents: dict[str, Tensor]) -> Tensor:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = {name: forward_ad.make_dual(p.detach(), tangents[name]) for name, p in self.problem.parameters.items()}
            return forward_ad.unpack_dual(self.problem.loss(duals)).tangent

    def _error(self) -> float:
        torch.manual_seed(4)
        self()
        true, k = self.problem.true_gradients(), self.k
        torch.manual_seed(4)
        d = torch.zeros(k, dtype=torch.float64)
        expected = {name: torch.zeros_like(g) for name, g in true.items()}
        for i in range(k):
            for name, v in self.draw().items():
                d[i] += (v.flatten() @ true[name].flatten()).item()
                expected[name].add_(v, alpha=self.derivatives[i].item() / k)
        combination = distance(self.gradients(), expected)
        return max(combination, derivative_error(self.derivatives, d, true))


def derivative_error(actual: Tensor, expected: Tensor, true: dict[str, Tensor]) -> float:
    """Relative to the size that k directional derivatives along normal vectors are expected to have."""
    size = len(actual) * sum(g.double().square().sum().item() for g in true.values())
    return ((actual.double() - expected.double()).square().sum().item() / size) ** 0.5


def mean_error(got: dict[str, Tensor], derivatives: Tensor, tangents: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Error of a mean over tangents: of the derivatives against the true gradient, and of the sum against the derivatives."""
    d, error, k = torch.zeros(len(derivatives), dtype=torch.float64), 0.0, len(derivatives)
    for name, v in tangents.items():
        d += (v.flatten(1) @ true[name].flatten()).double()
        expected = (derivatives / k) @ v.flatten(1)
        error = max(error, distance({name: got[name].flatten()}, {name: expected}))
    return max(error, derivative_error(derivatives, d, true))


# ---- JAX


class _Jax(Method):
    """A fully-connected net in JAX, compiled before it is timed. The gradient stays JAX's."""

    checked_in_float64 = False  # a switch of the whole process
    in_turns = False

    def __init__(self, problem: Problem, k: int = 0) -> None:
        super().__init__(problem, k)
        if not problem.name.startswith("fc"):
            raise Unsuitable("written in JAX for the fully-connected nets only")
        # By default JAX takes three quarters of a GPU's memory when it starts, and PyTorch's models need it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            import jax
        except ImportError as error:
            raise Unsuitable(str(error)) from None
        self.jax, self.step = jax, 0
        jax.config.update("jax_platforms", problem.x.device.type)
        self.values = [jax.numpy.asarray(p.detach().cpu().numpy()) for p in problem.parameters.values()]
        self.x, self.target = (jax.numpy.asarray(t.cpu().numpy()) for t in (problem.x.flatten(1), problem.target))
        self.compiled = jax.jit(self.gradient).lower(self.values, self.key()).compile()

    def key(self) -> Any:
        return self.jax.random.key(self.step)

    def loss(self, values: list[Any]) -> Any:
        y, layers = self.x, list(zip(values[::2], values[1::2]))
        for i, (weight, bias) in enumerate(layers):
            y = y @ weight.T + bias
            y = self.jax.nn.relu(y) if i + 1 < len(layers) else y
        scores = self.jax.nn.log_softmax(y)
        return -self.jax.numpy.take_along_axis(scores, self.target[:, None], 1).mean()

    def __call__(self) -> None:
        self.step += 1
        self.result = self.jax.block_until_ready(self.compiled(self.values, self.key()))

    def gradients(self) -> dict[str, Tensor]:
        return self._tensors(self.result[1])

    def _tensors(self, arrays: list[Any]) -> dict[str, Tensor]:
        import numpy

        return dict(zip(self.problem.parameters, (torch.from_numpy(numpy.array(a)) for a in arrays), strict=True))

    def gradient(self, values: list[Any], key: Any) -> tuple[Any, list[Any]]:
        raise NotImplementedError


class JaxGrad(_Jax):
    name = "JAX jit, grad"

    def gradient(self, values: list[Any], key: Any) -> tuple[Any, list[Any]]:
        return self.jax.value_and_grad(self.loss)(values)

    def _error(self) -> float:
        self()
        return distance(self.gradients(), self.problem.true_gradients())


class JaxVmapJvp(_Jax):
    """``vmap(jvp)`` with tangents from JAX's own generator, mean aggregation, all in one compiled function."""

    name = "JAX jit, vmap(jvp)"
    stores_tangents = True

    def draw(self, values: list[Any], key: Any) -> list[Any]:
        keys = self.jax.random.split(key, len(values))
        return [self.jax.random.normal(one, (self.k, *v.shape), v.dtype) for one, v in zip(keys, values)]

    def gradient(self, values: list[Any], key: Any) -> tuple[Any, list[Any]]:
        tangents = self.draw(values, key)
        d = self.jax.vmap(lambda v: self.jax.jvp(self.loss, (values,), (v,))[1])(tangents)
        return d, [self.jax.numpy.tensordot(d / self.k, v, 1) for v in tangents]

    def _error(self) -> float:
        self()
        tangents = self._tensors(self.draw(self.values, self.key()))
        d = torch.tensor(self.result[0].tolist())
        return mean_error(self.gradients(), d, tangents, self.problem.true_gradients())


# ---- torch.compile


def compiled(method: type[Method]) -> type[Method]:
    """The same method with what it evaluates compiled by ``torch.compile``."""

    class Compiled(method):  # type: ignore[misc, valid-type]
        name = f"torch.compile, {method.name}"
        checked_in_float64 = False  # would be compiled once more

        def __init__(self, problem: Problem, k: int = 0) -> None:
            super().__init__(problem, k) if k else super().__init__(problem)
            torch._dynamo.reset()
            self.evaluate = torch.compile(self.evaluate)

    return Compiled


ALTERNATIVES: list[type[Method]] = [MeZO, VmapJvp, ForwardAdLoop, JaxVmapJvp]
COMPILED = [compiled(m) for m in (Backprop, Activity, WeightNormal, WeightLowRank, MeZO, VmapJvp, ForwardAdLoop)]


def by_name(name: str) -> type[Method]:
    return next(m for m in [*REFERENCES, JaxGrad, *OURS, *MORE, *ALTERNATIVES] if m.name == name)
