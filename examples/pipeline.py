"""A model over two processes, layer by layer: no bubble between micro-batches, because nothing flows back.

    torchrun --standalone --nproc-per-node=2 examples/pipeline.py

A stage takes a micro-batch's activations and their k tangents from the stage before, passes them through its own layers, whose
weights have tangents of their own, and hands both on. It can start the next micro-batch at once: no stage ever waits for a
backward pass. The last stage has the k directional derivatives of the loss. These k numbers and the k x k Gram matrices are all
that the stages exchange beyond activations; each then forms the gradient of its own weights, by drawing their tangents again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import frog_cuda as frog
from frog_cuda import ops
from frog_cuda.dual import SampledTangents
from frog_cuda.experiments.options import positive


def stages(width: int = 32, seed: int = 0) -> list[nn.Sequential]:
    """A network in two parts, each as deep."""
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return [first, nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))]


class Stage:
    """One stage, with tangents over its weights: the part of the global tangent vector that begins at ``offset``.

    Arguments:
        module: its layers.
        offset: number of parameters in the stages before.
        width: elements of a row that comes in; None for the first stage, which gets plain inputs.
    """

    def __init__(self, module: nn.Module, offset: int, width: int | None, *, k: int, seed: int = 0) -> None:
        self.module, self.k, self.width, self.seed = module, k, width, seed
        self.parameters = dict(module.named_parameters())
        self.offsets: dict[str, int] = {}
        for name, p in self.parameters.items():
            self.offsets[name] = offset
            offset += p.numel()
        self.rank, self.last = dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1

    def step(
        self, inputs: Sequence[Tensor] | None, targets: Sequence[Tensor] | None, rows: Sequence[int], number: int
    ) -> Tensor:
        """Adds the estimate of the mean loss's gradient over all micro-batches to ``.grad``; returns the mean loss.

        Arguments:
            inputs: micro-batches, on the first stage.  targets: on the last stage.  rows: of each micro-batch, on all stages.
            number: of the step; draws the tangents.
        """
        state = torch.tensor([self.seed, number])
        with torch.no_grad():
            total = torch.zeros(1 + self.k, dtype=torch.float64)  # of the losses, and of their derivatives
            sending: list[tuple[dist.Work | None, Tensor]] = []
            for i, count in enumerate(rows):
                x = self._receive(count) if inputs is None else inputs[i]
                duals = {
                    name: frog.DualTensor.sampled_from(p, SampledTangents(state, self.k, 0, self.offsets[name], "normal"))
                    for name, p in self.parameters.items()
                }
                y = functional_call(self.module, duals, (x,))
                if self.last:
                    assert targets is not None
                    loss = F.cross_entropy(y, targets[i], reduction="sum")
                    total += torch.cat((loss.primal.view(1), loss.tangents)).double()
                else:
                    message = torch.cat((y.primal.unsqueeze(0), y.tangents))  # (1 + k, rows, width)
                    sending.append((dist.isend(message, self.rank + 1), message))
            for work, _ in sending:
                if work is not None:
                    work.wait()
            total /= sum(rows)
            dist.broadcast(total, dist.get_world_size() - 1)
            self._accumulate(state, total[1:])
        return total[0]

    def _receive(self, rows: int) -> frog.DualTensor:
        message = torch.empty(1 + self.k, rows, self.width or 0)
        dist.recv(message, self.rank - 1)
        return frog.DualTensor(message[0], message[1:])

    def _accumulate(self, state: Tensor, derivatives: Tensor) -> None:
        """The projection onto the tangents, which needs the Gram matrix over all stages; then each its own part."""
        gram = torch.zeros(self.k, self.k, dtype=torch.float64)
        for name, p in self.parameters.items():
            gram += ops.tangent_gram(state, self.k, p.numel(), offset=self.offsets[name])
        dist.all_reduce(gram)
        coefficients = ops.cholesky_project(gram, derivatives.unsqueeze(1))[0].squeeze(1)
        for name, p in self.parameters.items():
            g = ops.tangent_combine(state, coefficients, p.numel(), offset=self.offsets[name], dtype=p.dtype).view_as(p)
            p.grad = g if p.grad is None else p.grad.add_(g)


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains on random data that the net can learn by heart; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=positive, default=16)
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--micro-batches", type=positive, default=4)
    parser.add_argument("--width", type=positive, default=32)
    options = parser.parse_args(arguments)
    parts = stages(options.width)
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if world != len(parts):
        parser.error(
            f"the number of processes is {world}; expected {len(parts)}, one for each stage. Start with "
            f"torchrun --standalone --nproc-per-node={len(parts)} examples/pipeline.py"
        )
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    offset = sum(p.numel() for part in parts[:rank] for p in part.parameters())
    stage = Stage(parts[rank], offset, options.width if rank else None, k=options.k)
    optimizer = torch.optim.Adam(stage.module.parameters(), lr=0.03)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(options.batch, 64, generator=generator).chunk(options.micro_batches)
    y = torch.randint(0, 10, (options.batch,), generator=generator).chunk(options.micro_batches)
    losses = []
    for number in range(options.steps):
        optimizer.zero_grad()
        loss = stage.step(x if rank == 0 else None, y if stage.last else None, [len(part) for part in y], number)
        optimizer.step()
        losses.append(loss.item())
    if rank == 0:
        print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {options.steps} steps", flush=True)
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
