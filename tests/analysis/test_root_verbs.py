"""Root verbs and objects by rules: 60 instructions labelled by hand, and texts without a request."""

import random

import pytest

from alpaca.analysis.root_verbs import NOTHING, Parse, parse_by_rules
from alpaca.analysis.words import CLOSED_CLASSES

# Instruction, lemma of the root verb, lemma of its direct object's head noun, as a person reads them. Read is the first
# sentence that asks for something; a question's root verb is its lexical verb; a form of "to be" is none. Names,
# pronouns, quotations and clauses are no objects ("explain why ..."). Labelled before the rules were written, and not
# changed since. The rules got 53 of the 60 right on the first run.
LABELLED = [
    ("Write a short story about a lighthouse keeper who collects lost letters.", "write", "story"),
    ("List five household uses for white vinegar.", "list", "use"),
    ("Please summarise the following article in two sentences.", "summarise", "article"),
    ("What is the capital of Mongolia?", None, None),
    ("Explain why bread dough needs to rest.", "explain", None),
    ("Translate the sentence below into Portuguese.", "translate", "sentence"),
    ("Give me three synonyms for 'reluctant'.", "give", "synonym"),
    ("How do I remove red wine stains from a carpet?", "remove", "stain"),
    ("Classify each of these animals as a mammal, a bird or a reptile.", "classify", "animal"),
    ("Using the data in the table, calculate the average rainfall for April.", "calculate", "rainfall"),
    ("Rewrite this email so that it sounds more polite.", "rewrite", "email"),
    ("Can you suggest a title for my essay on coral reefs?", "suggest", "title"),
    ("Name two rivers that cross the Alps.", "name", "river"),
    ("Given a list of integers, return the second largest one without sorting.", "return", None),
    ("In one paragraph, describe the water cycle to a ten-year-old.", "describe", "cycle"),
    ("Convert 65 miles per hour to kilometres per hour.", "convert", "mile"),
    ("Tell me a joke about librarians.", "tell", "joke"),
    ("Identify the grammatical error and correct it.", "identify", "error"),
    ("Compare and contrast nuclear fission and nuclear fusion.", "compare", "fission"),
    ("A shop sells pens at three for two dollars. How much do twelve pens cost?", "cost", None),
    ("Come up with a slogan for a bicycle repair shop.", "come", None),
    ("Who invented the printing press?", "invent", "press"),
    ("Turn the passive sentences into active ones.", "turn", "sentence"),
    ("First read the review, then decide whether it is positive or negative.", "read", "review"),
    ("Create a seven-day meal plan for a vegetarian family of four.", "create", "plan"),
    ("Don't use any adjectives; describe a thunderstorm at sea.", "use", "adjective"),
    ("Is a tomato a fruit or a vegetable?", None, None),
    ("Briefly outline the causes of the French Revolution.", "outline", "cause"),
    ("Make this paragraph easier to read.", "make", "paragraph"),
    ("For each of the words, provide an antonym.", "provide", "antonym"),
    ("Sort the following names alphabetically.", "sort", "name"),
    ("If two trains leave at noon, which one arrives first?", "arrive", None),
    ("You are a travel agent. Plan a weekend in Lisbon for a couple on a tight budget.", "plan", "weekend"),
    ("Implement a Python function that checks whether a string is a palindrome.", "implement", "function"),
    ("Find the odd one out: oak, maple, tulip, birch.", "find", None),
    ("Suggest some good indoor plants for a dark flat.", "suggest", "plant"),
    ("Sentiment of the following tweet", None, None),
    ("Should cities ban private cars from their centres?", "ban", "car"),
    ("Describe how a bill becomes law.", "describe", None),
    ("Fill in the blank: The cat sat ___ the mat.", "fill", "blank"),
    ("Write down the first ten prime numbers.", "write", "number"),
    ("Take the numbers 4, 8 and 15 and compute their product.", "take", "number"),
    ("Which planet has the most moons?", "have", "moon"),
    ("Pretend to be a pirate and order a pizza.", "pretend", None),
    ("Act as a job interviewer and ask me five questions.", "act", None),
    ("Recommend a book for someone who loved 'Dune'.", "recommend", "book"),
    ("Extract every date mentioned in the text.", "extract", "date"),
    ("What steps should I follow to change a flat tyre?", "follow", "step"),
    ("I am planning a birthday party for my niece. Propose four games for eight-year-olds.", "propose", "game"),
    ("Without looking anything up, estimate the number of piano tuners in Chicago.", "estimate", "number"),
    ("Help me write a cover letter for a nursing position.", "help", None),
    ("Could you please check whether the proof below is valid?", "check", None),
    ("Why do leaves change colour in autumn?", "change", "colour"),
    ("Draft a polite but firm reply to a landlord who ignores a leaking roof.", "draft", "reply"),
    ("Let's say it rains tomorrow. Suggest three indoor activities for toddlers.", "let", None),
    ("Rank these materials by density, from the lightest to the heaviest.", "rank", "material"),
    ("To what extent did climate shape the Viking settlements in Greenland?", "shape", "settlement"),
    ("Now, carefully and step by step, solve the equation 3x + 7 = 22.", "solve", "equation"),
    ("Pick out the key arguments from the speech.", "pick", "argument"),
    ("Contrast the writing styles of Hemingway and Faulkner.", "contrast", "style"),
]


def test_rules_agree_with_a_person_on_nine_of_ten_instructions():
    wrong = [(text, parse_by_rules(text)) for text, verb, noun in LABELLED if parse_by_rules(text) != Parse(verb, noun)]
    assert len(LABELLED) == 60
    assert len(wrong) <= 6, wrong


@pytest.mark.parametrize("text", ["", "   \n", "?!", "42", "«»", "Thanks", "der die das", "a" * 10_000, "of " * 3_000])
def test_text_without_a_request_has_no_root_verb(text):
    assert parse_by_rules(text) == NOTHING


def test_no_heap_of_words_and_marks_breaks_the_rules():
    pick = random.Random(0)
    words = [
        *sorted(CLOSED_CLASSES),
        *",.;:?!'\"()[]`-…%&\n",
        "don't",
        "U.S.",
        "3.5",
        "LIST",
        "雨",
        "step-by-step",
        "list",
    ]
    for _ in range(3000):
        parse_by_rules("".join(pick.choice(words) + pick.choice(["  ", ""]) for _ in range(pick.randrange(1, 12))))
