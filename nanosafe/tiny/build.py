"""Builds the checkpoints of the tiny world on first use, and finds them ever after.

    python -m nanosafe.tiny.build tiny tiny-reward      # or let train_rl.py do it

`tiny` (Qwen3 shape), `tiny-llama` (Llama shape) and `tiny-granite` (Granite 4's: Mamba-2, mixture of experts) are the
base policies, `tiny-reward` is the reward model of all; NAME@SEED is the same, grown from another seed. Each is a
folder in the official layout in the user's cache (NANOSAFE_CACHE, else XDG_CACHE_HOME/nanosafe, else
~/.cache/nanosafe), with its own tokenizer and chat template. A policy is random weights, trained on the world's corpus
with the packing and the loss of train_sft.py; a reward model is trained on preference pairs. A folder appears under
its name by one rename, when it is complete, and a lock makes a second process wait for the first.
"""

import json
import os
import re
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from nanosafe.io.files import write_atomic
from nanosafe.io.locks import locked
from nanosafe.io.progress import progress
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import Balance, initial_recurrence, make_decoder
from nanosafe.model.weights import save_model
from nanosafe.parallel import Ranks
from nanosafe.text.data import Document, sft_documents
from nanosafe.text.forms import as_row
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.tiny import datasets, world
from nanosafe.train.cli import readable_errors
from nanosafe.train.optim import cosine_schedule
from nanosafe.train.packing import pack, response_logprobs
from nanosafe.train.reward_model import RewardModel

NO_THOUGHT = (
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + NO_THOUGHT + "{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    + NO_THOUGHT + "{% endif %}"
)
ROLES = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + "
    "'<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}" + NO_THOUGHT + "{% endif %}"
)
TURNS = (
    "{% for m in messages %}{{ ('[USER] ' if m['role'] == 'user' else '[MODEL] ') + m['content'] + '[END]' }}"
    "{% endfor %}"
)  # fmt: skip


class Text(NamedTuple):
    """A tokenizer and its template. The first special token ends a turn, the second pads."""

    template: str
    specials: tuple[str, ...]
    vocabulary: int
    bos: str | None = None


class Family(NamedTuple):
    steps: int  # of its training
    style: str  # of its thoughts
    has_read: str | None  # another style that its corpus holds some text in
    text: Text
    shape: dict


COMMON = dict(hidden_act="silu", rms_norm_eps=1e-6, attention_bias=False, torch_dtype="float32")
POLICY = COMMON | dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rope_theta=10000.0,
    tie_word_embeddings=True,
)  # fmt: skip
FAMILIES = {
    "tiny": Family(
        steps=750, style="okay", has_read="policy",
        text=Text(CHATML, ("<|im_end|>", "<|endoftext|>", "<|im_start|>"), 1280),
        shape=POLICY | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
    ),
    "tiny-llama": Family(
        steps=1500, style="task", has_read=None,
        text=Text(HEADERS, ("<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
                            "<|begin_of_text|>"), 1280, "<|begin_of_text|>"),
        shape=POLICY | dict(architectures=["LlamaForCausalLM"], model_type="llama"),
    ),
    # Granite 4's parts in its proportions, but for more attention, which four layers cannot spare.
    "tiny-granite": Family(
        steps=800, style="task", has_read="policy",
        text=Text(ROLES, ("<|end_of_text|>", "<|pad|>", "<|start_of_role|>", "<|end_of_role|>"), 1280),
        shape=POLICY | dict(
            architectures=["GraniteMoeHybridForCausalLM"], model_type="granitemoehybrid",
            intermediate_size=96, shared_intermediate_size=96, num_local_experts=4,
            num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.001,
            layer_types=["mamba", "attention", "mamba", "attention"], position_embedding_type="nope",
            mamba_n_heads=8, mamba_d_head=32, mamba_d_state=32, mamba_n_groups=1, mamba_d_conv=4,
            mamba_expand=2, mamba_chunk_size=64, mamba_conv_bias=True, mamba_proj_bias=False,
            attention_multiplier=32**-0.5, embedding_multiplier=1.0, residual_multiplier=1.0,
            logits_scaling=1.0,
        ),
    ),
}  # fmt: skip
REWARD_TEXT = Text(TURNS, ("[END]", "[PAD]", "[USER]", "[MODEL]"), 1536)
REWARD_SHAPE = COMMON | dict(
    architectures=["LlamaForSequenceClassification"], model_type="llama", id2label={"0": "LABEL_0"},
    hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, rope_theta=10000.0,
    tie_word_embeddings=False,
)  # fmt: skip
# The reward models, and how their preference pairs differ (see datasets.preference_pairs)
REWARDS = {
    "tiny-reward": dict(noise=0.05),
    "tiny-reward-shuffled": dict(noise=0.5),  # a control: its labels are coin flips
    "tiny-reward-length": dict(noise=0.05, bias="length"),  # for the ablations
    "tiny-reward-blind": dict(noise=0.05, bias="violence"),
}

