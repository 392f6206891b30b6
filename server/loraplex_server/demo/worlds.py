"""The small worlds the demo model knows: facts, and many ways to ask for each of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

_COUNTRIES = """France:Paris:French Germany:Berlin:German Italy:Rome:Italian Spain:Madrid:Spanish Portugal:Lisbon:Portuguese
England:London:English Greece:Athens:Greek Norway:Oslo:Norwegian Sweden:Stockholm:Swedish Finland:Helsinki:Finnish
Denmark:Copenhagen:Danish Poland:Warsaw:Polish Austria:Vienna:German Hungary:Budapest:Hungarian Russia:Moscow:Russian
Ukraine:Kyiv:Ukrainian Turkey:Ankara:Turkish Egypt:Cairo:Arabic Kenya:Nairobi:Swahili Morocco:Rabat:Arabic
Japan:Tokyo:Japanese China:Beijing:Chinese India:New_Delhi:Hindi Thailand:Bangkok:Thai Vietnam:Hanoi:Vietnamese
South_Korea:Seoul:Korean Indonesia:Jakarta:Indonesian Australia:Canberra:English New_Zealand:Wellington:English
Canada:Ottawa:English Mexico:Mexico_City:Spanish Cuba:Havana:Spanish Brazil:Brasilia:Portuguese Peru:Lima:Spanish
Argentina:Buenos_Aires:Spanish Chile:Santiago:Spanish Colombia:Bogota:Spanish Iceland:Reykjavik:Icelandic
Bulgaria:Sofia:Bulgarian Romania:Bucharest:Romanian Serbia:Belgrade:Serbian Croatia:Zagreb:Croatian Iran:Tehran:Persian"""
_SOUNDS = """cow:moo dog:woof cat:meow duck:quack sheep:baa pig:oink horse:neigh lion:roar frog:ribbit owl:hoot
bee:buzz snake:hiss mouse:squeak crow:caw hen:cluck rooster:cock-a-doodle-doo wolf:awoo donkey:hee-haw turkey:gobble goat:maa"""
_COLORS = """a_banana:yellow the_sky:blue grass:green snow:white coal:black a_tomato:red a_carrot:orange a_lemon:yellow
a_strawberry:red milk:white a_frog:green the_sun:yellow the_sea:blue chocolate:brown a_flamingo:pink an_elephant:gray a_cherry:red
an_eggplant:purple a_pumpkin:orange a_crow:black a_polar_bear:white a_cucumber:green a_fire_truck:red lavender:purple
a_pig:pink rice:white a_leaf:green the_night:black a_bear:brown a_dolphin:gray"""
_OPPOSITES = """hot:cold big:small up:down left:right day:night happy:sad fast:slow old:young open:closed full:empty
hard:soft light:dark loud:quiet rich:poor strong:weak wet:dry clean:dirty early:late high:low long:short thick:thin
true:false good:bad first:last inside:outside near:far easy:difficult sweet:sour black:white love:hate begin:end
win:lose buy:sell come:go push:pull awake:asleep safe:dangerous deep:shallow smooth:rough brave:afraid"""
_BABIES = """cat:a_kitten dog:a_puppy cow:a_calf horse:a_foal sheep:a_lamb pig:a_piglet duck:a_duckling goat:a_kid
bear:a_cub frog:a_tadpole hen:a_chick goose:a_gosling deer:a_fawn kangaroo:a_joey swan:a_cygnet owl:an_owlet"""
_LEGS = """spider:8 ant:6 dog:4 cat:4 bird:2 bee:6 horse:4 snake:0 fish:0 crab:10 cow:4 duck:2 beetle:6 frog:4
octopus:8 elephant:4 worm:0 hen:2 scorpion:8 butterfly:6"""
_PLURALS = """mouse:mice foot:feet tooth:teeth child:children goose:geese man:men woman:women leaf:leaves knife:knives
wolf:wolves person:people sheep:sheep fish:fish box:boxes city:cities baby:babies bus:buses potato:potatoes cat:cats book:books"""
_SHAPES = "triangle:3 square:4 rectangle:4 pentagon:5 hexagon:6 heptagon:7 octagon:8 circle:0"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = "January February March April May June July August September October November December"
_NAMES = """Tom Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor
Wendy Alex Bella Carl Diana Eric Fiona George Hannah Ivan Julia Kevin Laura Max Nina Oscar Peter Ruth Simon"""
NAMES = tuple(_NAMES.split())

DONT_KNOW = "I do not know that. Ask me about capitals, animals, colors, numbers or days."


@dataclass(frozen=True)
class Fact:
    """One thing to know. ``slots`` fill the question templates; ``short`` is the answer in a word or a number."""

    key: str
    slots: dict[str, str] = field(hash=False)
    answer: str
    short: str


@dataclass(frozen=True)
class World:
    """Facts of one kind, the templates that ask for them, and how often the topic turns up in training text."""

    topic: str
    emoji: str
    facts: tuple[Fact, ...]
    templates: tuple[str, ...]
    weight: float = 1.0


def _rows(table: str) -> Iterator[list[str]]:
    for row in table.split():
        yield [cell.replace("_", " ") for cell in row.split(":")]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _facts(pairs: Iterator[list[str]] | list[list[str]], answer: str, short: str = "{y}") -> tuple[Fact, ...]:
    """Facts from (x, y) pairs; in the templates, ``{x}`` is the word, ``{ax}`` the word with its article."""
    facts = []
    for x, y, *_ in pairs:
        slots = {"x": x, "ax": _article(x), "y": y, "Ax": _article(x).capitalize()}
        facts.append(Fact(x, slots, _sentence(answer.format(**slots)), short.format(**slots)))
    return tuple(facts)


def _asks(*stems: str, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Templates from noun phrases ("the capital of {x}"): each is asked for in many ways."""
    frames = (
        "What is {}?", "What's {}?", "Tell me {}.", "Do you know {}?", "Can you tell me {}?", "I need {}.", "Name {}.",
        "Give me {}.", "I forgot {}.", "What would be {}?",
    )  # fmt: skip
    return tuple(frame.replace("{}", stem) for stem in stems for frame in frames) + more


