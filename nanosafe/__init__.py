"""nanosafe: safety alignment of large reasoning models by SFT and REINFORCE++, from scratch.

The public surface: load official weights, sample, score, grade, and the REINFORCE++ mathematics. The two loops are
scripts, train_sft.py and train_rl.py. Importing the package alone loads nothing: a name is fetched when it is used.
"""

from importlib import import_module

from nanosafe.io.machine import prepare_torch

prepare_torch()  # before torch is imported

HOMES = {
    "Completion": "sampler.params",
    "Decoder": "model.decoder",
    "SamplingParams": "sampler.params",
    "advantages": "train.reinforce",
    "generate": "sampler.generation",
    "grade_answer": "text.grading",
    "load_model": "names",
    "load_reward_model": "names",
    "load_tokenizer": "names",
    "policy_loss": "train.reinforce",
    "save_model": "model.weights",
    "token_kl": "train.reinforce",
    "token_logprob_entropy": "kernels.logprob",
}
__all__ = list(HOMES)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'nanosafe' has no attribute {name!r}")
    return getattr(import_module(f"nanosafe.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
