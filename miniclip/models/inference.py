"""The towers as inference runs them: the same mathematics in fewer steps and less memory, equal up to rounding.

Read the towers first; nothing here says what CLIP computes. `encode_image` and `encode_text` come here when `applies`
says that it makes no difference but time, and when `model.fast`, which is True unless you change it. Nothing derived
from weights is kept between calls, so that a weight that was edited counts at once. What is saved:

- Padding: only the tokens up to each text's end are computed. Exact where attention is causal, and only there.
- The last block: after its attention, only the token that speaks for the picture or text goes on.
- QuickGELU(x) = SiLU(1.702 x) / 1.702. Matrix products scale for free, which leaves one pass over the widest tensor.
- Fresh memory: on a CPU the system clears it page by page, which can cost more than what is computed there. So all
  blocks work in the same buffer, and sums are made in place, by the products themselves.
- The patch embedding is a convolution without overlap, so one matrix product.
- BatchNorm is folded into the convolution before it, and maps have their channels side by side.
- The attention pool has one query, so W_k and W_v are applied to it and to its result, not to every position.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import ops
from miniclip.kernels.dispatch import use_kernel
from miniclip.models.resnet import AttentionPool, Bottleneck, ModifiedResNet
from miniclip.models.transformer import MLP, Attention, LayerNorm, ResidualAttentionBlock, Transformer
from miniclip.models.vit import VisionTransformer

# The modules whose arithmetic is repeated here, as they were when this was imported.
_OURS = (VisionTransformer, Transformer, ResidualAttentionBlock, Attention, MLP, LayerNorm)
_OURS += (ModifiedResNet, Bottleneck, AttentionPool)
_THEIRS = (nn.ModuleList, nn.Sequential, nn.Linear, nn.Embedding, nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.Identity)
_FORWARD = {kind: kind.forward for kind in (*_OURS, *_THEIRS)}


def applies(inputs: Tensor, *parts: nn.Module) -> bool:
    """Whether the forms below compute what calling `parts` would, and nobody could tell the difference.

    Not with gradients, in training, while a graph is captured, under autocast, or when somebody hooked, replaced,
    patched, quantised or sharded any module.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or len(inputs) == 0:
        return False
    device = inputs.device.type
    if type(inputs) is not Tensor or device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
        return False
    if device == "cuda" and torch.cuda.is_current_stream_capturing():  # lengths of texts can't be read during it
        return False
    return all(map(_is_untouched, parts))


def _is_untouched(module: nn.Module | None) -> bool:
    if module is None:
        return True
    state = module.__dict__  # looked into directly: this runs for every module in every call
    return (
        _FORWARD.get(type(module)) is type(module).forward
        and not (state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)
        and all(type(parameter) is nn.Parameter for parameter in state["_parameters"].values() if parameter is not None)
        and (None in state["_parameters"].values()) == isinstance(module, nn.Conv2d)  # which alone have no bias
        and all(map(_is_untouched, state["_modules"].values()))
    )


def image_embedding(tower: VisionTransformer | ModifiedResNet, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] in the tower's dtype -> embeddings [N, E], as `tower(image)`."""
    return _vit(tower, image) if isinstance(tower, VisionTransformer) else _resnet(tower, image)


def text_embedding(tower, text: Tensor) -> Tensor:
    """Token ids [N, L] -> embeddings [N, E], as the plain form in text.py; `tower.transformer` must be causal."""
    end = text.argmax(dim=-1)
    length = int(end.max()) + 1
    is_text = torch.arange(length, device=text.device) <= end[:, None]  # [N, length]
    places = is_text.flatten().nonzero().squeeze(1)  # [T], of the T tokens that are no padding
    dtype = tower.text_projection.dtype
    x = F.embedding(text[:, :length].flatten()[places], tower.token_embedding.weight).to(dtype)
    x = x + tower.positional_embedding[places % length].to(dtype)

    backend = tower.transformer.resblocks[0].attn.backend
    padded = x.new_zeros(is_text.numel(), 3 * x.shape[1])  # zeros, since no weight of 0 makes up for NaN

    def attend(qkv: Tensor) -> Tensor:
        if use_kernel("attention_varlen", backend, qkv, size=length):
            starts = F.pad((end + 1).cumsum(0, dtype=torch.int32), (1, 0))
            return ops.attention_varlen(qkv, starts, length, causal=True, backend=backend)
        if len(places) < len(padded):
            qkv = padded.index_copy_(0, places, qkv.flatten(1)).view(-1, *qkv.shape[1:])
        heard = ops.attention(qkv.unflatten(0, is_text.shape), causal=True, backend=backend).flatten(0, 1)
        return heard[places] if len(places) < len(padded) else heard

    x = _run_blocks(tower.transformer, x, attend, pooled=(end + 1).cumsum(0) - 1)
    return tower.ln_final(x) @ tower.text_projection


