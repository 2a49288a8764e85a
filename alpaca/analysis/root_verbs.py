"""Finds an instruction's root verb and that verb's direct object: "write" and "poem" in "Please write a short poem".

`parse_by_rules` needs lemminflect's lexicon only; `spacy_parser` reads a dependency parse.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from alpaca.cli import UserError


class Parse(NamedTuple):
    """What an instruction asks for: the lemmas of its root verb and of that verb's direct object."""

    verb: str | None
    object: str | None


NOTHING = Parse(None, None)

# ---------------------------------------------------------------------------------------------------------------------
# Rules. The lexicon tells which parts of speech a word can have; the closed classes of English and the place of a word
# between them tell which one it has here.


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SUBORDINATORS = _words("if when while because although though once unless until since as where")
_PREPOSITIONS = _SUBORDINATORS | _words(
    "about above across after against along among around at before behind below beneath beside between beyond by "
    "concerning considering despite down during except for from in including inside into like near of off on onto out "
    "outside over per regarding than through throughout to toward towards under unlike up upon versus via with within "
    "without"
)
_CONJUNCTIONS = _words("and or but nor / , &")
_ARTICLES = _words("a an the this these those my your his her its our their another no every such")
_QUANTIFIERS = _words(
    "all any both each either enough few less many more most much neither several some that first second third fourth "
    "fifth last one two three four five six seven eight nine ten eleven twelve fifteen twenty thirty fifty hundred"
)
_OBJECT_PRONOUNS = _words("me us him them it you myself yourself itself themselves")
_PRONOUNS = _OBJECT_PRONOUNS | _words("i he she we they someone something anyone anything everyone everything nothing")
_WH = _words("what which who whom whose how why when where whether")
_MODALS = _words(
    "can could should would will shall may might must do does did cannot can't couldn't don't doesn't didn't won't"
)
_HAVE, _BE = _words("has have had"), _words("is are was were am be been being")
_PARTICLES = _words("up down out off away back over")
_PHRASAL = {("fill", "in"), ("put", "on"), ("try", "on"), ("turn", "on"), ("take", "on")}
_HEDGES = _words("at least up to about around exactly over under than approximately roughly nearly only just")
_OPENERS = _words(
    "please now first firstly second next then also finally just and so kindly always never not do don't don’t , -"
)
_DATIVE_VERBS = _words(
    "give tell show teach send offer ask assign hand lend pass bring grant wish write find make draw"
)
# Readings that the lexicon has and instructions don't: "the following", "the given", "a think", "its vowels back".
_NOT_HERE = {"following": {"NOUN"}, "given": {"NOUN"}, "think": {"NOUN"}, "back": {"NOUN"}}
_CLOSED = (
    _PREPOSITIONS
    | _CONJUNCTIONS
    | _ARTICLES
    | _QUANTIFIERS
    | _PRONOUNS
    | _WH
    | _MODALS
    | _HAVE
    | _BE
    | {"not", "there"}
)
_TOKEN = re.compile(
    r"(?P<quote>\"[^\"]*\"|“[^”]*”|‘[^’]*’|`[^`]*`|(?<!\w)'[^']+'(?!\w)|\([^()]*\)|\[[^\[\]]*\])"
    r"|(?P<possessive>(?<=\w)['’]s\b|(?<=s)['’](?!\w))"
    r"|(?P<number>[$€£]?\d(?:[\w.,:/%^-]*\w)?%?)"
    r"|(?P<word>(?:e\.g|i\.e|vs|Mrs?|Dr|St|\b[A-Z])\.(?=\s*\S)|[^\W\d_](?:\w|-(?=\w)|['’](?!s\b)(?=\w))*)"
    r"|(?P<end>[.!?\n;:]+)|(?P<other>\S)"
)


_POLITE_FORM = re.compile(
    r"((?:^|[.,!?]\s)\s*)(?:(?:can|could|would|will) you|you (?:need|have|are (?:asked|required)) to"
    r"|your (?:task|job) is to|i(?: want| need|'d like| would like) you to|i(?:'d like| would like| want| need) to)\b",
    re.IGNORECASE,
)


class _Token(NamedTuple):
    kind: str  # a group of _TOKEN
    text: str
    word: str  # lower case
    can_be: frozenset[
        str
    ]  # of NOUN, VERB (base form), FORM (another form of a verb), ADJ, ADV; empty for closed classes


