"""Depthwise convolution of packed patches through a table of slots, and the LayerNorm after it, without a canvas.

    conv[s] = bias + sum_o weight[o] * x[s + o]        (s a site, o an offset; hidden neighbours count as zero)
    out = (conv - mean_c(conv)) * rstd,    rstd = 1 / sqrt(mean_c((conv - mean_c(conv))^2) + eps)

and backward, with g the gradient of out:

    grad_conv = rstd * (g - mean_c(g) - out * mean_c(g * out))
    grad_x[s] = sum_o weight[-o] * grad_conv[s + o]        (the same convolution with the flipped kernel)
    grad_weight[o] = sum_s grad_conv[s] * x[s + o],    grad_bias = sum_s grad_conv[s]

Nothing is scattered or added atomically, so sums have one order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fcmae.ops.operation import operation
from fcmae.patches import pick_cells

NUMBA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the CPU version takes; it computes in float32."""


def patch_slots(visible_ids: Tensor, num_patches: int) -> Tensor:
    """Return int32 (b, L): the place of each patch in its image's row of visible_ids (b, p), -1 where hidden."""
    b, p = visible_ids.shape
    places = torch.arange(p, dtype=torch.int32, device=visible_ids.device).expand(b, p)
    slots = torch.full((b, num_patches), -1, dtype=torch.int32, device=visible_ids.device)
    return slots.scatter(1, visible_ids, places)


def patch_depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    visible_ids: Tensor,
    slots: Tensor,
    grid: tuple[int, int],
    eps: float,
) -> Tensor:
    """Return LayerNorm without weight and bias of `patch_depthwise`, with the same arguments and that norm's eps.

    (b, p, k, k, c) in x's dtype. A weight and bias of the LayerNorm belong into the linear layer that follows.
    """
    return patch_depthwise_norm_rstd(x, weight, bias, visible_ids, slots, grid, eps)[0]


def _canvas(x: Tensor, slots: Tensor, grid: Sequence[int]) -> Tensor:
    """Patches (b, p, k, k, c) laid out as (b, c, h, w), hidden ones zero, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    padded = torch.cat([x, torch.zeros_like(x[:, :1])], 1)  # slot -1 is the last one
    image = torch.arange(len(x), device=x.device)[:, None]
    return rearrange(padded[image, slots], "b (gh gw) i j c -> b c (gh i) (gw j)", gh=grid[0], gw=grid[1])


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, visible_ids: Tensor, slots: Tensor, grid: Sequence[int]
) -> Tensor:
    canvas = _canvas(x, slots, grid)
    weight, bias = weight.to(canvas.dtype), None if bias is None else bias.to(canvas.dtype)
    out = F.conv2d(canvas, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return pick_cells(out.permute(0, 2, 3, 1), visible_ids, (grid[0], grid[1]))


def _statistics_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@operation(fake=lambda x, *_: x.new_empty(x.shape), numba_dtypes=NUMBA_DTYPES)
def patch_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    visible_ids: Tensor,
    slots: Tensor,
    grid: Sequence[int],
) -> Tensor:
    """Return the depthwise convolution (b, p, k, k, c) of visible patches, in x's dtype; hidden ones are zeros.

    Differentiable in x, weight and bias; sums in at least float32, also under autocast.

    Args:
        x: (b, p, k, k, c), k sites per patch side.
        weight: (c, 1, K, K), K odd, as of `nn.Conv2d`; of any floating dtype.
        bias: (c,), or None for none.
        visible_ids: int64 (b, p), without repeats.
        slots: `patch_slots` of visible_ids.
        grid: patches (gh, gw).
    """
    return _convolve(x, weight, bias, visible_ids, slots, grid).to(x.dtype).contiguous()


@operation(fake=lambda x, *_: (x.new_empty(x.shape), _statistics_like(x)), numba_dtypes=NUMBA_DTYPES)
def patch_depthwise_norm_rstd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    visible_ids: Tensor,
    slots: Tensor,
    grid: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `patch_depthwise_norm`; also returns rstd (b, p, k, k), at least float32."""
    conv = _convolve(x, weight, bias, visible_ids, slots, grid)
    var, mean = torch.var_mean(conv, -1, correction=0)
    rstd = (var + eps).rsqrt()
    return ((conv - mean[..., None]) * rstd[..., None]).to(x.dtype).contiguous(), rstd.contiguous()


@operation(fake=lambda grad, *_: grad.new_empty(grad.shape), numba_dtypes=NUMBA_DTYPES)
def patch_norm_backward(grad: Tensor, out: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of the norm's input (b, p, k, k, c) from that of its output, the output, and rstd."""
    g, normed = grad.to(rstd.dtype), out.to(rstd.dtype)
    along = (g * normed).mean(-1, keepdim=True)
    return (rstd[..., None] * (g - g.mean(-1, keepdim=True) - normed * along)).to(grad.dtype).contiguous()


def _fake_weight_grads(
    grad: Tensor, x: Tensor, visible_ids: Tensor, slots: Tensor, grid: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    flat = _statistics_like(x).new_empty(x.shape[-1])
    return flat.new_empty(x.shape[-1], 1, size, size), flat


@operation(fake=_fake_weight_grads, numba_dtypes=NUMBA_DTYPES)
def patch_depthwise_weight_grads(
    grad: Tensor, x: Tensor, visible_ids: Tensor, slots: Tensor, grid: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """The gradients of a size x size kernel (c, 1, size, size) and of the bias (c,), at least float32."""
    dense = _canvas(grad, slots, grid)
    c = x.shape[-1]
    grad_weight = conv2d_weight(_canvas(x, slots, grid), [c, 1, size, size], dense, padding=size // 2, groups=c)
    return grad_weight.contiguous(), dense.sum((0, 2, 3))


def _convolution_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
    return _convolution_grads(ctx, grad, *ctx.saved_tensors)


def _convolution_grads(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, visible_ids: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
    grad_x = patch_depthwise(grad, weight.flip(2, 3), None, visible_ids, slots, ctx.grid)
    grad_weight, grad_bias = patch_depthwise_weight_grads(grad, x, visible_ids, slots, ctx.grid, weight.shape[-1])
    return (
        grad_x,
        grad_weight.to(weight.dtype),
        None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
        None,
        None,
        None,
    )


def _keep_for_convolution(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, visible_ids, slots, ctx.grid = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, visible_ids, slots)


def _keep_for_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, visible_ids, slots, ctx.grid, _ = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight, visible_ids, slots, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, weight, visible_ids, slots, out, rstd = ctx.saved_tensors  # once only: checkpointing hands them out once
    grad_conv = patch_norm_backward(grad, out, rstd)
    return *_convolution_grads(ctx, grad_conv, x, weight, visible_ids, slots), None


patch_depthwise.register_autograd(_convolution_backward, setup_context=_keep_for_convolution)
patch_depthwise_norm_rstd.register_autograd(_norm_backward, setup_context=_keep_for_norm)
