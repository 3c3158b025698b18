"""The network of a CPC model in plain PyTorch layers: nothing else is needed to use its weights.

Van den Oord et al., "Representation learning with contrastive predictive coding" (2018); the norm
over channels is that of Riviere et al., "Unsupervised pretraining transfers well across languages"
(2020).
"""

import torch
from torch import nn

SAMPLES_PER_FRAME = 160  # 10 ms at 16 kHz


class ChannelNorm(nn.Module):
    """Normalises each frame over its channels to zero mean and unit (unbiased) variance."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dim, 1))
        self.bias = nn.Parameter(torch.zeros(1, dim, 1))

    def forward(self, x):
        """x: (batch, dim, time) -> the same shape."""
        centered = x - x.mean(dim=1, keepdim=True)
        variance = centered.square().sum(dim=1, keepdim=True) / (x.size(1) - 1)
        return centered * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


NORMS = {
    "layerNorm": ChannelNorm,
    "batchNorm": nn.BatchNorm1d,
    "instanceNorm": lambda dim: nn.InstanceNorm1d(dim, affine=True),
    "ID": lambda dim: nn.Identity(),
}
RECURRENT = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


class Encoder(nn.Module):
    """Five convolutions, each followed by a norm and a ReLU.

    linear_output: no ReLU after the last norm
    """

    KERNELS_STRIDES_PADDINGS = ((10, 5, 3), (8, 4, 2), (4, 2, 1), (4, 2, 1), (4, 2, 1))

    def __init__(self, dim, norm, linear_output):
        super().__init__()
        self.linear_output = linear_output
        for i, shape in enumerate(self.KERNELS_STRIDES_PADDINGS):
            self.add_module(f"conv{i}", nn.Conv1d(dim if i else 1, dim, *shape))
            self.add_module(f"batchNorm{i}", NORMS[norm](dim))  # the name, whatever the norm

    def forward(self, waveform):
        """waveform: (batch, 1, samples) -> (batch, dim, (samples + 1) // 160)."""
        x = waveform
        last = len(self.KERNELS_STRIDES_PADDINGS) - 1
        for i in range(last + 1):
            x = getattr(self, f"batchNorm{i}")(getattr(self, f"conv{i}")(x))
            if i < last or not self.linear_output:
                x = x.relu()
        return x


class ContextNetwork(nn.Module):
    """A recurrent network over the frames so far; `no_ar` is none: the context is the frame."""

    def __init__(self, dim_encoded, dim_context, kind, n_layers):
        super().__init__()
        if kind != "no_ar":
            self.baseNet = RECURRENT[kind](dim_encoded, dim_context, n_layers, batch_first=True)

    def forward(self, encoded):
        """encoded: (batch, frames, dim_encoded) -> (batch, frames, dim_context)."""
        return self.baseNet(encoded)[0] if hasattr(self, "baseNet") else encoded


class CPCNetwork(nn.Module):
    """An encoder, whose frames are 10 ms apart, and a context network.

    norm: a key of NORMS; linear_output: as of Encoder; ar_mode: a key of RECURRENT or "no_ar"
    """

    def __init__(self, dim_encoded, dim_context, norm, linear_output, ar_mode, num_ar_layers):
        super().__init__()
        self.gEncoder = Encoder(dim_encoded, norm, linear_output)
        self.gAR = ContextNetwork(dim_encoded, dim_context, ar_mode, num_ar_layers)

    def forward(self, waveform):
        """waveform: (batch, samples) or (samples,), 16 kHz, in [-1, 1]; at least 160 samples.

        Returns contexts (batch, frames, dim_context) and encoded frames (batch, frames,
        dim_encoded), frames = samples // 160.
        """
        waveform = waveform.view(-1, 1, waveform.size(-1))
        frames = self.gEncoder(waveform)[:, :, : waveform.size(2) // SAMPLES_PER_FRAME]
        encoded = frames.transpose(1, 2)
        return self.gAR(encoded), encoded