_END = _Token("end", "", "", frozenset())


@functools.cache
def _lexicon() -> Any:
    try:
        import lemminflect
    except ImportError as error:
        raise UserError(
            "lemminflect is not installed; run pip install -r requirements-analysis.txt (or pass --spacy_model NAME)"
        ) from error
    return lemminflect


@functools.cache
def _parts_of_speech(word: str) -> frozenset[str]:
    if word in _CLOSED or "'" in word or "’" in word:  # "you're"
        return frozenset()
    lemmas = _lexicon().getAllLemmas(word)
    if not lemmas and "-" in word:  # "seven-day" is what "day" is, but "step-by-step" is no verb
        last = _parts_of_speech(word.rpartition("-")[2])
        return last - {"VERB"} if word.count("-") > 1 else last or frozenset({"ADJ"})
    found = {kind for kind in lemmas if kind in ("NOUN", "ADJ", "ADV")}
    if "VERB" in lemmas:
        found.add("VERB" if word in lemmas["VERB"] else "FORM")
    found -= _NOT_HERE.get(word, set())
    return frozenset(found or {"NOUN"})  # what no lexicon has, like "chatbot", is nearly always a noun


@functools.cache
def _lemma(word: str, kind: str) -> str:
    lemmas = _lexicon().getLemma(word, kind) or (word,)
    return word if word in lemmas and word[-1] != "s" else lemmas[0]  # "data" is its own lemma beside "datum"


def _sentences(text: str) -> list[list[_Token]]:
    """Cuts a text into sentences, each closed by an `end` token and some padding."""
    sentences: list[list[_Token]] = [[]]
    for match in _TOKEN.finditer(text):
        kind, text = match.lastgroup, match.group()
        word = text if text.isupper() and len(text) > 1 else text.lower()  # "US" is not "us"
        token = _Token(kind, text, word, _parts_of_speech(word) if kind == "word" else frozenset())
        sentences[-1].append(token)
        if kind == "end":
            sentences.append([])
    return [[*tokens, _END, _END, _END] for tokens in sentences if any(t.kind == "word" for t in tokens)]


def parse_by_rules(instruction: str) -> Parse:
    """Finds root verb and direct object of the first sentence that asks for something.

    "Please write a short poem about rain." -> Parse("write", "poem"). Names and quotations aren't objects, as they
    aren't in Self-Instruct's figure; a sentence whose verb is "to be" has no root verb there and here.
    """
    for tokens in _sentences(_POLITE_FORM.sub(r"\1", instruction)):
        found = _imperative(tokens) or _question(tokens)
        if found:
            return found
    return NOTHING


def _imperative(tokens: list[_Token]) -> Parse | None:
    start = _skip_openers(tokens, 0)
    if tokens[start].word == "let":
        return Parse("let", None)
    if _is_request(tokens, start):
        return Parse(tokens[start].word, _object(tokens, start))
    opens_clause = start > 0 or tokens[start].word in _PREPOSITIONS or "FORM" in tokens[start].can_be
    if not opens_clause or tokens[start + 1].word in _MODALS | _BE | _HAVE | _WH:
        return None
    for comma in (i for i, token in enumerate(tokens) if token.word == ","):  # "Given a list, find ..."
        start = _skip_openers(tokens, comma)
        if _is_request(tokens, start) and tokens[start - 1].word not in ("and", "or"):
            return Parse(tokens[start].word, _object(tokens, start))
        if tokens[start].word in _WH | _MODALS:
            return _question(tokens[start:])
    return None


def _skip_openers(tokens: list[_Token], i: int) -> int:
    while tokens[i].word in _OPENERS or tokens[i].can_be == {"ADV"} or tokens[i].kind == "quote":
        i += 1
    return i


