"""The towers as inference runs them: the same mathematics in fewer steps and less memory, equal up to rounding.

Read the towers first; nothing here says what CLIP computes. `encode_image` and `encode_text` come here when `applies`
says that it makes no difference but time, and when `model.fast`, which is True unless you change it. Nothing derived
from weights is kept between calls, so that a weight that was edited counts at once; but see half.py. What is saved:

- Padding: only the tokens up to each text's end are computed. Exact where attention is causal, and only there.
- Beginnings: of texts that begin alike, as prompts made from a template do, the common tokens are computed once.
- The last block: only the token that speaks for the picture or text asks what the others hold, and goes on.
- QuickGELU(x) = SiLU(1.702 x) / 1.702. Matrix products scale for free, which leaves one pass over the widest tensor.
- Fresh memory: on a CPU the system clears it page by page, which can cost more than what is computed there. So all
  blocks work in the same buffer, and sums are made in place, by the products themselves.
- The patch embedding is a convolution without overlap, so one matrix product.
- BatchNorm is folded into the convolution before it, and maps have their channels side by side.
- Where attention has one query, there and in the attention pool, W_k and W_v are applied to it and to its result.
- Emulation: on a CPU without arithmetic in half precision, weights in it are multiplied in float32 (half.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import ops
from miniclip.fast import half, int8
from miniclip.fast.ops import add_layer_norm, attention_varlen, bias_quick_gelu
from miniclip.kernels.dispatch import use_kernel
from miniclip.models.resnet import AttentionPool, Bottleneck, ModifiedResNet
from miniclip.models.transformer import MLP, Attention, LayerNorm, ResidualAttentionBlock, Transformer
from miniclip.models.vit import VisionTransformer

# The modules whose arithmetic is repeated here, as they were when this was imported.
_OURS = (VisionTransformer, Transformer, ResidualAttentionBlock, Attention, MLP, LayerNorm)
_OURS += (ModifiedResNet, Bottleneck, AttentionPool)
_THEIRS = (nn.ModuleList, nn.Sequential, nn.Linear, nn.Embedding, nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.Identity)
# Matrix products of few rows, a single picture's or short texts', are faster by oneDNN than by MKL, which addmm calls.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
FEW_ROWS = 128  # measured on an AMD EPYC, two cores: up to 1.6 times as fast as MKL at 50 rows, but not with one row
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
    return all(map(is_untouched, parts))


def is_untouched(module: nn.Module | None, known: Mapping[type, Callable] = _FORWARD, any_bias: bool = False) -> bool:
    """Whether every module in it is of a `known` type, with the forward that stands there, and does that alone.

    any_bias: whether a convolution may have a bias, and a linear layer none.
    """
    if module is None:
        return True
    state = module.__dict__  # looked into directly: this runs for every module in every call
    return (
        known.get(type(module)) is type(module).forward
        and not (state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)
        and all(type(parameter) is nn.Parameter for parameter in state["_parameters"].values() if parameter is not None)
        and (any_bias or (None in state["_parameters"].values()) == isinstance(module, nn.Conv2d))
        and all(is_untouched(child, known, any_bias) for child in state["_modules"].values())
    )


def image_embedding(tower: VisionTransformer | ModifiedResNet, image: Tensor) -> Tensor:
    """Pixels [N, 3, R, R] in the tower's dtype -> embeddings [N, E], as `tower(image)`."""
    return _vit(tower, image) if isinstance(tower, VisionTransformer) else _resnet(tower, image)


def text_embedding(tower, text: Tensor) -> Tensor:
    """Token ids [N, L] -> embeddings [N, E], as the plain form in text.py; `tower.transformer` must be causal."""
    end = text.argmax(dim=-1)
    length = int(end.max()) + 1
    text = text[:, :length]
    prefix, first = _distinct_prefixes(text, end)  # [N, length]; [T]
    pooled = prefix.gather(1, end[:, None]).squeeze(1)
    padding = torch.arange(length, device=text.device) > end[:, None]
    dtype = half.arithmetic(tower.text_projection)
    x = F.embedding(text.flatten()[first], tower.token_embedding.weight).to(dtype)
    x = x + tower.positional_embedding[first % length].to(dtype)
    backend = tower.transformer.resblocks[0].attn.backend

    def attend(qkv: Tensor) -> Tensor:
        if use_kernel("attention_varlen", backend, qkv, size=length):
            starts = F.pad((end + 1).cumsum(0, dtype=torch.int32), (1, 0))
            return attention_varlen(qkv, starts, length, causal=True, backend=backend)
        sequences = qkv.index_select(0, prefix.flatten()).unflatten(0, prefix.shape)
        return ops.attention(sequences, causal=True, backend=backend).flatten(0, 1).index_select(0, first)

    def attend_once(attn: Attention, y: Tensor) -> Tensor:
        return _attend_once(y[pooled], y[prefix], *_in_proj(attn), attn.heads, padding)

    x = _run_blocks(tower.transformer, x, attend, attend_once, pooled)
    return _project(tower.ln_final(x), tower.text_projection)


