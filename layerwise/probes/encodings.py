"""Functions that return encodings for indices of samples: cached or computed in each call, cast and standardised."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerwise.probes.decoders import get_unmodified_type, is_flatten, list_layers, shares_parameters

Source = Callable[[Tensor], Tensor]  # indices (B,) -> inputs or encodings (B, ...)


def make_source(blocks: nn.Sequential, source: Source, batches: tuple[Tensor, ...], cache_bytes: int) -> Source:
    """Return a function that maps indices (B,) to blocks(source(indices)).

    All encodings are computed once and cached if they fit cache_bytes. Otherwise they are computed in each call.
    """

    @torch.no_grad()
    def encode(indices: Tensor) -> Tensor:
        return blocks(source(indices))

    one, N = encode(batches[0][:1]), sum(map(len, batches))
    if N * one.nbytes > cache_bytes:
        return encode
    layout = torch.channels_last if one.dim() == 4 else torch.contiguous_format
    cached = torch.empty((N, *one.shape[1:]), dtype=one.dtype, device=one.device, memory_format=layout)
    for indices in batches:
        cached[indices] = encode(indices)

    def get_cached(indices: Tensor) -> Tensor:
        return cached[indices]

    return get_cached


def cast_encodings(decoder: nn.Sequential, source: Source) -> Source:
    """Return a source that casts encodings to the dtype of the decoder: float32 if the model has half precision."""
    dtype = next((p.dtype for p in decoder.parameters()), None)

    def cast(indices: Tensor) -> Tensor:
        z = source(indices)
        return z.to(dtype or torch.promote_types(z.dtype, torch.float32)) if z.is_floating_point() else z

    return cast


def standardise(decoder: nn.Sequential, source: Source, batches: tuple[Tensor, ...]) -> Source:
    """Return a source that scales features to standard deviation 1, or channels before a convolution.

    This is done only if the first layer is a trainable linear layer or convolution. It can absorb the scale, so V_k
    does not change. The mean is subtracted only if that layer has a trainable bias and no padding. Constant features
    are not scaled.
    """
    first, *rest = list_layers(decoder)
    layer = rest[0] if is_flatten(first) and rest else first
    z = source(batches[0][:1])
    linear = get_unmodified_type(layer) is nn.Linear and (is_flatten(first) or z.dim() == 2)
    if not (linear or get_unmodified_type(layer) is nn.Conv2d) or not layer.weight.requires_grad:
        return source
    if shares_parameters(decoder):  # the scale would also change another layer
        return source
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

    def scale_and_shift(indices: Tensor) -> Tensor:
        return torch.addcmul(shift, source(indices), scale)

    return scale_and_shift