def _vit(tower: VisionTransformer, image: Tensor) -> Tensor:
    weight, (down, right) = tower.conv1.weight, tower.conv1.stride  # [D, 3, P, P]; P, P
    patch = weight.shape[-1]
    patches = image.unfold(2, patch, down).unfold(3, patch, right).permute(0, 2, 3, 1, 4, 5)
    grid = patches.flatten(3).flatten(1, 2) @ weight.flatten(1).T  # [N, L - 1, D]
    class_token = (tower.class_embedding + tower.positional_embedding[0]).to(grid.dtype)
    x = torch.cat([class_token.expand(len(grid), 1, -1), grid + tower.positional_embedding[1:].to(grid.dtype)], dim=1)
    count, length, width = x.shape
    x = tower.ln_pre(x.view(-1, width))

    causal, backend = tower.transformer.causal, tower.transformer.resblocks[0].attn.backend

    def attend(qkv: Tensor) -> Tensor:
        return ops.attention(qkv.unflatten(0, (count, length)), causal, backend=backend).flatten(0, 1)

    x = _run_blocks(tower.transformer, x, attend, pooled=slice(None, None, length))
    return tower.ln_post(x) @ tower.proj


def _run_blocks(transformer: Transformer, x: Tensor, attend: Callable[[Tensor], Tensor], pooled) -> Tensor:
    """All blocks over the tokens x [T, D], which may change in place; returns those at the indices `pooled`.

    attend: packed projections [T, 3, H, D / H] -> [T, D]; it knows which tokens belong together.
    """
    return (_run_blocks_on_gpu if x.is_cuda else _run_blocks_on_cpu)(transformer.resblocks, x, attend, pooled)


def _run_blocks_on_cpu(blocks: nn.ModuleList, x: Tensor, attend: Callable[[Tensor], Tensor], pooled) -> Tensor:
    width = x.shape[1]
    buffer = x.new_empty(len(x) * max(3 * width, *(block.mlp.c_fc.out_features for block in blocks)))
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        qkv = buffer[: 3 * x.numel()].view(len(x), 3 * width)
        torch.addmm(attn.in_proj_bias, _norm(block.ln_1, x), attn.in_proj_weight.T, out=qkv)
        heard = attend(qkv.unflatten(1, (3, attn.heads, -1)))
        if block is blocks[-1]:
            heard, x = heard[pooled], x[pooled]
        _add_linear(x, heard, attn.out_proj)

        hidden = buffer[: len(x) * mlp.c_fc.out_features].view(len(x), -1)
        activation = ops.ACTIVATIONS[mlp.activation]
        scale = 1.702 if activation is ops.quick_gelu else 1
        torch.addmm(mlp.c_fc.bias, _norm(block.ln_2, x), mlp.c_fc.weight.T, beta=scale, alpha=scale, out=hidden)
        hidden = F.silu(hidden, inplace=True) if activation is ops.quick_gelu else activation(hidden)
        _add_linear(x, hidden, mlp.c_proj, 1 / scale)
    return x


def _add_linear(x: Tensor, y: Tensor, layer: nn.Linear, scale: float = 1) -> None:
    """x += layer(scale * y), the bias not scaled."""
    x.addmm_(y, layer.weight.T, alpha=scale).add_(layer.bias)


