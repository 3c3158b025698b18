"""The learning rate of an epoch."""


def learning_rate(epoch, base, ramp=None, halve_every=-1):
    """Adam's learning rate in `epoch` (counted from 0), the same whether or not a run was resumed.

    Over the first `ramp` epochs it rises linearly, reaching `base` in the last of them. It is
    halved at every multiple of `halve_every` epochs after the ramp; a multiple inside the ramp
    halves nothing.
    """
    ramp = ramp or 0
    if epoch < ramp:
        return base * (epoch + 1) / ramp
    if halve_every <= 0:
        return base
    return base * 0.5 ** (epoch // halve_every - ramp // halve_every)