def _is_request(tokens: list[_Token], i: int) -> bool:
    """Whether a base form stands here that is neither a noun ("Summary of", "Water boils") nor inside a phrase."""
    following = tokens[i + 1]
    if (
        "VERB" not in tokens[i].can_be and "NOUN" in tokens[i].can_be
    ):  # no verb that the lexicon has: "Eyeball the data"
        return following.word in _ARTICLES or (following.word in _PARTICLES and tokens[i + 2].word in _ARTICLES)
    if "VERB" not in tokens[i].can_be or tokens[i + 2].word == tokens[i].word:  # "step by step"
        return False
    if following.word in _MODALS | _BE | _HAVE or following.kind == "possessive":
        return False
    return "NOUN" not in tokens[i].can_be or not (following.word == "of" or following.can_be == {"FORM"})


def _object(tokens: list[_Token], verb: int) -> str | None:
    i = verb + 1
    joined = _skip_openers(tokens, i)
    if tokens[joined - 1].word in ("and", ",") and _is_request(tokens, joined):  # "compare and contrast"
        i = joined + 1
    while tokens[i].can_be == {"ADV"}:
        i += 1
    if tokens[i + 1].word == "by" and tokens[i + 2].word == tokens[i].word:  # "piece by piece"
        i += 3
    if tokens[i].word in _PARTICLES or (tokens[verb].word, tokens[i].word) in _PHRASAL:
        i += 1
    if tokens[i].word in _OBJECT_PRONOUNS:
        if tokens[verb].word not in _DATIVE_VERBS or (tokens[i].word == "it" and tokens[verb].word == "make"):
            return None
        i += 1
    if tokens[i].word == "that" and tokens[i + 1].word in _ARTICLES | _PRONOUNS:  # "show that the ..."
        return None
    head, end = _noun_phrase(tokens, i)
    second = tokens[end].word in (_ARTICLES | _QUANTIFIERS) - {"that"} or tokens[end].kind == "number"
    if tokens[verb].word in _DATIVE_VERBS and end > i and second:  # "give each paragraph a heading"
        head, _ = _noun_phrase(tokens, end)
    return head


def _noun_phrase(tokens: list[_Token], start: int) -> tuple[str | None, int]:
    """Reads a noun phrase from `start` on, as far as its head.

    Returns:
        The head's lemma (None without a noun, or where it is a name) and the index behind the phrase.
    """
    head = None
    i = start
    while True:
        token = tokens[i]
        if token.word in ("one", "ones") and i > start and tokens[i - 1].can_be:  # "the odd one"
            return None, i + 1
        joins = token.word in _CONJUNCTIONS and _joins_modifiers(tokens, i)
        if token.kind == "possessive" or joins:
            head = None
        elif head is not None or not _is_specifier(tokens, i, start):
            has_noun = head is not None and "-" not in tokens[head].word  # "a five-minute stretching routine"
            if not _continues(tokens, i, start, has_noun):
                break
            if "NOUN" in token.can_be or token.can_be == {"VERB"}:  # the lexicon has "template" as a verb only
                head = i
        i += 1
    names = tokens[start].word not in ("a", "an")  # "a Haiku", "a URL"
    if head is None or (names and tokens[head].text[0].isupper()):
        return None, i
    return _lemma(tokens[head].word, "NOUN"), i


def _is_number(*tokens: _Token) -> bool:
    return any(token.kind == "number" or token.word in _QUANTIFIERS for token in tokens)


def _joins_modifiers(tokens: list[_Token], i: int) -> bool:
    """Whether the conjunction at `i` joins what stands before a noun: "polite but firm reply", "one or two words"."""
    before, after = tokens[i - 1], tokens[i + 1]
    if _is_number(before) and _is_number(after):
        return True
    if after.word in _CONJUNCTIONS:  # ", and"
        return _joins_modifiers([*tokens[:i], *tokens[i + 1 :]], i)
    return (
        "ADJ" in before.can_be and "ADJ" in after.can_be and (bool(tokens[i + 2].can_be) or tokens[i + 2].word == ",")
    )


def _is_specifier(tokens: list[_Token], i: int, start: int) -> bool:
    """Whether the word at `i` only says which or how many of the noun to come: "the", "at least 3", "each of"."""
    token, before = tokens[i], tokens[i - 1]
    if token.kind in ("quote", "number") or token.word in _ARTICLES | _QUANTIFIERS:
        return True
    if token.word == "of":
        return i > start and before.word in _QUANTIFIERS
    if token.word in ("below", "above"):
        return before.word in _ARTICLES
    if token.word == "to" and before.word != "up":
        return False
    return token.word in _HEDGES and _is_number(tokens[i + 1], tokens[i + 2])


