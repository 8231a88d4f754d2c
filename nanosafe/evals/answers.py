r"""What an answer says: its boxes, a plain form of what they hold, the integer or the letter to which it commits.

Nothing here knows a reference (graders.py compares). The patterns are few and short: whatever math-verify reads by
itself is left to it.
"""

import re
from dataclasses import dataclass

# A \boxed{} is followed to its closing brace in one pass; \{ and \} are text.
BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
# What may stand between the boxes of one answer: a few words before "and" or "or", no other words. List marks, names
# as in "x = \boxed{1}" and commands as in "\quad \text{and}" do not part them.
BETWEEN_BOXES = re.compile(
    r"(?:[^.!?\n]{0,40}\b(?:and|or)\b)?"
    r"(?:[^a-zA-Z0-9\\]|\\[a-zA-Z]+|\\.|(?<![a-zA-Z0-9])(?:and|or|[a-zA-Z]|\d{1,2})(?![a-zA-Z0-9]))*",
    re.DOTALL,
)
LONGEST = 1000  # characters in boxes that are read: MATH-500's longest reference has 53
TAIL = 4000  # characters of an answer without a box that are: math-verify's patterns take more than linear time
SIGNS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "±": r"\pm ", "π": r"\pi ", "°": r"^\circ ",
    "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "²": "^2", "³": "^3",
    "½": r"\frac12 ", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
})  # fmt: skip
# What is written -> how it is read, from top to bottom.
PLAIN = [(re.compile(written), read) for written, read in [
    # marks that change only the looks
    (r"(?<!\\)\\(?:!\s*|[()\[\]])|\\?\$|\\(?:display|text|script)style\b|\\(?:left|right)(?=[()])", ""),
    (r"(?<!\\)\\[,;:> ]|\\q?quad\b|~", " "),
    (r"\\(?:bf|it|rm|tt|[lL]arge|[hH]uge|boldsymbol|bm|underline|(?:text)?color\s*\{\w*\})(?![a-zA-Z])", " "),
    (r"\\(?:mbox|math(?:bf|it|rm)|text(?:bf|it|rm|normal))\s*(?=\{)", r"\\text"),
    (r"[\s.,;]+$", ""),
    (r"^\s*\{((?:[^{}]|\{[^{}]*\})*)\}$", r"\1"),
    # numbers: degrees, roots, thousands (10 080), mixed numbers (137 1/2), bases
    (r"\\degree\b|\^\s*(?:\\circ|\{\s*\\circ\s*\})", ""),
    (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"(?<=\d)(?: +|\{,\})(?=\d{3}(?!\d))", ""),
    (r"(?<![\d./])(\d+) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"\((\d+)\)(?=_)", r"\1"),
    (r"(?<=\d) i\b", "i"),
    # names: f(x) = 2x, (C) 14
    (r"^\s*[a-zA-Z]\([a-z]\)\s*=", "y ="),
    (r"^\\text\{\s*(\([A-E]\))\s*\}[^,]*$", r"\\text{\1}"),
    (r"\\(?:lor|vee)\b", ","),
    # words around a number: \text{Answer: }12, \text{12 apples}, 12 apples, 12 cm^2, 12 \pmod{13}
    (r"^\s*\\text\{[^{}]*(?:\bis|:)\s*\}", ""),
    (r"\\text\{\s*(\d[\d.,]*)", r"\1\\text{"),
    (r"(?<=\d) +((?!and\b|or\b|to\b)[a-z]{3,}[a-z ]*|[a-z]{2}(?=\^))(\^\{?[23]\}?)?$", r"\\text{ \1}"),
    (r"\s*(?:\\[pb]?mod|\(\s*\\text\s*\{\s*mod\s*\})\s*\{?\d+\}?\)?$", ""),
]]  # fmt: skip


@dataclass(frozen=True)
class Boxes:
    contents: list[str]  # one after the other, without repetitions; none if the last box is empty or never closed
    start: int  # of the first of them in the answer
    end: int


def last_boxes(answer: str) -> Boxes | None:
    r"""The last closed \boxed{} (\fbox{}, \framebox{}) of `answer`, with those side by side with it: parts of one
    answer, or a hedge. A last box that is never closed takes back what stood before it. None if there is no box."""
    opened, boxes, last = [], [], None
    for token in BRACES.finditer(answer):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token)
            last = token.start() if token[0] != "{" else last
        elif token[0] == "}" and opened and (start := opened.pop())[0] != "{":
            boxes.append((start.start(), start.end(), token.start()))
    if last is None:
        return None
    boxes.sort()  # a box in a box counts as the last
    if not boxes or boxes[-1][0] != last:
        return Boxes([], last, len(answer))
    first = len(boxes) - 1
    while first and BETWEEN_BOXES.fullmatch(answer, boxes[first - 1][2] + 1, boxes[first][0]):
        first -= 1
    if re.search(r"final answer is", answer[boxes[-1][2] :], re.IGNORECASE):
        return None
    contents = dict.fromkeys(answer[begin:end].strip() for _, begin, end in boxes[first:])
    return Boxes([] if "" in contents else list(contents), boxes[first][0], boxes[-1][2] + 1)


