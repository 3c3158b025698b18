"""The optimiser, Adam: its groups of parameters, and loading its state."""

import torch

from utils.misc import UserError

CODES = ".targetQuantizer.embedding.weight"  # suffix of the name of the codes for segments


def parameter_groups(networks, codebook_rate):
    """Adam's groups of parameters: one for all or, if codes are learned, a second one for these.

    codebook_rate: the learning rate of the codes, "base_lr" of their group
    """
    named = list(networks.named_parameters())
    codes = [weight for name, weight in named if name.endswith(CODES)]
    if not codes:
        return networks.parameters()
    others = [weight for name, weight in named if not name.endswith(CODES)]
    return [{"params": others}, {"params": codes, "base_lr": codebook_rate}]


def load_optimizer(optimizer, state, source):
    """Load Adam's state; settings such as `fused` stay as this program set them."""
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    try:
        if not isinstance(state["param_groups"], list):
            raise TypeError("its groups aren't a list")
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in optimizer.state:
                    _check_moments(optimizer.state[parameter], parameter)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise UserError(f"{source}: its optimizer state doesn't fit ({error})") from error
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
        for parameter in group["params"]:
            if parameter in optimizer.state:  # the fused optimiser counts steps on the device
                moments = optimizer.state[parameter]
                moments["step"] = torch.as_tensor(moments["step"]).float().to(parameter.device)


def _check_moments(moments, parameter):
    """Raise one of several errors unless Adam can continue with these."""
    shapes = {moments[key].shape for key in ("exp_avg", "exp_avg_sq")}
    strided = all(moments[key].layout == torch.strided for key in ("exp_avg", "exp_avg_sq"))
    if shapes != {parameter.shape} or not strided or torch.as_tensor(moments["step"]).numel() != 1:
        raise ValueError("moments of another shape than the weights")
    float(moments["step"])