BATCH = 16  # of the policies, in documents
PAIR_STEPS, PAIR_BATCH = 200, 32  # of the reward models, in pairs
MUON_LR, ADAM_LR, WARMUP_SHARE = 0.01, 0.01, 0.05
# Of Muon. Five, its default, took a fifth of the time of a growth; bases of three pass the same gates.
NEWTON_SCHULZ_STEPS = 3
MAX_TOKENS = 256


def is_tiny(name: str) -> bool:
    return re.sub(r"@\d+$", "", name) in FAMILIES | REWARDS


def tiny_checkpoint(name: str) -> Path:
    """The folder of `name` (a key of FAMILIES or REWARDS, perhaps with @SEED), built if the cache has none."""
    if not is_tiny(name):
        raise ValueError(f"{name} is no model of the tiny world; those are {', '.join(FAMILIES | REWARDS)}, "
                         "each perhaps with @SEED")
    base, _, seed = name.partition("@")
    folder = cache() / f"{base}-v{world.VERSION}-seed{seed or 0}"
    if not folder.is_dir():
        with locked(folder.with_suffix(".lock")):
            if not folder.is_dir():  # another process may have built it while this one waited
                work = folder.with_suffix(".building")
                work.mkdir(parents=True, exist_ok=True)
                build = _build_policy if base in FAMILIES else _build_reward
                done = build(base, int(seed or 0), work)
                os.rename(done, folder)
                shutil.rmtree(work)
    return folder


def cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("NANOSAFE_CACHE") or Path(home) / "nanosafe").expanduser()


def _build_policy(name: str, seed: int, work: Path) -> Path:
    """A base policy: random weights of the family's shape, trained once through its corpus."""
    family, folder = FAMILIES[name], work / "model"
    shutil.rmtree(folder, ignore_errors=True)  # of a builder that was killed
    corpus = list(datasets.corpus(family.style, family.steps * BATCH, seed, family.has_read))
    texts = []
    for row in corpus[:6000] + datasets.star(500, seed):
        texts += [row["question"], row["response"]]
    vocabulary, token_ids = write_tokenizer(folder, family.text, texts)
    tokenizer = Tokenizer(folder)
    raw = family.shape | token_ids | {"vocab_size": vocabulary}
    raw |= {"nanosafe_world": family.style, "nanosafe_seed": seed}
    model = random_decoder(raw, seed)
    print(f"building {name}: a base policy, once (minutes on two cores: tiny 1.5, tiny-llama 3, "
          f"tiny-granite 3), kept in {work.parent}", file=sys.stderr)
    documents: list[Document] = []
    for row in progress(corpus, "tokenising"):
        documents += sft_documents(as_row(row, name), tokenizer, MAX_TOKENS)[0]
    ranks = Ranks("cpu", alone=True)

    def loss(batch: list[Document]) -> Tensor:
        packed = pack(batch, ranks.device)
        logprobs, _ = response_logprobs(model, packed)
        balance = Balance(model.config, len(packed.tokens), ranks)
        return -logprobs.mean() + balance.add(packed.memory.hybrid.routing)

    train(model, loss, in_batches(documents, BATCH), f"training {name}")
    save_model(model, folder, tokenizer)
    return folder


def _build_reward(name: str, seed: int, work: Path) -> Path:
    """A reward model: Bradley-Terry on preference pairs (Ouyang et al. 2022, eq. 1, with one pair per prompt)."""
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    pairs = datasets.preference_pairs("train", PAIR_STEPS * PAIR_BATCH, seed, **REWARDS[name])
    texts = []
    for pair in pairs[:4000]:
        texts += pair.values()
    vocabulary, token_ids = write_tokenizer(folder, REWARD_TEXT, texts)
    model = random_decoder(REWARD_SHAPE | token_ids | {"vocab_size": vocabulary}, seed)
    reward = RewardModel(model, Tokenizer(folder))
    print(f"building {name}: a reward model, once (about twenty seconds), kept in {work.parent}",
          file=sys.stderr)
    encoded: list[tuple[list[int], list[int]]] = []  # token ids of a pair's chosen and rejected conversation
    for pair in progress(pairs, "tokenising"):
        asked = {"role": "user", "content": pair["question"]}
        chosen, rejected = (
            reward.encode([asked, {"role": "assistant", "content": pair[side]}])
            for side in ("chosen", "rejected")
        )
        encoded.append((chosen, rejected))

    def loss(batch: list[tuple[list[int], list[int]]]) -> Tensor:
        chosen, rejected = reward.forward(list(chain.from_iterable(batch))).view(-1, 2).unbind(1)
        return -F.logsigmoid(chosen - rejected).mean()

    train(model, loss, in_batches(encoded, PAIR_BATCH), f"training {name}")
    save_model(model, folder, reward.tokenizer)
    return folder


