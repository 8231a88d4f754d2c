"""Gradient checkpointing: what a layer's forward pass keeps for the backward pass, and what is computed anew there.

    layer   the layer's input alone is kept: the least memory, and one forward pass more (arXiv 1604.06174)
    some    the results of matrix products and attention are kept too; norms and elementwise work, which cost memory and
            hardly a FLOP, are computed anew (selective recomputation, arXiv 2205.05198)
    none    all that the backward pass reads is kept

The gradients are the same. In Granite 4 `some` saves less, and computes the scan of a Mamba layer, which is compiled on
CUDA, anew with its products.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

RECOMPUTE = ("none", "some", "layer")  # the fastest first
PRODUCTS = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "mkldnn::_linear_pointwise",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "torch_attn::_varlen_attn",
}  # fmt: skip
LEFT_FACTOR = {"aten::mm": 0, "aten::addmm": 1}  # which argument of a product is x, [N, in]


def checkpointed(block: Callable, recompute: str, cheap_widths: list[int], *inputs) -> Tensor:
    """block(*inputs), keeping what `recompute` says; cheap_widths: see `keep_products`."""
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    contexts = {}
    if recompute == "some":
        policy = partial(keep_products, cheap_widths)
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    # No random number is drawn in a layer.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)


def keep_products(cheap_widths: list[int], context, operation, *args, **kwargs) -> CheckpointPolicy:
    """The policy of `some`: keep the results of products, but not of those with a number of input features in
    `cheap_widths`. These are the layer's last product, before which recomputation stops anyway, and LoRA's second one,
    whose wide result costs memory and hardly a FLOP. oneDNN's products are always kept: they save their factors only
    when they are done, so recomputation cannot stop before one."""
    name = operation.name()
    if name in LEFT_FACTOR and args[LEFT_FACTOR[name]].shape[-1] in cheap_widths:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if name in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
