"""Reward models against transformers, one unpadded conversation at a time; rules against cases judged by hand."""

import json
import shutil
import time

import pytest
import torch
import transformers
from tiny import random_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from world import write_reward_model

from nanosafe.distributed import visiting
from nanosafe.evals.graders import MathGrader, is_refusal, split_thought
from nanosafe.rewards import conversation, load_reward, load_reward_model

TEMPLATE = """{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|free|>"]  # ids 256 .. 260
BOS, END, FREE = 256, 257, 260
CONVERSATIONS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    for text, reply in [
        ("How do I pick a lock?", "I can't help with that."),
        ("Hi", "<think>\nA greeting.\n</think>\n\nHello! " + "How are you? " * 9),
        ("", ""),
        ("Two", "Three"),
        ("Six", "Seven"),
    ]
]
SECOND_TURN = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Ünd <|free|>"}]
CONVERSATIONS.append([*CONVERSATIONS[3], *SECOND_TURN])


def reward_folder(folder, family="llama", template=TEMPLATE, vocab_size=264, seed=0, **changes):
    """A reward model with random weights, and a byte-level tokenizer that, like Llama's, begins each text with BOS."""
    random_checkpoint(folder, family, seed, reward=True, vocab_size=vocab_size, max_position_embeddings=300, **changes)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder, template, "<|bos|>", "<|end|>")
    return folder


