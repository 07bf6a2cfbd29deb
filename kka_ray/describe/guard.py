"""Reads a line of the language model and refuses what should not be drawn, with the reason.

A description of the normal class would be drawn as a normal image, judged hard, rewarded by the preference training,
and would then poison the detector. Two rules refuse it:

- *subject*: where the normal class has names (`bed`, `chair`, ...), the line's subject must not be one of them, a
  listed synonym, or a word whose embedding is as near to one as a synonym's. It is switched off (`subject: false`)
  where anomalies are defects of the normal object: "a steel screw with a bent tip" is then what is wanted.
- *vocabulary*: where normal and anomalous samples differ by attributes only, a line must use some word that no
  normal caption uses; else it says nothing that is not normal.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from kka_ray.config.models import GuardConfig
from kka_ray.features.text import TextEncoder

_LEADING = re.compile(r"^(?:[\s\-*\u2022.):\"'`]+|\d+[.):](?!\d))+")
"""List marks. A number is one if a full stop, a bracket or a colon follows: "20 petals" begins with what is meant."""
_PICTURE = re.compile(
    r"^(?:an?|the|one|this is an?|there is an?|it is an?)?\s*(?:[\w-]+\s){0,2}"
    r"(?:photos?|photographs?|pictures?|images?|close-ups?|closeups?|shots?|views?|paintings?|drawings?|snapshots?)"
    r"\s+(?:of|showing|shows|with|depicting)\s+",
    re.IGNORECASE,
)
_OPENING = re.compile(r"^(?:there (?:is|are)|this is|these are|here is|it is|it's)\s+", re.IGNORECASE)
_COUNTING = re.compile(
    r"^(?:an?|the|some|two|three|several|many)?\s*(?:[\w-]+\s)?"
    r"(?:pairs?|sets?|rows?|groups?|couples?|stacks?|piles?|collections?|pieces?|lots?|kinds?|types?|sorts?) of\s+",
    re.IGNORECASE,
)
_RELATIONS = frozenset(
    [
        "in",
        "on",
        "at",
        "with",
        "near",
        "beside",
        "under",
        "behind",
        "over",
        "by",
        "next",
        "against",
        "from",
        "inside",
        "into",
        "above",
        "below",
        "between",
        "around",
        "among",
        "without",
        "for",
        "to",
        "of",
        "that",
        "which",
        "who",
        "is",
        "are",
        "was",
        "were",
        "has",
        "have",
        "being",
        "and",
        "while",
        "as",
        "along",
        "across",
        "through",
        "atop",
        "outside",
        "standing",
        "sitting",
        "lying",
        "placed",
        "made",
        "covered",
        "filled",
        "surrounded",
        "seen",
    ]
)
_FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "there",
        "here",
        "it",
        "its",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "has",
        "have",
        "had",
        "do",
        "does",
        "of",
        "in",
        "on",
        "at",
        "to",
        "by",
        "for",
        "from",
        "with",
        "without",
        "and",
        "or",
        "but",
        "as",
        "them",
        "they",
        "their",
        "one",
        "ones",
        "some",
        "any",
        "all",
        "each",
        "every",
        "which",
        "who",
        "what",
        "where",
        "when",
        "very",
        "more",
        "most",
        "other",
        "another",
        "same",
        "own",
        "such",
        "than",
        "then",
        "so",
        "not",
        "no",
    ]
)
_WORD = re.compile(r"[^\W\d_]+(?:'[a-z]+)?|\d+")
_PART = re.compile(r"[\w'-]+|[^\w\s'-]+")
"""A word with its hyphens, or punctuation."""
_IN_F = re.compile(r"(?:.*(?:shel|lea|wol|hal|cal|loa|thie|sel|scar|hoo|shea|whar|dwar)|el)ves")
_IN_FE = re.compile(r"(?:.*(?:kni|wi)|li)ves")
"""Plurals of `shelf`, `penknife`, ...; most words in -ves, as `gloves` and `valves`, only add an s."""


class Guard:
    """Judges lines in the order they are given and remembers those it let pass, so that copies are refused.

    Args:
        config: limits and switches.
        normal_terms: names of the normal class and synonyms, for the subject rule; without any it refuses nothing.
        normal_captions: captions of the training normals, for the vocabulary rule.
        encoder: sentence embeddings.
    """

    def __init__(
        self, config: GuardConfig, normal_terms: Sequence[str], normal_captions: Sequence[str], encoder: TextEncoder
    ) -> None:
        self.config = config
        self._encoder = encoder
        names = {_singular(term.lower()) for term in normal_terms}
        self._term_vectors = encoder.embed(sorted(names))
        # Each word in the form that a subject's words have: "glasses case" is met as "glass case".
        self._terms = names | {" ".join(map(_singular, _PART.findall(_bare(name)))) for name in names}
        self._vocabulary = {w for caption in normal_captions for w in content_words(caption)}
        self._texts: set[str] = set()
        self._vectors = np.zeros((0, self._term_vectors.shape[1]), np.float32)

    def judge(self, raw_lines: Sequence[str]) -> list[tuple[str, str]]:
        """(text, reason) for each line; the reason is empty where the line may be drawn."""
        texts = [clean(raw) for raw in raw_lines]
        vectors = self._encoder.embed(texts)
        return [
            (text, self._reason(raw, text, vector)) for raw, text, vector in zip(raw_lines, texts, vectors, strict=True)
        ]

    def _reason(self, raw: str, text: str, vector: np.ndarray) -> str:
        reason = form_reason(raw, text, self.config)
        if reason:
            return reason
        if self.is_normal_class(text):
            return "normal_class"
        key = words_of(text)
        if key in self._texts:
            return "duplicate"
        if self.config.near_duplicate < 1 and len(self._vectors):
            if float((self._vectors @ vector).max()) >= self.config.near_duplicate:
                return "near_duplicate"
        self._texts.add(key)
        self._vectors = np.vstack([self._vectors, vector])
        return ""

    def is_normal_class(self, text: str) -> bool:
        """Whether a line describes the normal class itself."""
        if self.config.subject and self._terms and self._names_normal_class(text):
            return True
        return self.config.normal_vocabulary and not (set(content_words(text)) - self._vocabulary)

    def _names_normal_class(self, text: str) -> bool:
        words = subject(text, self._terms)
        if not words:
            return False
        if _ends_in(words, self._terms):
            return True
        if self.config.subject_similarity >= 1:
            return False
        return float((self._encoder.embed([words[-1]]) @ self._term_vectors.T).max()) >= self.config.subject_similarity


def clean(raw: str) -> str:
    """The line itself: the first one, without list marks, quotes, a final full stop and doubled blanks."""
    line = next((part for part in raw.split("\n") if part.strip()), "")
    line = _LEADING.sub("", line)
    return re.sub(r"\s+", " ", line).strip().strip("\"'`").rstrip(" .,;:")


def form_reason(raw: str, text: str, config: GuardConfig) -> str:
    """Why a line's form is refused, or an empty string."""
    words = text.lower().split()
    if not words:
        return "empty"
    if len(words) < config.min_words:
        return "too_short"
    if len(words) > config.max_words or not raw.rstrip(" ").endswith("\n"):
        return "too_long"  # a line without its end was cut off by the token limit
    letters = sum(c.isalpha() or c == " " for c in text)
    if letters < 0.8 * len(text) or "http" in text or "://" in text:
        return "malformed"
    triples = Counter(zip(words, words[1:], words[2:], strict=False))
    if triples and max(triples.values()) >= 3:
        return "malformed"  # the model is going round in circles
    return ""


