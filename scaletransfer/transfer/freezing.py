"""Which part of a network is trained: all, what lies behind a block, or the classifier alone."""

from __future__ import annotations

import itertools

from torch import nn

from scaletransfer.models import head_names


def freeze(network: nn.Module, through: str | None, linear_probe: bool) -> nn.Module:
    """Take the frozen tensors out of training, in place; the network.

    through: the name of a module (its last part or parts do: ``block3`` is ``body.block3``); frozen are all parameters
    up to its last, in the order in which the network has them. linear_probe: all but the classifier's. Frozen modules
    stay as in evaluation, so that batch norm's statistics do not move either.

    Raises ValueError for a module that there is not, and where nothing would be left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    head = set(head_names(network))
    if linear_probe:
        if not head:
            raise ValueError("model.linear_probe: this network does not say which tensors its classifier has")
        frozen = set(names) - head
    elif through is not None:
        prefixes = _modules(network, through)
        inside = [name for name in names if name.startswith(prefixes)]
        if not inside:
            raise ValueError(f"model.freeze_through is {through!r}, but the network has {_choices(network)}")
        frozen = set(names[: names.index(inside[-1]) + 1])
    else:
        return network
    if head & frozen or frozen == set(names):
        raise ValueError(
            f"model.freeze_through is {through!r}, which leaves no classifier to train: freeze less, up to one of "
            f"{_choices(network)}"
        )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for module in network.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
            module.train = _Resting(module)  # type: ignore[method-assign]  # the loop calls train() on the whole
    return network


class _Resting:
    """In place of a frozen module's ``train``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.module


def _modules(network: nn.Module, name: str) -> tuple[str, ...]:
    """Prefixes of the parameters of the modules called so; the shortest name wins."""
    found = [path for path, _ in network.named_modules() if path == name or path.endswith(f".{name}")]
    return tuple(f"{path}." for path in sorted(found, key=lambda path: path.count("."))[:1])


def _choices(network: nn.Module) -> str:
    """The parts up to which a network can be frozen: those that end before its classifier begins."""
    head = set(head_names(network))
    names = [name for name, _ in network.named_parameters()]
    before = set(itertools.takewhile(lambda name: name not in head, names))
    shown: list[str] = []
    for name, child in network.named_children():
        inner = [f"{name}.{n}" for n, grand in child.named_children() if any(True for _ in grand.parameters())]
        blocks = isinstance(child, nn.Sequential | nn.ModuleList) and 1 < len(inner) <= 12
        for path in inner if blocks else [name]:
            own = {n for n in names if n.startswith(f"{path}.")}
            if own and own <= before:
                shown.append(path.removeprefix("body."))
    return ", ".join(shown[:24])
