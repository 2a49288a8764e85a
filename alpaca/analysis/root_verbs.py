"""Finds an instruction's root verb and its direct object: "write" and "poem" in "Please write a short poem".

`parse_by_rules` needs nothing but lemminflect's lexicon; `spacy_parser` uses a dependency parse.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from alpaca.analysis.words import (
    ARTICLES,
    AUXILIARIES,
    BE,
    CONJUNCTIONS,
    DATIVE_VERBS,
    HAVE,
    HEDGES,
    MODALS,
    OBJECT_PRONOUNS,
    OPENERS,
    PARTICLES,
    PHRASAL_VERBS,
    PREPOSITIONS,
    PRONOUNS,
    QUANTIFIERS,
    QUESTION_WORDS,
    Token,
    ends_with_question_mark,
    lemma,
    split_sentences,
)
from alpaca.cli import UserError


class Parse(NamedTuple):
    """What an instruction asks for.

    Attributes:
        verb: The lemma of its root verb, or None.
        object: The lemma of that verb's direct object, or None.
    """

    verb: str | None
    object: str | None


NOTHING = Parse(None, None)

# "Can you", "I want you to" and the like make a request of what follows.
_POLITE_FORM = re.compile(
    r"((?:^|[.,!?]\s)\s*)(?:(?:can|could|would|will) you|you (?:need|have|are (?:asked|required)) to"
    r"|your (?:task|job) is to|i(?: want| need|'d like| would like) you to|i(?:'d like| would like| want| need) to)\b",
    re.IGNORECASE,
)


def parse_by_rules(instruction: str) -> Parse:
    """Finds root verb and direct object in the first sentence that asks for something.

    Names and quotations don't count as objects, and "to be" doesn't count as a root verb, as in Self-Instruct's figure.

    Example:
        "Please write a short poem about rain." -> Parse("write", "poem")
        "How do I remove red wine stains?" -> Parse("remove", "stain")
        "What is the capital of Mongolia?" -> Parse(None, None)
    """
    for tokens in split_sentences(_POLITE_FORM.sub(r"\1", instruction)):
        found = _imperative(tokens) or _question(tokens)
        if found:
            return found
    return NOTHING


# ---------------------------------------------------------------------------------------------------------------------
# Requests. In all rules below, `tokens` is a sentence and a position is an index into it.


def _imperative(tokens: list[Token]) -> Parse | None:
    """Reads "Please list three rivers" and "Given a list, find ..."; None if the sentence is no request."""
    start = _skip_openers(tokens, 0)
    if tokens[start].word == "let":
        return Parse("let", None)
    if _is_request(tokens, start):
        return Parse(tokens[start].word, _object(tokens, start))
    opens_clause = start > 0 or tokens[start].word in PREPOSITIONS or "FORM" in tokens[start].can_be
    if not opens_clause or tokens[start + 1].word in AUXILIARIES | QUESTION_WORDS:
        return None
    return _request_after_comma(tokens)


def _request_after_comma(tokens: list[Token]) -> Parse | None:
    """Reads "Given a list, find ..." and "In your opinion, what should ..."."""
    for comma in (i for i, token in enumerate(tokens) if token.word == ","):
        start = _skip_openers(tokens, comma)
        if _is_request(tokens, start) and tokens[start - 1].word not in ("and", "or"):
            return Parse(tokens[start].word, _object(tokens, start))
        if tokens[start].word in QUESTION_WORDS | MODALS:
            return _question(tokens[start:])
    return None


def _skip_openers(tokens: list[Token], i: int) -> int:
    """Skips what may come before a request's verb: "first", "please", "carefully", a quotation."""
    while tokens[i].word in OPENERS or tokens[i].can_be == {"ADV"} or tokens[i].kind == "quote":
        i += 1
    return i


def _is_request(tokens: list[Token], i: int) -> bool:
    """Tells whether the word at `i` is a request's verb.

    It must be a base form, but not a noun ("Summary of", "Water boils") and not inside a phrase ("step by step").
    """
    token, following = tokens[i], tokens[i + 1]
    if "VERB" not in token.can_be and "NOUN" in token.can_be:  # the lexicon lacks the verb: "Eyeball the data"
        return following.word in ARTICLES or (following.word in PARTICLES and tokens[i + 2].word in ARTICLES)
    if "VERB" not in token.can_be or tokens[i + 2].word == token.word:
        return False
    if following.word in AUXILIARIES or following.kind == "possessive":
        return False
    return "NOUN" not in token.can_be or not (following.word == "of" or following.can_be == {"FORM"})