def words_of(text: str) -> str:
    """A text's words in lower case, with single spaces: texts that differ by no more are duplicates."""
    return " ".join(_WORD.findall(text.lower()))


def content_words(text: str) -> list[str]:
    """Lower-case words that carry meaning, in the singular."""
    return [_singular(w) for w in _WORD.findall(text.lower()) if w not in _FUNCTION_WORDS]


def subject(text: str, terms: Collection[str] = ()) -> list[str]:
    """Words of the line's subject: its first noun phrase, in the singular, without 'a photo of' and 'a pair of'.

    `terms` are nouns that are known, in the singular: one of them ends the phrase before `and`, a comma or a participle
    ("four tennis courts arranged neatly"), before which other words go on ("a red, soft couch"). One of several words
    belongs to the phrase whatever they are ("two chests of drawers", "a rocking chair").
    """
    names = sorted((term.split() for term in terms if " " in term), key=len, reverse=True)
    words: list[str] = []
    parts = _PART.findall(_bare(text.strip().lower()))
    singulars = [_singular(part) for part in parts]
    place = 0
    while place < len(parts):
        if name := next((n for n in names if singulars[place : place + len(n)] == n), None):
            words += name
            place += len(name)
            continue
        part, following = parts[place], "".join(parts[place + 1 : place + 2])
        goes_on = following and following not in _FUNCTION_WORDS | _RELATIONS
        place += 1
        if words and part in ("and", ",") and goes_on and not _ends_in(words, terms):
            continue
        if words and (part in _RELATIONS or not _WORD.match(part)):
            break
        if words and part.endswith("ing") and len(part) > 5:
            break
        if words and part.endswith(("ed", "ly")) and _ends_in(words, terms):
            break
        if part not in _FUNCTION_WORDS and _WORD.match(part):
            words.append(_singular(part))
    return words


def _bare(text: str) -> str:
    """A text in lower case without 'there is', 'a photo of' and 'a pair of' at its beginning."""
    return _COUNTING.sub("", _OPENING.sub("", _PICTURE.sub("", text)))


def _ends_in(words: Sequence[str], terms: Collection[str]) -> bool:
    return any(" ".join(words[i:]) in terms for i in range(len(words)))


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    if _IN_F.fullmatch(word):
        return word[:-3] + "f"
    if _IN_FE.fullmatch(word):
        return word[:-3] + "fe"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
