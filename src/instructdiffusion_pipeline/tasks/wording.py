"""Grammar that the families share: articles, number, lists."""

import re
from collections.abc import Sequence

DETERMINERS = {"the", "a", "an", "this", "that", "these", "those", "his", "her", "its", "their", "my", "your", "our"}
DETERMINERS |= {"both", "all", "every", "each", "one", "two", "three", "four", "someone", "anyone", "everyone"}
# The head noun of "two men on the left" ends where one of these begins.
LINKS = {
    "on",
    "in",
    "at",
    "of",
    "with",
    "to",
    "from",
    "by",
    "near",
    "under",
    "behind",
    "over",
    "above",
    "below",
    "who",
}
LINKS |= {
    "that",
    "which",
    "wearing",
    "holding",
    "sitting",
    "standing",
    "next",
    "closest",
    "facing",
    "between",
    "beside",
}
PLURALS = {"people", "men", "women", "children", "feet", "teeth", "mice", "geese", "sheep", "scissors", "pants"}
SINGULARS = {"bus", "glass", "grass", "dress", "gas", "lens", "tennis", "mattress", "platypus", "cactus", "octopus"}


def the(name: str) -> str:
    """`name` with "the" before it, unless it brings a determiner of its own."""
    return name if name.split(maxsplit=1)[0].lower() in DETERMINERS else f"the {name}"


def a(phrase: str) -> str:
    """`phrase` with "a" or "an" before it, by its first letter (all our colours follow the rule)."""
    return f"an {phrase}" if phrase[0].lower() in "aeiou" else f"a {phrase}"


def is_plural(name: str) -> bool:
    """Whether `name` stands for several things, by the ending of its head noun."""
    words = re.findall(r"\w+", name.lower())
    head = next((index for index, word in enumerate(words) if index and word in LINKS), len(words))
    if " and " in " ".join(words[:head]) or words[0] in {"both", "all", "these", "those", "two", "three", "four"}:
        return True
    noun = words[head - 1]
    return noun in PLURALS or (noun.endswith("s") and noun not in SINGULARS and not noun.endswith(("ss", "us", "is")))


def listing(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
