"""nanosafe: safety alignment of large reasoning models by SFT and REINFORCE++, from scratch.

The public surface: load official weights, sample, score, grade answers, and the REINFORCE++ mathematics. The two loops
are scripts, train_sft.py and train_rl.py.
"""

import warnings

from nanosafe.evals.graders import grade_answer
from nanosafe.kernels.head import token_logprob_entropy
from nanosafe.model import Decoder
from nanosafe.reinforce import advantages, policy_loss, token_kl
from nanosafe.rewards import load_reward_model
from nanosafe.sampler import Completion, SamplingParams, generate
from nanosafe.tokenizer import load_tokenizer
from nanosafe.weights import load_model, save_model

# `python -m nanosafe.sampler` runs a module that this one has imported, which is meant.
warnings.filterwarnings("ignore", "'nanosafe.sampler' found in sys.modules", RuntimeWarning)

__all__ = [
    "Completion", "Decoder", "SamplingParams", "advantages", "generate", "grade_answer", "load_model",
    "load_reward_model", "load_tokenizer", "policy_loss", "save_model", "token_kl", "token_logprob_entropy",
]  # fmt: skip