def _distinct_prefixes(text: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """What has to be computed of texts [N, L] that end at `end` [N]: T tokens, one for each way that a text begins.

    Attention is causal: what becomes of a token depends on the ids up to it, so texts that begin alike share it.
    Returns, for each token, which of the T it is, [N, L] (padding counts as its text's end), and where each of the T
    first stands in text.flatten(), [T]. On a GPU finding them would take longer than it saves: there none is shared.
    """
    count, length = text.shape
    is_text = torch.arange(length, device=text.device) <= end[:, None]
    if count == 1 or text.is_cuda:
        return (is_text.flatten().cumsum(0) - 1).view(count, length), is_text.flatten().nonzero().squeeze(1)
    prefix, found, columns = torch.zeros_like(end), 0, []
    for place, ids in enumerate(text.long().T):
        rows = is_text[:, place].nonzero().squeeze(1)
        longer, inverse = torch.unique(prefix[rows] << 32 | ids[rows], return_inverse=True)
        prefix = prefix.index_copy(0, rows, found + inverse)
        found += len(longer)
        columns.append(prefix)
    prefix = torch.stack(columns, dim=1)
    places = torch.arange(prefix.numel())
    return prefix, places.new_empty(found).scatter_reduce_(0, prefix.flatten(), places, "amin", include_self=False)


def _vit(tower: VisionTransformer, image: Tensor) -> Tensor:
    weight, (down, right) = tower.conv1.weight, tower.conv1.stride  # [D, 3, P, P]; P, P
    patch = weight.shape[-1]
    image = image.to(half.arithmetic(weight))
    patches = image.unfold(2, patch, down).unfold(3, patch, right).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    same = weight.dtype is image.dtype
    grid = patches @ weight.flatten(1).T if same else half.product(patches, weight)  # [N, L - 1, D]
    class_token = (tower.class_embedding + tower.positional_embedding[0]).to(grid.dtype)
    x = torch.cat([class_token.expand(len(grid), 1, -1), grid + tower.positional_embedding[1:].to(grid.dtype)], dim=1)
    count, length, width = x.shape
    x = tower.ln_pre(x.view(-1, width))

    causal, backend = tower.transformer.causal, tower.transformer.resblocks[0].attn.backend

    def attend(qkv: Tensor) -> Tensor:
        return ops.attention(qkv.unflatten(0, (count, length)), causal, backend=backend).flatten(0, 1)

    def attend_once(attn: Attention, y: Tensor) -> Tensor:
        y = y.view(count, length, width)
        return _attend_once(y[:, 0], y[:, :1] if causal else y, *_in_proj(attn), attn.heads)

    x = _run_blocks(tower.transformer, x, attend, attend_once, torch.arange(0, len(x), length, device=x.device))
    return _project(tower.ln_post(x), tower.proj)


def _project(x: Tensor, projection: Tensor) -> Tensor:
    return (x @ projection.to(x.dtype)).to(projection.dtype)


def _run_blocks(transformer: Transformer, x: Tensor, attend: Callable, attend_once: Callable, pooled: Tensor) -> Tensor:
    """All blocks over the tokens x [T, D], which may change in place; returns those at `pooled` [N].

    attend: packed projections [T, 3, H, D / H] -> [T, D]; it knows which tokens belong together.
    attend_once: a block's attention and tokens [T, D] -> what the pooled ones hear, before out_proj.
    """
    if x.is_cuda:
        return _run_blocks_on_gpu(transformer.resblocks, x, attend, pooled)
    return _run_blocks_on_cpu(transformer.resblocks, x, attend, attend_once, pooled)


def _run_blocks_on_cpu(
    blocks: nn.ModuleList, x: Tensor, attend: Callable, attend_once: Callable, pooled: Tensor
) -> Tensor:
    width = x.shape[1]
    rows = max(len(x), len(pooled))  # texts may be equal, and have fewer tokens than there are texts
    buffer = x.new_empty(rows * max(3 * width, *(block.mlp.c_fc.out_features for block in blocks)))
    if blocks[0].mlp.c_fc.weight.dtype is not x.dtype:
        half.pack([weight for weight in blocks.parameters() if weight.ndim == 2])
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        y = _norm(block.ln_1, x)
        if block is blocks[-1]:
            heard, x = attend_once(attn, y), x[pooled]
        else:
            qkv = _linear(y, attn, attn.in_proj_weight, attn.in_proj_bias, buffer)
            heard = attend(qkv.unflatten(1, (3, attn.heads, -1)))
        _add_linear(x, heard, attn.out_proj)

        if ops.ACTIVATIONS[mlp.activation] is ops.quick_gelu:
            y = _norm(block.ln_2, x, 1.702)
            bias = 1.702 * mlp.c_fc.bias.to(y.dtype)
            hidden = F.silu(_linear(y, mlp.c_fc, mlp.c_fc.weight, bias, buffer), inplace=True)
            _add_linear(x, hidden, mlp.c_proj, 1 / 1.702)
        else:
            hidden = _linear(_norm(block.ln_2, x), mlp.c_fc, mlp.c_fc.weight, mlp.c_fc.bias, buffer)
            _add_linear(x, ops.ACTIVATIONS[mlp.activation](hidden), mlp.c_proj)
    return x


def _linear(y: Tensor, layer: nn.Module, weight: Tensor, bias: Tensor, buffer: Tensor) -> Tensor:
    """y [T, n_in], the layer's weight [n_out, n_in] -> y W^T + bias [T, n_out], which may be in the buffer."""
    if (integers := int8.packed(layer, y)) is not None:
        return int8.product(y, integers).add_(bias)
    if weight.dtype is not y.dtype:
        return half.product(y, weight).add_(bias)
    if _suits_onednn(y):
        return _ONEDNN_LINEAR(y, weight, bias, "none", [], "")
    return torch.addmm(bias, y, weight.T, out=buffer[: len(y) * len(weight)].view(len(y), -1))


def _add_linear(x: Tensor, y: Tensor, layer: nn.Linear, scale: float = 1) -> None:
    """x += layer(scale * y), the bias not scaled."""
    if (integers := int8.packed(layer, y)) is not None:
        x.add_(int8.product(y, integers), alpha=scale)
    elif layer.weight.dtype is not y.dtype:
        x.add_(half.product(y, layer.weight), alpha=scale)
    elif _suits_onednn(y):
        x.add_(_ONEDNN_LINEAR(y, layer.weight, None, "none", [], ""), alpha=scale)
    else:
        x.addmm_(y, layer.weight.T, alpha=scale)
    x.add_(layer.bias)


def _suits_onednn(y: Tensor) -> bool:
    return y.dtype is torch.float32 and 1 < len(y) < FEW_ROWS and _ONEDNN_LINEAR is not None


def _norm(layer: LayerNorm, x: Tensor, scale: float = 1) -> Tensor:
    """scale * layer(x). On the CPU PyTorch takes half-precision x with float32 weights, and sums in float32."""
    dtype = half.arithmetic(layer.weight)
    weight, bias = (p.to(dtype) if scale == 1 else scale * p.to(dtype) for p in (layer.weight, layer.bias))
    return F.layer_norm(x, weight.shape, weight, bias, layer.eps)


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
        x, y = add_layer_norm(attn.out_proj(heard), x, norm.weight, norm.bias, norm.eps, backend=backend)
        activation = ops.ACTIVATIONS[mlp.activation]
        if activation is ops.quick_gelu and use_kernel("bias_quick_gelu", backend, y, size=4 * y.numel()):
            hidden = bias_quick_gelu(y @ mlp.c_fc.weight.T, mlp.c_fc.bias, backend=backend)
        else:
            hidden = activation(mlp.c_fc(y))
        y = mlp.c_proj(hidden)
        if after is not None:
            norm = after.ln_1
            x, y = add_layer_norm(y, x, norm.weight, norm.bias, norm.eps, backend=backend)
    return x + y


def _resnet(tower: ModifiedResNet, image: Tensor) -> Tensor:
    """Of a single picture the features are computed plainly: there the folding costs as much as it saves."""
    dtype = half.arithmetic(tower.conv1.weight)
    if len(image) == 1 and dtype is image.dtype:
        features = tower.features(image)
    else:
        features = _resnet_features(tower, image.to(dtype))
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
    x = pool.embed(x)  # [N, L, C]
    projections = (pool.q_proj, pool.k_proj, pool.v_proj)
    weights, biases = [layer.weight for layer in projections], [layer.bias for layer in projections]
    pooled, last = _attend_once(x[:, 0], x, weights, biases, pool.heads), pool.c_proj
    return F.linear(pooled, last.weight.to(x.dtype), last.bias.to(x.dtype)).to(last.weight.dtype)


def _in_proj(attn: Attention) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Weights and biases, each of queries, keys and values."""
    return attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)


def _attend_once(
    query: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], heads: int, padding=None
) -> Tensor:
    """Attention from one token of each sequence, query [N, D], to all of it, x [N, L, D], but for `padding` [N, L].

    With a single query, W_k and W_v cost less when applied to it and to its result. Of the score q . (W_k x + b_k), the
    part q . b_k is the same everywhere: softmax ignores it. Returns [N, D], before the last projection.
    """
    w_q, *pair = (weight.to(x.dtype) for weight in weights)
    w_k, w_v = (weight.unflatten(0, (heads, -1)) for weight in pair)  # [H, D / H, D]
    q = F.linear(query, w_q, biases[0].to(x.dtype)).unflatten(1, (heads, -1))  # [N, H, D / H]
    scores = torch.einsum("nhd,hdc->nhc", q * q.shape[-1] ** -0.5, w_k) @ x.transpose(1, 2)  # [N, H, L]
    if padding is not None:
        scores.masked_fill_(padding[:, None], -torch.inf)
    mean = scores.softmax(dim=-1) @ x  # [N, H, D]
    return torch.einsum("nhc,hdc->nhd", mean, w_v).flatten(1) + biases[2]
