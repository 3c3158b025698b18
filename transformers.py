"""Causal transformer layers: a context network (`--arMode transformer`) or a prediction head.

Post-norm layers after Vaswani et al., "Attention is all you need" (2017), with the relative
positions of Shaw et al., "Self-attention with relative position representations" (2018), one table
per layer shared by its heads, or with the sinusoids of the former paper (`--abspos`).

This file shadows the Hugging Face package of the same name for all later imports in the process.
This program imports neither that package nor one that needs it.
"""

import math
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import nn

from utils.fast_dropout import dropout, relu_with_dropout_
from utils.misc import SAMPLES_PER_FRAME, UserError

N_HEADS = 8
SIZE_FEED_FORWARD = 2048
DROPOUT = 0.1


def build_transformer(dim, n_layers, size_sequence, abspos):
    """A stack of causal layers, (B, S, dim) -> (B, S, dim) for any S up to `size_sequence` frames.

    With `abspos`, fixed sinusoids are added to the input, as element 0 of the stack; otherwise
    attention depends on learned relative positions. Raises UserError if `dim` isn't a multiple of
    the number of heads.
    """
    check_heads(dim)
    positions = [SinusoidalPositions(dim, size_sequence)] if abspos else []
    layers = [TransformerLayer(dim, size_sequence, relative=not abspos) for _ in range(n_layers)]
    return nn.Sequential(*positions, *layers)


def check_heads(dim):
    """Raise UserError unless `dim`, a transformer's width, is a multiple of the heads' number."""
    if dim % N_HEADS:
        raise UserError(
            f"a transformer has {N_HEADS} heads, so its width must be a multiple of {N_HEADS}, "
            f"not {dim}: change --hiddenEncoder or choose another network"
        )


def check_length(n_frames, size_sequence):
    """Raise UserError if there are more frames than a transformer has positions for."""
    if n_frames > size_sequence:
        raise UserError(
            f"this transformer was made for at most {size_sequence} frames and got {n_frames}: cut "
            f"the audio into windows of at most {size_sequence * SAMPLES_PER_FRAME} samples"
        )


def batched_forward(layers, x):
    """Apply K layers to the same input: (B, S, dim) -> (B, S, K, dim).

    One batched matrix product replaces the K products of a loop over layers, which is faster on a
    GPU. All layers must have the same size and relative positions.
    """
    n_layers, training, (batch_size, n_frames, dim) = len(layers), layers[0].training, x.shape
    check_length(n_frames, layers[0].multihead.Att.size_sequence)

    def all_of(name):  # (K, ...); torch.stack would copy each gradient separately
        return torch.cat(list(map(attrgetter(name), layers))).unflatten(0, (n_layers, -1))

    def linear(rows, name):
        weight, bias = all_of(f"{name}.weight"), all_of(f"{name}.bias")
        return torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)

    def normalised(rows, name):
        weight, bias = all_of(f"{name}.weight"), all_of(f"{name}.bias")
        return torch.addcmul(bias.unsqueeze(1), F.layer_norm(rows, (dim,)), weight.unsqueeze(1))

    rows = x.flatten(0, 1).expand(n_layers, -1, -1)  # (K, B * S, dim)
    weight = torch.cat([all_of(f"multihead.{name}.weight") for name in ("Wq", "Wk", "Wv")], dim=1)
    heads = torch.bmm(rows, weight.mT).view(n_layers * batch_size, n_frames, 3, N_HEADS, -1)
    query, key, value = heads.permute(2, 0, 3, 1, 4)  # (K * B, heads, S, dim_head)
    attended = attend(query, key, value, all_of("multihead.Att.Krelpos"), training)
    attended = attended.transpose(1, 2).reshape(n_layers, -1, dim)
    rows = normalised(rows + torch.bmm(attended, all_of("multihead.Wo.weight").mT), "ln_multihead")
    hidden = F.dropout(linear(rows, "ffnetwork.lin1"), DROPOUT, training)
    hidden = F.relu(hidden, inplace=True)
    rows = normalised(rows + linear(hidden, "ffnetwork.lin2"), "ln_ffnetwork")
    return rows.unflatten(1, (batch_size, n_frames)).permute(1, 2, 0, 3)


