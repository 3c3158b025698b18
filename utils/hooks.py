"""What happens between epochs: hooks, and the promise that they leave training as it was.

A hook has `due(epoch) -> bool` and `run(epoch, model, criterion) -> dict` of values to log.
"""

import contextlib


@contextlib.contextmanager
def untouched(step):
    """A block after which the networks in `step` are as before it.

    Restores train or eval mode and `requires_grad` of everything in `step`, and the kept hidden
    state of `step.model`. Weights and buffers are the block's own business: it must not train them.
    """
    modes = [(module, module.training) for module in step.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in step.parameters()]
    hidden = step.model.hidden_state()
    step.model.reset_hidden()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires in gradients:
            parameter.requires_grad_(requires)
        step.model.set_hidden_state(hidden)
