"""Functions that return encodings for indices of samples: cached or computed in each call, cast and standardised."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerwise.probes.decoders import get_unmodified_type, is_flatten, list_layers, shares_parameters

Source = Callable[[Tensor], Tensor]  # indices (B,) -> inputs or encodings (B, ...)


def make_source(
    blocks: nn.Sequential, source: Source, batches: tuple[Tensor, ...], cache_bytes: int
) -> tuple[Source, int]:
    """Return a function that maps indices (B,) to blocks(source(indices)), and the number of bytes that it caches.

    All encodings are computed once and cached if they fit cache_bytes. Otherwise they are computed in each call.
    """

    @torch.no_grad()
    def encode(indices: Tensor) -> Tensor:
        return blocks(source(indices))

    one, N = encode(batches[0][:1]), sum(map(len, batches))
    if N * one.nbytes > cache_bytes:
        return encode, 0
    layout = torch.channels_last if one.dim() == 4 else torch.contiguous_format
    cached = torch.empty((N, *one.shape[1:]), dtype=one.dtype, device=one.device, memory_format=layout)
    for indices in batches:
        cached[indices] = encode(indices)

    def get_cached(indices: Tensor) -> Tensor:
        return cached[indices]

    return get_cached, cached.nbytes


def transform_source(source: Source, transform: Callable[[Tensor], Tensor]) -> Source:
    """Return a source of the transformed encodings."""
    return lambda indices: transform(source(indices))


def make_cast(decoder: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """Return a function that casts encodings to the dtype of the decoder: float32 if the model has half precision."""
    dtype = next((p.dtype for p in decoder.parameters()), None)

    def cast(z: Tensor) -> Tensor:
        return z.to(dtype or torch.promote_types(z.dtype, torch.float32)) if z.is_floating_point() else z

    return cast


def make_standardiser(
    decoder: nn.Sequential, source: Source, batches: tuple[Tensor, ...]
) -> Callable[[Tensor], Tensor]:
    """Return a function that scales features to standard deviation 1, or channels before a convolution.

    Means and standard deviations are those over all batches of the source. Encodings are scaled only if the first layer
    is a trainable linear layer or convolution. It can absorb the scale, so V_k does not change. The mean is subtracted
    only if that layer has a trainable bias and no padding. Constant features are not scaled.
    """
    first, *rest = list_layers(decoder)
    layer = rest[0] if is_flatten(first) and rest else first
    z = source(batches[0][:1])
    linear = get_unmodified_type(layer) is nn.Linear and (is_flatten(first) or z.dim() == 2)
    if not (linear or get_unmodified_type(layer) is nn.Conv2d) or not layer.weight.requires_grad:
        return nn.Identity()
    if shares_parameters(decoder):  # the scale would also change another layer
        return nn.Identity()
    over, N = (0,) if linear else (0, 2, 3), sum(map(len, batches))
    mean, square = torch.zeros(2, *z.double().mean(over, keepdim=True).shape, dtype=torch.float64, device=z.device)
    for indices in batches:
        h = source(indices).double()
        mean += h.mean(over, keepdim=True) * len(indices) / N
        square += h.square().mean(over, keepdim=True) * len(indices) / N
    variance = square - mean**2
    scale = torch.where(variance > 1e-12 * square, variance, 1.0).rsqrt()
    has_bias = layer.bias is not None and layer.bias.requires_grad
    can_shift = has_bias and (linear or layer.padding in ("valid", (0, 0)))
    shift = -mean * scale if can_shift else torch.zeros_like(mean)
    scale, shift = scale.to(z.dtype), shift.to(z.dtype)

    return lambda z: torch.addcmul(shift, z, scale)


def group_equal(source: Source, batches: tuple[Tensor, ...]) -> Tensor:
    """Return the number of the group of each sample, (N,). Samples are in the same group if their encodings are equal.

    Two hashes of 64 bits are compared. Two different encodings have the same with probability 2^-66 at most, so that
    any two of 100,000 do with probability 1e-10 at most.
    """
    words = read_words(source(batches[0][:1])).shape[1]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**63), 2**63 - 1, (2, words), generator=generator).to(batches[0].device)
    hashes = torch.cat([hash_rows(source(indices), weights) for indices in batches])  # (N, 2)
    return hashes.unique(dim=0, return_inverse=True)[1]


def read_words(z: Tensor) -> Tensor:
    """Return the numbers of each encoding z (B, ...), at least float32 or integers, as words of 32 bits, (B, words)."""
    z = z.flatten(1)
    if z.is_floating_point():
        z = z + 0.0  # makes 0.0 of -0.0
    elif z.element_size() < 4:
        z = z.int()
    return z.contiguous().view(torch.int32)


def hash_rows(z: Tensor, weights: Tensor) -> Tensor:
    """Return two hashes of each encoding z (B, ...), (B, 2) int64: weighted sums of its words, modulo 2^64.

    Words that differ have a difference w 2^k with an odd w and k <= 31. The product with a random weight has 64 - k
    random bits, so that each hash is the same with probability 2^-33 at most. Words of 64 bits would have 1 bit where
    only signs differ.

    weights: random, (2, words).
    """
    words = read_words(z)
    return torch.stack([(words * of_hash).sum(1) for of_hash in weights], dim=1)


def compute_group_entropy(groups: Tensor, labels: Tensor) -> float:
    """Return the mean entropy of the labels (N,) given the group (N,), in nats.

    No decoder has a lower mean cross-entropy, because it returns the same for all samples of a group.
    """
    C = int(labels.max()) + 1
    counts = torch.bincount(groups * C + labels).double()  # of each group and label
    sizes = torch.bincount(groups).double()
    return max(0.0, ((torch.xlogy(sizes, sizes).sum() - torch.xlogy(counts, counts).sum()) / len(labels)).item())
