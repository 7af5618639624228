"""Texts changed a little for training, their sentiment kept as far as words alone tell. Pictures: `feats.images`.

Words left out, swapped and replaced by synonyms as in Wei & Zou, EDA: Easy Data Augmentation Techniques, EMNLP 2019;
mood particles at the end as in study B.
"""

import hashlib
import re
from dataclasses import dataclass
from random import Random

from feats.errors import UsageError

# Within a group each word can stand for each other: as strong, and of the same sentiment.
SYNONYMS = (
    ("good", "nice"),
    ("great", "awesome", "fantastic"),
    ("amazing", "incredible"),
    ("beautiful", "lovely", "gorgeous"),
    ("perfect", "flawless"),
    ("delicious", "tasty", "yummy"),
    ("funny", "hilarious"),
    ("happy", "glad"),
    ("excited", "thrilled"),
    ("calm", "peaceful"),
    ("love", "adore"),
    ("smart", "clever"),
    ("awful", "terrible", "horrible"),
    ("ugly", "hideous"),
    ("stupid", "dumb"),
    ("boring", "dull"),
    ("annoying", "irritating"),
    ("scary", "frightening"),
    ("sad", "unhappy"),
    ("angry", "furious"),
    ("scared", "afraid"),
    ("tired", "exhausted"),
    ("hate", "detest", "loathe"),
    ("weird", "strange", "odd"),
    ("big", "large"),
    ("small", "little"),
    ("fast", "quick"),
    ("quiet", "silent"),
    ("loud", "noisy"),
    ("really", "truly"),
    ("maybe", "perhaps"),
    ("start", "begin"),
    ("buy", "purchase"),
    ("kids", "children"),
    ("friend", "buddy"),
    ("photo", "picture", "pic"),
    ("movie", "film"),
    ("shop", "store"),
    ("road", "street"),
    ("everyone", "everybody"),
    ("someone", "somebody"),
    ("anyone", "anybody"),
)
PARTICLES = ("haha", "wow", "oh no", "sigh", "yay", "ugh", "hmm", "oh well")
PARTICLE_PROBABILITY = 0.5

_OTHERS = {word: [other for other in group if other != word] for group in SYNONYMS for word in group}
# Letters, with apostrophes and hyphens among them and punctuation at the ends. Nothing else is dropped or replaced:
# hashtags, @user, URLs, emoji, emoticons and numbers all hold some other character.
_WORD = re.compile(r"""(["'“‘(\[]*)([^\W\d_]+(?:['’-][^\W\d_]+)*)([.,;:!?…"'”’)\]]*)""")
_NEGATION = re.compile(
    r"not?|nor|never|none|nothing|nobody|without|cannot|\w+n['’]t|(do|does|did|is|was|wo|ca|ai)nt", re.IGNORECASE
)


@dataclass(frozen=True)
class TextAugmentation:
    """How much a text is changed: probabilities for each of its words, in [0, 1), else `UsageError`."""

    drop: float = 0.1  # of being left out; negations stay, since without one a text says the opposite
    swap: float = 0.1  # of changing places with the next
    synonym: float = 0.1  # of being replaced by a synonym, where `SYNONYMS` has one
    # Half the texts get a mood particle at the end, whatever their label is.
    particles: bool = False

    def __post_init__(self) -> None:
        for name in ("drop", "swap", "synonym"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UsageError(f"`{name}` {value:g}: expected a probability, 0 or more and less than 1")


def augment_text(text: str, seed: int, how: TextAugmentation = TextAugmentation()) -> str:
    """The text, changed at random as `how` says: a function of its arguments and nothing else.

    Words are what blanks part, and are joined by one blank. At least one is left of a text that has any.
    """
    words = text.split()
    if not words:
        return text
    key = hashlib.blake2b(f"{seed}/{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    random = Random(int.from_bytes(key))
    replaced = [_synonym(word, random) if random.random() < how.synonym else word for word in words]
    left = [word for word in replaced if random.random() >= how.drop or not _can_go(word)]
    left = left or [random.choice(replaced)]
    _swap(left, how.swap, random)
    if how.particles and random.random() < PARTICLE_PROBABILITY:
        left.append(random.choice(PARTICLES))
    return " ".join(left)


def _synonym(word: str, random: Random) -> str:
    """A synonym in the word's own case, between the punctuation at its ends; the word itself where there is none."""
    found = _WORD.fullmatch(word)
    others = _OTHERS.get(found[2].lower()) if found else None
    if not found or not others:
        return word
    other = random.choice(others)
    if found[2].isupper():
        other = other.upper()
    elif found[2][0].isupper():
        other = other.capitalize()
    return f"{found[1]}{other}{found[3]}"


def _can_go(word: str) -> bool:
    found = _WORD.fullmatch(word)
    return found is not None and not _NEGATION.fullmatch(found[2])


def _swap(words: list[str], probability: float, random: Random) -> None:
    """Let words change places with the next, in place; none moves twice."""
    i = 0
    while i < len(words) - 1:
        if random.random() < probability:
            words[i : i + 2] = words[i + 1], words[i]
            i += 1
        i += 1
