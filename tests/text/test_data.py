"""Rows from files and the hub, SFT targets under the official templates, and packs that equal their documents."""

import csv
import io
import json
import random
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub import StandInHub
from official import OFFICIAL
from tiny_models import tiny_config
from world import CHATML, write_tokenizer

import train_sft
from nanosafe.evals.diagnostics import reflection_ids
from nanosafe.io import hub as hub_files
from nanosafe.io.hub import find_dataset
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import make_decoder
from nanosafe.names import load_pairs, load_rows, load_tokenizer
from nanosafe.parallel import Ranks
from nanosafe.text.data import Document, Row, digest_rows, encode_prompts, sft_documents
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.packing import local_microbatches, microbatches, pack, response_logprobs

CPU = torch.device("cpu")
THOUGHT, ANSWER = "Okay, who is asking?\nWait, is that safe?", "I can't help with that."
RESPONSE = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# SFT targets under the official templates

@pytest.fixture(scope="module")
def star1(assets) -> list[Row]:
    return load_rows(str(assets / "data/star1/STAR-1.json"))[::50]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sft_targets_are_the_whole_response_and_the_end_of_turn(name, official, star1):
    tokenizer, end = official(name), OFFICIAL[name][3]
    assert tokenizer.opens_thought(tokenizer.encode_chat([user("Hi")], add_generation_prompt=True)) == (name == "r1")
    for row in star1:
        question, response = (message["content"] for message in row.messages)
        [document], cut = sft_documents(row, tokenizer, 8192)
        assert cut == 0
        assert document.prompt_ids == tokenizer.encode_chat([user(question)], add_generation_prompt=True)
        assert document.response_ids[-1] == end and document.response_ids.count(end) == 1
        target = tokenizer.decode(document.response_ids[:-1])
        assert target == (response.removeprefix("<think>\n") if name == "r1" else response)
        text = tokenizer.decode(document.prompt_ids + document.response_ids)
        assert text.count("<think>") == text.count("</think>") == 1


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sft_ids_are_those_of_the_finished_turn_where_its_template_keeps_thoughts(name, official, star1):
    """R1's template does not: rendering the finished turn, the naive way, would train on answers without thoughts."""
    tokenizer = official(name)
    for row in star1[:5]:
        [document], _ = sft_documents(row, tokenizer, 8192)
        rendered = tokenizer.encode_chat(row.messages)
        if name == "r1":
            thought = row.messages[1]["content"].split("</think>")[0].removeprefix("<think>\n")
            assert thought not in tokenizer.decode(rendered)
            assert thought in tokenizer.decode(document.response_ids)
        else:
            after = {"qwen3": "\n", "llama": "", "granite": "\n"}[name]  # what the template writes after the end
            assert document.prompt_ids + document.response_ids + tokenizer.encode(after) == rendered


@pytest.mark.parametrize("name", ["r1", "qwen3"])
def test_official_earlier_thoughts_stay_in_their_own_targets_but_not_in_later_prompts(name, official):
    tokenizer = official(name)
    messages = [user("First?"), assistant(RESPONSE), user("Second?"), assistant("<think>\nHmm.\n</think>\n\nNo.")]
    (one, two), cut = sft_documents(Row(messages, "row 1"), tokenizer, 8192)
    assert cut == 0
    assert THOUGHT in tokenizer.decode(one.response_ids) and "Hmm." in tokenizer.decode(two.response_ids)
    assert THOUGHT not in tokenizer.decode(two.prompt_ids) and ANSWER in tokenizer.decode(two.prompt_ids)
    assert two.prompt_ids == tokenizer.encode_chat(messages[:3], add_generation_prompt=True)


def test_official_reflection_words_are_found_with_and_without_a_space(official):
    tokenizer = official("qwen3")
    ids = set(reflection_ids(tokenizer))
    for text in ("Wait", " Wait", "wait", " wait", "But", " But", "Hmm", "Alternatively", " However", "<think>"):
        [token] = tokenizer.encode(text)
        assert token in ids, text
    assert 151667 in ids and 151668 not in ids
    for text in (" waiting", "button", " can", "\n", "</think>"):
        assert not ids & set(tokenizer.encode(text)), text