def plain(text: str) -> str:
    """A formula in the form that the table above gives it."""
    text = text.translate(SIGNS)
    for written, read in PLAIN:
        text = written.sub(read, text)
    return text.strip()


def in_box(text: str) -> str:
    """A reference, which data sets give as bare LaTeX, as an answer gives it."""
    inside = text.strip().strip("$") if text.replace(r"\$", "").count("$") in (0, 2) else "$"
    return text if r"\boxed" in text or "$" in inside.replace(r"\$", "") else rf"\boxed{{{inside}}}"


def answer_formula(answer: str) -> str:
    r"""What math-verify is to read of an answer: its boxes in a plain form as one \boxed{}, else its last
    characters, of which it takes the formula or number behind "answer", else the last one. "" if there is no answer."""
    boxes = last_boxes(answer)
    if boxes is None:
        return answer[-TAIL:].translate(SIGNS)
    content = ", ".join(boxes.contents)
    return rf"\boxed{{{plain(content)}}}" if boxes.contents and len(content) <= LONGEST else ""


# What is no value: a comparison, a congruence, a ratio, "at least 2".
NO_VALUE = re.compile(
    r"[<>]|\\(?:[gl]eq?(?:slant)?|neq?|equiv)(?![a-zA-Z])|\d\s*:\s*\d|\b(?:not|at least|at most|more|less|to)\b")
BASE = re.compile(r"\d_\{?(\w+)\}?\}$")


def says_less(reference: str, answer: str) -> bool:
    """Whether a boxed answer is no value where the reference is one, or has another base: math-verify would take the
    number in it."""
    if not answer.startswith(r"\boxed"):
        return False
    base, its_base = BASE.search(reference), BASE.search(answer)
    if its_base and its_base[1] != (base[1] if base else "10"):
        return True
    return bool(NO_VALUE.search(answer)) and not re.search(r"[<>\[(:]|\\[gln]eq?\b|\{\\text", reference)


HEDGE = re.compile(r"\b(?:not|neither|at least|at most|or|and|about|approximately|between|more|less)\b")
NOT_BUT = re.compile(r"\bnot \S+ but (?:rather )?")  # "not B but C" is C

# An integer with what may stand around it: words and "=" before it, words as units behind it.
NAMED = re.compile(r"=|\\equiv|[A-Za-z)]\s*:|\bis\b")
INTEGER = re.compile(
    r"(?:[A-Za-z]{2,} )*\(?\+?0*(\d{1,3})(?:\.0*)?\)?(?:(?: \(?[A-Za-z]{2,}\.?\)?)+(?: ?\^[23])?)?")
STATED = re.compile(r"\banswer(?:\s+is\s*:?|\s*:|\s*\n)([^,;(]{1,100})", re.IGNORECASE)


def read_integer(text: str) -> int | None:
    r"""The integer from 0 to 999 that `text` is: 073, 73.0, m+n=73, 73\text{ cm}^2 are 73. None for all else: a sum,
    a range or "at least 73" is no integer."""
    words = " ".join(re.sub(r"\\text|[{}]", " ", NAMED.split(plain(text))[-1]).split())
    number = INTEGER.fullmatch(words)
    return int(number[1]) if number and not HEDGE.search(words) else None