def _continues(tokens: list[_Token], i: int, start: int, has_noun: bool) -> bool:
    """Whether the word at `i` belongs to the noun phrase begun at `start`."""
    token, following = tokens[i], tokens[i + 1]
    if not token.can_be or not has_noun:
        return bool(token.can_be) and not (i == start and token.can_be <= {"VERB", "ADV"})
    before_noun = bool(following.can_be & {"NOUN", "ADJ"})
    if "NOUN" not in token.can_be:  # "a world famous painter", but "the names alphabetically", "the date mentioned"
        return "ADJ" in token.can_be and before_noun
    if "FORM" in token.can_be and not token.word.endswith("s"):  # "machine learning", but "a story building a"
        return before_noun or not (following.word in _ARTICLES or following.kind in ("quote", "number"))
    return True


def _question(tokens: list[_Token]) -> Parse | None:
    """Reads "What steps should I follow", "Who wrote", "How to bake"; None where the sentence is no question."""
    first = 1 if tokens[0].word in _PREPOSITIONS and tokens[1].word in _WH else 0  # "To what extent"
    opening = tokens[first].word
    if opening not in _WH and not (opening in _MODALS | _BE | _HAVE and tokens[-4].text.startswith("?")):
        return None
    if tokens[first + 1].word == "to" and "VERB" in tokens[first + 2].can_be:
        return Parse(tokens[first + 2].word, _object(tokens, first + 2))
    if tokens[first + 1].kind == "possessive":  # "What's"
        return _passive(tokens, _skip_adverbs(tokens, first + 2), asks_what=True)
    auxiliary = next((i for i, token in enumerate(tokens) if token.word in _MODALS | _BE | _HAVE), len(tokens))
    verb = next((i for i in range(first + 1, min(auxiliary, len(tokens))) if _is_finite(tokens, i)), None)
    if verb is not None:  # "Who invented", "Which one arrives"
        return Parse(_lemma(tokens[verb].word, "VERB"), _object(tokens, verb))
    if auxiliary == len(tokens):
        return NOTHING
    behind = _skip_adverbs(tokens, auxiliary + 1)
    if tokens[auxiliary].word in _BE:
        return _passive(tokens, behind, asks_what=opening in ("what", "which", "who"))
    if tokens[behind].word == "be" and "FORM" in tokens[behind + 1].can_be:  # "How many can be made"
        return _passive(tokens, behind + 1, asks_what=True)
    if opening in ("what", "who", "which", "how") and _is_verb_of_fronted_subject(tokens, behind):
        return Parse(tokens[behind].word, _object(tokens, behind))
    verb = _verb_behind_subject(tokens, auxiliary + 1, "FORM" if tokens[auxiliary].word in _HAVE else "VERB")
    if verb is None:
        owns = tokens[auxiliary].word in _HAVE and auxiliary > first  # "Which planet has the most moons"
        return Parse("have", _object(tokens, auxiliary)) if owns else NOTHING
    if tokens[verb - 1].word == "be":  # "Why must dough be kneaded"
        return Parse(_lemma(tokens[verb].word, "VERB"), None)
    fronted = None
    if first == 0 and (opening in ("what", "which") or tokens[1].word in ("many", "much")):
        fronted, _ = _noun_phrase(tokens, 1)
    has_object = _noun_phrase(tokens, verb + 1)[1] > verb + 1
    return Parse(_lemma(tokens[verb].word, "VERB"), _object(tokens, verb) if has_object else fronted)


def _skip_adverbs(tokens: list[_Token], i: int) -> int:
    while _is_adverb(tokens[i]):
        i += 1
    return i


def _is_adverb(token: _Token) -> bool:
    return token.word == "not" or ("ADV" in token.can_be and not token.can_be & {"NOUN", "VERB", "FORM"})


def _passive(tokens: list[_Token], i: int, asks_what: bool) -> Parse:
    """Reads what stands behind "is": "meant by", "causing it", "(the word) derived"; NOTHING for "the capital"."""
    verb: int | None = i
    if "FORM" not in tokens[i].can_be or "NOUN" in tokens[i].can_be or "-" in tokens[i].word:
        verb = None if asks_what else _verb_behind_subject(tokens, i, "FORM")
    if verb is None:
        return NOTHING
    return Parse(
        _lemma(tokens[verb].word, "VERB"), _object(tokens, verb) if tokens[verb].word.endswith("ing") else None
    )