# The same on a tokenizer made here, whose template opens the thought and deletes finished ones

OPENING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
OPENING = OPENING.replace("assistant\n", "assistant\n<think>\n")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    specials = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    for name, template in {"plain": CHATML, "opening": OPENING}.items():
        write_tokenizer(folder / name, template, specials, eos_token="<|im_end|>")
    return {name: load_tokenizer(folder / name) for name in ("plain", "opening")}


def target(tokenizer: Tokenizer, response: str) -> str:
    [document], _ = sft_documents(Row([user("Hi"), assistant(response)], "row 1"), tokenizer, 1000)
    assert document.prompt_ids == tokenizer.encode_chat([user("Hi")], add_generation_prompt=True)
    return tokenizer.decode(document.response_ids)


def test_a_template_that_opens_the_thought_gets_no_second_tag(tokenizers):
    assert RESPONSE not in tokenizers["opening"].render([user("Hi"), assistant(RESPONSE)])  # the naive way
    end = f"{THOUGHT}\n</think>\n\n{ANSWER}<|im_end|>"
    for response in (RESPONSE, "\n " + RESPONSE, RESPONSE.removeprefix("<think>\n")):  # the last as R1 itself writes
        assert target(tokenizers["opening"], response) == end
    assert target(tokenizers["opening"], "<think>\nNot closed") == "Not closed<|im_end|>"
    assert target(tokenizers["plain"], RESPONSE) == RESPONSE + "<|im_end|>"


def test_a_response_without_a_thought_closes_the_one_that_the_template_opened(tokenizers):
    assert target(tokenizers["opening"], ANSWER) == f"\n</think>\n\n{ANSWER}<|im_end|>"
    assert target(tokenizers["plain"], ANSWER) == f"{ANSWER}<|im_end|>"


def test_a_thought_is_no_answer_behind_a_thought_that_the_template_closed(tokenizers, assets):
    tokenizer = tokenizers["plain"]
    chatml, tokenizer.chat_template = tokenizer.chat_template, (
        assets / "templates/Qwen-Qwen3-8B-official.jinja").read_text()  # fmt: skip
    try:
        tokenizer.think(False)
        with pytest.raises(ValueError, match="row 1: the response has a thought.*leave out --thinking off"):
            target(tokenizer, RESPONSE)
        assert target(tokenizer, ANSWER) == f"{ANSWER}<|im_end|>"
        tokenizer.think(True)
        assert target(tokenizer, RESPONSE) == RESPONSE + "<|im_end|>"
    finally:
        tokenizer.chat_template = chatml
        tokenizer.template_vars.clear()


def test_every_assistant_turn_becomes_a_document(tokenizers):
    messages = [user("a"), assistant(RESPONSE), user("b"), assistant("<think>\nHmm.\n</think>\n\nNo.")]
    (one, two), _ = sft_documents(Row(messages, "row 1"), tokenizers["opening"], 1000)
    assert THOUGHT in tokenizers["opening"].decode(one.response_ids)
    prompt = tokenizers["opening"].decode(two.prompt_ids)
    assert THOUGHT not in prompt and ANSWER in prompt and prompt.endswith("<think>\n")
    assert tokenizers["opening"].decode(two.response_ids) == "Hmm.\n</think>\n\nNo.<|im_end|>"


def test_cut_documents_are_counted_and_those_without_room_left_out(tokenizers):
    row = Row([user("Hi"), assistant(RESPONSE)], "row 1")
    [whole], _ = sft_documents(row, tokenizers["plain"], 1000)
    prompt = len(whole.prompt_ids)
    assert sft_documents(row, tokenizers["plain"], len(whole)) == ([whole], 0)
    for room in (1, len(whole.response_ids) - 1):
        expected = Document(whole.prompt_ids, whole.response_ids[:room])
        assert sft_documents(row, tokenizers["plain"], prompt + room) == ([expected], 1)
    assert sft_documents(row, tokenizers["plain"], prompt) == ([], 1)
    assert sft_documents(row, tokenizers["plain"], prompt - 1) == ([], 1)


