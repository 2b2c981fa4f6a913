"""The encodings on which probes are trained: computed batch by batch or cached, and standardised."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerwise.probes.decoders import get_type, is_flatten, list_layers, shares_parameters

Encoder = Callable[[Tensor], Tensor]  # indices (B,) -> encodings (B, ...)


def make_encoder(blocks: nn.Sequential, source: Encoder, batches: tuple[Tensor, ...], cache_bytes: int) -> Encoder:
    """Return indices (B,) -> blocks(source(indices)).

    All encodings are computed once and cached if they fit cache_bytes. Otherwise each call computes its own.
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
    return lambda indices: cached[indices]


def match_dtype(decoder: nn.Sequential, encode: Encoder) -> Encoder:
    """Return an encoder whose encodings have the dtype of the decoder, which differs for models of half precision."""
    dtype = next((p.dtype for p in decoder.parameters()), None)

    def converted(indices: Tensor) -> Tensor:
        z = encode(indices)
        return z.to(dtype or torch.promote_types(z.dtype, torch.float32)) if z.is_floating_point() else z

    return converted


def standardise(decoder: nn.Sequential, encode: Encoder, batches: tuple[Tensor, ...]) -> Encoder:
    """Return an encoder whose features (before a convolution: whose channels) have standard deviation 1.

    Done only if the decoder begins with a linear layer or a convolution whose weights could do the same, so that the
    set of functions does not change. The mean is subtracted only if that layer has a bias and does not pad. Features
    that are constant keep their scale.
    """
    first, *rest = list_layers(decoder)
    layer = rest[0] if is_flatten(first) and rest else first
    z = encode(batches[0][:1])
    linear = get_type(layer) is nn.Linear and (is_flatten(first) or z.dim() == 2)
    if not (linear or get_type(layer) is nn.Conv2d) or not layer.weight.requires_grad:
        return encode
    if shares_parameters(decoder):  # another layer would have to undo what the first one absorbs
        return encode
    over, N = (0,) if linear else (0, 2, 3), sum(map(len, batches))
    mean, square = torch.zeros(2, *z.double().mean(over, keepdim=True).shape, dtype=torch.float64, device=z.device)
    for indices in batches:
        h = encode(indices).double()
        mean += h.mean(over, keepdim=True) * len(indices) / N
        square += h.square().mean(over, keepdim=True) * len(indices) / N
    variance = square - mean**2
    scale = torch.where(variance > 1e-12 * square, variance, 1.0).rsqrt()
    has_bias = layer.bias is not None and layer.bias.requires_grad
    can_shift = has_bias and (linear or layer.padding in ("valid", (0, 0)))
    shift = -mean * scale if can_shift else torch.zeros_like(mean)
    scale, shift = scale.to(z.dtype), shift.to(z.dtype)
    return lambda indices: torch.addcmul(shift, encode(indices), scale)
