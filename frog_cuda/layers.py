"""What ``layers=`` means: which modules' outputs (activity) or parameters (weight) are perturbed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ._checks import warn
from .local import LocalRule, local_rule

#: parameters of the layers that have rules
_OWN = {"weight", "bias"}

Named = tuple[str, nn.Module | nn.Parameter]


def parameters_of(member: nn.Module | nn.Parameter) -> Iterator[nn.Parameter]:
    """All parameters of a module, or the parameter itself."""
    yield from member.parameters() if isinstance(member, nn.Module) else (member,)


@dataclass(eq=False)
class Group:
    """Modules, and parameters that no inner module owns, that count as one layer: the output of the last one, a module, is
    perturbed, and all trainable parameters get their gradient from it."""

    members: list[Named]

    def __post_init__(self) -> None:
        self.name, output = self.members[-1]
        if not isinstance(output, nn.Module):
            raise ValueError(
                f"layers: {self.name!r} is a parameter; put it in a group that ends with the module whose output is perturbed"
            )
        self.output = output
        self.parameters: list[Tensor] = []
        for _, member in self.members:
            own = [p for p in parameters_of(member) if p.requires_grad]
            self.parameters += [p for p in own if not any(p is q for q in self.parameters)]
        single = len(self.members) == 1
        # Hooks of pruning and weight norm make the layer's weight of other parameters
        plain = self.output._parameters.keys() <= _OWN
        #: how a single layer gets its gradient without a second run, as long as it holds; None where that is not known
        self.rule: LocalRule | None = local_rule(self.output) if single and plain else None
        #: whether the layer always runs again for its gradient; otherwise, and without a rule, the whole pass is repeated
        self.runs_again = single and self.rule is None


def select(model: nn.Module, layers: Any) -> list[list[Named]]:
    """The groups of modules that ``layers`` names.

    Arguments:
        layers: module names; a predicate ``(name, module) -> bool``; or groups, a list of lists of names, in the order in which
            the modules run. Names of parameters are accepted, too, such as a class token that no inner module owns.
    Raises:
        TypeError, ValueError: not of this form, unknown name, nothing selected, a module in two groups.
    """
    modules: dict[str, nn.Module | nn.Parameter] = dict(model.named_modules())
    if callable(layers):
        chosen: list[list[Named]] = [[(name, module)] for name, module in modules.items() if layers(name, module)]
        if not chosen:
            raise ValueError("layers: the predicate selects no module")
        return chosen
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(
            f"layers is {layers!r}; accepted are a list of module names, a list of lists of names, a predicate "
            "(name, module) -> bool, or None"
        )
    if len(layers) == 0:
        raise ValueError("layers is empty; name at least one module, or pass None for all")
    groups = [[entry] if isinstance(entry, str) else entry for entry in layers]
    members = modules | dict(model.named_parameters(remove_duplicate=False))
    seen: set[str] = set()
    found: list[list[Named]] = []
    for group in groups:
        if not isinstance(group, Sequence) or not group or not all(isinstance(name, str) for name in group):
            raise TypeError(f"layers: {group!r} is neither a module name nor a non-empty list of module names")
        for name in group:
            if name not in members:
                known = [n for n in modules if n][:10]
                raise ValueError(
                    f"layers: the model has no module or parameter {name!r}; it has {', '.join(known) or 'none'}, ..."
                )
            if name in seen:
                raise ValueError(f"layers: {name!r} is named twice")
            seen.add(name)
        found.append([(name, members[name]) for name in group])
    return found


def default_layers(model: nn.Module) -> list[list[Named]]:
    """Every innermost module that owns trainable parameters; :class:`torch.nn.MultiheadAttention` counts as one, and so does a
    module with parametrizations."""
    found: list[list[Named]] = []

    def visit(name: str, module: nn.Module) -> None:
        inner = [(n, m) for n, m in module.named_children() if any(p.requires_grad for p in m.parameters())]
        owned = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        whole = isinstance(module, nn.MultiheadAttention) or is_parametrized(module)
        if (owned and not inner) or (inner and whole):
            found.append([(name, module)])
            return
        for n, m in inner:
            visit(f"{name}.{n}" if name else n, m)

    visit("", model)
    return found


def activity_groups(model: nn.Module, layers: Any) -> list[Group]:
    """Groups for activity perturbation, those without trainable parameters left out."""
    named = default_layers(model) if layers is None else select(model, layers)
    unique: list[Group] = []
    outputs: set[int] = set()
    for modules in named:
        group = Group(modules)
        if id(group.output) in outputs:  # the same module under two names
            continue
        if group.parameters:
            outputs.add(id(group.output))
            unique.append(group)
    for group in unique:
        within = set(group.output.modules()) - {group.output}
        nested = [other for other in unique if other.output in within]
        # What an inner layer is given depends on parameters of the outer one, which only the whole pass shows
        for one in (group, *nested) if nested else ():
            one.rule, one.runs_again = None, False
    if not unique:
        raise ValueError("model: nothing to perturb: no selected layer has parameters that require grad")
    if layers is None:
        covered = {id(p) for g in unique for p in g.parameters}
        left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
        if left:
            warn(
                f"activity perturbation: {', '.join(left)} belong to no innermost layer and get no gradient; name them or the "
                "modules that own them in layers=, or freeze them"
            )
    return unique
