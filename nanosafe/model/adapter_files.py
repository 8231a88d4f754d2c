"""LoRA's adapters on disk: a folder in the form of the library PEFT, adapter_config.json and adapter_model.safetensors.

A run's checkpoints have this form too, with the base's config.json and tokenizer beside them, so that every script
loads one as it loads a model: `Adapter` reads it, and the base that it names is loaded and gets it merged.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from nanosafe.io.fields import ADAPTER, check, wrong
from nanosafe.io.files import read_json, staged
from nanosafe.io.hub import model_reference
from nanosafe.model.decoder import Decoder
from nanosafe.model.lora import PEFT_PREFIX, adapted, copy_whole, sum_in_float32
from nanosafe.model.weights import StoredTensors, generation_config, open_file, save_tensors


def save_adapter(model: Decoder, folder: str | Path, tokenizer=None, *, base: str, dtype: torch.dtype | None = None,
                 writes: bool = True) -> None:
    """Write the adapters of `model` as PEFT loads them, with its config.json and `tokenizer` beside them.

    base: the name of the model that they are for, as --model has it. dtype and writes: as in save_model.
    """
    layers, tensors = adapted(model), {}
    for name, layer in layers.items():
        for key in ("lora_A", "lora_B"):
            weight = getattr(layer, key).detach()
            tensors[f"{PEFT_PREFIX}{name}.{key}.weight"] = weight.to(dtype or weight.dtype)
    rank, alpha = model.config.lora
    repo, revision = model_reference(base)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": repo, "revision": revision,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        # The last two parts of a name: input_linear alone would name Granite's experts too.
        "target_modules": sorted({".".join(name.split(".")[-2:]) for name in layers}),
    }  # fmt: skip
    files = {"adapter_config.json": settings, "config.json": model.config.raw}
    if generation := generation_config(model.config, tokenizer):
        files["generation_config.json"] = generation
    with staged(Path(folder), writes) as new:
        save_tensors(tensors, new, "adapter_model", max_shard_bytes=sys.maxsize)
        if writes:
            for name, content in files.items():
                (new / name).write_text(json.dumps(content, indent=2) + "\n")
    if writes and tokenizer is not None:
        tokenizer.save(Path(folder))


class Adapter(dict[str, tuple[Tensor, Tensor]]):
    """The adapters in a folder, A [R, in] and B [out, R] in float32 by the name of the linear layer, and their base."""

    def __init__(self, folder: Path):
        """Raises ValueError for a kind of adapter that is not computed here."""
        self.folder, path = folder, folder / "adapter_config.json"
        settings = check(read_json(path), ADAPTER, path)
        self.rank, self.alpha = settings["r"], settings["lora_alpha"]
        self.base = "@".join(filter(None, (settings["base_model_name_or_path"], settings["revision"])))
        if Path(self.base).expanduser().resolve() == folder.resolve():
            raise wrong(path, "base_model_name_or_path", self.base, "another folder than the adapters'")
        stored = StoredTensors(folder, "adapter_model")
        for key in stored:
            name = key.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
            if name != key.removeprefix(PEFT_PREFIX):
                parts = [f"{PEFT_PREFIX}{name}.{part}.weight" for part in ("lora_A", "lora_B")]
                if parts[1] in stored:
                    A, B = (open_file(stored[part].path).get_tensor(part).float() for part in parts)
                    self[name] = A, B
        if len(stored) != 2 * len(self):
            raise ValueError(f"{folder}/adapter_model.safetensors holds other tensors "
                             "than pairs of lora_A and lora_B, which alone are read")

    @torch.no_grad()
    def copy_to(self, model: Decoder) -> None:
        """Fill the adapters of `model`; raises ValueError where it has others."""
        layers = adapted(model)
        shapes = {name: (layer.lora_A.shape, layer.lora_B.shape) for name, layer in layers.items()}
        if shapes != {name: (A.shape, B.shape) for name, (A, B) in self.items()}:
            raise ValueError(f"{self.folder}: the adapters are not those of the model in layers or shape")
        for name, layer in layers.items():
            for parameter, values in zip((layer.lora_A, layer.lora_B), self[name], strict=True):
                copy_whole(parameter, values)

    @torch.no_grad()
    def merge_into(self, model: Decoder) -> None:
        """Add the adapters to the weights of a `model` without any; raises ValueError for one that they do not fit."""
        weights = dict(model.named_parameters())
        for name, (A, B) in self.items():
            weight = weights.get(f"{name}.weight")
            if weight is None or weight.shape != (len(B), A.shape[1]) or A.shape[0] != B.shape[1]:
                raise ValueError(f"{self.folder}: the adapter of {name} does not fit {self.base}")
            weight.copy_(sum_in_float32(weight, self.alpha / self.rank * (B @ A)))
