"""LoRA (arXiv 2106.09685): the weights stay as they are, and a product of two narrow matrices beside each is trained.

A linear layer computes W x + alpha / R * B A x, where A [R, in] and B [out, R] are its adapter. B starts at zero, so
training starts from the model itself, and the model without its adapters is the reference model for ever.

All linear layers inside the decoder's layers have one, attention's, MLP's and Mamba's, but routers. Embedding, head,
norms, convolutions and experts have none and stay frozen.

The policy that samples is the one that trains: adapters are added in the forward pass there too. In bfloat16 a merged
weight would be another policy, for what an adapter adds is often smaller than half of a weight's last bit. Weights are
merged only where they are copied anyway, in a CPU's packed copies (sampler/packed.py), and at the end, for final/.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanosafe.kernels.cpu_matmul import Linear, linear
from nanosafe.parallel import full_tensor, local_shard
from nanosafe.randomness import derive_seed

ADAPTER = ("lora_A", "lora_B")  # PEFT's names
PEFT_PREFIX = "base_model.model."  # of the module that has an adapter, in PEFT's files


class LoraLinear(Linear):
    """A frozen linear layer and its adapter."""

    enabled = True

    def __init__(self, plain: nn.Linear, rank: int, alpha: float):
        # nn.Linear's own constructor would draw weights that are there already.
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.lora_A = nn.Parameter(plain.weight.new_zeros(rank, plain.in_features))
        self.lora_B = nn.Parameter(plain.weight.new_zeros(plain.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out]."""
        if not self.enabled:
            return super().forward(x)
        # Before the wide product: recomputation in the backward pass may end where that one begins.
        update = self.update(x)
        return super().forward(x) + update

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds to the layer's result, [N, out]."""
        return linear(self.scale * linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight that computes what weight and adapter do: their sum in float32, rounded once to the weight's type.

        Under sharding every rank must call this, and each gets its rows.
        """
        A, B = full_tensor(self.lora_A).float(), full_tensor(self.lora_B).float()
        return sum_in_float32(self.weight, self.scale * (B @ A))


def add_adapters(model: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a decoder, and give its linear layers adapters that are zero."""
    model.requires_grad_(False)
    for name, parent in list(model.model.layers.named_modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not name.endswith("router"):
                setattr(parent, child_name, LoraLinear(child, rank, alpha))


def freeze_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Give frozen parameters `dtype`: only what trains needs a float32 master."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def adapted(model: nn.Module) -> dict[str, LoraLinear]:
    """Its layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def is_adapter(name: str) -> bool:
    """Of a parameter's name."""
    return name.endswith(ADAPTER)


@torch.no_grad()
def start_adapters(model: nn.Module, seed: int) -> None:
    """A as PEFT draws it, uniform in +-1/sqrt(in), a function of seed and name for any number of ranks; B zero."""
    for name, layer in adapted(model).items():
        generator = torch.Generator().manual_seed(derive_seed(seed, "lora", name))
        bound = 1 / math.sqrt(layer.in_features)
        values = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        copy_whole(layer.lora_A, values)
        layer.lora_B.zero_()


@torch.no_grad()
def copy_whole(parameter: Tensor, values: Tensor) -> None:
    """Fill a parameter, sharded or not, from a whole tensor that every rank has."""
    if isinstance(parameter, DTensor):
        values = local_shard(values.__getitem__, like=parameter)
    parameter.copy_(values)


def sum_in_float32(weight: Tensor, update: Tensor) -> Tensor:
    """weight + update, in the weight's type and sharded as it is; update: whole, float32."""
    update = update.to(weight.device)
    if isinstance(weight, DTensor):
        update = local_shard(update.__getitem__, like=weight)
    return (weight.float() + update).to(weight.dtype)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put the adapters into the weights, in place, and set B to zero: the model stays the same up to rounding."""
    for layer in adapted(model).values():
        layer.weight.copy_(layer.merged())
        layer.lora_B.zero_()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its adapters, if it has any, inside the block."""
    layers = adapted(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


def merged_weight(layer: nn.Linear) -> Tensor:
    """A linear layer's weight, with its adapter if it has one."""
    return layer.merged() if isinstance(layer, LoraLinear) else layer.weight.detach()


def product_with_update(layer: nn.Linear, product: Tensor, x: Tensor) -> Tensor:
    """layer(x) where the product with its weight is there already."""
    return product + layer.update(x) if isinstance(layer, LoraLinear) else product