# ---------------------------------------------------------------------------------------------------------------------
# Objects and noun phrases


def _object(tokens: list[Token], verb: int) -> str | None:
    """Finds the lemma of the direct object of the verb at position `verb`.

    Example:
        "write a short poem" -> "poem", "tell me a joke" -> "joke", "explain why it rains" -> None
    """
    is_dative = tokens[verb].word in DATIVE_VERBS
    i = _skip_to_object(tokens, verb)
    if tokens[i].word in OBJECT_PRONOUNS:
        if not is_dative or (tokens[i].word == "it" and tokens[verb].word == "make"):  # "make it rhyme"
            return None
        i += 1
    if tokens[i].word == "that" and tokens[i + 1].word in ARTICLES | PRONOUNS:  # "show that the ..."
        return None
    head, end = _noun_phrase(tokens, i)
    second = tokens[end].word in (ARTICLES | QUANTIFIERS) - {"that"} or tokens[end].kind == "number"
    if is_dative and end > i and second:  # "give each paragraph a heading"
        head, _ = _noun_phrase(tokens, end)
    return head


def _skip_to_object(tokens: list[Token], verb: int) -> int:
    """Skips what may come between a verb and its object: "write (down)", "compare (and contrast)"."""
    i = verb + 1
    joined = _skip_openers(tokens, i)
    if tokens[joined - 1].word in ("and", ",") and _is_request(tokens, joined):  # "compare and contrast"
        i = joined + 1
    while tokens[i].can_be == {"ADV"}:
        i += 1
    if tokens[i + 1].word == "by" and tokens[i + 2].word == tokens[i].word:  # "piece by piece"
        i += 3
    if tokens[i].word in PARTICLES or (tokens[verb].word, tokens[i].word) in PHRASAL_VERBS:
        i += 1
    return i


def _noun_phrase(tokens: list[Token], start: int) -> tuple[str | None, int]:
    """Reads the noun phrase that begins at `start`, up to its head.

    Returns:
        The head's lemma (None if there is no noun, or if it is a name) and the position after the phrase.

    Example:
        "the capital city of France" -> ("city", 3), "Paris in spring" -> (None, 1), "quickly" -> (None, 0)
    """
    head = None
    i = start
    while True:
        token = tokens[i]
        if token.word in ("one", "ones") and i > start and tokens[i - 1].can_be:  # "the odd one"
            return None, i + 1
        if token.kind == "possessive" or (token.word in CONJUNCTIONS and _joins_modifiers(tokens, i)):
            head = None  # the noun before it is only a modifier: "the dog's tail"
        elif head is not None or not _is_specifier(tokens, i, start):
            has_noun = head is not None and "-" not in tokens[head].word  # "a five-minute stretching routine"
            if not _continues(tokens, i, start, has_noun):
                break
            if "NOUN" in token.can_be or token.can_be == {"VERB"}:  # the lexicon has "template" only as a verb
                head = i
        i += 1
    may_be_name = tokens[start].word not in ("a", "an")  # "a Haiku" and "a URL" are no names
    if head is None or (may_be_name and tokens[head].text[0].isupper()):
        return None, i
    return lemma(tokens[head].word, "NOUN"), i


def _joins_modifiers(tokens: list[Token], i: int) -> bool:
    """Tells whether the conjunction at `i` joins words before a noun: "polite but firm reply", "one or two words"."""
    before = tokens[i - 1]
    while tokens[i + 1].word in CONJUNCTIONS:  # ", and"
        i += 1
    after, noun = tokens[i + 1], tokens[i + 2]
    if _is_number(before) and _is_number(after):
        return True
    return "ADJ" in before.can_be and "ADJ" in after.can_be and (bool(noun.can_be) or noun.word == ",")


def _is_number(token: Token) -> bool:
    return token.kind == "number" or token.word in QUANTIFIERS


def _is_specifier(tokens: list[Token], i: int, start: int) -> bool:
    """Tells whether the word at `i` only says which or how many of the noun to come: "the", "at least 3", "each of"."""
    token, before = tokens[i], tokens[i - 1]
    if token.kind in ("quote", "number") or token.word in ARTICLES | QUANTIFIERS:
        return True
    if token.word == "of":
        return i > start and before.word in QUANTIFIERS
    if token.word in ("below", "above"):  # "the below sentence"
        return before.word in ARTICLES
    if token.word == "to" and before.word != "up":
        return False
    return token.word in HEDGES and (_is_number(tokens[i + 1]) or _is_number(tokens[i + 2]))


