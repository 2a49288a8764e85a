"""English words as the rules in `root_verbs.py` see them: closed classes, parts of speech, tokens and sentences.

The lexicon says which parts of speech a word can have. Words that only a closed class has ("the", "of", "which") are
listed here and have none.
"""

import functools
import re
from typing import Any, NamedTuple

from alpaca.cli import UserError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SUBORDINATORS = _words("if when while because although though once unless until since as where")
PREPOSITIONS = SUBORDINATORS | _words(
    "about above across after against along among around at before behind below beneath beside between beyond by "
    "concerning considering despite down during except for from in including inside into like near of off on onto out "
    "outside over per regarding than through throughout to toward towards under unlike up upon versus via with within "
    "without"
)
CONJUNCTIONS = _words("and or but nor / , &")
ARTICLES = _words("a an the this these those my your his her its our their another no every such")
QUANTIFIERS = _words(
    "all any both each either enough few less many more most much neither several some that first second third fourth "
    "fifth last one two three four five six seven eight nine ten eleven twelve fifteen twenty thirty fifty hundred"
)
OBJECT_PRONOUNS = _words("me us him them it you myself yourself itself themselves")
PRONOUNS = OBJECT_PRONOUNS | _words("i he she we they someone something anyone anything everyone everything nothing")
QUESTION_WORDS = _words("what which who whom whose how why when where whether")
MODALS = _words(
    "can could should would will shall may might must do does did cannot can't couldn't don't doesn't didn't won't"
)
HAVE = _words("has have had")
BE = _words("is are was were am be been being")
AUXILIARIES = MODALS | HAVE | BE
PARTICLES = _words("up down out off away back over")
CLOSED_CLASSES = (
    PREPOSITIONS | CONJUNCTIONS | ARTICLES | QUANTIFIERS | PRONOUNS | QUESTION_WORDS | AUXILIARIES | _words("not there")
)

# Verb and preposition that together take an object: "fill in the blank".
PHRASAL_VERBS = {("fill", "in"), ("put", "on"), ("try", "on"), ("turn", "on"), ("take", "on")}
# Verbs that may take two objects: "tell me a joke", "give each paragraph a heading".
DATIVE_VERBS = _words("give tell show teach send offer ask assign hand lend pass bring grant wish write find make draw")
# Words before a number: "at least 3", "up to ten".
HEDGES = _words("at least up to about around exactly over under than approximately roughly nearly only just")
# Words that may come before the verb of a request: "please", "first", "don't".
OPENERS = _words(
    "please now first firstly second next then also finally just and so kindly always never not do don't don’t , -"
)
# Readings that the lexicon has but instructions don't: "the following" and "the given" are not nouns here, nor are
# "a think" or "a back", and "short" (of "short story, please") is no verb.
UNUSED_READINGS = {"short": {"VERB"}, "following": {"NOUN"}, "given": {"NOUN"}, "think": {"NOUN"}, "back": {"NOUN"}}


class Token(NamedTuple):
    """A word, number, quotation or mark of a sentence.

    Attributes:
        kind: quote, possessive, number, word, end or other: the group of `_TOKEN` that matched.
        text: The text as it was written.
        word: The text in lower case, except for words in capitals: "US" is not "us".
        can_be: The parts of speech that a word can have: NOUN, ADJ, ADV, VERB (a base form, such as "write") and FORM
            (another form of a verb, such as "written"). Empty for closed classes and for anything but a word.
    """

    kind: str
    text: str
    word: str
    can_be: frozenset[str]


_TOKEN = re.compile(
    r"(?P<quote>\"[^\"]*\"|“[^”]*”|‘[^’]*’|`[^`]*`|(?<!\w)'[^']+'(?!\w)|\([^()]*\)|\[[^\[\]]*\])"
    r"|(?P<possessive>(?<=\w)['’]s\b|(?<=s)['’](?!\w))"
    r"|(?P<number>[$€£]?\d(?:[\w.,:/%^-]*\w)?%?)"
    r"|(?P<word>(?:e\.g|i\.e|vs|Mrs?|Dr|St|\b[A-Z])\.(?=\s*\S)|[^\W\d_](?:\w|-(?=\w)|['’](?!s\b)(?=\w))*)"
    r"|(?P<end>[.!?\n;:]+)|(?P<other>\S)"
)
# Rules look up to 3 tokens ahead of a word, and one back: tokens[-1], before the first word, is padding too.
_PADDING = [Token("end", "", "", frozenset())] * 3


def split_sentences(text: str) -> list[list[Token]]:
    """Splits a text into sentences of tokens, each closed by padding. Sentences without a word are left out.

    Example:
        "Add 2 and 3. Why?" -> [[Add, 2, and, 3, ., <padding> x 3], [Why, ?, <padding> x 3]]
    """
    sentences: list[list[Token]] = [[]]
    for match in _TOKEN.finditer(text):
        kind, text = match.lastgroup, match.group()
        word = text if text.isupper() and len(text) > 1 else text.lower()
        token = Token(kind, text, word, parts_of_speech(word) if kind == "word" else frozenset())
        sentences[-1].append(token)
        if kind == "end":
            sentences.append([])
    return [[*tokens, *_PADDING] for tokens in sentences if any(token.kind == "word" for token in tokens)]


def ends_with_question_mark(tokens: list[Token]) -> bool:
    """Tells whether a sentence's last token, before the padding, is a question mark (or "?!")."""
    return next(token.text for token in reversed(tokens) if token.text).startswith("?")


@functools.cache
def parts_of_speech(word: str) -> frozenset[str]:
    """Looks up the parts of speech that a word can have.

    Example:
        "poem" -> {NOUN}, "write" -> {VERB}, "written" -> {FORM}, "the" -> {}, "chatbot" -> {NOUN}
    """
    if word in CLOSED_CLASSES or "'" in word or "’" in word:  # "you're"
        return frozenset()
    lemmas = _lexicon().getAllLemmas(word)
    if not lemmas and "-" in word:  # "seven-day" can be what "day" can, but "step-by-step" is not a verb
        last = parts_of_speech(word.rpartition("-")[2])
        return last - {"VERB"} if word.count("-") > 1 else last or frozenset({"ADJ"})
    found = {kind for kind in lemmas if kind in ("NOUN", "ADJ", "ADV")}
    if "VERB" in lemmas:
        found.add("VERB" if word in lemmas["VERB"] else "FORM")
    found -= UNUSED_READINGS.get(word, set())
    return frozenset(found or {"NOUN"})  # a word missing from the lexicon, like "chatbot", is nearly always a noun


@functools.cache
def lemma(word: str, kind: str) -> str:
    """Looks up a word's lemma as a NOUN or a VERB: "stories" -> "story", "data" -> "data" (and not "datum")."""
    lemmas = _lexicon().getLemma(word, kind) or (word,)
    return word if word in lemmas and word[-1] != "s" else lemmas[0]


@functools.cache
def _lexicon() -> Any:
    try:
        import lemminflect
    except ImportError as error:
        raise UserError(
            "lemminflect is not installed; run pip install -r requirements-analysis.txt (or pass --spacy_model NAME)"
        ) from error
    return lemminflect