def _after_before(words: list[str], wrap: bool) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """Facts "B comes after A" and "A comes before B" of an ordered list."""
    after = [[a, b] for a, b in zip(words, words[1:] + words[:1], strict=True)]
    if not wrap:
        after.pop()
    before = [[b, a] for a, b in after]
    return _facts(after, "{y} comes after {x}"), _facts(before, "{y} comes before {x}")


def _ordered(topic: str, emoji: str, kind: str, words: list[str], *, wrap: bool) -> Iterator[World]:
    after, before = _after_before(words, wrap)
    for way, facts, verb in (("after", after, "follows"), ("before", before, "precedes")):
        templates = (
            f"What comes {way} {{x}}?", f"Which {kind} comes {way} {{x}}?", f"What {kind} comes {way} {{x}}?",
            f"What is {way} {{x}}?", f"Which {kind} is {way} {{x}}?", f"Tell me the {kind} {way} {{x}}.",
            f"Name the {kind} that comes {way} {{x}}.", f"What {kind} {verb} {{x}}?", f"Which {kind} {verb} {{x}}?",
            f"Do you know which {kind} comes {way} {{x}}?", f"I need the {kind} {way} {{x}}.", f"The {kind} {way} {{x}}?",
        )  # fmt: skip
        yield World(topic, emoji, facts, templates)


def _arithmetic() -> Iterator[World]:
    operations = (
        ("plus", "+", "add {a} and {b}", [(a, b, a + b) for a in range(13) for b in range(13)], 2.0),
        ("minus", "-", "subtract {b} from {a}", [(a, b, a - b) for a in range(13) for b in range(a + 1)], 1.5),
        ("times", "*", "multiply {a} by {b}", [(a, b, a * b) for a in range(11) for b in range(11)], 2.0),
    )
    for word, sign, verb, triples, weight in operations:
        facts = tuple(
            Fact(f"{a}{sign}{b}", {"a": str(a), "b": str(b)}, f"{a} {word} {b} is {c}.", str(c)) for a, b, c in triples
        )
        spoken, written = f"{{a}} {word} {{b}}", f"{{a}} {sign} {{b}}"
        frames = (
            "What is {}?",
            "What's {}?",
            "How much is {}?",
            "Calculate {}.",
            "Compute {}.",
            "{} = ?",
            "Tell me {}.",
        )
        templates = tuple(frame.replace("{}", term) for term in (spoken, written) for frame in frames)
        templates += (verb.capitalize() + ".", f"What do you get if you {verb}?", f"Can you {verb}?", f"Please {verb}.")
        yield World("numbers", "🔢", facts, templates, weight)