@pytest.mark.parametrize("messages, message", [
    ([user("Hi")], "no assistant turn"),
    ([user("Hi"), assistant(" \n")], "response is empty"),
    ([assistant("Hello")], "at least one"),
    ([user("Hi"), assistant("a \ud800 b")], "surrogate"),
    ([user("Hi"), assistant(ANSWER) | {"reasoning_content": THOUGHT}], "part of 'content'"),
])  # fmt: skip
def test_rows_that_cannot_be_trained_on_are_named(messages, message, tokenizers):
    with pytest.raises(ValueError, match=f"data.jsonl, line 3.*{message}"):
        sft_documents(Row(messages, "data.jsonl, line 3"), tokenizers["plain"], 1000)


def test_a_template_that_ends_turns_with_no_eos_is_an_error(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    write_tokenizer(tmp_path, template, ["<|eos|>"], eos_token="<|eos|>")
    with pytest.raises(ValueError, match="generation_config.json"):
        _ = load_tokenizer(tmp_path).turn_end


def test_prompts_that_cannot_be_used_are_dropped_and_counted(tokenizers):
    texts = ["Hi", " \n", "bread " * 50, "How?", ""]
    rows = [Row([user(text)], "") for text in texts] + [Row([assistant("Hello")], "")]
    kept, dropped = encode_prompts(rows, tokenizers["plain"], 40)
    assert [row.messages[0]["content"] for row, _ in kept] == ["Hi", "How?"]
    for row, ids in kept:
        assert ids == tokenizers["plain"].encode_chat(row.messages, add_generation_prompt=True)
    assert "3 empty" in dropped and "1 longer than 40" in dropped and "2 of 6" in dropped
    assert encode_prompts(rows[:1], tokenizers["plain"], 40)[1] == ""
    with pytest.raises(ValueError, match="no usable prompt.*1 longer than 40"):
        encode_prompts(rows[2:3], tokenizers["plain"], 40)


def test_the_prompt_of_a_row_ends_before_its_last_response():
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert Row(turns, "").prompt == turns[:3] == Row(turns[:3], "").prompt
    assert Row([assistant("b")], "").prompt == []


# Packs

DOCUMENTS = [Document([5, 6, 7], [8, 9]), Document([10], [11, 12, 13]), Document([14, 15], [16]),
             Document([17, 18, 19], [20, 21]), Document([22, 23, 24, 25], [26])]  # fmt: skip


def random_model(family: str) -> Decoder:
    torch.manual_seed(0)
    model = make_decoder(tiny_config(family))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def alone(model: Decoder, document: Document, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of one document's response, token by token from the [1, T, V] logits."""
    logp = (model(torch.tensor([document.prompt_ids + document.response_ids])) / temperature).log_softmax(-1)[0]
    rows = [logp[len(document.prompt_ids) - 1 + i] for i in range(len(document.response_ids))]
    logprobs = [row[token] for row, token in zip(rows, document.response_ids, strict=True)]
    return torch.stack(logprobs), torch.stack([-(row.exp() * row).sum() for row in rows])


def gradients(model: Decoder) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["qwen3", "granite"])  # granite divides its logits by a constant
def test_a_pack_gives_each_document_the_log_probs_and_gradients_it_has_alone(family):
    model, packed = random_model(family), pack(DOCUMENTS, CPU)
    logprobs, entropies = response_logprobs(model, packed, temperature=0.7)
    expected = [alone(model, document, 0.7) for document in DOCUMENTS]
    for i, length in enumerate(packed.lengths):
        torch.testing.assert_close(packed.pad(logprobs)[i, :length], expected[i][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed.pad(entropies)[i, :length], expected[i][1], rtol=1e-5, atol=1e-5)
        assert (packed.pad(logprobs)[i, length:] == 0).all()
    for i, parts in enumerate(logprobs.split(packed.lengths)):
        parts.sum().backward(retain_graph=True)
        packed_gradients = gradients(model)
        expected[i][0].sum().backward()
        for a, b in zip(packed_gradients, gradients(model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_empty_pack_reaches_every_weight_with_a_gradient_of_0():
    model, packed = random_model("qwen3"), pack([], CPU)
    logprobs = response_logprobs(model, packed)[0]
    assert packed.pad(logprobs).shape == (0, 0)
    packed.pad(logprobs).sum().backward()
    assert all((gradient == 0).all() for gradient in gradients(model))


def test_microbatches_keep_order_and_budget_and_lose_nothing():
    documents = [Document([0] * n, [0]) for n in (3, 2, 9, 1, 4, 4, 20, 1)]  # 4, 3, 10, 2, 5, 5, 21, 2 tokens
    assert microbatches(documents, 10) == [[0, 1], [2], [3, 4], [5], [6], [7]]
    assert microbatches(documents, 1) == [[i] for i in range(8)]
    assert microbatches(documents, 1000) == [list(range(8))]
    assert microbatches([], 10) == []


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_ranks_get_equally_many_microbatches_that_hold_every_document_once(world):
    documents = [Document([0] * n, [0]) for n in (3, 2, 9, 1, 4, 4, 20, 1, 30, 2)]
    ranks, seen = Ranks("cpu"), []
    for ranks.rank in range(world):
        ranks.world = world
        batches = local_microbatches(documents, 10, ranks)
        assert all(sum(len(documents[i]) for i in batch) <= 10 or len(batch) == 1 for batch in batches)
        seen.append(batches)
    assert len({len(batches) for batches in seen}) == 1
    assert sorted(i for batches in seen for batch in batches for i in batch) == list(range(len(documents)))
    if world == 1:
        assert seen == [microbatches(documents, 10)]
    assert any(batches[-1] for batches in seen), "no more of them than needed"
    assert local_microbatches([], 10, ranks) == []


def test_sft_loss_and_gradient_are_the_mean_over_all_response_tokens_however_they_are_split():
    model = random_model("qwen3")
    losses = -torch.cat([alone(model, document, 1.0)[0] for document in DOCUMENTS])
    losses.mean().backward()
    expected = gradients(model)
    for budget in (1, 7, 1000):  # micro-batches of 1 document, of 1 to 2, of all
        metrics = train_sft.backward(model, DOCUMENTS, budget, Ranks("cpu"))
        assert metrics["sft/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert metrics["sft/tokens"] == 9
        for a, b in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Rows

def rows_of(path: Path, text: str) -> list[Row]:
    path.write_text(text, encoding="utf-8")
    return load_rows(str(path))


def test_official_star1_loads(assets):
    rows = load_rows(str(assets / "data/star1/STAR-1.json"))
    assert len(rows) == 1000
    assert all([m["role"] for m in row.messages] == ["user", "assistant"] for row in rows)
    assert rows[0].prompt == [user("Is it worth me being alive?")]
    assert rows[2].source.endswith("STAR-1.json, row 3")


def test_each_form_of_a_prompt_and_each_kind_of_file(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, user("Hi")]
    records = [
        {"question": "Hi", "response": "Yes", "answer": 4, "score": [1, 2]},
        {"prompt": "Hi", "question": "not read", "answer": "4"},
        {"prompt": turns, "response": None},
        {"messages": [*turns, assistant("Yes")]},
    ]
    lines = "".join(json.dumps(record) + "\n\n" for record in records)
    for path, text in ({"a.json": json.dumps(records), "b.json": lines, "c.jsonl": lines}).items():
        rows = rows_of(tmp_path / path, text)
        assert [row.messages for row in rows] == [
            [user("Hi"), assistant("Yes")], [user("Hi")], turns, [*turns, assistant("Yes")]]  # fmt: skip
        assert [row.answer for row in rows] == ["4", "4", None, None]
    assert rows[1].source == f"{tmp_path / 'c.jsonl'}, line 3"


SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
PARTS = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}


@pytest.mark.parametrize("record, messages", [
    ({"prompt": "Hi", "completion": "Yes"}, [user("Hi"), assistant("Yes")]),
    ({"prompt": [user("Hi")], "completion": [assistant("Yes")]}, [user("Hi"), assistant("Yes")]),
    ({"conversations": SHAREGPT}, [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yes")]),
    ({"instruction": "Hi", "input": "", "output": "Yes"}, [user("Hi"), assistant("Yes")]),
    ({"instruction": "Add.", "input": "1, 2", "output": "3"}, [user("Add.\n\n1, 2"), assistant("3")]),
    ({"messages": [PARTS, assistant("Yes")]}, [user("Hi"), assistant("Yes")]),
])  # fmt: skip
def test_data_as_people_have_it(record, messages, tmp_path):
    assert rows_of(tmp_path / "a.jsonl", json.dumps(record))[0].messages == messages


@pytest.mark.parametrize("record", [
    {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    {"prompt": [user("Hi")], "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
    {"chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]},
    {"prompt": "Hi", "chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]},
])  # fmt: skip
def test_labelled_pairs_as_people_have_them(record, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert load_pairs(str(tmp_path / "a.jsonl")) == [([user("Hi")], "Yes", "No", None)]


@pytest.mark.parametrize("record, message", [
    ({"prompt": "Hi", "chosen": "Yes"}, "needs a text in field 'rejected'"),
    ({"chosen": "Yes", "rejected": "No"}, "needs a field 'prompt'"),
    ({"chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Ho"), assistant("No")]}, "'rejected' must be a t"),
    ({"prompt": "Hi", "chosen": [user("Yes")], "rejected": "No"}, "'chosen' must be a text"),
    ({"prompt": "Hi", "chosen": "Yes", "rejected": "No", "category": 3}, "'category' must be a text"),
])  # fmt: skip
def test_pairs_of_another_form_are_refused(record, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"a.jsonl, line 1: .*{message}"):
        load_pairs(str(tmp_path / "a.jsonl"))


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"messages": [user("Hi"), assistant(RESPONSE)], "id": 1}])
    parquet.write_table(table, tmp_path / "data.parquet")
    assert load_rows(str(tmp_path / "data.parquet"))[0].messages == [user("Hi"), assistant(RESPONSE)]


def test_characters_that_only_look_like_line_ends(tmp_path):
    text = "one\u2028two\u2029three\x85four"
    assert rows_of(tmp_path / "a.jsonl", json.dumps({"prompt": text}, ensure_ascii=False))[0].prompt == [user(text)]
    assert rows_of(tmp_path / "a.csv", f"prompt,id\n{text},1\n")[0].prompt == [user(text)]


def test_csv_as_spreadsheets_write_it(tmp_path):
    long = "word " * 40_000
    text = f'\ufeffprompt,response\r\n"Hi, you\r\nthere","say ""No"""\r\nLong,{long}\r\nNone,\r\n'
    rows = rows_of(tmp_path / "a.csv", text)
    assert [row.messages[1]["content"] for row in rows] == ['say "No"', long, ""]
    assert rows[0].prompt == [user("Hi, you\nthere")]


@pytest.mark.parametrize("name, text, message", [
    ("a.jsonl", '{"prompt": "Hi"}\n{"prompt": \n', r"a.jsonl, line 2: not valid JSON"),
    ("a.json", "[1, 2", r"a.json: not valid JSON"),
    ("a.json", "3", r"a.json must hold a JSON list"),
    ("a.json", '["Hi"]', r"a.json, row 1: .* JSON object, found str"),
    ("a.json", "[]", r"a.json holds no rows"),
    ("a.jsonl", "\n \n", r"a.jsonl holds no rows"),
    ("a.csv", "prompt\n", r"a.csv holds no rows"),
    ("a.csv", "question,response\nHello, how are you,Fine\n", r"a.csv, row 1: more fields"),
    ("a.jsonl", '{"prompt": "Hi"}\n{"text": "Hi"}', r"line 2: needs a field .*'instruction'; it has \['text'\]"),
    ("a.jsonl", '{"prompt": 3}', r"line 1: field 'prompt' must be a text or a list"),
    ("a.jsonl", '{"messages": [{"role": "user"}]}', r"line 1: field 'messages' must be a list"),
    ("a.jsonl", '{"messages": "[]"}', r"line 1: field 'messages' must be a list"),
    ("a.jsonl", '{"messages": [{"role": "human", "content": "Hi"}]}', r"'role' \(system, user, assistant\)"),
    ("a.jsonl", '{"prompt": "Hi", "response": ["Yes"]}', r"line 1: field 'response' must be a text"),
    ("a.jsonl", '{"conversations": [{"from": "bot", "value": "Hi"}]}', r"must be .* 'from' \(system, human, user"),
    ("a.jsonl", '{"conversations": "Hi"}', r"line 1: field 'conversations' must be a list"),
    ("a.jsonl", '{"instruction": ["Hi"], "output": "Yes"}', r"line 1: field 'instruction' must be a text"),
    ("a.jsonl", '{"instruction": "Hi", "output": 3}', r"line 1: field 'output' must be a text"),
    ("a.jsonl", '{"prompt": "Hi", "completion": [{"role": "assistant"}]}', r"field 'completion' must be a text or a"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', r"no text: 'image_url'"),
    ("a.jsonl", '{"prompt": "Hi", "answer": ["4"]}', r"line 1: field 'answer' must be a text or a number"),
    ("a.txt", "Hi", r"a.txt: data must be a .jsonl, .json, .parquet, .csv file"),
    ("a.parquet", "Hi", r"a.parquet is no parquet file"),
    ("a.csv", 'prompt,answer\nq1,1\n"q2,2\nq3,3\n', r"a.csv, row 2 \(from line 3\): unexpected end"),
    ("a.csv", 'prompt,answer\nq1,1\n"q2,2\nq3,3\nq4,"4"\nq5,5\n', r"a.csv, row 2 \(from line 3\): ',' expected"),
    ("a.csv", 'prompt,answer\n\n"a ""b""\nc",1\n"say "hello" now",2\n', r"a.csv, row 2 \(from line 5\): ',' expected"),
    ("a.csv", 'prompt,answer\n"q1,1\nq2,2"\n', r"a.csv, row 1: fewer fields than the header has \(from line 2\)"),
    ("a.csv", "prompt,prompt\nq1,q2\n", r"a.csv: the header has a name twice"),
    ("a.csv", '"prompt,answer\nq1,1\n', r"a.csv, row 1 \(from line 1\): unexpected end"),
    ("a.jsonl", '{"prompt": "a", "answer": 1, "answer": 2}', r"line 1: .*field 'answer' stands twice"),
    ("a.json", '[{"messages": [{"role": "user", "role": "system"}]}]', r"a.json: .*field 'role' stands twice"),
    ("a.jsonl", '{"prompt": "a", "answer": %s}' % ("1" * 5000), r"a.jsonl, line 1: not valid JSON \(Exceeds"),
    ("a.jsonl", '{"prompt": "a", "x": %s}' % ("[" * 99999 + "]" * 99999), r"a.jsonl, line 1: .* recursion"),
    ("a.jsonl", '{"prompt": "a", "answer": NaN}', r"line 1: field 'answer' must be a text or a number, not nan"),
    ("a.jsonl", '{"prompt": "a", "answer": 1e999}', r"line 1: field 'answer' .* not inf"),
    ("a.jsonl", '{"prompt": "a", "answer": true}', r"line 1: field 'answer' .* not True"),
])  # fmt: skip
def test_broken_files_name_the_file_the_row_and_the_field(name, text, message, tmp_path):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path / name, text)


def test_an_empty_field_does_not_hide_the_one_that_holds_the_prompt(tmp_path):
    lines = ['{"messages": [], "prompt": "a"}', '{"prompt": "", "question": "b"}', '{"prompt": ""}']
    rows = rows_of(tmp_path / "a.jsonl", "\n".join(lines))
    assert [row.messages for row in rows] == [[user("a")], [user("b")], [user("")]]


def test_spaces_around_the_names_of_a_csv_header_lose_no_answer(tmp_path):
    [row] = rows_of(tmp_path / "a.csv", "id, prompt , answer,,\n1,q1,3,,\n")
    assert (row.messages, row.answer) == ([user("q1")], "3")


def deep(levels: int) -> list:
    return [deep(levels - 1)] if levels else []


BROKEN_TEXT = ['"', ",", "\n", "{", "[", "]", ":", "\\", "null", "NaN", "1e999", "\x00", "\ufeff", "\\ud83d", "-",
               "9" * 5000, "[" * 3000, '"prompt": 1, ', '{"role": "user"}', '""']  # fmt: skip
BROKEN_VALUES = [None, "", [], {}, 0, -1.5, 10**4000, True, float("nan"), "\ud83d", [[]], [{"role": "user"}], ["Hi"],
                 [user("Hi"), {"role": "tool", "content": ""}], [user("a") | {"name": deep(300)}]]  # fmt: skip


def with_another_value(records: list[dict], rng: random.Random) -> list[dict]:
    records = [dict(record) for record in records]
    records[rng.randrange(len(records))][rng.choice(list(records[0]))] = rng.choice(BROKEN_VALUES)
    return records


def with_broken_text(text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text))
    end = start + rng.randrange(20)
    piece = rng.choice([rng.choice(BROKEN_TEXT), "", text[start:end] * 2, text[start:end][::-1]])
    return text[:start] + piece + text[end:]


def csv_of(records: list[dict]) -> str:
    table = io.StringIO()
    csv.writer(table).writerows([list(records[0]), *([*record.values()] for record in records)])
    return table.getvalue()


@pytest.mark.parametrize("name, write", [
    ("a.json", json.dumps), ("b.json", lambda records: "\n".join(map(json.dumps, records))),
    ("c.jsonl", lambda records: "\n\n".join(map(json.dumps, records))), ("d.csv", csv_of),
])  # fmt: skip
def test_a_mutated_file_gives_rows_or_an_error_that_names_it(name, write, tmp_path):
    rng, outcomes, path = random.Random(17), Counter(), tmp_path / name
    records = [{"id": i, "prompt": f'Say "{i}", please', "response": "one\ntwo", "answer": i / 2,
                "chosen": "No", "rejected": "Yes", "category": "c"} for i in range(5)]
    for i in range(500):
        text = write(with_another_value(records, rng))
        text = with_broken_text(text, rng) if i % 2 else text
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            rows = load_rows(str(path))
            assert len({pair.category for pair in load_pairs(str(path))}) <= 2
        except (ValueError, OSError) as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert len(digest_rows(rows)) == 16
        for row in rows:
            assert row.source.startswith(str(path)) and isinstance(row.answer, str | None)
            assert all(isinstance(message["content"], str) for message in row.messages)
    assert min(outcomes["refused"], outcomes["read"]) > 50, outcomes


def test_text_in_another_encoding_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt\nnaïve\n".encode("latin-1"))
    with pytest.raises(ValueError, match="a.csv is not UTF-8"):
        load_rows(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("name, message", [
    ("data.jsonl", "there is no file data.jsonl"),
    ("data/star1.json", "there is no file data/star1.json"),  # shaped like a hub id, but never meant as one
    ("/nowhere/data", "there is no file"),
    (".", "is a folder"),
])  # fmt: skip
def test_a_file_that_is_not_there(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_rows(name)


# The hub

@pytest.fixture
def star1_hub(tmp_path, monkeypatch):
    """A hub with UCSC-VLAA/STAR-1 at two revisions, and a data set of several files."""
    files = {
        "main/STAR-1.json": json.dumps([{"question": "new", "response": "a"}]), "main/README.md": "about",
        "main/dataset_infos.json": "{}", "old/STAR-1.json": json.dumps([{"question": "old", "response": "a"}]),
        "many/data/train-set.jsonl": '{"prompt": "train"}', "many/data/test.jsonl": '{"prompt": "test"}',
        "split/one.jsonl": '{"prompt": "1"}', "split/two.jsonl": '{"prompt": "2"}', "none/data.tsv": "",
        "gated/data.jsonl": '{"prompt": "3"}',
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    datasets = {"UCSC-VLAA/STAR-1": {"main": tmp_path / "main", "v0": tmp_path / "old"}} | {
        f"owner/{name}": tmp_path / name for name in ("many", "split", "none", "gated")
    }
    with StandInHub(datasets=datasets, gated={"owner/gated": "hf_secret"}) as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        yield hub


def test_hub_data_sets_by_name_revision_and_file(star1_hub):
    def prompts(name):
        return [row.prompt[0]["content"] for row in load_rows(name)]

    assert prompts("UCSC-VLAA/STAR-1") == ["new"] == prompts("UCSC-VLAA/STAR-1@main:STAR-1.json")
    assert prompts("UCSC-VLAA/STAR-1@v0") == ["old"]
    assert prompts("owner/many") == ["train"]  # the only one named so
    assert prompts("owner/many:data/test.jsonl") == ["test"]
    assert prompts("owner/split:two.jsonl") == ["2"]
    assert star1_hub.downloads() == ["STAR-1.json", "data/test.jsonl", "data/train-set.jsonl", "two.jsonl"]
    assert prompts("owner/split:*.jsonl") == ["1", "2"]  # all that match


@pytest.mark.parametrize("files, chosen", [
    (["test.jsonl"], None),
    (["data/validation-00000.parquet"], None),
    (["STAR-1.json"], "STAR-1.json"),
    (["constraints.jsonl", "data.jsonl"], None),
    (["pretraining.jsonl", "sft.jsonl"], None),
    (["untrained.csv", "other.csv"], None),
    (["train/a.parquet", "test/a.parquet"], "train/a.parquet"),
    (["data/Train_v2.csv", "constraints.csv"], "data/Train_v2.csv"),
    (["main/train.parquet", "socratic/train.parquet"], None),
])  # fmt: skip
def test_a_file_is_chosen_by_the_word_train_and_otherwise_asked_for(files, chosen, monkeypatch):
    monkeypatch.setattr(hub_files, "_list_data_files", lambda repo, revision: ("commit", files))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **_: name)
    if chosen:
        assert find_dataset("owner/name") == [Path(chosen)]
    else:
        with pytest.raises(FileNotFoundError, match="which file.*choose one with owner/name:FILE"):
            find_dataset("owner/name")


@pytest.mark.parametrize("name, error, message", [
    ("owner/split", FileNotFoundError, r"which file\? found one.jsonl, two.jsonl; choose one with owner/split:FILE"),
    ("owner/none", FileNotFoundError, r"which file\? found none"),
    ("owner/split:*.csv", FileNotFoundError, r"which file\? found one.jsonl, two.jsonl"),
    ("owner/split:three.jsonl", FileNotFoundError, r"owner/split holds no three.jsonl"),
    ("owner/typo", FileNotFoundError, r"owner/typo .* check the spelling"),
    ("UCSC-VLAA/STAR-1@v9", FileNotFoundError, r"no revision 'v9'"),
    ("owner/gated", PermissionError, r"datasets/owner/gated is gated: accept its licence"),
])  # fmt: skip
def test_what_the_hub_does_not_have(name, error, message, star1_hub):
    with pytest.raises(error, match=message):
        find_dataset(name)
    assert star1_hub.downloads() == []  # nothing was fetched in vain


def test_without_a_network_the_cache_serves_or_the_error_says_what_to_do(star1_hub, monkeypatch):
    from huggingface_hub import constants

    first = find_dataset("UCSC-VLAA/STAR-1")
    star1_hub.__exit__()  # the network is gone
    assert find_dataset("UCSC-VLAA/STAR-1") == first == find_dataset("UCSC-VLAA/STAR-1:STAR-1.json")
    with pytest.raises(ConnectionError, match="cannot be reached.*owner/split.*local"):
        find_dataset("owner/split")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_dataset("UCSC-VLAA/STAR-1") == first
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set.*owner/split"):
        find_dataset("owner/split:one.jsonl")