def _is_verb_of_fronted_subject(tokens: list[_Token], i: int) -> bool:
    """Whether the subject stood before the auxiliary: "(What would) happen", "(Which bird can) fly backwards"."""
    following = tokens[i + 1]
    if "VERB" not in tokens[i].can_be:
        return False
    ends = following.kind != "word" or following.word in _ARTICLES | _PREPOSITIONS or _is_adverb(following)
    return ends or "NOUN" not in tokens[i].can_be


def _is_finite(tokens: list[_Token], i: int) -> bool:
    token, before = tokens[i], tokens[i - 1]
    if "NOUN" in token.can_be and tokens[i + 1].word in _MODALS | _BE | _HAVE:  # "What steps should"
        return False
    if "VERB" in token.can_be and _is_plural(before):  # "How many primes lie"
        return True
    if "FORM" in token.can_be and (before.word in _WH or before.word == "one" or "NOUN" in before.can_be):
        return "NOUN" not in token.can_be or tokens[i + 1].kind != "word" or not tokens[i + 1].can_be & {"VERB", "FORM"}
    return False


def _verb_behind_subject(tokens: list[_Token], start: int, wanted: str) -> int | None:
    """Finds the verb in "(does) the presence of heat affect": behind a noun, best a plural, or before a phrase."""
    candidates = []
    for i in range(start + 1, len(tokens)):
        token = tokens[i]
        before = next(tokens[j] for j in range(i - 1, -1, -1) if not _is_adverb(tokens[j]))
        if token.kind in ("end", "other") and token.word != ",":
            break
        follows_subject = (
            before.word in _PRONOUNS | {"one"} or before.kind in ("quote", "number") or "NOUN" in before.can_be
        )
        if not follows_subject or tokens[i + 1].word == "of":
            continue
        if token.word == "be" and "FORM" in tokens[i + 1].can_be and wanted == "VERB":
            return i + 1
        if token.word in ("have", "do") and wanted == "VERB":
            return i
        if wanted in token.can_be and tokens[i + 1].word not in ("have", "do"):
            sure = before.word in _PRONOUNS | {"one"} or _is_plural(before)
            if sure or "NOUN" not in token.can_be or not tokens[i + 1].can_be:
                return i
            candidates.append(i)
    return candidates[0] if candidates else None


def _is_plural(token: _Token) -> bool:
    return "NOUN" in token.can_be and token.word.endswith("s") and not token.word.endswith("ss")


# ---------------------------------------------------------------------------------------------------------------------
# A dependency parser, where the user has one


def spacy_parser(model: str) -> Callable[[str], Parse]:
    """Loads a spaCy pipeline and returns a function like `parse_by_rules` that reads its dependency parse.

    Raises:
        UserError: spaCy or the model is not installed, or the model has no dependency parser.
    """
    try:
        import spacy
    except ImportError as error:
        raise UserError("spaCy is not installed; run pip install spacy, or leave out --spacy_model") from error
    try:
        pipeline = spacy.load(model)
    except (OSError, ValueError) as error:
        hint = f"python -m spacy download {model}"
        raise UserError(f"spaCy finds no model {model!r}; install it ({hint}), or leave out --spacy_model") from error
    if "parser" not in pipeline.pipe_names:
        raise UserError(f"{model} has no dependency parser, only {', '.join(pipeline.pipe_names) or 'nothing'}")

    def parse(instruction: str) -> Parse:
        for sentence in pipeline(instruction).sents:
            verb = sentence.root
            has_subject = any(child.dep_ in ("nsubj", "nsubjpass", "expl") for child in verb.children)
            if sentence.text.rstrip().endswith("?") or (verb.pos_ == "VERB" and not has_subject):
                if verb.pos_ != "VERB":
                    return NOTHING
                nouns = [c.lemma_.lower() for c in verb.children if c.dep_ in ("dobj", "obj") and c.pos_ == "NOUN"]
                return Parse(verb.lemma_.lower(), nouns[0] if nouns else None)
        return NOTHING

    return parse
