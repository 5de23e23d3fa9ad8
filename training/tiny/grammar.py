"""Sentences with a German translation and an intent, spoken questions with their answers, and who may hear them when.

Every text belongs to one split by its md5 hash, so that a test sentence is in no training speech and in no training
text, whatever the seed. Five colour-object pairs are kept from training altogether: they ask for new combinations.
Held-out questions are never *spoken* in training; the language model knows them as text, as a real one would.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TEST_PERCENT, DEV_PERCENT = 8, 3
QUESTION_TEST_PERCENT, QUESTION_DEV_PERCENT = 14, 6  # questions are few, so the held-out shares are larger

ARTICLES = {
    "nominative": {"m": "der", "f": "die", "n": "das"},
    "accusative": {"m": "den", "f": "die", "n": "das"},
    "dative": {"m": "dem", "f": "der", "n": "dem"},
}
CONTRACTIONS = {"in dem": "im", "in das": "ins", "zu dem": "zum", "zu der": "zur", "an dem": "am"}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GERMAN_DIGITS = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
COLOURS = {
    "red": "rot",
    "blue": "blau",
    "green": "grün",
    "yellow": "gelb",
    "black": "schwarz",
    "white": "weiß",
    "brown": "braun",
}


@dataclass(frozen=True)
class Noun:
    """An English noun and its German counterpart with gender and, for places, the prepositions that go with it."""

    english: str
    german: str
    gender: str
    plural: str = ""
    german_plural: str = ""
    to: tuple[str, str] = ("in", "accusative")  # "to the kitchen" -> "in die Küche"
    at: tuple[str, str] = ("in", "in")  # "in the kitchen" -> "in der Küche" (English, German)

    def with_article(self, case: str, adjective: str = "") -> str:
        """Return article, weak adjective and noun, as `den roten Stuhl`."""
        ending = "en" if case == "dative" or (case == "accusative" and self.gender == "m") else "e"
        middle = f" {adjective}{ending}" if adjective else ""
        return f"{ARTICLES[case][self.gender]}{middle} {self.german}"


OBJECTS = (
    Noun("box", "Kiste", "f", "boxes", "Kisten"),
    Noun("chair", "Stuhl", "m", "chairs", "Stühle"),
    Noun("book", "Buch", "n", "books", "Bücher"),
    Noun("bag", "Tasche", "f", "bags", "Taschen"),
    Noun("cup", "Tasse", "f", "cups", "Tassen"),
    Noun("table", "Tisch", "m", "tables", "Tische"),
    Noun("bottle", "Flasche", "f", "bottles", "Flaschen"),
    Noun("ball", "Ball", "m", "balls", "Bälle"),
)
PLACES = (
    Noun("kitchen", "Küche", "f"),
    Noun("garden", "Garten", "m"),
    Noun("garage", "Garage", "f"),
    Noun("office", "Büro", "n"),
    Noun("hall", "Flur", "m"),
    Noun("cellar", "Keller", "m"),
    Noun("station", "Bahnhof", "m", to=("zu", "dative"), at=("at", "an")),
)
DEVICES = (Noun("lamp", "Lampe", "f"), Noun("light", "Licht", "n"), Noun("radio", "Radio", "n"))
OPENINGS = (Noun("door", "Tür", "f"), Noun("window", "Fenster", "n"))
PEOPLE = {  # English: (German nominative, German accusative)
    "my brother": ("mein Bruder", "meinen Bruder"),
    "my sister": ("meine Schwester", "meine Schwester"),
    "the doctor": ("der Arzt", "den Arzt"),
    "the teacher": ("der Lehrer", "den Lehrer"),
    "my mother": ("meine Mutter", "meine Mutter"),
}
CITIES = {"berlin": "Berlin", "paris": "Paris", "london": "London", "rome": "Rom"}
WEATHER = {"cold": "kalt", "warm": "warm", "hot": "heiß", "dark": "dunkel"}
TIMES = {"now": "jetzt", "today": "heute", "tomorrow": "morgen"}
BRINGING = {"bring": "bring", "carry": "trag"}
OWNING = {"has": "hat", "needs": "braucht"}
SWITCHING = {"on": "ein", "off": "aus"}
MOVING = {"open": "öffne", "close": "schließe"}
COUNTS = tuple(range(2, 10))
POLITE = (True, False)
HELD_OUT_PAIRS = (("red", "bottle"), ("blue", "book"), ("green", "chair"), ("black", "cup"), ("white", "bag"))


@dataclass(frozen=True)
class Sentence:
    """A spoken sentence (lower case, no punctuation), its German translation and what its speaker wants."""

    text: str
    german: str
    intent: str


@dataclass(frozen=True)
class Question:
    """A spoken question, its one- or two-word answer, and whether it may be held out of the training speech."""

    core: str
    answer: str
    prefix: str = ""
    can_hold_out: bool = True

    @property
    def text(self) -> str:
        """The question as it is spoken."""
        return f"{self.prefix} {self.core}".strip()


def contract(text: str) -> str:
    """Return German text with preposition and article drawn together (`in dem` -> `im`)."""
    for long, short in CONTRACTIONS.items():
        text = text.replace(f"{long} ", f"{short} ")
    return text


def going_to(place: Noun) -> str:
    """Return where something is brought, in German (`in die Küche`)."""
    preposition, case = place.to
    return contract(f"{preposition} {place.with_article(case)}")


def being_at(place: Noun) -> tuple[str, str]:
    """Return where something is, in English and German (`in the kitchen`, `in der Küche`)."""
    english, german = place.at
    return f"{english} the {place.english}", contract(f"{german} {place.with_article('dative')}")


def _bring_many(polite: bool, verb: str, count: int, colour: str, thing: Noun, place: Noun) -> Sentence:
    please, bitte = ("please ", "bitte ") if polite else ("", "")
    return Sentence(
        f"{please}{verb} {DIGITS[count]} {colour} {thing.plural} to the {place.english}",
        f"{bitte}{BRINGING[verb]} {GERMAN_DIGITS[count]} {COLOURS[colour]}e {thing.german_plural} {going_to(place)}",
        "transport",
    )


def _bring_one(polite: bool, verb: str, colour: str, thing: Noun, place: Noun) -> Sentence:
    please, bitte = ("please ", "bitte ") if polite else ("", "")
    return Sentence(
        f"{please}{verb} the {colour} {thing.english} to the {place.english}",
        f"{bitte}{BRINGING[verb]} {thing.with_article('accusative', COLOURS[colour])} {going_to(place)}",
        "transport",
    )


def _switch(polite: bool, state: str, colour: str, device: Noun, place: Noun) -> Sentence:
    please, bitte = ("please ", "bitte ") if polite else ("", "")
    where, wo = being_at(place)
    adjective = f"{colour} " if colour else ""
    what = device.with_article("accusative", COLOURS.get(colour, ""))
    return Sentence(
        f"{please}turn {state} the {adjective}{device.english} {where}",
        f"{bitte}schalte {what} {wo} {SWITCHING[state]}",
        "switch",
    )


def _open(polite: bool, verb: str, colour: str, thing: Noun, place: Noun) -> Sentence:
    please, bitte = ("please ", "bitte ") if polite else ("", "")
    where, wo = being_at(place)
    return Sentence(
        f"{please}{verb} the {colour} {thing.english} {where}",
        f"{bitte}{MOVING[verb]} {thing.with_article('accusative', COLOURS[colour])} {wo}",
        "switch",
    )


def _thing_is(colour: str, thing: Noun, behind: bool, place: Noun) -> Sentence:
    where, wo = being_at(place)
    if behind:
        where, wo = f"behind the {place.english}", f"hinter {place.with_article('dative')}"
    subject = thing.with_article("nominative", COLOURS[colour])
    return Sentence(f"the {colour} {thing.english} is {where}", f"{subject} ist {wo}", "statement")


def _things_are(count: int, colour: str, thing: Noun, behind: bool, place: Noun) -> Sentence:
    where, wo = being_at(place)
    if behind:
        where, wo = f"behind the {place.english}", f"hinter {place.with_article('dative')}"
    return Sentence(
        f"the {DIGITS[count]} {colour} {thing.plural} are {where}",
        f"die {GERMAN_DIGITS[count]} {COLOURS[colour]}en {thing.german_plural} sind {wo}",
        "statement",
    )


def _person_owns(person: str, verb: str, count: int, colour: str, thing: Noun) -> Sentence:
    return Sentence(
        f"{person} {verb} {DIGITS[count]} {colour} {thing.plural}",
        f"{PEOPLE[person][0]} {OWNING[verb]} {GERMAN_DIGITS[count]} {COLOURS[colour]}e {thing.german_plural}",
        "statement",
    )


def _call(polite: bool, person: str, time: str, hour: int) -> Sentence:
    please, bitte = ("please ", "bitte ") if polite else ("", "")
    at, um = (f" at {DIGITS[hour]}", f" um {GERMAN_DIGITS[hour]}") if hour else ("", "")
    return Sentence(
        f"{please}call {person} {time}{at}", f"{bitte}ruf {PEOPLE[person][1]} {TIMES[time]}{um} an", "phone"
    )


def _weather(kind: str, city: str, time: str) -> Sentence:
    return Sentence(
        f"it is {kind} in {city} {time}", f"es ist {TIMES[time]} {WEATHER[kind]} in {CITIES[city]}", "weather"
    )


def _past_weather(kind: str, place: Noun, city: str) -> Sentence:
    where, wo = (f"in {city}", f"in {CITIES[city]}") if city else being_at(place)
    return Sentence(f"it was {kind} {where}", f"es war {wo} {WEATHER[kind]}", "weather")


@dataclass(frozen=True)
class Family:
    """One kind of sentence: how often it is drawn, the choices it makes, and the function that writes it."""

    weight: float
    slots: tuple[tuple, ...]
    build: Callable[..., Sentence]

    def __iter__(self) -> Iterator[Sentence]:
        """Yield every sentence of the family."""
        return (self.build(*choice) for choice in itertools.product(*self.slots))

    def draw(self, rng: random.Random) -> Sentence:
        """Return one sentence."""
        return self.build(*(rng.choice(slot) for slot in self.slots))


_COLOURS = tuple(COLOURS)
FAMILIES = (
    Family(0.20, (POLITE, tuple(BRINGING), COUNTS, _COLOURS, OBJECTS, PLACES), _bring_many),
    Family(0.10, (POLITE, tuple(BRINGING), _COLOURS, OBJECTS, PLACES), _bring_one),
    Family(0.10, (POLITE, tuple(SWITCHING), ("", "", "", *_COLOURS), DEVICES, PLACES), _switch),
    Family(0.08, (POLITE, tuple(MOVING), _COLOURS, OPENINGS, PLACES), _open),
    Family(0.10, (_COLOURS, OBJECTS, POLITE, PLACES), _thing_is),
    Family(0.12, (COUNTS, _COLOURS, OBJECTS, POLITE, PLACES), _things_are),
    Family(0.10, (tuple(PEOPLE), tuple(OWNING), COUNTS, _COLOURS, OBJECTS), _person_owns),
    Family(0.09, (POLITE, tuple(PEOPLE), tuple(TIMES), (0, *range(1, 10))), _call),
    Family(0.04, (tuple(WEATHER), tuple(CITIES), tuple(TIMES)), _weather),
    Family(0.03, (tuple(WEATHER), PLACES, ("", "", *CITIES)), _past_weather),
)
DIGIT_STRINGS = 0.12  # share of digit strings among the sentences
INTENTS = ("transport", "switch", "statement", "phone", "weather", "digits")


def digit_string(rng: random.Random, shortest: int = 1, longest: int = 7) -> Sentence:
    """Return a sentence of spoken digits."""
    digits = [rng.randrange(10) for _ in range(rng.randint(shortest, longest))]
    return Sentence(" ".join(DIGITS[d] for d in digits), " ".join(GERMAN_DIGITS[d] for d in digits), "digits")


def draw_sentence(rng: random.Random) -> Sentence:
    """Return one sentence of any family or a digit string."""
    if rng.random() < DIGIT_STRINGS:
        return digit_string(rng)
    return rng.choices(FAMILIES, weights=[family.weight for family in FAMILIES])[0].draw(rng)


def draw_split(rng: random.Random, split: str, count: int, distinct: bool = False) -> list[Sentence]:
    """Return `count` sentences of one split ("train", "dev" or "test"); with `distinct`, no text twice."""
    found: list[Sentence] = []
    seen: set[str] = set()
    for _ in range(400 * count + 4_000):
        sentence = draw_sentence(rng)
        if sentence_split(sentence.text) == split and not (distinct and sentence.text in seen):
            found.append(sentence)
            seen.add(sentence.text)
            if len(found) == count:
                return found
    raise ValueError(f"only {len(found)} of {count} {split} sentences found; ask for fewer or set distinct=False")


def all_sentences() -> Iterator[Sentence]:
    """Yield every sentence of the grammar but the digit strings, some more than once."""
    return itertools.chain.from_iterable(FAMILIES)


def _percent(text: str) -> int:
    return int(hashlib.md5(text.encode()).hexdigest(), 16) % 100


def sentence_split(text: str) -> str:
    """Return the split of a sentence, from its text alone: "test", "dev" or "train"."""
    words = text.split()
    singular = {noun.plural: noun.english for noun in OBJECTS}
    pairs = {(first, singular.get(second, second)) for first, second in itertools.pairwise(words)}
    place = _percent(text)
    if place < TEST_PERCENT or pairs & set(HELD_OUT_PAIRS):
        return "test"
    return "dev" if place < TEST_PERCENT + DEV_PERCENT else "train"


PREFIXES = ("", "please tell me", "hello")
OPPOSITES = (("hot", "cold"), ("black", "white"), ("on", "off"), ("big", "small"), ("fast", "slow"), ("old", "young"))
CAPITALS = (("germany", "berlin"), ("france", "paris"), ("england", "london"), ("italy", "rome"))
FACTS = (
    ("what color is the snow", "white"),
    ("what color is the grass", "green"),
    ("what color is the sun", "yellow"),
    ("how many days has a week", "seven"),
    ("how many legs has a dog", "four"),
    ("how many legs has a man", "two"),
)


def all_questions() -> list[Question]:
    """Return every question with every prefix. A question with a word of its own is never held out of the speech."""
    cores: list[tuple[str, str, bool]] = []
    for a, b in itertools.product(range(10), repeat=2):
        if a + b < 10:
            cores.append((f"what is {DIGITS[a]} plus {DIGITS[b]}", DIGITS[a + b], True))
        if a >= b:
            cores.append((f"what is {DIGITS[a]} minus {DIGITS[b]}", DIGITS[a - b], True))
        if a != b:
            cores.append((f"which is bigger {DIGITS[a]} or {DIGITS[b]}", DIGITS[max(a, b)], True))
    for a in range(9):
        cores.append((f"what comes after {DIGITS[a]}", DIGITS[a + 1], True))
        cores.append((f"what comes before {DIGITS[a + 1]}", DIGITS[a], True))
    words = dict(zip(DIGITS, GERMAN_DIGITS, strict=True)) | COLOURS | WEATHER
    words |= {noun.english: noun.german for noun in (*OBJECTS, *PLACES, *DEVICES, *OPENINGS)}
    cores += [(f"what is the german word for {english}", german, True) for english, german in words.items()]
    common = set(COLOURS) | set(SWITCHING) | set(WEATHER)
    for one, other in OPPOSITES:
        cores += [(f"what is the opposite of {a}", b, a in common) for a, b in ((one, other), (other, one))]
    cores += [(f"what is the capital of {country}", city, False) for country, city in CAPITALS]
    cores += [(question, answer, False) for question, answer in FACTS]
    return [Question(core, answer, prefix, free) for core, answer, free in cores for prefix in PREFIXES]


def question_split(question: Question) -> str:
    """Return where a question is spoken: "test", "dev" or "train". All its prefixes share one split."""
    place = _percent(question.core)
    if not question.can_hold_out or place >= QUESTION_TEST_PERCENT + QUESTION_DEV_PERCENT:
        return "train"
    return "test" if place < QUESTION_TEST_PERCENT else "dev"


def text_question_split(question: Question) -> str:
    """Return which text-only set a question is in; "test" and "dev" ones are text in stage 0 and never again."""
    place = _percent(f"text {question.text}")
    return "test" if place < 52 else ("dev" if place < 66 else "train")