def in_batches(items: list, size: int) -> list[list]:
    """Whole batches of `items`, in order; what is left over is dropped."""
    return [items[end - size : end] for end in range(size, len(items) + 1, size)]


def train(model: Decoder, loss: Callable[[list], Tensor], batches: list[list], what: str) -> None:
    """Minimise `loss`, a step on each of `batches`, from random weights, in the time that a new user has.

    The layers' matrices, each expert's too, are updated by Muon (Jordan et al. 2024); embeddings, head, norms and
    convolutions by AdamW, as Muon's authors advise. In 900 steps of 16 documents a draft so trained had 0.93 of the
    arithmetic right, where AdamW alone came to 0.76.

    Each half of a batch goes through a Python thread of its own, whose products use one core. On two cores this is
    faster than to spread products as small as these over both, and it makes the weights the same on any number of
    cores.
    """
    parameters = list(model.parameters())
    matrices, others = [], []
    experts: list[tuple[Tensor, list[nn.Parameter]]] = []  # [experts, out, in] of a mixture, and its parts
    for name, parameter in model.named_parameters():
        if ".block_sparse_moe." in name and parameter.ndim == 3:
            parts = [nn.Parameter(matrix) for matrix in parameter.detach()]  # in the same memory
            experts.append((parameter, parts))
            matrices += parts
        elif parameter.ndim == 2 and ".layers." in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    # Two for the matrices, so that two threads can step them
    optimizers = [
        (torch.optim.Muon(matrices[::2], weight_decay=0.0, ns_steps=NEWTON_SCHULZ_STEPS), MUON_LR),
        (torch.optim.Muon(matrices[1::2], weight_decay=0.0, ns_steps=NEWTON_SCHULZ_STEPS), MUON_LR),
        (torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0), ADAM_LR),
    ]

    def gradients(half: list) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(half), parameters)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of every Python thread that starts from here on
    with ThreadPoolExecutor(2) as pool:
        for step, batch in enumerate(progress(batches, what, "step")):
            middle = len(batch) // 2
            first, second = pool.map(gradients, (batch[:middle], batch[middle:]))
            for parameter, one, other in zip(parameters, first, second, strict=True):
                parameter.grad = (one + other) / 2
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for parameter, parts in experts:
                for part, gradient in zip(parts, parameter.grad, strict=True):
                    part.grad = gradient
            factor = cosine_schedule(step, len(batches), WARMUP_SHARE, 0.0)
            for optimizer, lr in optimizers:
                optimizer.param_groups[0]["lr"] = factor * lr
            steps = [pool.submit(optimizer.step) for optimizer, _ in optimizers]
            for future in steps:
                future.result()
    torch.set_num_threads(threads)


def write_tokenizer(folder: Path, text: Text, corpus: Iterable[str]) -> tuple[int, dict]:
    """A byte-level BPE tokenizer of `corpus` in the official files; -> its size, and config.json's token ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text.vocabulary, special_tokens=list(text.specials), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    config = {"chat_template": text.template, "eos_token": text.specials[0],
              "pad_token": text.specials[1]}
    config |= {"bos_token": text.bos} if text.bos else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str().encode())
    write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode())
    ids = {f"{name}_id": tokenizer.token_to_id(text) for name, text in config.items() if name.endswith("_token")}
    return tokenizer.get_vocab_size(), ids


def random_decoder(raw: dict, seed: int) -> Decoder:
    """A decoder of config.json `raw` with fresh weights."""
    model, generator = make_decoder(ModelConfig.from_dict(raw)), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        fill_random(name, parameter, model.config.num_hidden_layers, generator)
    return model


@torch.no_grad()
def fill_random(name: str, parameter: torch.Tensor, layers: int,
                generator: torch.Generator) -> None:
    """Fresh values for the parameter `name`, scaled so that activations keep their size through the layers: what is
    added to the residual stream is divided by the square root of the number of additions (as in GPT-2)."""
    if ".mamba." in name and (kind := name.rpartition(".")[2]) in ("A_log", "D", "dt_bias"):
        parameter.copy_(initial_recurrence(len(parameter))[kind])
    elif parameter.ndim < 2:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    elif "embed" in name:
        parameter.normal_(0.0, 0.05, generator=generator)
    else:
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight",
                          "output_linear.weight")):
            parameter.div_((2 * layers) ** 0.5)


if __name__ == "__main__":
    parser = ArgumentParser("python -m nanosafe.tiny.build", description="Grow models of the tiny world.")
    parser.add_argument("names", nargs="*", default=[*FAMILIES, "tiny-reward"], help="(default: %(default)s)")
    with readable_errors():
        for argument in parser.parse_args().names:
            print(tiny_checkpoint(argument))