def _continues(tokens: list[Token], i: int, start: int, has_noun: bool) -> bool:
    """Tells whether the word at `i` belongs to the noun phrase that begins at `start`."""
    token, following = tokens[i], tokens[i + 1]
    if not token.can_be or not has_noun:
        return bool(token.can_be) and not (i == start and token.can_be <= {"VERB", "ADV"})
    before_noun = bool(following.can_be & {"NOUN", "ADJ"})
    if "NOUN" not in token.can_be:  # "a world famous painter", but "the names alphabetically", "the date mentioned"
        return "ADJ" in token.can_be and before_noun
    if "FORM" in token.can_be and not token.word.endswith("s"):  # "machine learning", but "a story building a"
        return before_noun or not (following.word in ARTICLES or following.kind in ("quote", "number"))
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def _question(tokens: list[Token]) -> Parse | None:
    """Reads a question, such as "Who wrote Emma?"; None if the sentence is none.

    The question word is the first token or, in "To what extent", the second one.
    """
    first = 1 if tokens[0].word in PREPOSITIONS and tokens[1].word in QUESTION_WORDS else 0
    opening, second = tokens[first].word, tokens[first + 1]
    if opening not in QUESTION_WORDS and not (opening in AUXILIARIES and ends_with_question_mark(tokens)):
        return None
    if second.word == "to" and "VERB" in tokens[first + 2].can_be:  # "How to bake bread"
        return Parse(tokens[first + 2].word, _object(tokens, first + 2))
    if second.kind == "possessive":  # "What's causing it"
        return _participle(tokens, _skip_adverbs(tokens, first + 2), asks_what=True)
    auxiliary = next((i for i, token in enumerate(tokens) if token.word in AUXILIARIES), None)
    before = range(first + 1, len(tokens) if auxiliary is None else auxiliary)
    verb = next((i for i in before if _is_finite(tokens, i)), None)
    if verb is not None:  # "Who invented the press", "Which one arrives first"
        return Parse(lemma(tokens[verb].word, "VERB"), _object(tokens, verb))
    if auxiliary is None:
        return NOTHING
    if tokens[auxiliary].word in BE:  # "What is meant by", "Is a tomato a fruit"
        after = _skip_adverbs(tokens, auxiliary + 1)
        return _participle(tokens, after, asks_what=opening in ("what", "which", "who"))
    return _question_with_auxiliary(tokens, first, auxiliary)


def _question_with_auxiliary(tokens: list[Token], first: int, auxiliary: int) -> Parse:
    """Reads "What steps should I follow", "Which planet has moons", "How many can be made".

    Args:
        tokens: The sentence.
        first: The position of the question word.
        auxiliary: The position of a modal or a form of "have".
    """
    opening, owns = tokens[first].word, tokens[auxiliary].word in HAVE
    after = _skip_adverbs(tokens, auxiliary + 1)
    if tokens[after].word == "be" and "FORM" in tokens[after + 1].can_be:  # "How many can be made"
        return _participle(tokens, after + 1, asks_what=True)
    if opening in ("what", "who", "which", "how") and _is_verb_of_fronted_subject(tokens, after):
        return Parse(tokens[after].word, _object(tokens, after))  # "Which bird can fly backwards"
    verb = _verb_after_subject(tokens, auxiliary + 1, "FORM" if owns else "VERB")
    if verb is None:  # "Which planet has the most moons"
        return Parse("have", _object(tokens, auxiliary)) if owns and auxiliary > first else NOTHING
    root = lemma(tokens[verb].word, "VERB")
    if tokens[verb - 1].word == "be":  # "Why must dough be kneaded"
        return Parse(root, None)
    if _noun_phrase(tokens, verb + 1)[1] > verb + 1:  # "How do I remove stains"
        return Parse(root, _object(tokens, verb))
    return Parse(root, _fronted_object(tokens, first))


def _fronted_object(tokens: list[Token], first: int) -> str | None:
    """Finds an object that comes before the verb: "step" in "What steps should I follow"."""
    if first == 0 and (tokens[0].word in ("what", "which") or tokens[1].word in ("many", "much")):
        return _noun_phrase(tokens, 1)[0]
    return None


