r"""What an answer says: what stands in its boxes, a formula in a plain form, an integer or a letter.

grading.py compares it with the reference. What math-verify reads by itself is left to it. Each table of patterns stands
above the function that reads with it; tests/helpers/graded_*.py has the cases that they were made for.
"""

import re
from typing import NamedTuple

LONGEST = 1000  # characters in boxes that are read; MATH-500's longest reference has 53
TAIL = 4000  # characters read of an answer without a box, because math-verify's time is not linear
NOT_BUT = re.compile(r"\bnot \S+ but (?:rather )?")  # "not B but C" is C

# Boxes

# A \boxed{} is followed to its closing brace in one pass; \{ and \} are text.
BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
# What may stand between the boxes of one answer: words only before an "and" or "or". List marks,
# names as in "x = \boxed{1}" and commands as in "\quad \text{and}" do not part them.
BETWEEN_BOXES = re.compile(
    r"(?:[^.!?\n]{0,40}\b(?:and|or)\b)?(?:[^a-zA-Z0-9\\]|\\[a-zA-Z]+|\\."
    r"|(?<![a-zA-Z0-9])(?:and|or|[a-zA-Z]|\d{1,2})(?![a-zA-Z0-9]))*", re.DOTALL)


class Box(NamedTuple):
    start: int  # of \boxed{
    content: int  # where that begins
    end: int  # of the content, where its closing brace is


class Boxes(NamedTuple):
    """The last boxes of an answer, which together are one answer or a hedge."""

    contents: list[str]  # without repetitions; none where nothing can be read
    end: int  # where in the answer they end


def last_boxes(answer: str) -> Boxes | None:
    r"""What stands in the last \boxed{} (\fbox{}, \framebox{}) of an answer and in those beside it.

    There is nothing to read if one is empty, if they are longer than LONGEST, or if the last is never closed, for that
    takes back what stood before it. None if there is no box, or a "final answer is" follows it.
    """
    opened, boxes, last = [], [], -1
    for token in BRACES.finditer(answer):
        if token[0] == "}":
            opening = opened.pop() if opened else None
            if opening and opening[0] != "{":
                boxes.append(Box(opening.start(), opening.end(), token.start()))
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append(token)
            if token[0] != "{":
                last = token.start()
    boxes.sort()  # a box in a box counts as the last
    if last < 0 or re.search("final answer is", answer[last:], re.IGNORECASE):
        return None
    if not boxes or boxes[-1].start != last:
        return Boxes([], len(answer))
    first = len(boxes) - 1
    while first and BETWEEN_BOXES.fullmatch(answer, boxes[first - 1].end + 1, boxes[first].start):
        first -= 1
    contents = list(dict.fromkeys(answer[box.content : box.end] for box in boxes[first:]))
    readable = all(map(str.strip, contents)) and len("".join(contents)) <= LONGEST
    return Boxes(contents if readable else [], boxes[-1].end + 1)


# Maths

