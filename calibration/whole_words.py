"""Where words and numbers of a text begin and end."""

import re
import unicodedata

_WHOLE = re.compile(
    r"""
    (?: (?<![ldm.]) -?\.?(?=d) )?             # the sign of a number, and its point if no digit precedes it: -5, .5
    [ld][ldm]*                                # a word or a number: letters, digits and combining marks
    (?: ['-](?=[ld])       [ldm]+             # can't, well-known, 3-5
      | (?<=d)[.,:/^*×·–](?=d) [ldm]+ )*      # 4.5, 1,000, 4:30, 4/5, 10^5
    (?: (?<=d)[%‰] )?
    """,
    re.VERBOSE,
)
"""A word or number, over the classes of characters that ``_classes`` returns."""


def inner_places(text: str) -> set[int]:
    """The places of ``text`` between two characters of one word or number, and before a combining mark."""
    classes = _classes(text)
    places = {place for place, kind in enumerate(classes) if kind == "m"}
    for found in _WHOLE.finditer(classes):
        places.update(range(found.start() + 1, found.end()))
    return places


def _classes(text: str) -> str:
    """The class of each character: d(igit), l(etter that has a case, or underscore), m(ark), or the character itself."""
    return "".join(map(_class_of, text))


def _class_of(character: str) -> str:
    match unicodedata.category(character)[0]:
        case "N":
            return "d"
        case "M":
            return "m"
        case "L":
            return "l" if character.lower() != character.upper() else " "
        case _:
            return "l" if character == "_" else character