def _participle(tokens: list[Token], i: int, asks_what: bool) -> Parse:
    """Reads what follows "is": "meant by", "causing it", "(the word) derived"; NOTHING for "the capital".

    Args:
        tokens: The sentence.
        i: The position after "is" and adverbs.
        asks_what: Whether "what" or "who" is the subject, so that no other subject comes before the participle.
    """
    verb: int | None = i
    if "FORM" not in tokens[i].can_be or "NOUN" in tokens[i].can_be or "-" in tokens[i].word:
        verb = None if asks_what else _verb_after_subject(tokens, i, "FORM")
    if verb is None:
        return NOTHING
    word = tokens[verb].word
    return Parse(lemma(word, "VERB"), _object(tokens, verb) if word.endswith("ing") else None)


def _is_verb_of_fronted_subject(tokens: list[Token], i: int) -> bool:
    """Tells whether the subject came before the auxiliary: "(What would) happen", "(Which bird can) fly backwards"."""
    following = tokens[i + 1]
    if "VERB" not in tokens[i].can_be:
        return False
    ends = following.kind != "word" or following.word in ARTICLES | PREPOSITIONS or _is_adverb(following)
    return ends or "NOUN" not in tokens[i].can_be


def _is_finite(tokens: list[Token], i: int) -> bool:
    """Tells whether the word at `i` is the verb of a question without auxiliary: "(Who) invented", "(primes) lie"."""
    token, before = tokens[i], tokens[i - 1]
    if "NOUN" in token.can_be and tokens[i + 1].word in AUXILIARIES:  # "What steps should"
        return False
    if "VERB" in token.can_be and _is_plural(before):  # "How many primes lie"
        return True
    if "FORM" in token.can_be and (before.word in QUESTION_WORDS or before.word == "one" or "NOUN" in before.can_be):
        return "NOUN" not in token.can_be or tokens[i + 1].kind != "word" or not tokens[i + 1].can_be & {"VERB", "FORM"}
    return False


def _verb_after_subject(tokens: list[Token], start: int, wanted: str) -> int | None:
    """Finds the verb that follows the subject: "affect" in "(does) the presence of heat affect rust".

    Args:
        tokens: The sentence.
        start: Where the subject begins.
        wanted: VERB for a base form, FORM for a participle.

    Returns:
        The position of the first word that can be the verb and nothing else, or follows a plural or a pronoun; or
        else of the first that can be the verb; or None.
    """
    candidates = []
    for i in range(start + 1, len(tokens) - 1):
        token, following = tokens[i], tokens[i + 1]
        before = next(tokens[j] for j in range(i - 1, -1, -1) if not _is_adverb(tokens[j]))
        if token.kind in ("end", "other") and token.word != ",":
            break
        if not _ends_subject(before) or following.word == "of":
            continue
        if token.word == "be" and "FORM" in following.can_be and wanted == "VERB":
            return i + 1
        if token.word in ("have", "do") and wanted == "VERB":
            return i
        if wanted in token.can_be and following.word not in ("have", "do"):
            sure = before.word in PRONOUNS | {"one"} or _is_plural(before)
            if sure or "NOUN" not in token.can_be or not following.can_be:
                return i
            candidates.append(i)
    return candidates[0] if candidates else None


def _ends_subject(token: Token) -> bool:
    return token.word in PRONOUNS | {"one"} or token.kind in ("quote", "number") or "NOUN" in token.can_be


def _skip_adverbs(tokens: list[Token], i: int) -> int:
    while _is_adverb(tokens[i]):
        i += 1
    return i


def _is_adverb(token: Token) -> bool:
    return token.word == "not" or ("ADV" in token.can_be and not token.can_be & {"NOUN", "VERB", "FORM"})


def _is_plural(token: Token) -> bool:
    return "NOUN" in token.can_be and token.word.endswith("s") and not token.word.endswith("ss")


# ---------------------------------------------------------------------------------------------------------------------
# A dependency parser, if the user has one


def spacy_parser(model: str) -> Callable[[str], Parse]:
    """Loads a spaCy pipeline and returns a function like `parse_by_rules` that uses its dependency parse.

    Raises:
        UserError: spaCy or the pipeline is not installed, or the pipeline has no dependency parser.
    """
    try:
        import spacy
    except ImportError as error:
        raise UserError("spaCy is not installed; run pip install spacy, or leave out --spacy_model") from error
    try:
        pipeline = spacy.load(model)
    except (OSError, ValueError) as error:
        hint = f"python -m spacy download {model}"
        raise UserError(f"spaCy has no model {model!r}; install it ({hint}), or leave out --spacy_model") from error
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