def _norm(layer: LayerNorm, x: Tensor) -> Tensor:
    """On the CPU PyTorch takes half-precision x with float32 weights, and sums in float32."""
    return F.layer_norm(x, layer.weight.shape, layer.weight, layer.bias, layer.eps)


def _run_blocks_on_gpu(blocks: nn.ModuleList, x: Tensor, attend: Callable[[Tensor], Tensor], pooled) -> Tensor:
    """Here what costs is the number of passes over memory: each norm goes with the sum before it."""
    first, backend = blocks[0].ln_1, blocks[0].attn.backend
    y = ops.layer_norm(x, first.weight, first.bias, first.eps)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        attn, mlp = block.attn, block.mlp
        heard = attend(F.linear(y, attn.in_proj_weight, attn.in_proj_bias).unflatten(1, (3, attn.heads, -1)))
        if after is None:
            heard, x = heard[pooled], x[pooled]
        norm = block.ln_2
        x, y = ops.add_layer_norm(attn.out_proj(heard), x, norm.weight, norm.bias, norm.eps, backend=backend)
        activation = ops.ACTIVATIONS[mlp.activation]
        if activation is ops.quick_gelu and use_kernel("bias_quick_gelu", backend, y, size=4 * y.numel()):
            hidden = ops.bias_quick_gelu(y @ mlp.c_fc.weight.T, mlp.c_fc.bias, backend=backend)
        else:
            hidden = activation(mlp.c_fc(y))
        y = mlp.c_proj(hidden)
        if after is not None:
            norm = after.ln_1
            x, y = ops.add_layer_norm(y, x, norm.weight, norm.bias, norm.eps, backend=backend)
    return x + y


def _resnet(tower: ModifiedResNet, image: Tensor) -> Tensor:
    """Of a single picture the features are computed plainly: there the folding costs as much as it saves."""
    features = _resnet_features(tower, image) if len(image) > 1 else tower.features(image)
    return _attention_pool(tower.attnpool, features)


def _resnet_features(tower: ModifiedResNet, image: Tensor) -> Tensor:
    x = image.contiguous(memory_format=torch.channels_last)
    x = _conv_norm(x, tower.conv1, tower.bn1).relu_()
    x = _conv_norm(x, tower.conv2, tower.bn2).relu_()
    x = _conv_norm(x, tower.conv3, tower.bn3).relu_()
    x = tower.avgpool(x)
    for stage in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        for block in stage:
            shortcut = x
            if block.downsample is not None:
                pool, conv, norm = block.downsample
                shortcut = _conv_norm(pool(x), conv, norm)
            x = _conv_norm(x, block.conv1, block.bn1).relu_()
            x = _conv_norm(x, block.conv2, block.bn2).relu_()
            x = _conv_norm(block.avgpool(x), block.conv3, block.bn3).add_(shortcut).relu_()
    return x


def _conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """norm(conv(x)), with the norm's scale in the convolution's weights and its shift as the bias."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]  # in float32, also of half weights
    return F.conv2d(x, weight.to(x.dtype), shift.to(x.dtype), conv.stride, conv.padding, conv.dilation)


def _attention_pool(pool: AttentionPool, x: Tensor) -> Tensor:
    """As `pool(x)`. Of the score q . (W_k x + b_k), the part q . b_k is the same everywhere: softmax ignores it."""
    x = pool.embed(x)  # [N, L, C]
    q = pool.q_proj(x[:, 0]).unflatten(1, (pool.heads, -1))  # [N, H, C / H]
    w_k, w_v = (layer.weight.unflatten(0, (pool.heads, -1)) for layer in (pool.k_proj, pool.v_proj))  # [H, C / H, C]
    query = torch.einsum("nhd,hdc->nhc", q * q.shape[-1] ** -0.5, w_k)
    mean = (query @ x.transpose(1, 2)).softmax(dim=-1) @ x  # [N, H, C]
    pooled = torch.einsum("nhc,hdc->nhd", mean, w_v).flatten(1) + pool.v_proj.bias
    return pool.c_proj(pooled)