class SinusoidalPositions(nn.Module):
    """Adds fixed sinusoids of each frame's position to its features."""

    def __init__(self, dim, size_sequence):
        super().__init__()
        position = torch.arange(size_sequence)[:, None]
        feature = torch.arange(dim)
        frequency = torch.exp(-math.log(10_000) * (feature - feature % 2) / dim)
        angle = position * frequency
        self.register_buffer("pe", torch.where(feature % 2 == 0, angle.sin(), angle.cos())[None])

    def forward(self, x):
        """x: (B, S, dim) -> (B, S, dim)."""
        check_length(x.size(1), self.pe.size(1))
        return x + self.pe[:, : x.size(1)]


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward network, each added to its input and normalised."""

    def __init__(self, dim, size_sequence, relative, n_outputs=1, causal=True):
        super().__init__()
        self.multihead = MultiHeadAttention(dim, size_sequence, relative, causal)
        self.ln_multihead = nn.LayerNorm(dim)
        self.ffnetwork = FeedForward(dim, SIZE_FEED_FORWARD, n_outputs * dim)
        self.ln_ffnetwork = nn.LayerNorm(dim)

    def forward(self, x):
        """x: (B, S, dim) -> (B, S, dim)."""
        x = self.ln_multihead(x + self.multihead(x))
        return self.ln_ffnetwork(x + self.ffnetwork(x))


class MultiOutputLayer(TransformerLayer):
    """A layer with relative positions whose feed-forward network has several outputs.

    Each is added to the output of the shared attention and normalised by the same norm.
    """

    def __init__(self, dim, size_sequence, n_outputs):
        super().__init__(dim, size_sequence, relative=True, n_outputs=n_outputs)

    def forward(self, x):
        """x: (B, S, dim) -> (B, S, n_outputs, dim)."""
        x = self.ln_multihead(x + self.multihead(x))
        outputs = self.ffnetwork(x).unflatten(2, (-1, x.size(2)))
        return self.ln_ffnetwork(x.unsqueeze(2) + outputs)


class FeedForward(nn.Module):
    def __init__(self, dim, dim_hidden, dim_output):
        super().__init__()
        self.lin1 = nn.Linear(dim, dim_hidden)
        self.lin2 = nn.Linear(dim_hidden, dim_output)

    def forward(self, x):
        """x: (B, S, dim) -> (B, S, dim_output)."""
        # Flattened, so that `hidden` isn't a view: changing a view in place would copy it.
        hidden = self.lin1(x.flatten(0, 1))
        output = self.lin2(relu_with_dropout_(hidden, DROPOUT, self.training))
        return output.unflatten(0, x.shape[:2])


class MultiHeadAttention(nn.Module):
    def __init__(self, dim, size_sequence, relative, causal=True):
        super().__init__()
        # The order of registration is that of the optimiser states in existing checkpoints.
        self.Wo = nn.Linear(dim, dim, bias=False)
        self.Wk = nn.Linear(dim, dim, bias=False)
        self.Wq = nn.Linear(dim, dim, bias=False)
        self.Wv = nn.Linear(dim, dim, bias=False)
        kind = CausalAttention if causal else TwoSidedAttention
        self.Att = kind(dim // N_HEADS, size_sequence, relative)

    def forward(self, x):
        """x: (B, S, dim) -> (B, S, dim); if causal, frames attend to no later ones."""
        weight = torch.cat([self.Wq.weight, self.Wk.weight, self.Wv.weight])
        heads = F.linear(x, weight).unflatten(-1, (3, N_HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        return self.Wo(self.Att(query, key, value).transpose(1, 2).flatten(2))


class CausalAttention(nn.Module):
    """Causal scaled dot-product attention, with or without learned relative positions."""

    def __init__(self, dim_head, size_sequence, relative):
        super().__init__()
        self.size_sequence = size_sequence
        if relative:
            bound = dim_head**-0.5
            krelpos = torch.empty(dim_head, size_sequence).uniform_(-bound, bound)
            self.Krelpos = nn.Parameter(krelpos)  # column -1: the frame itself, -2: the one before
            self.register_buffer("z", torch.zeros(1, size_sequence, 1))
        else:
            self.Krelpos = None
        # Like z above, unused but part of the checkpoint format.
        mask = torch.full((1, size_sequence, size_sequence), -math.inf)
        self.register_buffer("mask", mask.triu(1))

    def forward(self, query, key, value):
        """Each (B, heads, S, dim_head) -> (B, heads, S, dim_head).

        Raises UserError if S is larger than `size_sequence`.
        """
        check_length(query.size(2), self.size_sequence)
        if self.training and query.device.type == "cpu":
            return self.attend_with_dropout(query, key, value)
        return attend(query, key, value, self.Krelpos, self.training)

    def attend_with_dropout(self, query, key, value):
        """The same for training on a CPU, where PyTorch's dropout takes as long as the products."""
        scaled = query * query.size(3) ** -0.5
        weights = (scaled @ key.mT + self.position_scores(query)).softmax(dim=-1)
        return dropout(weights, DROPOUT) @ value

    def position_scores(self, query):
        """The position terms of the scores, -inf where a frame isn't attended to."""
        if self.Krelpos is not None:
            return relative_scores(query, self.Krelpos)
        n_frames = query.size(2)
        return query.new_full((n_frames, n_frames), -math.inf).triu(1)


