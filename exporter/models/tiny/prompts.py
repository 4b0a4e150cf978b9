"""Prompts of `tiny`: one colour, one shape, one direction and perhaps a speed, in any order."""

from __future__ import annotations

from svdit.exporter.models.tiny.config import DEFAULT_SPEED, KINDS, Captions
from svdit.plans.errors import complain

FILLERS = frozenset({"a", "an", "the", "moving", "going", "and", "is", "towards"})
"""Words that may stand in a prompt and mean nothing."""


def tokens_of(prompt: str, captions: Captions) -> list[int]:
    """Caption tokens [colour, shape, direction, speed] of a prompt such as "fast red circle moving up-left".

    Raises SvditError listing the vocabulary for an unknown word, two words of one kind, or a kind left out.
    """
    kind_of = {word: kind for kind, words in captions.vocabulary.items() for word in words}
    found: dict[str, str] = {}
    for word in prompt.lower().replace(",", " ").replace(".", " ").split():
        if word in FILLERS:
            continue
        kind = kind_of.get(word)
        if kind is None:
            raise complain(f"prompt {prompt!r}", f"the word {word!r}", _vocabulary(captions), _try())
        if found.setdefault(kind, word) != word:
            got = f"two words for its {kind}, {found[kind]!r} and {word!r}"
            hint = f"diagonals are one word, as in {found[kind]}-{word}" if kind == "direction" else ""
            raise complain(f"prompt {prompt!r}", got, "one", hint)
    if DEFAULT_SPEED in captions.vocabulary["speed"]:
        found.setdefault("speed", DEFAULT_SPEED)
    tokens, start = [], 0
    for kind in KINDS:
        words = captions.vocabulary[kind]
        if kind not in found:
            raise complain(f"prompt {prompt!r}", f"no {kind}", "one of " + ", ".join(words), _try())
        tokens.append(start + words.index(found[kind]))
        start += len(words)
    return tokens


def _vocabulary(captions: Captions) -> str:
    return "; ".join(f"{kind}: {', '.join(words)}" for kind, words in captions.vocabulary.items())


def _try() -> str:
    return 'try "red circle moving right"'
