"""What the token entropies of a response say about its reasoning: reflection tokens.

The paper's reflection-token list could not be recovered. Ours is the union of the two lists that its authors use
elsewhere, matched by the text of a token with and without a leading space (a bare look-up misses the latter).
"""

from nanosafe.tokenizer import Tokenizer

REFLECTION_WORDS = frozenset(
    "Wait wait But but Alternatively <think> Okay Hmm Albeit However Yet Still Nevertheless Though Meanwhile "
    "Whereas".split()
)


def reflection_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the vocabulary whose text, stripped of spaces, is a reflection word."""
    return [i for i, text in enumerate(tokenizer.vocabulary()) if text.strip() in REFLECTION_WORDS]