class TwoSidedAttention(CausalAttention):
    """Attention to frames before and after, if fewer than `size_sequence` frames away."""

    def __init__(self, dim_head, size_sequence, relative):
        super().__init__(dim_head, size_sequence, relative)
        self.mask.zero_()

    def forward(self, query, key, value):
        """Each (B, heads, S, dim_head) -> (B, heads, S, dim_head), for any S."""
        if self.training and query.device.type == "cpu":
            return self.attend_with_dropout(query, key, value)
        mask, rate = self.position_scores(query), DROPOUT if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=rate)

    def position_scores(self, query):
        return two_sided_scores(query, self.Krelpos)


def attend(query, key, value, krelpos, training):
    """Causal attention, each (B, heads, S, dim_head) -> (B, heads, S, dim_head).

    krelpos: learned relative positions, see `relative_scores`, or None.
    """
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if krelpos is None else relative_scores(query, krelpos),
        is_causal=krelpos is None,
        dropout_p=DROPOUT if training else 0.0,
    )


def relative_scores(query, krelpos):
    """query: (B, heads, S, dim_head) -> (B, heads, S, S), the position terms of the scores.

    krelpos: (dim_head, size), one column per distance, the last one for distance 0; or (K,
    dim_head, size) for K layers, each applied to its own B / K rows of query.

    Entry (i, j) is query_i . krelpos[distance i - j] / sqrt(dim_head), and -inf for j > i. The
    product of row i with all distances has one column per distance; the last i + 1 of them must be
    shifted left by S - 1 - i. With an extra column in front, this is done by reading the same
    memory, from entry S on, as rows of S instead of S + 1 (Huang et al., "Music transformer",
    2018). Distances beyond the first frame, which no row needs, end up at j > i and are masked.
    """
    n_frames, dim_head = query.shape[2:]
    by_distance = F.pad(krelpos[..., -n_frames:], (1, 0))  # (..., dim_head, S + 1)
    rows = (query * dim_head**-0.5).reshape(*krelpos.shape[:-2], -1, dim_head)
    beyond = query.new_full((n_frames, n_frames + 1), -math.inf).triu(1).flip(1)
    scores = (rows @ by_distance).view(*query.shape[:-1], n_frames + 1) + beyond
    return scores.flatten(2)[..., n_frames:].unflatten(2, (n_frames, n_frames))


def two_sided_scores(query, krelpos):
    """`relative_scores` of layers that aren't causal: query (B, heads, S, dim_head) -> (.., S, S).

    Entry (i, j) is query_i . krelpos[distance i - j] for j <= i, 0 for j = i + 1, and beyond that
    query_(i + 1) . krelpos[column j - i - 2]: what shifting rows by reading the same memory gives
    where nothing is masked. Checkpoints of hCPC were trained this way. Distances without a column
    get -inf.
    """
    n_frames, size = query.size(2), krelpos.size(1)
    products = (query * query.size(3) ** -0.5) @ krelpos

    def shifted(columns):
        """(..., S, S): row i moved left by S - 1 - i, then the first entries of the next row."""
        rows = F.pad(columns, (1, 0)).flatten(2)[..., n_frames:]
        return rows.unflatten(2, (n_frames, n_frames))

    # Negative padding crops: `before` keeps the last columns, `after` the first ones.
    before, after = (F.pad(products, p) for p in ((n_frames - size, 0), (0, n_frames - size)))
    ones = torch.ones(n_frames, n_frames, dtype=torch.bool, device=query.device)
    scores = torch.where(ones.tril(), shifted(before), shifted(after))
    return scores.masked_fill(ones.tril(-size) | ones.triu(size), -math.inf)
