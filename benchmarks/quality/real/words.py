"""Words for keys, names and lists, chosen for these tasks: common, and each distinct from the others."""

from random import Random

ADJECTIVES = tuple(
    "amber ancient brave brisk bright calm careful cheerful clever cold crimson curious daring deep eager early "
    "fancy fierce gentle golden grand green happy hidden honest humble icy jolly keen kind late lively lonely loud "
    "lucky mighty modest narrow noble odd pale patient plain polite proud quick quiet rapid rare restless rough "
    "royal rusty secret sharp shiny silent silver simple sleepy smooth soft solid steady strange sturdy sunny swift "
    "tall tame tidy tiny warm wild wise yellow young".split()
)
NOUNS = tuple(
    "anchor apple arrow badge barrel basket beacon bell blanket bottle bridge brush bucket button cabin camera "
    "candle canyon carpet castle chain chair circle clock coat compass copper corner cottage cradle curtain desk "
    "diamond dragon drum eagle engine falcon feather fence ferry flute forest fountain garden ginger glove hammer "
    "harbor helmet island jacket kettle ladder lantern lemon library marble meadow mirror mountain needle oven "
    "paddle parrot pepper piano pillow pocket puppet rabbit ribbon saddle shelter spoon statue stove table temple "
    "thunder ticket tunnel turtle umbrella valley violin wagon window winter".split()
)


def keys(draw: Random, n: int) -> list[str]:
    """``n`` different keys such as "brave-lantern", as RULER makes them of an adjective and a noun."""
    found: dict[str, None] = {}
    while len(found) < n:
        found.setdefault(f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}")
    return list(found)


def numbers(draw: Random, n: int, digits: int = 7) -> list[str]:
    """``n`` different numbers."""
    return [str(number) for number in draw.sample(range(10 ** (digits - 1), 10**digits), n)]


def identifiers(draw: Random, n: int) -> list[str]:
    """``n`` UUIDs."""
    digits = [f"{draw.getrandbits(128):032x}" for _ in range(n)]
    return [f"{d[:8]}-{d[8:12]}-{d[12:16]}-{d[16:20]}-{d[20:]}" for d in digits]


def made_up(draw: Random, n: int, letters: int) -> list[str]:
    """``n`` different words that do not exist, of alternating consonants and vowels."""
    found: dict[str, None] = {}
    while len(found) < n:
        found.setdefault("".join(draw.choice("aeiou" if at % 2 else "bdfghjklmnprstvz") for at in range(letters)))
    return list(found)
