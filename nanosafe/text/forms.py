"""Records of data files as rows and labelled pairs, in the forms in which people have them.

| form | prompt | response |
|---|---|---|
| STAR-1 | `question` | `response` |
| plain | `prompt`, a text | `response` |
| chat | `messages`, or `prompt` as messages | the assistant's turns, or `response` |
| TRL, prompt and completion | `prompt`, a text or messages | `completion`, a text or messages |
| ShareGPT | `conversations` of `from` (human, gpt, system) and `value` | gpt's turns |
| Alpaca | `instruction`, and below it `input` | `output` |
| TRL, preference | `prompt`, or how `chosen` and `rejected` both begin | `chosen`, `rejected`: texts or messages |

A message's `content` is a text, or a list of parts that are texts. Any other form is refused, and nothing is guessed.
"""

import math

from nanosafe.text.data import Pair, Row

# A turn of another role is refused, because chat templates skip it without a word.
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# The fields that hold a prompt, and those in which its response may stand.
RESPONSES = {
    "messages": ("response",),
    "conversations": (),
    "prompt": ("response", "completion"),
    "question": ("response",),
    "instruction": ("response", "output"),
}


def as_row(record: dict, source: str) -> Row:
    """A record, in one of the forms above, as a row, perhaps with the reference answer in its field `answer`.

    Raises ValueError naming `source`, where the record stands, and the field.
    """
    given = [name for name in RESPONSES if record.get(name) is not None]
    if not given:
        raise ValueError(f"{source}: needs a field 'messages', 'conversations', 'prompt', 'question' "
                         f"or 'instruction'; it has {list(record)}")
    # An empty field does not hide a later one that holds the prompt.
    field = next((name for name in given if record[name] not in ("", [])), given[0])
    if field == "conversations":
        messages = _sharegpt_messages(record[field], source)
    elif field == "instruction":
        instruction = _text(record, field, source)
        if record.get("input"):
            instruction += "\n\n" + _text(record, "input", source)
        messages = [{"role": "user", "content": instruction}]
    else:
        messages = _messages(record, field, "user", source, texts=field != "messages")
    for name in RESPONSES[field]:
        if record.get(name) is not None:
            if name == "completion":
                messages = messages + _messages(record, name, "assistant", source)
            else:
                messages = [*messages, {"role": "assistant", "content": _text(record, name, source)}]
            break
    return Row(messages, source, _answer_text(record.get("answer"), source), record)


def as_pair(record: dict, source: str) -> Pair:
    """A record as a labelled pair: a prompt, the responses `chosen` and `rejected`, perhaps a `category`.

    Raises ValueError as `as_row` does.
    """
    turns = {}
    for field in ("chosen", "rejected"):
        if record.get(field) is None:
            raise ValueError(f"{source}: a labelled pair needs a text in field {field!r}; "
                             f"it has {list(record)}")
        turns[field] = _messages(record, field, "assistant", source)
    category = record.get("category")
    if not isinstance(category, str | None):
        raise ValueError(f"{source}: field 'category' must be a text")
    if any(record.get(name) is not None for name in RESPONSES):
        prompt = as_row(record, source).prompt
    else:
        prompt = turns["chosen"][:-1]
    for field, messages in turns.items():
        # Some data sets repeat the prompt before each response.
        if not messages or messages[-1]["role"] != "assistant" or messages[:-1] not in ([], prompt):
            raise ValueError(f"{source}: field {field!r} must be a text, or end with one turn of the "
                             "assistant behind the same prompt")
    if not prompt:
        raise ValueError(f"{source}: a labelled pair needs a field 'prompt', or 'chosen' and 'rejected' "
                         "that begin with it")
    return Pair(prompt, turns["chosen"][-1]["content"], turns["rejected"][-1]["content"], category)


def _messages(record: dict, field: str, role: str, source: str, *, texts: bool = True) -> list[dict]:
    """A field that holds messages or, if `texts` may stand there, the text of one message of `role`."""
    value = record[field]
    if texts and isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = []
    for message in value if isinstance(value, list) else [None]:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            break
        content = message.get("content")
        if isinstance(content, list):
            content = _joined_parts(content, field, source)
        if not isinstance(content, str):
            break
        messages.append({**message, "content": content})
    else:
        return messages
    form = "a text or a list of objects" if texts else "a list of objects"
    raise ValueError(f"{source}: field {field!r} must be {form} with a 'role' "
                     f"({', '.join(ROLES)}) and a 'content' text")


def _joined_parts(parts: list, field: str, source: str) -> str:
    """The text of a content that is a list of parts, as templates of such models write it: one behind the other."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"{source}: field {field!r} has a content part that is no text: {kind!r:.50}")
        texts.append(part["text"])
    return "".join(texts)


def _sharegpt_messages(turns: object, source: str) -> list[dict]:
    messages = []
    for turn in turns if isinstance(turns, list) else [None]:
        role = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in SHAREGPT_ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(f"{source}: field 'conversations' must be a list of objects with 'from' "
                             f"({', '.join(SHAREGPT_ROLES)}) and a 'value' text")
        messages.append({"role": SHAREGPT_ROLES[role], "content": turn["value"]})
    return messages


def _text(record: dict, field: str, source: str) -> str:
    if not isinstance(record[field], str):
        raise ValueError(f"{source}: field {field!r} must be a text")
    return record[field]


def _answer_text(answer: object, source: str) -> str | None:
    """A reference answer, which may be a number, as text."""
    if answer is None or isinstance(answer, str):
        return answer
    # To Python a bool is an int, and its JSON reads NaN and Infinity.
    if type(answer) is int or (type(answer) is float and math.isfinite(answer)):
        return str(answer)
    raise ValueError(f"{source}: field 'answer' must be a text or a number, not {answer!r:.50}")
