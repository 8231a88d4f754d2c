r"""What an answer says: its boxes, a plain form of the formula in them, the integer or the letter.

graders.py compares it with the reference. What math-verify reads by itself is left to it.
"""

import re

LONGEST = 1000  # characters in boxes that are read; MATH-500's longest reference has 53
TAIL = 4000  # characters that are, of an answer without a box: math-verify's time is not linear

# A \boxed{} is followed to its closing brace in one pass; \{ and \} are text.
BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
# What may stand between the boxes of one answer: words only before an "and" or "or". List marks,
# names as in "x = \boxed{1}" and commands as in "\quad \text{and}" do not part them.
BETWEEN_BOXES = re.compile(
    r"(?:[^.!?\n]{0,40}\b(?:and|or)\b)?(?:[^a-zA-Z0-9\\]|\\[a-zA-Z]+|\\."
    r"|(?<![a-zA-Z0-9])(?:and|or|[a-zA-Z]|\d{1,2})(?![a-zA-Z0-9]))*", re.DOTALL)
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
    (r"\\text\{\s*(\d[\d.,:]*)", r"\1\\text{"),
    (r"(?<=\d) +((?!and\b|or\b|to\b)[a-z]{3,}[a-z ]*|[a-z]{2}(?=\^))(\^\{?\d\}?)?$", r"\\text{\1}"),
    (r"\s*\(?(?:\\[pb]?|\\text\s*\{\s*)?mod\b\s*\}?\s*\{?\d+\}?\)?$", ""),
]]  # fmt: skip
# What is no value: a comparison, a congruence, a ratio, "at least 2".
NO_VALUE = re.compile(
    r"[<>]|\\(?:[gl]eq?(?:slant)?|neq?|equiv)(?![a-zA-Z])|\d\s*:\s*\d"
    r"|\b(?:not|at least|at most|more|less|to)\b")
BASE = re.compile(r"\d_\{?(\w+)")


def last_boxes(answer: str) -> tuple[list[str], int] | None:
    r"""What stands in the last \boxed{} (\fbox{}, \framebox{}) of an answer and in those beside it,
    parts of one answer or a hedge, without repetitions; and where in the answer they end.

    Nothing stands in them if one is empty, they are longer than LONGEST, or the last is never closed:
    it takes back what stood before it. None if there is no box, or a "final answer is" follows it.
    """
    opened, boxes, last = [], [], -1
    for token in BRACES.finditer(answer):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token)
            last = token.start() if token[0] != "{" else last
        elif token[0] == "}" and opened and (start := opened.pop())[0] != "{":
            boxes.append((start.start(), start.end(), token.start()))
    boxes.sort()  # a box in a box counts as the last
    if last < 0 or re.search("final answer is", answer[last:], re.IGNORECASE):
        return None
    if not boxes or boxes[-1][0] != last:
        return [], len(answer)
    first = len(boxes) - 1
    while first and BETWEEN_BOXES.fullmatch(answer, boxes[first - 1][2] + 1, boxes[first][0]):
        first -= 1
    contents = list(dict.fromkeys(answer[begin:end] for _, begin, end in boxes[first:]))
    read = all(content.strip() for content in contents) and len("".join(contents)) <= LONGEST
    return contents if read else [], boxes[-1][2] + 1


def plain(text: str) -> str:
    """A formula in the form that the table above gives it."""
    text = text.translate(SIGNS)
    for written, read in PLAIN:
        text = written.sub(read, text)
    return text.strip()


def answer_formula(answer: str) -> str | None:
    r"""What math-verify is to read: the boxes in a plain form as one \boxed{}, else the end of the
    answer, of which it takes what stands behind "answer", else the last formula or number."""
    boxes = last_boxes(answer)
    if boxes is None:
        return answer[-TAIL:].translate(SIGNS) or None
    return rf"\boxed{{{plain(', '.join(boxes[0]))}}}" if boxes[0] else None


def reference_formula(reference: str) -> str | None:
    """The same of a reference, which data sets give as bare LaTeX or in one pair of dollars."""
    bare = re.fullmatch(r"\s*(\$?)((?:[^$\\]|\\.)*)\1\s*", reference, re.DOTALL)
    boxed = bare is None or r"\boxed" in reference
    return answer_formula(reference if boxed else rf"\boxed{{{bare[2]}}}")


def says_less(reference: str, answer: str) -> bool:
    """Whether a boxed answer is no value where the reference is one, or has another base:
    math-verify would take the number in it."""
    if not answer.startswith(r"\boxed"):
        return False
    if set(BASE.findall(answer)) - {"10", *BASE.findall(reference)}:
        return True
    value = not re.search(r"[<>\[(:]|\\[gln]eq?\b|\{\\text", reference)
    return value and NO_VALUE.search(answer) is not None


