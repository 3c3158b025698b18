"""Segments to predict that are replaced by the nearest of some codes, found by k-means.

Cuervo et al., "Variable-rate hierarchical CPC leads to acoustic unit discovery in speech" (2022);
"robust" as the codes are found again in each epoch, like those of Lancucki et al., "Robust training
of vector quantized bottleneck models" (2020). All names are keys of checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.kmeans import assign, kmeans
from utils.misc import UserError
from utils.run.distributed import from_rank_zero

FIRST_EPOCH, LAST_EPOCH = 3, 50  # of those that begin with new codes; before, there are none
RESERVOIR = 20_480  # vectors that codes are found in
FEWEST_PER_CODE = 4  # of these
COMMITMENT = 0.25  # weight of moving vectors to their codes, not codes to their vectors


class RobustKmeans(nn.Module):
    """A batch norm and, from the fourth epoch on, the nearest of `n_codes` codes, with its gradient
    passed on to the vector it stands for."""

    def __init__(self, dim, n_codes):
        super().__init__()
        self.batchNorm = nn.BatchNorm1d(dim)
        self.embedding = nn.Embedding(n_codes, dim)
        nn.init.xavier_uniform_(self.embedding.weight)
        self.reestimationReservoir = Reservoir(RESERVOIR, dim)
        # Unused but part of the checkpoint format.
        self.register_buffer("reestimationData", torch.zeros(5, dtype=torch.int32))

    def forward(self, encoded, lengths, epoch):
        """encoded (B, n, D), of which lengths (B,) are segments -> the targets, and a loss."""
        is_segment = torch.arange(encoded.size(1), device=lengths.device) < lengths.unsqueeze(1)
        with torch.autocast(encoded.device.type, enabled=False):
            vectors = self.batchNorm(encoded[is_segment])
            if self.training and epoch < LAST_EPOCH:
                self.reestimationReservoir.add(vectors.detach())
            codes, loss = self.nearest(vectors)
        if epoch < FIRST_EPOCH:  # the loss keeps its parameters among those with a gradient
            codes, loss = vectors, 0 * loss
        return torch.zeros_like(encoded).masked_scatter(is_segment.unsqueeze(2), codes), loss

    def nearest(self, vectors):
        """The nearest codes of vectors (N, D), and the loss that moves each to the other."""
        ids, _ = assign(vectors.detach(), self.embedding.weight.detach())
        codes = self.embedding(ids)
        loss = F.mse_loss(codes, vectors.detach())
        loss = loss + COMMITMENT * F.mse_loss(vectors, codes.detach())
        return vectors + (codes - vectors).detach(), loss

    @torch.no_grad()
    def begin_epoch(self, epoch, generator):
        """Find the codes again in the vectors of the last epoch. All ranks must call it."""
        if FIRST_EPOCH <= epoch < LAST_EPOCH:
            self.embedding.weight.copy_(from_rank_zero(self.found_codes(generator)))
        self.reestimationReservoir.i.zero_()

    def found_codes(self, generator):
        """By k-means (n_codes, D): fewer where there are few vectors, several times each."""
        vectors, codes = self.reestimationReservoir.vectors, self.embedding.weight
        n_found = max(1, min(len(codes), len(vectors) // FEWEST_PER_CODE))
        try:
            found = kmeans(vectors, n_found, generator, tolerance=1e-4).centers
        except UserError:  # hardly any different vectors
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
        """Add vectors (N, D), drawing by the global generator of their device."""
        size, number = len(self.buffer), torch.arange(len(vectors), device=vectors.device)
        added = self.i + number  # before each
        place = (torch.rand(len(vectors), device=vectors.device) * (added + 1)).long()
        place = torch.where(added < size, added, place).clamp(max=size)
        # Where several take the same place, the last one stays.
        latest = torch.full((size + 1,), -1, device=vectors.device)
        latest.scatter_reduce_(0, place, number, "amax")
        taken = (latest[:size] >= 0).nonzero().squeeze(1)
        self.buffer[taken] = vectors[latest[taken]].to(self.buffer.dtype)
        self.i += len(vectors)
