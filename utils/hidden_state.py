"""The hidden state that a recurrent network keeps from one batch to the next."""

import torch
import torch.nn.functional as F
from torch import nn


class KeepsHidden:
    """A recurrent network that can start each row where the same row of the last batch ended.

    It does with `keep_hidden`, without gradient through the state; otherwise rows start from the
    zero state. `hidden` is the state kept from the last batch, or None. Subclasses have `network`,
    an nn.LSTM, nn.GRU or nn.RNN.
    """

    keep_hidden = False
    hidden = None

    def start(self, batch_size, device, continues):
        """The initial hidden state of a batch; None is the zero state.

        continues: (B,) bool or None for all. Rows where it is False and rows that the last batch
        didn't have start from the zero state.
        """
        if not self.keep_hidden or self.hidden is None:
            return None

        def resume(state):  # (layers, rows of the last batch, A) -> (layers, B, A)
            state = state[:, :batch_size].to(device)
            state = F.pad(state, (0, 0, 0, batch_size - state.size(1)))
            if continues is not None:
                state = torch.where(continues[:, None], state, 0)
            return state.contiguous()

        return _map_state(resume, self.hidden)

    def keep(self, end):
        """Store the final state of a batch."""
        if self.keep_hidden:
            self.hidden = _map_state(torch.Tensor.detach, end)

    def is_hidden_state(self, state):
        """Whether `state` can be the `hidden` of this network."""
        is_lstm = isinstance(self.network, nn.LSTM)
        tensors = state if isinstance(state, tuple) else (state,)
        if isinstance(state, tuple) != is_lstm or len(tensors) != 1 + is_lstm:
            return False
        if not all(torch.is_tensor(t) and t.is_floating_point() and t.ndim == 3 for t in tensors):
            return False
        shape = (self.network.num_layers, tensors[0].size(1), self.network.hidden_size)
        return all(tensor.shape == shape for tensor in tensors)


def _map_state(function, state):
    """Apply `function` to a hidden state: two tensors for an LSTM, otherwise one."""
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)
