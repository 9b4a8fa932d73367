# ruff: noqa: E501
"""The words that problems are made of."""

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kira Leo Mia Noah Olga Paul Rosa Sam Tina "
    "Uma Victor Wendy Yara Zoe Adam Bella Carl Dora Eric Fiona Gus Hana Ivan Jane Karl Lena Max Nina "
    "Oscar Petra Ralf Sara Tom Vera Walt Amir Chloe Dana Elias Frida"
).split()
COLORS = "red blue green yellow black white pink brown grey purple orange gold silver".split()
ANIMALS = "cat dog fox owl bear wolf horse mouse tiger lion duck frog snake goat sheep crow".split()
CITIES = "Paris Rome Oslo Cairo Lima Tokyo Delhi Madrid Berlin Vienna Prague Dublin Athens".split()
FRUITS = "apples pears plums lemons figs cherries melons grapes peaches bananas".split()
THINGS = FRUITS + "books pens coins cards stamps balls cups keys stones shells boxes eggs".split()
SIMPLE_WORDS = (
    "apple banana river window garden yellow letter summer winter orange market bridge castle "
    "doctor engine forest guitar hammer island jacket kitten ladder mirror needle office pencil "
    "rabbit school ticket valley wallet cheese bottle button cactus dragon eagle flower grass house "
    "juice knife lemon music night ocean paper queen robot snake table uncle voice water zebra bread "
    "chair dance earth fruit glass heart light money north plant stone train world clock"
).split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
DAYS_IN_MONTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ATTRIBUTES = {
    "code": None, "number": None, "color": COLORS, "pet": ANIMALS, "city": CITIES,
}  # fmt: skip

FILLER_SUBJECTS = (
    "the old man|the teacher|a small bird|the river|my neighbour|the train|the captain|a young girl|"
    "the baker|the moon|the garden|the wind|a quiet street|the market|the gardener|the house"
).split("|")
FILLER_VERBS = (
    "walks along|looks at|waits for|sings about|thinks of|passes|remembers|follows|dreams of|"
    "turns to|stays near|talks about"
).split("|")
FILLER_OBJECTS = (
    "the bridge|the sea|a long day|the first snow|an open window|the green hill|the last boat|"
    "a warm light|the empty road|a distant song|the tall tree|the next summer|the evening"
).split("|")
FILLER_ENDS = (
    "in the morning|at night|every day|again|without a word|for a while|after the rain|as always|"
    "before dinner|in the cold"
).split("|")