SIGNS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "±": r"\pm ", "π": r"\pi ",
    "°": r"^\circ ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "²": "^2", "³": "^3", "½": r"\frac12 ", "\u00a0": " ", "\u202f": " ",
})  # fmt: skip
# What is written -> how it is read, from top to bottom.
PLAIN = [(re.compile(written), read) for written, read in [
    # marks that change only the looks
    (r"(?<!\\)\\(?:!\s*|[()\[\]])|\\?\$|\\displaystyle\b|\\(?:left|right)(?=[()])", ""),
    (r"(?<!\\)\\[,;:> ]|\\q?quad\b|~", " "),
    (r"\\(?:bf|it|rm|tt|[lL]arge|boldsymbol|bm|underline|(?:text)?color\s*\{\w*\})(?!\w)", " "),
    (r"\\(?:mbox|math(?:bf|it|rm)|text(?:bf|it|rm|normal))\s*(?=\{)", r"\\text"),
    (r"[\s.,;]+(?=\}?$)", ""),
    (r"^\s*\{((?:[^{}]|\{[^{}]*\})*)\}$", r"\1"),
    # degrees, roots, thousands (10 080), mixed numbers (137 1/2)
    (r"\\degree\b|\^\s*(?:\\circ|\{\s*\\circ\s*\})", ""),
    (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"(?<=\d)(?: +|\{,\})(?=\d{3}(?!\d))", ""),
    (r"(?<![\d./])(\d+) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    # around a number: \text{Answer: }12, \text{12 apples}, 12 apples, 12 cm^2, 12 \pmod{13}
    (r"^\s*\\text\{[^{}]*(?:\bis|\bare|:)\s*\}", ""),
    (r"\\text\{\s*(\d[\d.,:]*)(?![^{}]*(?:\d|\bor\b))", r"\1\\text{"),
    (r"(?<=\d) +((?!and\b|or\b|to\b)[a-z]{3,}[a-z ]*|[a-z]{2}(?=\^))(\^\{?\d\}?)?$", r"\\text{\1}"),
    (r"\s*\(?(?:\\[pb]?|\\text\s*\{\s*)?mod\b\s*\}?\s*\{?\d+\}?\)?$", ""),
]]  # fmt: skip
# What is no value: a comparison, a congruence, a ratio, "at least 2".
NO_VALUE = re.compile(
    r"[<>]|\\(?:[gl]eq?(?:slant)?|neq?|equiv)(?![a-zA-Z])|\d\s*:\s*\d"
    r"|\b(?:not|at least|at most|more|less|to)\b")
BASE = re.compile(r"\d_\{?(\w+)")


def plain_formula(text: str) -> str:
    """A formula in the form that the tables above give it."""
    text = text.translate(SIGNS)
    for written, read in PLAIN:
        text = written.sub(read, text)
    return text.strip()


def answer_formula(answer: str) -> str | None:
    r"""What math-verify is to read: the boxes in a plain form as one \boxed{}. Without boxes it is the end of the
    answer, of which math-verify takes what stands behind "answer", else the last formula or number."""
    boxes = last_boxes(answer)
    if boxes is None:
        return answer[-TAIL:].translate(SIGNS) or None
    if not boxes.contents:
        return None
    formula = plain_formula(", ".join(boxes.contents))
    return rf"\boxed{{{formula}}}"


def reference_formula(reference: str) -> str | None:
    """The same of a reference, which data sets give as bare LaTeX or in one pair of dollars."""
    bare = re.fullmatch(r"\s*(\$?)((?:[^$\\]|\\.)*)\1\s*", reference, re.DOTALL)
    if bare and r"\boxed" not in reference:
        reference = rf"\boxed{{{bare[2]}}}"
    return answer_formula(reference)


def differs_in_form(reference: str, answer: str) -> bool:
    """Whether a boxed answer is no value where the reference is one, or has another base; math-verify would compare
    the number in it and nothing else."""
    if not answer.startswith(r"\boxed"):
        return False
    if set(BASE.findall(answer)) - {"10", *BASE.findall(reference)}:
        return True
    reference_is_value = not re.search(r"[<>\[(:]|\\[gln]eq?\b|\{\\text", reference)
    return reference_is_value and NO_VALUE.search(answer) is not None


# Integers

# What keeps a text with one number from being that number.
HEDGE = re.compile(r"\b(?:not|neither|at least|at most|or|and|about|between|more|less)\b")
# What parts the number from what it is the value of.
NAMED = re.compile(r"=|\\equiv|[A-Za-z)]\s*:|\bis\b")
# An integer with what may stand around it: words before it, words as units behind it.
INTEGER = re.compile(
    r"(?:[A-Za-z]{2,} )*\(?\+?0*(\d{1,3})(?:\.0*)?\)?(?:(?: \(?[A-Za-z]{2,}\.?\)?)+(?: ?\^[23])?)?")
# Where an answer without a box says its number.
STATED = re.compile(r"\banswer(?:\s+is\s*:?|\s*:|\s+-\s|\s*\n)(?=([^,;(]{1,100}))", re.IGNORECASE)
CLAUSE_END = re.compile(r"\n|[.!?](?!\d)|\b(?:because|since|as)\b")  # behind the number


def read_integer(text: str) -> int | None:
    r"""The integer from 0 to 999 that `text` is: 073, 73.0, m+n=73, 73\text{ cm}^2 are 73. None for all else: a sum, a
    range or "at least 73" is no integer."""
    value = _last_with_digit(NAMED.split(plain_formula(text)))
    words = " ".join(re.sub(r"\\text|[{}]", " ", value).split())
    number = INTEGER.fullmatch(words)
    return int(number[1]) if number and not HEDGE.search(words) else None


def answer_integer(answer: str) -> int | None:
    """The one integer in an answer's boxes; without boxes, behind its last "answer is" or "answer:", else in its last
    clause with a digit."""
    boxes = last_boxes(answer)
    if boxes is not None:
        values = set(map(read_integer, boxes.contents))
        return values.pop() if len(values) == 1 else None
    text = NOT_BUT.sub("", re.sub(r"\\[()\[\]]|[$*#`]|</?\w+>", " ", answer[-TAIL:]))
    stated = STATED.findall(text)
    clause = stated[-1] if stated else _last_with_digit(re.split(r"[\n,]", text))
    return read_integer(CLAUSE_END.split(clause.strip())[0])


def _last_with_digit(parts: list[str]) -> str:
    return next((part for part in reversed(parts) if re.search(r"\d", part)), "")


# Letters

# Marks of bold text and formulas, which say nothing.
MARKS = re.compile(
    r"[*`#${}\"]|__|\\[()\[\]]|\\(?:text|math)\w*|\\(?:bf|it|rm|boldsymbol|[lL]arge)(?![a-zA-Z])")
# Where a letter is given.
GIVEN = re.compile("|".join((
    # "the answer is B", "Answer: option (B)", "I choose B"
    r"(?i:\b(?:ans|answer|option|choice|correct)\s*"
    r"(?:(?:is|(?:should|must|would) be)\b\s*:?|[:>=–-]|\n)"
    r"|\b(?:choose|pick|select|go with|it is|it's|matches|corresponds to)\b)"
    r"(?:[\s(\[<,]|(?i:the|option|choice|answer|letter|therefore|thus|clearly)\b)*([A-D])(?!\w)",
    # "B is right"
    r"\b([A-D])(?=[)\]]?\s+(?i:is (?:the )?(?:final )?(?:correct|right|best|answer)))",
    # "answer: b", and nothing more on the line
    r"(?i:\banswer[ \t]*:[ \t(]*)([a-d])(?=[.)\s]*$)",
)), re.MULTILINE)  # fmt: skip
# Without such a place: a line that is a letter, or begins with one as the list of options does.
LINE = re.compile(
    r"^[^\w\n]*(?:(?i:so|thus|hence|therefore|option|choice|answer)\b[ ,(\[]*)*([A-D])"
    r"(?=[)\].:]+(?:\s|$)|\s*$)", re.MULTILINE)
# What follows a letter that is no choice.
NO_CHOICE = re.compile("|".join((
    r"[\w^'’(]|\s*[=+]|[-–/*]\w",  # the rest of a word or formula
    r"[)\]\s]*(?:[,/&]|\bor\b|\band\b)[\s(\[]*(?:maybe )?[A-D]\b(?! (?:is|was|has)\b)",  # a second letter
    r"[)\]\s]*(?:\?|(?:is|was) (?:not|wrong|incorrect|false|out|too)\b|isn't|cannot)",  # a denial
    # a noun after the article A
    r"(?<=A) (?!(?:is|and|because|since|as|which|with|due|for|not|but|rather)\b)[a-z]",
)))  # fmt: skip


def answer_letter(answer: str) -> str | None:
    """The letter, "A" to "D", of the last place of an answer that commits to exactly one."""
    boxes = last_boxes(answer)
    if boxes is not None:
        if not boxes.contents:
            return None
        # The boxes are said once more in words, which the patterns read, with what follows them.
        answer += f"\nThe answer is {', '.join(boxes.contents)}\n{answer[boxes.end :]}"
    answer = NOT_BUT.sub("", MARKS.sub("", answer))
    given = _letters(GIVEN, answer)
    if given:
        return given[-1]
    lines = set(_letters(LINE, answer))
    return lines.pop() if len(lines) == 1 else None


def _letters(places: re.Pattern, text: str) -> list[str]:
    given = [place for place in places.finditer(text) if not NO_CHOICE.match(text, place.end())]
    return [place[place.lastindex].upper() for place in given]
