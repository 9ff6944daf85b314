"""A model's `train` and `zero_grad` without a walk over all its modules at every step, while it is trained.

Phi-3-Vision with LoRA has 1,976 modules and 848 weights. The Trainer asks for both between the end of a step, which
waits for the device, and the first kernel of the next: 10 ms in which a GPU has nothing to do. Knows no trainer.
"""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def short_walks(model: nn.Module) -> Iterator[None]:
    """While it is open, `model.train(mode)` only looks at the modes of all modules where they are that one, 0.1 ms
    instead of 7, and `model.zero_grad()` goes over the weights that ask for a gradient.

    Modules and trained weights are found once, so neither may change meanwhile. Each module's own mode is looked at, as
    PEFT's model says that it is in training around a base that is not.
    """
    plain, modules, trained = model.train, list(model.modules()), list[nn.Parameter]()

    def train(mode: bool = True) -> nn.Module:
        return model if all(module.training is mode for module in modules) else plain(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        if not trained:
            trained.extend(weight for weight in model.parameters() if weight.requires_grad)
        for weight in trained:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.zero_()

    model.train, model.zero_grad = train, zero_grad  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.train, model.zero_grad