def answer_integer(answer: str) -> int | None:
    """The integer in the boxes of an answer; without boxes, behind its last "answer is" or "answer:", else its last
    number. None if there is none or a second one."""
    boxes = last_boxes(answer)
    if boxes is not None:
        values = {read_integer(content[:LONGEST]) for content in boxes.contents}
        return values.pop() if len(values) == 1 else None
    answer = NOT_BUT.sub("", re.sub(r"\\[()\[\]]|[$*#]", " ", answer))  # the marks of formulas and of bold text
    stated = STATED.findall(answer)
    if stated:
        return read_integer(re.split(r"\n|[.!?](?!\d)|\b(?:because|since|as)\b", stated[-1].strip())[0])
    words = answer.split()
    while words and not any(map(str.isdecimal, words[-1])):
        behind = words.pop()
        if behind[0] in "+-/^<>=":
            return None
    return read_integer(words[-1].strip(".,;:!?()\"'")) if words else None


MARKS = re.compile(r"[*`#${}]|__|\\[()\[\]]|\\(?:text|math)\w*|\\(?:bf|it|rm|boldsymbol|[lL]arge)(?![a-zA-Z])")
QUOTED = re.compile(r"([\"'])([A-D])\1")
# Where a letter is given: "the answer is B", "Answer: option (B)", "I choose B", "B is the right one".
GIVEN = re.compile(
    r"(?i:\b(?:ans|answer|option|choice)\s*(?:(?:is|(?:should|must|would|has to) be)\b\s*:?|[:>-]|\n)"
    r"|\b(?:choose|pick|select|go with)\b)"
    r"(?:[\s(\[<]|(?i:(?:the|option|choice|letter|therefore|thus|clearly)\b))*([A-D])(?!\w)"
    r"|\b([A-D])(?=[)\]]?\s+(?i:is (?:the )?(?:correct|right|best)))"
    r"|(?i:\banswer[ \t]*:[ \t(]*)([a-d])(?=[.)\s]*$)", re.MULTILINE)
# Without such a place: a line that is a letter, or begins with one as the list of options does.
LINE = re.compile(r"^[^\w\n]*(?:(?i:option|choice|answer)\b[ (\[]*)?([A-D])(?=[)\].:]+(?:\s|$)|\s*$)", re.MULTILINE)
# What may follow a letter that then is no choice: the rest of a word or formula, a second letter, a denial, a noun.
NO_CHOICE = re.compile(
    r"[\w^'’(]|\s*[=+]|[-/*]\w"
    r"|[)\]\s]*(?:[,/&]|\bor\b|\band\b)[\s(\[]*(?:maybe |perhaps |option )?[A-D]\b(?! (?:is|was|has)\b)"
    r"|[)\]\s]*(?:\?|(?:is|was) (?:not|wrong|incorrect|false|out|too)\b|isn't|cannot)")
ARTICLE = re.compile(r" (?!(?:is|and|because|since|as|which|with|due|for|not|but|rather)\b)[a-z]")


def answer_letter(answer: str) -> str | None:
    """The letter, "A" to "D", of the last place of `answer` that commits to exactly one, None if none does."""
    boxes = last_boxes(answer)
    if boxes is not None:
        if not boxes.contents:
            return None
        said = f"\nThe answer is {', '.join(boxes.contents)}\n"
        answer = answer[: boxes.start] + said + answer[boxes.end :]
    answer = QUOTED.sub(r"\2", NOT_BUT.sub("", MARKS.sub("", answer)))
    given, lines = _letters(GIVEN, answer), _letters(LINE, answer)
    if given:
        return given[-1]
    return lines[0] if len(set(lines)) == 1 else None


def _letters(places: re.Pattern, text: str) -> list[str]:
    letters = []
    for place in places.finditer(text):
        letter, rest = place[place.lastindex], text[place.end() : place.end() + 40]
        if not NO_CHOICE.match(rest) and not (letter == "A" and ARTICLE.match(rest)):
            letters.append(letter.upper())
    return letters
