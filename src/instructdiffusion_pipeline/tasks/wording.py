"""Grammar that the families share: articles, number, lists."""

import re
from collections.abc import Sequence

DETERMINERS = {
    "the", "a", "an", "this", "that", "these", "those", "his", "her", "its", "their", "my", "your", "our", "both",
    "all", "every", "each", "one", "two", "three", "four", "five", "six", "several", "many", "some", "any", "no",
    "another", "either", "neither", "half", "most", "what", "whatever", "whichever",
}  # fmt: skip
PRONOUNS = {
    "he", "she", "it", "they", "him", "them", "i", "we", "us", "you", "who", "whoever", "someone", "anyone",
    "everyone", "something", "anything", "everything", "nothing", "nobody",
}  # fmt: skip
# The head noun of "two men on the left" ends where one of these begins, or a participle.
LINKS = {
    "on", "in", "at", "of", "with", "without", "w", "wo", "to", "from", "by", "near", "under", "behind", "over",
    "above", "below", "against", "inside", "outside", "for", "who", "that", "which", "whose", "next", "closest",
    "nearest", "between", "beside", "has", "is", "are", "was",
}  # fmt: skip
PLURALS = {
    "people", "men", "women", "children", "feet", "teeth", "mice", "geese", "sheep", "scissors", "pants", "skis",
    "police", "cattle", "they", "them", "these", "those",
}  # fmt: skip
SINGULARS = {
    "bus", "glass", "grass", "dress", "gas", "lens", "tennis", "mattress", "canvas", "james", "news",
}  # fmt: skip
MANY = {"both", "all", "these", "those", "two", "three", "four", "five", "six", "several", "many"}


def the(name: str) -> str:
    """`name` with "the" before it, unless it is a pronoun or brings a determiner of its own."""
    return name if name.split(maxsplit=1)[0].lower() in DETERMINERS | PRONOUNS else f"the {name}"


def a(phrase: str) -> str:
    """`phrase` with "a" or "an" before it, by its first letter (all our colours follow the rule)."""
    return f"an {phrase}" if phrase[0].lower() in "aeiou" else f"a {phrase}"


def is_plural(name: str) -> bool:
    """Whether `name` stands for several things: by its first word, by two heads, or by the ending of its head noun."""
    words = re.findall(r"\w+", name.lower()) or [name]
    words = words[: next((i for i, word in enumerate(words) if i and (word in LINKS or word.endswith("ing"))), None)]
    second = words[words.index("and") + 1 :] if "and" in words else []
    # "cat and dog" and "the man and his dog", but not "black and white cat"
    if words[0] in MANY or len(second) == 1 or (second and second[0] in DETERMINERS):
        return True
    noun = words[-1]
    return noun in PLURALS or (noun.endswith("s") and noun not in SINGULARS and not noun.endswith(("ss", "us", "is")))


def listing(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