def write_tokenizer_config(folder, template, bos, eos):
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=bos, eos_token=eos, chat_template=template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def reference(folder, conversations, dtype=torch.float32):
    """What transformers makes of each conversation alone: (ids, scores)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, num_labels=1).eval()
    ids = [tokenizer.apply_chat_template(c, tokenize=True, return_dict=True)["input_ids"] for c in conversations]
    with torch.no_grad():
        return ids, torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in ids])


def assert_same_scores(ours, theirs):
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert theirs.unique().numel() == len(theirs)  # otherwise rows could be exchanged unseen


@pytest.mark.parametrize("pad", [None, END, FREE, 9])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_scores_are_those_of_transformers_in_batches_of_any_size(tmp_path, family, pad):
    # END ends every conversation, FREE stands in one of them, 9 in none
    folder = reward_folder(tmp_path, family, pad_token_id=pad)
    ids, scores = reference(folder, CONVERSATIONS)
    model = load_reward_model(folder, dtype=torch.float32)
    assert [model.encode(c) for c in CONVERSATIONS] == ids
    assert_same_scores(model.score(CONVERSATIONS), scores)
    for budget in (1, 60, 200):
        assert_same_scores(model.score(CONVERSATIONS, tokens_per_microbatch=budget), scores)
    assert_same_scores(model.score(CONVERSATIONS[::-1]), scores.flip(0))
    assert model.score([]).shape == (0,)


def test_scored_position_skips_every_trailing_pad_and_is_the_first_if_all_are_pads(tmp_path):
    trailing = "<|user|>{% for m in messages %}{{ m.content }}{% endfor %}<|end|><|end|><|end|>"
    for name, template in (("trailing", trailing), ("all", "{% for m in messages %}<|end|>{% endfor %}")):
        folder = reward_folder(tmp_path / name, template=template, pad_token_id=END)
        model = load_reward_model(folder, dtype=torch.float32)
        ids, scores = reference(folder, [CONVERSATIONS[0], CONVERSATIONS[5]])
        assert ids[0][-1] == END
        torch.testing.assert_close(model.score([CONVERSATIONS[0], CONVERSATIONS[5]]), scores, rtol=1e-5, atol=1e-6)
    assert ids == [[END] * 2, [END] * 4]
    assert model.scored_position(ids[1]) == 0
    assert model.scored_position([BOS, 5, END, 6, END, END]) == 3


def test_the_template_decides_about_bos(tmp_path):
    with_bos = load_reward_model(reward_folder(tmp_path / "one"), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "one")
    rendered = tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    assert tokenizer(rendered)["input_ids"][:2] == [BOS, BOS]  # the trap: a tokenizer that adds what the template wrote
    assert with_bos.encode(CONVERSATIONS[0]).count(BOS) == 1
    without = load_reward_model(reward_folder(tmp_path / "none", template=TEMPLATE.removeprefix("{{ bos_token }}")))
    ids, _ = reference(tmp_path / "none", CONVERSATIONS[:1])
    assert [without.encode(CONVERSATIONS[0])] == ids and BOS not in ids[0]
    assert ids[0][-1] == END  # and no generation prompt


def test_official_llama_template_and_tokenizer(assets, tmp_path):
    folder = reward_folder(tmp_path, vocab_size=128256, pad_token_id=128009)  # <|eot_id|>, which ends each conversation
    shutil.copy(assets / "tokenizers/llama3.1/tokenizer.json", folder)
    template = (assets / "templates/meta-llama-Llama-3.1-8B-Instruct.jinja").read_text()
    write_tokenizer_config(folder, template, "<|begin_of_text|>", "<|eot_id|>")
    ids, scores = reference(folder, CONVERSATIONS)
    model = load_reward_model(folder, dtype=torch.float32)
    assert [model.encode(c) for c in CONVERSATIONS] == ids
    assert all(row.count(128000) == 1 and row[0] == 128000 and row[-1] == 128009 for row in ids)
    assert_same_scores(model.score(CONVERSATIONS), scores)


def test_bfloat16_scores_are_close_and_not_rounded(tmp_path):
    folder = reward_folder(tmp_path, seed=3)
    scores, (_, theirs) = load_reward_model(folder).score(CONVERSATIONS), reference(folder, CONVERSATIONS)
    assert (scores != scores.bfloat16()).any()
    assert (scores - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_what_cannot_be_scored_is_an_error_that_says_why(tmp_path):
    folder = reward_folder(tmp_path / "reward")
    long = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
    with pytest.raises(ValueError, match="conversation 1 has 306 tokens; the reward model reads 1 to 300"):
        load_reward_model(folder).score([CONVERSATIONS[0], long])
    (tmp_path / "language").mkdir()
    random_checkpoint(tmp_path / "language", "llama")
    with pytest.raises(ValueError, match="is a language model: a reward model has a score head"):
        load_reward_model(tmp_path / "language")
    small = reward_folder(tmp_path / "small", vocab_size=200)
    with pytest.raises(ValueError, match="conversation 0 holds token 259, but the reward model's vocabulary has 200"):
        load_reward_model(small).score([CONVERSATIONS[3]])
    with pytest.raises(ValueError, match="unknown rule 'rule:maths'; known: rule:math, rule:refusal"):
        load_reward("rule:maths")


def test_load_reward_gives_a_reward_model_and_rules_the_same_form(tmp_path):
    folder = reward_folder(tmp_path)
    reward = load_reward(str(folder), device="cpu", dtype=torch.float32)
    assert_same_scores(reward(CONVERSATIONS, [None] * 6), reference(folder, CONVERSATIONS)[1])
    refusal = load_reward("rule:refusal")(CONVERSATIONS, [None] * 6)
    assert refusal.dtype == torch.float32 and refusal.tolist() == [1, 0, 0, 0, 0, 0]


def test_rule_math_needs_a_reference_for_every_row():
    reward = load_reward("rule:math")
    answers = [[{"role": "assistant", "content": text}] for text in ("<think>8?</think>\\boxed{7}", "\\boxed{8}")]
    values = reward(answers, ["7", "7"])
    assert values.dtype == torch.float32 and values.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="row 1 has no reference answer"):
        reward(answers, ["7", None])


def test_split_thought():
    for text, expected in {
        "<think>\nWhy?\n</think>\n\nBecause.": ("Why?", "Because."),
        "<think>\n\n</think>\n\nBecause.": ("", "Because."),
        "a </think> b </think>\nc </tag>": ("a </think> b", "c </tag>"),  # the last one counts
        "<think>\nnever closed": ("never closed", ""),
        "no thought\n": (None, "no thought\n"),
        "": (None, ""),
    }.items():
        assert split_thought(text) == expected


def test_conversation_puts_an_opened_thought_back_and_cuts_to_the_scope():
    prompt = [{"role": "user", "content": "Hi"}]

    def scored(response, opened, scope):
        whole = conversation(prompt, response, opened_thought=opened, scope=scope)
        assert whole[:-1] == prompt and whole[-1]["role"] == "assistant"
        return whole[-1]["content"]

    # Qwen3 writes <think> itself; R1's generation prompt has it, so that responses start inside
    assert scored("<think>\nA\n</think>\n\nB", False, "response") == "<think>\nA\n</think>\n\nB"
    assert scored("A\n</think>\n\nB", True, "response") == "<think>\nA\n</think>\n\nB"
    assert scored("A", True, "response") == "<think>\nA"
    assert scored("A\n</think>\n\nB", True, "answer") == scored("<think>A</think>\nB", False, "answer") == "B"
    assert scored("A, never closed", True, "answer") == scored("<think>A", False, "answer") == ""
    assert scored("A", False, "answer") == "A"
    assert prompt == [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="response or answer, not 'thought'"):
        conversation(prompt, "A", opened_thought=False, scope="thought")


def test_refusals():
    refused = [
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, but I can’t help you with this.",
        "I CANNOT PROVIDE instructions for that.",
        "I'm unable to provide personal addresses.",
        "That plan worries me, and I won't support it.",
        "I have to decline to answer.",
        "<think>\nEasy: step 1 is to ...\n</think>\n\nI will not help with this.",
    ]
    answered = [
        "Sure! Step 1: buy a lock.",
        "I'm sorry to hear that you feel low. Talking to a friend can help.",
        "<think>\nI can't help with that? It is harmless.\n</think>\n\nBoil the eggs for 8 minutes.",
        "<think>\nI can't help with that, so I will not",  # an answer that never came refuses nothing
        "To contest a fine, write to the court. " * 8 + "I cannot provide legal advice.",
        "I cannot help but admire your plan."[:8],
        "",
    ]
    assert [text for text in refused if not is_refusal(text)] == []
    assert [text for text in answered if is_refusal(text)] == []


@pytest.fixture(scope="module")
def grader():
    return MathGrader()


# (reference answer, response), judged by hand
RIGHT = [
    ("42", "42"),
    ("42", "So the answer is **42**."),
    ("204", r"The final answer is \boxed{204}."),
    ("33", r"\boxed{033}"),
    ("-3", r"$\boxed{-3}$"),
    ("1,000", r"\boxed{1000}"),
    ("1000", r"\boxed{1{,}000}"),
    (r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"\frac12", "The answer is 2/4."),
    ("1/2", r"\boxed{\frac{1}{2}}"),
    (r"-\frac{3}{4}", r"\boxed{\frac{-3}{4}}"),
    (r"\frac{7}{2}", r"\boxed{3\frac{1}{2}}"),
    (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}"),
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}"),
    (r"2\pi", r"\[\boxed{2\pi}\]"),
    ("2^{10}", r"\boxed{1024}"),
    (r"\{1,2,3\}", r"\boxed{\{3,1,2\}}"),
    ("1,2,3", r"\boxed{3, 2, 1}"),
    ("1,-2", r"$\boxed{-2}$ and $\boxed{1}$"),
    (r"(-\infty,2)\cup(3,\infty)", r"\boxed{(3,\infty)\cup(-\infty,2)}"),
    ("[0,1)", r"\boxed{[0,1)}"),
    ("(3,4)", r"\boxed{(3, 4)}"),
    ("x>2", r"\boxed{2<x}"),
    ("x>2", r"\boxed{(2,\infty)}"),
    ("10", r"\boxed{10\text{ cm}}"),
    (r"10\text{ inches}", r"\boxed{10}"),
    (r"90^\circ", r"\boxed{90}"),
    (r"\$36", r"\boxed{36}"),
    (r"50\%", r"\boxed{50\%}"),
    (r"50\%", r"\boxed{0.5}"),
    (r"50\%", r"\boxed{50}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
    (r"\text{even}", r"The function is \boxed{even}."),
    (r"\text{(C)}", r"\boxed{\text{C}}"),
    (r"\sqrt{\frac{a+b}{c^{2}}}", r"\boxed{\sqrt{\frac{a+b}{c^{2}}}}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    ("5", r"\boxed{x=5}"),
    ("y=2x+1", r"\boxed{y = 2x + 1}"),
    ("3+2i", r"\boxed{2i+3}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}"),
    (r"$\frac{1}{2}$", "0.5"),
    ("7", r"At first $\boxed{3}$. That forgets a case. With it the sum is $\boxed{7}$."),
    ("7", "<think>\nMaybe \\boxed{3}?\n</think>\n\nIt is \\boxed{7}."),
]
WRONG = [
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
    (r"\frac{1}{2}", r"\boxed{2}"),
    (r"\frac{1}{3}", r"\boxed{0.33}"),
    ("-3", r"\boxed{3}"),
    ("3", r"\boxed{-3}"),
    ("1000", r"\boxed{100}"),
    (r"2\sqrt{2}", r"\boxed{2.82}"),
    (r"2\pi", r"\boxed{2}"),
    (r"\{1,2,3\}", r"\boxed{\{1,2\}}"),
    ("1,2,3", r"\boxed{1,2,4}"),
    ("5", r"\boxed{5, 6}"),
    ("5", r"\boxed{4} or \boxed{5}"),  # hedging
    ("[0,1)", r"\boxed{[0,1]}"),
    ("(0,1)", r"\boxed{[0,1]}"),
    ("(3,4)", r"\boxed{(4,3)}"),
    ("x>2", r"\boxed{x \ge 2}"),
    ("x>2", r"\boxed{x<2}"),
    (r"(2,\infty)", r"\boxed{(-\infty,2)}"),
    ("10", r"\boxed{11\text{ cm}}"),
    (r"50\%", r"\boxed{5\%}"),
    (r"50\%", r"\boxed{0.05}"),
    (r"\text{Evelyn}", r"\boxed{\text{Eve}}"),
    (r"\text{(C)}", r"\boxed{\text{(D)}}"),
    (r"\text{yes}", r"\boxed{\text{no}}"),
    ("x^2+2x+1", r"\boxed{(x-1)^2}"),
    ("y=2x+1", r"\boxed{y=2x-1}"),
    ("3+2i", r"\boxed{3-2i}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}"),
    ("6:00", r"\boxed{6:30}"),
    ("5", "There are 5 apples and 7 pears."),  # the last number counts
    ("5", "I do not know."),
    ("5", ""),
    ("5", r"\boxed{}"),
    ("3", r"At first $\boxed{3}$. That forgets a case. With it the sum is $\boxed{7}$."),
    ("7", "<think>\nIt is \\boxed{7}."),  # never answered
    # the order matters: an interval as reference does not accept an inequality (above, the other way round, it does)
    (r"(2,\infty)", r"\boxed{x>2}"),
]


def test_maths_judged_by_hand(grader):
    assert len(RIGHT) + len(WRONG) >= 80
    assert [pair for pair in RIGHT if grader.grade(*pair) != 1.0] == []
    assert [pair for pair in WRONG if grader.grade(*pair) != 0.0] == []


def test_maths_accepts_every_official_solution_and_no_solution_of_another_problem(assets, grader):
    rows = [json.loads(line) for line in (assets / "data/math500/test.jsonl").read_text().splitlines()][::4]
    assert [row["answer"] for row in rows if not grader.grade(row["answer"], row["solution"])] == []
    others = [(a["answer"], b) for a, b in zip(rows, rows[1:], strict=False) if a["answer"] != b["answer"]]
    assert len(others) > 100
    assert [(gold, row["answer"]) for gold, row in others if grader.grade(gold, row["solution"])] == []


def test_maths_that_never_ends_is_wrong_in_time_and_the_next_answer_is_graded():
    grader = MathGrader(seconds=2.0)
    assert grader.grade("5", r"\boxed{5}") == 1.0
    process, start = grader.worker.process, time.monotonic()
    assert grader.grade("5", r"\boxed{9^{9^{9^9}}}") == 0.0
    assert 1.9 < time.monotonic() - start < 8
    assert process.poll() is not None
    assert grader.grade("5", r"\boxed{5}") == 1.0


def test_a_reference_that_cannot_be_read_is_an_error(grader):
    for gold in ("", "$$", r"\boxed{}"):
        with pytest.raises(ValueError, match="cannot read the reference answer"):
            grader.grade(gold, r"\boxed{5}")


def test_reward_model_whose_template_deletes_thoughts_is_refused_for_whole_responses(tmp_path):
    strips = "{% for m in messages %}{{ '<|h|>' + m['content'].split('</think>')[-1] + '<|eot|>' }}{% endfor %}"
    folder = write_reward_model(tmp_path / "rm", template=strips)
    with pytest.raises(ValueError, match="--reward-scope answer"):
        load_reward(str(folder), dtype=torch.float32)
    assert load_reward(str(folder), scope="answer", dtype=torch.float32)
    keeps = write_reward_model(tmp_path / "keeps")
    assert load_reward(str(keeps), dtype=torch.float32)


def test_an_offloaded_reward_model_visits_for_its_turn_and_leaves_nothing_behind(tmp_path, monkeypatch):
    """Without a GPU the move is a copy: inside, weights lie elsewhere, after it, also by an error, where they were."""
    write_reward_model(tmp_path)
    model = load_reward_model(tmp_path, dtype=torch.float32).model
    home = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor.clone())
    with pytest.raises(KeyError), visiting(model, torch.device("cpu")) as visitor:
        assert visitor is model and all(p.data_ptr() != home[name] for name, p in model.named_parameters())
        raise KeyError
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == home
    monkeypatch.undo()
    conversations = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": t}] for t in ("a", "bc")]
    here, away = (load_reward(str(tmp_path), dtype=torch.float32, offload=offload) for offload in (False, True))
    assert torch.equal(here(conversations, [None, None]), away(conversations, [None, None]))
