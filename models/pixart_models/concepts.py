"""Concept density, the paper's Table 1: how much a set of captions says, counted in nouns.

A noun is valid when it appears more than 10 times in the set; the share of distinct nouns that are
valid, and the nouns of a caption, are what dense captions raise (LAION from 6.4 to 20.9 a picture).

The tagger is a lexicon (Brill's, as textblob ships it: text, no download, nothing unpickled) that
gives each word its usual class, and a few rules that correct classes by their neighbours, written
as regular expressions over a sentence's classes, one letter a word. Proper nouns and nouns before
nouns count; letters' case does not, plurals count as their singular. On the 60 hand-labelled
sentences of its test precision is 0.97 and recall 0.98 (0.94 and 0.99 on the 18 its rules were not
fitted to); textblob's own tagger has 0.94 and 0.95 (0.96 and 0.96) and takes nine times as long. A
core counts about 6,000 captions of 100 words a second.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache

MIN_COUNT = 11  # "more than 10 times"

_TOKEN = re.compile(r"\w+://\S+|[^\W\d_][^\W_]*(?:-[^\W_]+)*|'s\b|\w+|[^\w\s]")
# N noun, n noun that can be a verb, i noun in -ing, S plural, s plural that can be a verb; v verb,
# z verb in -s, g verb in -ing, d participle, M modal, J adjective, R adverb, D determiner,
# Q this, A other, O pronoun, W relative, I preposition, F of, T to, C and, # number, . the rest
_CLASS_OF_TAG = {
    "NN": "N", "NNP": "N", "FW": "N", "NNS": "S", "NNPS": "S", "VB": "v", "VBP": "v", "VBZ": "z",
    "VBG": "g", "VBN": "d", "VBD": "d", "MD": "M", "JJ": "J", "JJR": "J", "JJS": "J", "RB": "R",
    "RBR": "R", "RBS": "R", "RP": "R", "WRB": "R", "UH": "R", "DT": "D", "PDT": "D", "PRP$": "D",
    "WP$": "D", "POS": "D", "PRP": "O", "EX": "O", "WP": "W", "WDT": "W", "IN": "I", "TO": "T",
    "CC": "C", "CD": "#",
}  # fmt: skip
_FIXED = {
    "of": "F", "this": "Q", "these": "Q", "those": "Q", "that": "W", "other": "A", "others": "O",
    "a": "D", "i": "O", "'s": "D", "leaves": "S",
}  # fmt: skip
_ENDINGS = [  # of words that the lexicon lacks
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\d|://", "#"), (r"ly$", "R"), (r"ing$", "g"), (r"ed$", "d"),
        (r"(ous|ful|less|ish|[ai]ble|ive|ic|al|ary)$", "J"), (r"[^siu]s$", "S"),
    )
]  # fmt: skip
_MAX_LETTERS = 40
_NOUNS = frozenset("NniSs")
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=[TMO])n|(?<=W)n(?=[DIRTO#.])", "v"),  # to rest, it can rest, who rest on
        (r"i(?=[DQO])", "g"),  # reading the
        (r"(?<=[OW])s|(?<=[Nn])s(?=[DQO#])", "z"),  # that shields, image features a
        (r"(?<=[Ss])n(?=[DIRTQO#])", "v"),  # dogs play with
        (r"(?<=[DJAFINn#])v|(?<=[DJAF])z|(?<=#)z(?![DQO])|(?<=D[dg])[vz]", "N"),  # brown bear
        (r"(?<=D)[Jdg](?=[FIzM.])|(?<=J)g(?=F)|(?<=I)J(?=F)|(?<=F)J(?=[.C])", "N"),  # the left of
    )
]


@dataclass
class ConceptDensity:
    """Noun counts of some captions; those of several partitions ``merge``, in any order."""

    counts: Counter[str] = field(default_factory=Counter)
    """How often each noun (lower case, singular) appears: ~100 bytes for each distinct one."""
    num_captions: int = 0
    """Captions that say anything; empty ones are left out."""

    def merge(self, other: "ConceptDensity") -> None:
        """Add another partition's counts to these."""
        self.counts.update(other.counts)
        self.num_captions += other.num_captions

    @property
    def num_distinct(self) -> int:
        return len(self.counts)

    @property
    def num_valid(self) -> int:
        """Distinct nouns that appear more than 10 times."""
        return sum(count >= MIN_COUNT for count in self.counts.values())

    @property
    def valid_share(self) -> float:
        """Of distinct nouns; 0 where there are none."""
        return self.num_valid / max(1, self.num_distinct)

    @property
    def num_nouns(self) -> int:
        return self.counts.total()

    @property
    def nouns_per_caption(self) -> float:
        return self.num_nouns / max(1, self.num_captions)


def measure_concepts(texts: Iterable[str]) -> ConceptDensity:
    """The concept density of captions, one a picture; loads the tagger (seconds) at first."""
    density = ConceptDensity()
    for text in texts:
        if text.strip():
            density.counts.update(find_nouns(text))
            density.num_captions += 1
    return density


def find_nouns(text: str) -> list[str]:
    """The nouns of an English text in order, lower case and singular."""
    words = [_look_up(word) for word in _TOKEN.findall(text.lower().replace("\u2019", "'"))]
    classes = "".join([kind for kind, _ in words])
    for pattern, replacement in _RULES:
        classes = pattern.sub(replacement, classes)
    return [noun for kind, (_, noun) in zip(classes, words, strict=True) if kind in _NOUNS]


@lru_cache(maxsize=2**18)
def _look_up(word: str) -> tuple[str, str]:
    """A word's usual class, and what it counts as where it is a noun."""
    kind = _classify(word)
    if kind in "Sz":
        noun = _singular(word)
        return ("s" if kind == "S" and _can_be_verb(noun) else kind), noun
    if kind == "N" and word.endswith("ing"):
        return "i", word
    return ("n" if kind == "N" and _can_be_verb(word) else kind), word


def _classify(word: str) -> str:
    if word in _FIXED:
        return _FIXED[word]
    if not word[0].isalpha() or not 1 < len(word) <= _MAX_LETTERS:
        return "#" if word[0].isalnum() else "."
    lexicon = _load_lexicon()
    for spelling in (word, word.title(), word.upper()):
        if spelling in lexicon:
            return _CLASS_OF_TAG.get(lexicon[spelling].split("|")[0], ".")
    if "-" in word:  # the last part decides
        kind = _classify(word.rsplit("-", 1)[1])
        return {"d": "J", "g": "J", "J": "J", "S": "S"}.get(kind, "N")
    return next((kind for ending, kind in _ENDINGS if ending.search(word)), "N")


def _singular(word: str) -> str:
    from textblob.en.inflect import singularize

    lexicon = _load_lexicon()
    guess = str(singularize(word))
    candidates = (word[:-1], guess, word[:-3] + "f", word[:-3] + "fe")
    for noun in candidates:
        if lexicon.get(noun, "").startswith("NN"):
            return noun
    return word[:-1] if word[:-1] in lexicon else guess


def _can_be_verb(word: str) -> bool:
    lexicon = _load_lexicon()
    stems = (word, word.rstrip("e"), word + word[-1:])  # play-ing, rid-ing, run-n-ing
    return (
        lexicon.get(word) in ("VB", "VBP")
        or any(lexicon.get(stem + "ing") == "VBG" for stem in stems)
        or any(lexicon.get(stem + "ed") in ("VBD", "VBN") for stem in stems)
    )


@cache
def _load_lexicon() -> dict[str, str]:
    """94,000 words as they are spelled, with their usual Penn Treebank tag."""
    from textblob.en import lexicon

    return dict(lexicon.items())
