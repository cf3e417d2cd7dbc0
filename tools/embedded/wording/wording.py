"""The shape of one language's sentences and questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Variants = Mapping[str, Sequence[str]]


def unchanged(text: str) -> str:
    return text


@dataclass(frozen=True)
class Wording:
    """How one language says what ``statements`` and ``questions`` hold.

    Args:
        sentences: kind of statement -> variants; ``{S}`` is the subject, by name or by a pronoun.
        questions: kind of question -> variants.
        pronouns: kind of subject -> what stands for its name in the sentences after the first.
        titles: kind of subject -> title, ``{S}`` being the name.
        subjects: kind of subject -> how it is named in a sentence, where the bare name will not do.
        join: several names -> one list.
        territory: a territory's name -> that name as it stands in a sentence; likewise ``currency`` and ``language``.
        number: a number in figures -> the same in the language's own figures.
        identifiers: whether a money or a time zone is given with its code, as is usual where those are foreign words.
        number_asked: the same in a question.
        brackets: a name and the code that follows it.
        finish: a filled template -> the text, grammar that depends on the filling put right.
    """

    sentences: Variants
    questions: Variants
    pronouns: Variants
    titles: Mapping[str, str]
    join: Callable[[Sequence[str]], str]
    territory: Callable[[str], str] = unchanged
    currency: Callable[[str], str] = unchanged
    language: Callable[[str], str] = unchanged
    number: Callable[[str], str] = unchanged
    number_asked: Callable[[str], str] = unchanged
    finish: Callable[[str], str] = unchanged
    identifiers: bool = True
    brackets: str = "{} ({})"
    subjects: Mapping[str, str] = field(default_factory=dict)


def joiner(comma: str, last: str) -> Callable[[Sequence[str]], str]:
    """A function that makes "A, B and C" of several names, with these separators."""

    def join(names: Sequence[str]) -> str:
        return comma.join(names[:-1]) + last + names[-1] if len(names) > 1 else names[0]

    return join