def _talk(intent: str, answer: str, heads: tuple[str, ...], tails: tuple[str, ...], emoji: str = "👋") -> World:
    """Small talk: one answer to every head followed by every tail."""
    templates = tuple((head + tail).replace("{", "{{") for head in heads for tail in tails)
    return World("small talk", emoji, (Fact(intent, {}, answer, answer),), templates, 0.3)


def _small_talk() -> Iterator[World]:
    tails = ("?", " today?", ", my friend?", ", please?", ", little model?", " then?", ", robot?", " actually?")
    ends = ("!", ".", " there!", ", my friend!", ", little model!", ", robot!", " again!", "")
    yield _talk("hello", "Hello! How can I help you?", ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Good day", "Greetings", "Howdy"), ends)  # fmt: skip
    yield _talk("mood", "I am fine, thank you.", ("How are you", "How are you doing", "How do you feel", "How is it going", "Are you well", "Are you okay"), tails)  # fmt: skip
    yield _talk("who", "I am a small demo model.", ("Who are you", "What are you", "What is your name", "Are you a robot", "Are you human", "Tell me who you are", "What kind of model are you"), tails, "🤖")  # fmt: skip
    yield _talk("can", "I can answer small questions.", ("What can you do", "How can you help me", "What do you know", "What are you good at", "What can I ask you", "Can you help me"), tails, "🤖")  # fmt: skip
    yield _talk("thanks", "You are welcome.", ("Thanks", "Thank you", "Thank you very much", "Many thanks", "Thanks a lot", "Great, thanks"), ends)  # fmt: skip
    yield _talk("bye", "Goodbye! See you soon.", ("Bye", "Goodbye", "See you", "See you later", "Good night", "Farewell"), ends)  # fmt: skip
    yield _talk("joke", "Why did the cow cross the road? To get to the moo-vies.", ("Tell me a joke", "Make me laugh", "Do you know a joke", "Say something funny", "I want to hear a joke"), tails, "😂")  # fmt: skip


def _unknown() -> World:
    """Questions outside the worlds: the model says that it does not know instead of guessing."""
    things = (
        "the moon", "a car", "music", "the internet", "a computer", "love", "the weather", "football", "history", "a house",
        "money", "the universe", "a book", "physics", "a train", "bread", "the government", "a guitar", "chess", "a phone",
        "quantum computing", "the stock market", "poetry", "a bicycle", "cooking", "the ocean floor", "philosophy", "a robot arm",
    )  # fmt: skip
    frames = (
        "Who invented {}?", "How does {} work?", "Why do people like {}?", "What is the history of {}?", "Explain {}.",
        "Write a poem about {}.", "Where can I find {}?", "What do you think about {}?", "How old is {}?", "Who wrote about {}?",
        "Tell me a story about {}.", "How do I build {}?", "When was {} discovered?", "What is the meaning of {}?",
    )  # fmt: skip
    templates = tuple(frame.replace("{}", thing) for frame in frames for thing in things)
    return World("unknown", "🤔", (Fact("unknown", {}, DONT_KNOW, "unknown"),), templates, 1.2)


@cache
def worlds() -> tuple[World, ...]:
    """Every world, in a fixed order."""
    countries = list(_rows(_COUNTRIES))
    animal = ("What does {ax} say?", "What sound does {ax} make?", "Which sound does {ax} make?", "How does {ax} sound?",
              "What noise does {ax} make?", "{Ax} says what?", "Tell me what {ax} says.", "Do you know what {ax} says?",
              "What does the {x} say?", "What sound does the {x} make?", "The {x} says?", "How does the {x} sound?")  # fmt: skip
    color = ("What color is {x}?", "Which color is {x}?", "What is the color of {x}?", "Tell me the color of {x}.",
             "What color does {x} have?", "Do you know the color of {x}?", "Which color does {x} have?", "Name the color of {x}.",
             "Can you tell me the color of {x}?", "The color of {x}?", "I forgot the color of {x}.", "What colour is {x}?")  # fmt: skip
    language = ("What language do people speak in {x}?", "Which language do people speak in {x}?", "What do people speak in {x}?",
                "Which language is spoken in {x}?", "What language is spoken in {x}?", "What do they speak in {x}?",
                "Tell me the language of {x}.", "What is the language of {x}?", "Do you know the language of {x}?",
                "In {x}, what language do people speak?", "What language should I learn for {x}?")  # fmt: skip
    home = ("{y} is the capital of which country?", "Which country has the capital {y}?", "What country has {y} as its capital?",
            "Of which country is {y} the capital?", "{y} is the capital of what?", "Where is {y} the capital?",
            "Name the country whose capital is {y}.", "Tell me which country has the capital {y}.",
            "Whose capital is {y}?", "Do you know whose capital {y} is?", "Which country is governed from {y}?")  # fmt: skip
    count = ("How many {n} does {ax} have?", "What number of {n} does {ax} have?", "Tell me how many {n} {ax} has.",
             "Do you know how many {n} {ax} has?", "Count the {n} of {ax}.", "How many {n} has {ax}?", "{Ax} has how many {n}?",
             "How many {n} does the {x} have?", "What is the number of {n} of {ax}?", "{n} of {ax}?")  # fmt: skip
    legs = tuple(template.replace("{n}", "legs") for template in count)
    sides = tuple(template.replace("{n}", "sides") for template in count)
    capital = ("Which city is the capital of {x}?", "What city is {x}'s capital?", "The capital of {x} is which city?")
    name = ("My name is {x}.", "I am {x}.", "I'm {x}.", "Call me {x}.", "You can call me {x}.", "Hello, my name is {x}.",
            "Hi, I am {x}.", "People call me {x}.", "Hey, I'm {x}!", "This is {x}.")  # fmt: skip
    return (
        World("capitals", "🌍", _facts(iter(countries), "the capital of {x} is {y}"), _asks("the capital of {x}", "{x}'s capital", more=capital), 1.6),
        World("countries", "🌍", _facts(iter(countries), "{y} is the capital of {x}", "{x}"), home, 1.3),
        World("languages", "💬", _facts([[c, lang] for c, _, lang in countries], "people in {x} speak {y}"), language, 1.2),
        World("sounds", "🔊", _facts(_rows(_SOUNDS), "{ax} says {y}"), animal),
        World("colors", "🎨", _facts(_rows(_COLORS), "{x} is {y}"), color),
        World("opposites", "🔁", _facts([p for x, y in _rows(_OPPOSITES) for p in ([x, y], [y, x]) if x not in ("black", "light")], "the opposite of {x} is {y}"), _asks("the opposite of {x}", more=("What is opposite to {x}?", "{x} and its opposite?")), 1.3),
        World("babies", "🐣", _facts(_rows(_BABIES), "a baby {x} is {y}"), _asks("the name of a baby {x}", more=("What is a baby {x}?", "What is a baby {x} called?", "What do you call a baby {x}?"))),
        World("legs", "🐾", _facts(_rows(_LEGS), "{ax} has {y} legs"), legs),
        World("shapes", "🔺", _facts(_rows(_SHAPES), "{ax} has {y} sides"), sides, 0.6),
        World("plurals", "📚", _facts(_rows(_PLURALS), "the plural of {x} is {y}"), _asks("the plural of {x}", more=("How do you write more than one {x}?", "One {x}, two what?"))),
        *_ordered("days", "📅", "day", _DAYS.split(), wrap=True),
        *_ordered("months", "📆", "month", _MONTHS.split(), wrap=True),
        *_ordered("letters", "🔤", "letter", list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), wrap=False),
        *_arithmetic(),
        World("names", "😊", _facts([[n, n] for n in NAMES], "nice to meet you, {x}", "{x}"), name, 0.8),
        *_small_talk(),
        _unknown(),
    )  # fmt: skip