HEDGE = re.compile(r"\b(?:not|neither|at least|at most|or|and|about|between|more|less)\b")
NOT_BUT = re.compile(r"\bnot \S+ but (?:rather )?")  # "not B but C" is C
# An integer with what may stand around it: words and "=" before it, words as units behind it.
NAMED = re.compile(r"=|\\equiv|[A-Za-z)]\s*:|\bis\b")
INTEGER = re.compile(
    r"(?:[A-Za-z]{2,} )*\(?\+?0*(\d{1,3})(?:\.0*)?\)?(?:(?: \(?[A-Za-z]{2,}\.?\)?)+(?: ?\^[23])?)?")
STATED = re.compile(r"\banswer(?:\s+is\s*:?|\s*:|\s+-\s|\s*\n)(?=([^,;(]{1,100}))", re.IGNORECASE)


def read_integer(text: str) -> int | None:
    r"""The integer from 0 to 999 that `text` is: 073, 73.0, m+n=73, 73\text{ cm}^2 are 73. None for
    all else: a sum, a range or "at least 73" is no integer."""
    parts = [part for part in NAMED.split(plain(text)) if re.search(r"\d", part)] or [""]
    words = " ".join(re.sub(r"\\text|[{}]", " ", parts[-1]).split())
    number = INTEGER.fullmatch(words)
    return int(number[1]) if number and not HEDGE.search(words) else None


def answer_integer(answer: str) -> int | None:
    """The one integer in an answer's boxes; without boxes, behind its last "answer is" or
    "answer:", else in its last clause with a digit."""
    boxes = last_boxes(answer)
    if boxes is not None:
        values = {read_integer(content) for content in boxes[0]}
        return values.pop() if len(values) == 1 else None
    text = NOT_BUT.sub("", re.sub(r"\\[()\[\]]|[$*#]|</?\w+>", " ", answer[-TAIL:]))
    clauses = [clause for clause in re.split(r"[\n,]", text) if re.search(r"\d", clause)]
    said = (STATED.findall(text) or clauses or [""])[-1].strip()
    return read_integer(re.split(r"\n|[.!?](?!\d)|\b(?:because|since|as)\b", said)[0])


MARKS = re.compile(  # of bold text and formulas
    r"[*`#${}\"]|__|\\[()\[\]]|\\(?:text|math)\w*|\\(?:bf|it|rm|boldsymbol|[lL]arge)(?![a-zA-Z])")
# Where a letter is given: "the answer is B", "Answer: option (B)", "I choose B", "B is right".
GIVEN = re.compile(
    r"(?i:\b(?:ans|answer|option|choice|correct)\s*"
    r"(?:(?:is|(?:should|must|would) be)\b\s*:?|[:>=–-]|\n)"
    r"|\b(?:choose|pick|select|go with|it is|it's|matches|corresponds to)\b)"
    r"(?:[\s(\[<,]|(?i:the|option|choice|answer|letter|therefore|thus|clearly)\b)*([A-D])(?!\w)"
    r"|\b([A-D])(?=[)\]]?\s+(?i:is (?:the )?(?:final )?(?:correct|right|best|answer)))"
    r"|(?i:\banswer[ \t]*:[ \t(]*)([a-d])(?=[.)\s]*$)", re.MULTILINE)
# Without such a place: a line that is a letter, or begins with one as the list of options does.
LINE = re.compile(
    r"^[^\w\n]*(?:(?i:so|thus|hence|therefore|option|choice|answer)\b[ ,(\[]*)*([A-D])"
    r"(?=[)\].:]+(?:\s|$)|\s*$)", re.MULTILINE)
# What follows a letter that is no choice: the rest of a word or formula, a second letter, a denial,
# a noun after an article.
NO_CHOICE = re.compile(
    r"[\w^'’(]|\s*[=+]|[-–/*]\w"
    r"|[)\]\s]*(?:[,/&]|\bor\b|\band\b)[\s(\[]*(?:maybe )?[A-D]\b(?! (?:is|was|has)\b)"
    r"|[)\]\s]*(?:\?|(?:is|was) (?:not|wrong|incorrect|false|out|too)\b|isn't|cannot)"
    r"|(?<=A) (?!(?:is|and|because|since|as|which|with|due|for|not|but|rather)\b)[a-z]")


def answer_letter(answer: str) -> str | None:
    """The letter, "A" to "D", of the last place of an answer that commits to exactly one."""
    boxes = last_boxes(answer)
    if boxes is not None and not boxes[0]:
        return None
    if boxes is not None:
        answer += f"\nThe answer is {', '.join(boxes[0])}\n{answer[boxes[1] :]}"
    answer = NOT_BUT.sub("", MARKS.sub("", answer))
    given, lines = _letters(GIVEN, answer), _letters(LINE, answer)
    if given:
        return given[-1]
    return lines[0] if len(set(lines)) == 1 else None


def _letters(places: re.Pattern, text: str) -> list[str]:
    found = [place for place in places.finditer(text) if not NO_CHOICE.match(text, place.end())]
    return [place[place.lastindex].upper() for place in found]
