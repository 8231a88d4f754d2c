"""Short names for hub repositories, and the default settings of the two training scripts: data, nothing else."""

# alias -> hub repository, pinned to the commit that was checked where one is known
ALIASES = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B@70d244cc86ccca08cf5af4e1e306ecf908b1ad5e",
    "qwen3-4b": "Qwen/Qwen3-4B@1cfa9a7208912126459214e8b04321603b3df60c",
    "qwen3-4b-2507": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3-4b-thinking-2507": "Qwen/Qwen3-4B-Thinking-2507",
    "qwen3-8b": "Qwen/Qwen3-8B@b968826d9c46dd6066d109eabc6255188de91218",
    "qwen3-14b": "Qwen/Qwen3-14B@40c069824f4251a91eefaf281ebe4c544efd3e18",
    "qwen3-32b": "Qwen/Qwen3-32B@9216db5781bf21249d130ec9da846c4624c16137",
    "r1-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B@ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562",
    "r1-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B@916b56a44061fd5cd7d6a8fb632557ed4f724f60",
    "r1-0528-qwen3-8b": "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    "r1-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B@6a6f4aa4197940add57724a7707d069478df56b1",
    "r1-llama-70b": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct@0e9e39f249a16976918f6564b8830bc894c89659",
    "llama-guard-3": "meta-llama/Llama-Guard-3-8B@7327bd9f6efbbe6101dc6cc4736302b3cbb6e425",
    "skywork-v2-llama-1b": "Skywork/Skywork-Reward-V2-Llama-3.2-1B",
    "skywork-v2-llama-3b": "Skywork/Skywork-Reward-V2-Llama-3.2-3B",
    "skywork-v2-llama-8b": "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
    "skywork-v2-qwen3-0.6b": "Skywork/Skywork-Reward-V2-Qwen3-0.6B",
    "skywork-v2-qwen3-1.7b": "Skywork/Skywork-Reward-V2-Qwen3-1.7B",
    "skywork-v2-qwen3-4b": "Skywork/Skywork-Reward-V2-Qwen3-4B",
    "skywork-v2-qwen3-8b": "Skywork/Skywork-Reward-V2-Qwen3-8B",
    "granite-guardian": "ibm-granite/granite-guardian-3.1-8b",
    "granite-4.0-350m": "ibm-granite/granite-4.0-350m",
    "granite-4.0-h-350m": "ibm-granite/granite-4.0-h-350m",
    "granite-4.0-tiny": "ibm-granite/granite-4.0-tiny-preview@9bbe26b647d49e1cc50612f30e8ab2b0920631f2",
    "granite-4.0-h-tiny": "ibm-granite/granite-4.0-h-tiny",
}

TINY_MODELS = ("tiny", "tiny-llama", "tiny-granite", "tiny-reward")  # which tiny/build.py grows

# Defaults of the training scripts. RL: what of the paper's settings could not be recovered is learning rate, KL
# coefficient and schedule of OpenRLHF's REINFORCE++ script; batch and lengths are our own, for OpenRLHF's rollout of
# 1,024 prompts is more than STAR-1 has. 500 steps are the paper's "500 episodes", read as rollouts with their updates;
# where an episode is a pass over all prompts, as in OpenRLHF, they would be eight times as many. SFT: STAR-1's own
# recipe, 39 steps on its 1,000 rows.
RECIPES = {
    "rl": dict(
        reward_model="skywork-v2-llama-8b", prompts="UCSC-VLAA/STAR-1",
        steps=500, prompts_per_step=128, samples_per_prompt=1, minibatches=4, epochs=1,
        lr=5e-7, kl_coef=0.01, kl_kind="k1",
        max_prompt_tokens=1024, max_response_tokens=4096, tokens_per_microbatch=16384,
    ),
    "sft": dict(
        data="UCSC-VLAA/STAR-1", epochs=5, batch_size=128,
        lr=1e-5, max_tokens=8192, tokens_per_microbatch=16384,
    ),
}
# What the tiny world changes in them. Its models are 10,000 times smaller and so take larger steps. Learning rate and
# epochs of SFT, learning rate and KL coefficient of RL were chosen among twenty settings each, tried on the validation
# split (docs/tuning.md).
TINY_RECIPES = {
    "rl": dict(
        reward_model="tiny-reward", prompts="tiny-star", pairs="tiny-pairs", eval_every=10,
        steps=40, prompts_per_step=64, minibatches=2, lr=1e-4, kl_coef=0.3,
        max_prompt_tokens=128, max_response_tokens=128, tokens_per_microbatch=4096,
        save_every=10, keep=4,
    ),
    "sft": dict(
        data="tiny-star", eval_every=20, epochs=5, batch_size=64,
        lr=1e-4, max_tokens=256, tokens_per_microbatch=4096,
    ),
}
