"""The layers of any of transformers' text networks: found, and entered or left anywhere.

The networks differ in how they call their layers (masks, positions, biases) and agree in one thing: a layer's first
argument, and the first of what it gives, are the hidden states (B, L, width). So the network always runs as it is,
with what enters one layer replaced, and layers that aren't needed left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class HiddenLayers:
    """`modules` are a network's layers in their order, `after` the beginnings of the names of parameters used after
    the last. A layer gives its hidden states alone where `beside` is None, else a tuple with `beside` more; where it is
    `shared`, the first layer's are needed by the others (T5's position bias)."""

    modules: Sequence[nn.Module]
    after: tuple[str, ...]
    beside: int | None
    shared: bool

    def states_before(self, k: int, run: Callable[[], object]) -> torch.Tensor:
        """What enters layer k, or leaves the last, while `run` runs the network, no further: (B, L, width)."""
        if k == 0:
            hook = self.modules[0].register_forward_pre_hook(_stop_before, with_kwargs=True)
        else:
            hook = self.modules[k - 1].register_forward_hook(_stop_after)
        try:
            run()
        except _Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise RuntimeError(f"the network never came to layer {k}")

    @contextmanager
    def entered_with(self, hidden: torch.Tensor, k: int) -> Iterator[None]:
        """Meanwhile `hidden` (B, L, width) enters layer k, or what comes after the last, whatever the network gives its
        layers; those below aren't computed, but for a first one that the others need something of."""
        beside: tuple[Any, ...] = (None,) * (self.beside or 0)

        def skipping(real: Callable[..., Any] | None) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal beside
                if real is not None:
                    beside = real(*args, **kwargs)[1:]
                return hidden if self.beside is None else (hidden, *beside)

            return forward

        with ExitStack() as undo:
            if k == 0:
                entry = self.modules[0].register_forward_pre_hook(_giving(hidden), with_kwargs=True)
                undo.callback(entry.remove)
            for i, layer in enumerate(self.modules[:k]):
                undo.enter_context(_with_forward(layer, skipping(layer.forward if self.shared and i == 0 else None)))
            yield


def find_layers(network: nn.Module, run: Callable[[], torch.Tensor]) -> HiddenLayers | None:
    """The layers of `network`, one of transformers'. `run` runs it on a text and gives its last hidden states.

    None where it has no list of as many layers as it says, or where such a run goes otherwise once it is cut.
    """
    count = getattr(network.config, "num_hidden_layers", None)
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    modules = next(lists, None)
    if not modules:
        return None
    try:
        with torch.no_grad():  # not inference mode: what a network keeps must serve training, too
            layers, whole = _watch(network, tuple(modules), run)
            k = len(modules) - 1
            hidden = layers.states_before(k, run)
            with layers.entered_with(hidden, k):
                cut = run()
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # foreign code, called as it wasn't meant to be
    return layers if hidden.shape[:2] == whole.shape[:2] and torch.equal(whole, cut) else None


def _watch(
    network: nn.Module, modules: tuple[nn.Module, ...], run: Callable[[], torch.Tensor]
) -> tuple[HiddenLayers, torch.Tensor]:
    """The layers, by what a run calls when and what they give; and what it gave."""
    within = {id(module) for layer in modules for module in layer.modules()}
    called_after: dict[str, bool] = {}
    given: list[Any] = []  # by the layers, as long as the run lasts

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            called_after.setdefault(name, len(given) == len(modules))

        return hook

    with ExitStack() as undo:
        for layer in modules:
            undo.callback(layer.register_forward_hook(lambda module, args, output: given.append(output)).remove)
        for name, module in network.named_modules():
            if name and id(module) not in within and next(module.parameters(recurse=False), None) is not None:
                undo.callback(module.register_forward_pre_hook(note(name)).remove)
        whole = run()
    after = tuple(f"{name}." for name, late in called_after.items() if late)
    first = given[0]
    if not isinstance(first, tuple):
        return HiddenLayers(modules, after, None, False), whole
    shared = any(isinstance(value, torch.Tensor) for value in first[1:])
    return HiddenLayers(modules, after, len(first) - 1, shared), whole


class _Reached(Exception):
    """Leaves a network's forward pass where it isn't needed any further."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


def _stop_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else kwargs["hidden_states"])


def _stop_after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)


def _giving(hidden: torch.Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook by which a layer gets `hidden` in place of its own hidden states."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    return hook


@contextmanager
def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward pass; an own one, as some libraries put there, comes back."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
