"""Quantised targets: each segment to predict is replaced by the nearest of several k-means codes.

Cuervo et al., "Variable-rate hierarchical CPC leads to acoustic unit discovery in speech" (2022);
"robust" because codes are re-estimated in each epoch, as by Lancucki et al., "Robust training of
vector quantized bottleneck models" (2020). All names are keys of checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.kmeans import assign, kmeans
from utils.misc import UserError
from utils.run.distributed import from_rank_zero

FIRST_EPOCH, LAST_EPOCH = 3, 50  # new codes at the start of each epoch from 3 to 49; none before
RESERVOIR = 20_480  # vectors to estimate codes from
FEWEST_PER_CODE = 4  # vectors
COMMITMENT = 0.25  # weight of the loss that moves vectors to their codes, not codes to vectors


class RobustKmeans(nn.Module):
    """A batch norm and, from the fourth epoch on, the nearest of `n_codes` codes, whose gradient is
    passed straight through to the vector that it replaces."""

    def __init__(self, dim, n_codes):
        super().__init__()
        self.batchNorm = nn.BatchNorm1d(dim)
        self.embedding = nn.Embedding(n_codes, dim)
        nn.init.xavier_uniform_(self.embedding.weight)
        self.reestimationReservoir = Reservoir(RESERVOIR, dim)
        # Unused but part of the checkpoint format.
        self.register_buffer("reestimationData", torch.zeros(5, dtype=torch.int32))

    def forward(self, encoded, lengths, epoch):
        """encoded (B, n, D), lengths (B,) in segments -> the targets (B, n, D), and a loss."""
        is_segment = torch.arange(encoded.size(1), device=lengths.device) < lengths.unsqueeze(1)
        with torch.autocast(encoded.device.type, enabled=False):
            vectors = self.batchNorm(encoded[is_segment])
            if self.training and epoch < LAST_EPOCH:
                self.reestimationReservoir.add(vectors.detach())
            codes, loss = self.nearest(vectors)
        if epoch < FIRST_EPOCH:  # a loss of 0 gives the codes a gradient nevertheless
            codes, loss = vectors, 0 * loss
        return torch.zeros_like(encoded).masked_scatter(is_segment.unsqueeze(2), codes), loss

    def nearest(self, vectors):
        """The codes nearest to vectors (N, D), and the loss that moves each towards the other."""
        ids, _ = assign(vectors.detach(), self.embedding.weight.detach())
        codes = self.embedding(ids)
        loss = F.mse_loss(codes, vectors.detach())
        loss = loss + COMMITMENT * F.mse_loss(vectors, codes.detach())
        return vectors + (codes - vectors).detach(), loss

    @torch.no_grad()
    def begin_epoch(self, epoch, generator):
        """Re-estimate the codes from the vectors of the last epoch. All ranks must call it."""
        if FIRST_EPOCH <= epoch < LAST_EPOCH:
            self.embedding.weight.copy_(from_rank_zero(self.estimated_codes(generator)))
        self.reestimationReservoir.i.zero_()

    def estimated_codes(self, generator):
        """Codes by k-means, (n_codes, D); if there are few vectors, fewer codes are repeated."""
        vectors, codes = self.reestimationReservoir.vectors, self.embedding.weight
        n_found = max(1, min(len(codes), len(vectors) // FEWEST_PER_CODE))
        try:
            found = kmeans(vectors, n_found, generator, tolerance=1e-4).centers
        except UserError:  # too few different vectors
            return codes.clone()
        return found[torch.arange(len(codes), device=found.device) % n_found]


class Reservoir(nn.Module):
    """A random sample of all vectors added: Vitter, "Random sampling with a reservoir" (1985)."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("buffer", torch.zeros(size, dim))
        self.register_buffer("i", torch.zeros(1, dtype=torch.int32))  # vectors added so far

    @property
    def vectors(self):
        return self.buffer[: int(self.i)]

    def add(self, vectors):
        """Add vectors (N, D), drawing with the global generator of their device."""
        size, number = len(self.buffer), torch.arange(len(vectors), device=vectors.device)
        added = self.i + number  # vectors added before each
        place = (torch.rand(len(vectors), device=vectors.device) * (added + 1)).long()
        place = torch.where(added < size, added, place).clamp(max=size)
        # If several take the same place, the last one stays.
        latest = torch.full((size + 1,), -1, device=vectors.device)
        latest.scatter_reduce_(0, place, number, "amax")
        taken = (latest[:size] >= 0).nonzero().squeeze(1)
        self.buffer[taken] = vectors[latest[taken]].to(self.buffer.dtype)
        self.i += len(vectors)
