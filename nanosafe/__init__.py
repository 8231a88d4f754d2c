"""nanosafe: safety alignment of large reasoning models by SFT and REINFORCE++, from scratch.

The public surface: load official weights, sample, score, grade, and the REINFORCE++ mathematics. The two loops are
scripts, train_sft.py and train_rl.py.
"""

from nanosafe.io.machine import prepare_torch

prepare_torch()  # before torch is imported

from nanosafe.kernels.logprob import token_logprob_entropy
from nanosafe.model.decoder import Decoder
from nanosafe.model.weights import save_model
from nanosafe.names import load_model, load_reward_model, load_tokenizer
from nanosafe.sampler import Completion, SamplingParams, generate
from nanosafe.text.grading import grade_answer
from nanosafe.train.reinforce import advantages, policy_loss, token_kl

__all__ = [
    "Completion", "Decoder", "SamplingParams", "advantages", "generate", "grade_answer", "load_model",
    "load_reward_model", "load_tokenizer", "policy_loss", "save_model", "token_kl", "token_logprob_entropy",
]  # fmt: skip
