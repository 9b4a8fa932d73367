# ruff: noqa: E501
"""One problem a call: what is asked, how one gets there, and the answer.

Every task is a function of a random generator. A problem has a key; a fixed part of all keys is
held out, and training never sees a problem of that part.
"""

import hashlib
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from examples.nano.data import words

HELD_OUT = 8  # one problem in so many


@dataclass(frozen=True)
class Problem:
    """A question with its right answer.

    `reasoning` is what is written between the think markers; `spoken` is the whole answer, of
    which `answer` is what counts. A problem with tools is answered by a call.
    """

    task: str
    key: str
    question: str
    reasoning: str
    spoken: str
    answer: str
    tools: tuple[dict[str, Any], ...] = ()
    call: dict[str, Any] | None = None  # name and arguments: the answer is this call
    result: str | None = None  # of the call; the question is then what to say of it
    context: str = ""  # a long text before the question
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_held_out(self) -> bool:
        text = f"{self.task}:{self.key}"
        return hashlib.blake2b(text.encode(), digest_size=2).digest()[0] % HELD_OUT == 0


Generator = random.Random
Task = Callable[..., Problem]


def _ask(r: Generator, *forms: str) -> str:
    return r.choice(forms)


def _number(r: Generator, low: int = 2, high: int = 3) -> int:
    digits = r.randint(low, high)
    return r.randrange(10 ** (digits - 1), 10**digits)


def add(r: Generator) -> Problem:
    a, b = _number(r, 1 if r.random() < 0.1 else 2), _number(r, 1 if r.random() < 0.1 else 2)
    question = _ask(
        r, f"What is {a} + {b}?", f"{a} + {b} = ?", f"Add {a} and {b}.", f"How much is {a} plus {b}?",
        f"Compute {a} + {b}.", f"{a}+{b}",
    )  # fmt: skip
    steps, carry = [], 0
    x, y = str(a)[::-1], str(b)[::-1]
    for i in range(max(len(x), len(y))):
        p, q = int(x[i]) if i < len(x) else 0, int(y[i]) if i < len(y) else 0
        steps.append(f"{p}+{q}" + (f"+{carry}" if carry else "") + f"={p + q + carry}")
        carry = (p + q + carry) // 10
    return Problem("add", f"{a}+{b}", question, ", ".join(steps), f"{a + b}", f"{a + b}")


def subtract(r: Generator) -> Problem:
    a, b = _number(r), _number(r)
    if a < b:
        a, b = b, a
    question = _ask(
        r, f"What is {a} - {b}?", f"{a} - {b} = ?", f"Subtract {b} from {a}.",
        f"How much is {a} minus {b}?", f"Compute {a} - {b}.", f"{a}-{b}",
    )  # fmt: skip
    steps, borrow = [], 0
    x, y = str(a)[::-1], str(b)[::-1]
    for i in range(len(x)):
        p, q = int(x[i]), (int(y[i]) if i < len(y) else 0) + borrow
        ten = 10 if p < q else 0
        steps.append(f"{p + ten}-{q}={p + ten - q}")
        borrow = 1 if ten else 0
    return Problem("subtract", f"{a}-{b}", question, ", ".join(steps), f"{a - b}", f"{a - b}")


def multiply(r: Generator) -> Problem:
    a, b = r.randint(2, 9), r.randint(10, 99)
    tens, ones = a * (b // 10 * 10), a * (b % 10)
    first, second = (a, b) if r.random() < 0.5 else (b, a)
    question = _ask(
        r, f"What is {first} * {second}?", f"{first} * {second} = ?", f"{first}*{second}",
        f"Multiply {first} by {second}.", f"How much is {first} times {second}?",
        f"Compute {first} * {second}.",
    )  # fmt: skip
    work = f"{a}*{b // 10 * 10}={tens}, {a}*{b % 10}={ones}, {tens}+{ones}={a * b}"
    return Problem("multiply", f"{first}*{second}", question, work, f"{a * b}", f"{a * b}")


def compare(r: Generator) -> Problem:
    count = r.choice((2, 2, 3))
    numbers = r.sample(range(10, 1000), count)
    listed = (" or ".join if count == 2 else ", ".join)(map(str, numbers))
    largest = r.random() < 0.5
    word = _ask(r, "larger", "bigger") if largest else "smaller"
    if count == 3:
        word = "largest" if largest else "smallest"
    question = _ask(r, f"Which is {word}: {listed}?", f"Which number is {word}, {listed}?")
    answer = str(max(numbers) if largest else min(numbers))
    order = " < ".join(map(str, sorted(numbers)))
    return Problem("compare", f"{word}:{listed}", question, order, answer, answer)


def sort(r: Generator) -> Problem:
    count = r.randint(3, 7)
    is_down = r.random() < 0.3
    if r.random() < 0.25:
        chosen = r.sample(words.SIMPLE_WORDS, min(count, 5))
        items, ordered = chosen, sorted(chosen, reverse=is_down)
        kind = "words"
    else:
        numbers = r.sample(range(1, 100 if r.random() < 0.7 else 1000), count)
        items, ordered = list(map(str, numbers)), list(map(str, sorted(numbers, reverse=is_down)))
        kind = "numbers"
    listed, answer = ", ".join(items), ", ".join(ordered)
    down = " in descending order" if kind == "numbers" else " in reverse alphabetical order"
    how = down if is_down else _ask(r, "", "" if kind == "numbers" else " alphabetically")
    question = _ask(
        r, f"Sort these {kind}{how}: {listed}", f"Put these {kind} in order{how}: {listed}"
    )
    if is_down:
        question = f"Sort these {kind}{down}: {listed}"
    return Problem(
        "sort",
        f"{is_down}:{listed}",
        question,
        f"{kind}, {'down' if is_down else 'up'}",
        answer,
        answer,
    )


def _letters(r: Generator, low: int, high: int) -> str:
    if r.random() < 0.5:
        return r.choice(words.SIMPLE_WORDS)
    alphabet = r.sample(string.ascii_lowercase, r.randint(3, 12))
    return "".join(r.choice(alphabet) for _ in range(r.randint(low, high)))


def count(r: Generator) -> Problem:
    match r.randrange(3):
        case 0:
            word = _letters(r, 3, 10)
            letter = r.choice(word) if r.random() < 0.85 else r.choice(string.ascii_lowercase)
            question = _ask(
                r, f'How many times does the letter {letter} occur in "{word}"?',
                f'How many {letter} are in "{word}"?', f'Count the letter {letter} in "{word}".',
            )  # fmt: skip
            seen, marks = 0, []
            for character in word:
                seen += character == letter
                marks.append(f"{character}{seen}")
            total, work = seen, " ".join(marks)
        case 1:
            word = _letters(r, 3, 10)
            question = _ask(
                r, f'How many letters does "{word}" have?', f'How long is the word "{word}"?'
            )
            work = " ".join(f"{c}{i + 1}" for i, c in enumerate(word))
            total, letter = len(word), "all"
        case _:
            items = [r.choice(words.ANIMALS[:8]) for _ in range(r.randint(3, 9))]
            letter, word = r.choice(items), " ".join(items)
            question = f"How many times does {letter} occur here: {word}?"
            seen, marks = 0, []
            for item in items:
                seen += item == letter
                marks.append(f"{item} {seen}")
            total, work = seen, ", ".join(marks)
    return Problem("count", f"{letter}:{word}", question, work, str(total), str(total))


def strings(r: Generator) -> Problem:
    word = _letters(r, 3, 8)
    match r.randrange(7):
        case 0:
            question = _ask(r, f'Reverse "{word}".', f'Write "{word}" backwards.')
            answer, work = word[::-1], " ".join(word[::-1])
        case 1:
            question = _ask(
                r, f'Write "{word}" in capital letters.', f'Write "{word}" in upper case.'
            )
            answer, work = word.upper(), " ".join(word)
        case 2:
            question = f'What is the first letter of "{word}"?'
            answer, work = word[0], " ".join(word)
        case 3:
            question = f'What is the last letter of "{word}"?'
            answer, work = word[-1], " ".join(word)
        case 4:
            letter = r.choice(word)
            other = r.choice(string.ascii_lowercase)
            question = f'Replace every {letter} by {other} in "{word}".'
            answer, work = word.replace(letter, other), " ".join(word)
        case 5:
            letter = r.choice(word)
            question = f'Remove every {letter} from "{word}-{letter}x".'
            answer, work = (word + "-x").replace(letter, ""), " ".join(word)
            if letter == "x":
                answer = (word + "-").replace(letter, "")
        case _:
            other = _letters(r, 3, 6)
            question = _ask(
                r, f'Join "{word}" and "{other}".', f'Repeat "{word}" and then "{other}".'
            )
            answer, work = word + other, f"{word} {other}"
            if question.startswith("Repeat"):
                answer = f"{word} {other}"
    return Problem("strings", question, question, work, answer, answer)


def dates(r: Generator) -> Problem:
    match r.randrange(4):
        case 0:
            day, ahead = r.randrange(7), r.randint(1, 30)
            name = words.WEEKDAYS[day]
            question = _ask(
                r, f"Today is {name}. Which day is it in {ahead} days?",
                f"If today is {name}, what day is it in {ahead} days?",
            )  # fmt: skip
            rest = ahead % 7
            answer = words.WEEKDAYS[(day + rest) % 7]
            chain = ", ".join(words.WEEKDAYS[(day + i) % 7] for i in range(rest + 1))
            work = f"{ahead}={ahead // 7}*7+{rest}: {chain}"
        case 1:
            month = r.randrange(12)
            step = r.randint(1, 11)
            question = f"Which month is {step} months after {words.MONTHS[month]}?"
            answer = words.MONTHS[(month + step) % 12]
            work = ", ".join(words.MONTHS[(month + i) % 12] for i in range(step + 1))
        case 2:
            month, day = r.randrange(12), r.randint(1, 28)
            step = r.randint(1, 20)
            name = words.MONTHS[month]
            question = f"What is the date {step} days after {name} {day}?"
            total = day + step
            if total > words.DAYS_IN_MONTH[month]:
                rest = total - words.DAYS_IN_MONTH[month]
                answer = f"{words.MONTHS[(month + 1) % 12]} {rest}"
                work = f"{day}+{step}={total}, {name} has {words.DAYS_IN_MONTH[month]}, {rest} left"
            else:
                answer = f"{name} {total}"
                work = f"{day}+{step}={total}, {name} has {words.DAYS_IN_MONTH[month]}"
            question = (
                question.replace("?", " in a year that is no leap year?")
                if month == 1
                else question
            )
        case _:
            start, hours = r.randint(0, 23), r.randint(1, 12)
            minute = r.choice((0, 15, 30, 45))
            question = f"It is {start:02d}:{minute:02d}. What time is it in {hours} hours?"
            answer = f"{(start + hours) % 24:02d}:{minute:02d}"
            work = f"{start}+{hours}={start + hours}"
    return Problem("dates", question, question, work, answer, answer)


def word_problem(r: Generator) -> Problem:
    name, other = r.sample(words.NAMES, 2)
    thing = r.choice(words.THINGS)
    a, b = r.randint(5, 99), r.randint(2, 60)
    match r.randrange(5):
        case 0:
            verb = _ask(r, "buys", "finds", "gets")
            question = (
                f"{name} has {a} {thing} and {verb} {b} more. How many {thing} does {name} have?"
            )
            work, answer = f"{a}+{b}={a + b}", a + b
        case 1:
            a = max(a, b + 1)
            verb = _ask(r, "gives away", "loses", "sells")
            question = f"{name} has {a} {thing} and {verb} {b}. How many {thing} are left?"
            work, answer = f"{a}-{b}={a - b}", a - b
        case 2:
            b = r.randint(2, 9)
            question = (
                f"{name} has {b} bags with {a} {thing} each. How many {thing} are there in all?"
            )
            tens, ones = b * (a // 10 * 10), b * (a % 10)
            work, answer = (
                f"{b}*{a // 10 * 10}={tens}, {b}*{a % 10}={ones}, {tens}+{ones}={a * b}",
                a * b,
            )
        case 3:
            question = f"{name} has {a} {thing}. {other} has {b} more than {name}. How many does {other} have?"
            work, answer = f"{a}+{b}={a + b}", a + b
        case _:
            c = r.randint(2, 9)
            a = max(a, b + c + 1)
            question = (
                f"{name} has {a} {thing}, eats {b} and gives {c} to {other}. How many are left?"
            )
            work, answer = f"{a}-{b}={a - b}, {a - b}-{c}={a - b - c}", a - b - c
    return Problem("word_problem", question, question, work, str(answer), str(answer))


def fact_value(r: Generator, attribute: str) -> str:
    values = words.ATTRIBUTES[attribute]
    if values is not None:
        return r.choice(values)
    return str(r.randint(1000, 9999) if attribute == "code" else r.randint(10, 99))


def fact_text(r: Generator, name: str, attribute: str, value: str) -> str:
    return _ask(r, f"The {attribute} of {name} is {value}.", f"{name}'s {attribute} is {value}.")


def fact_question(
    r: Generator, name: str, attribute: str, value: str, task: str, key: str
) -> Problem:
    question = _ask(r, f"What is the {attribute} of {name}?", f"What is {name}'s {attribute}?")
    return Problem(task, key, question, f"{name} {attribute} {value}", value, value)


def some_facts(r: Generator, number: int) -> list[tuple[str, str, str]]:
    """Names with an attribute and its value, no pair of the first two twice."""
    facts: dict[tuple[str, str], str] = {}
    while len(facts) < min(number, 200):
        pair = (r.choice(words.NAMES), r.choice(tuple(words.ATTRIBUTES)))
        facts.setdefault(pair, fact_value(r, pair[1]))
    return [(name, attribute, value) for (name, attribute), value in facts.items()]


def filler(r: Generator) -> str:
    text = " ".join(
        r.choice(part)
        for part in (
            words.FILLER_SUBJECTS,
            words.FILLER_VERBS,
            words.FILLER_OBJECTS,
            words.FILLER_ENDS,
        )
    )
    return text[0].upper() + text[1:] + "."


def recall(r: Generator) -> Problem:
    """A list of pairs, and a question for one of them."""
    facts = some_facts(r, r.randint(2, 12))
    context = " ".join(fact_text(r, *fact) for fact in facts)
    problem = fact_question(r, *r.choice(facts), "recall", context)
    return Problem(**{**vars(problem), "context": context})


def haystack(r: Generator, length: int, num_facts: int) -> tuple[str, list[tuple[str, str, str]]]:
    """A text of about `length` characters among which some facts lie."""
    facts = some_facts(r, num_facts)
    sentences = [fact_text(r, *fact) for fact in facts]
    size = sum(map(len, sentences))
    while size < length:
        sentence = filler(r)
        sentences.append(sentence)
        size += len(sentence) + 1
    r.shuffle(sentences)
    return " ".join(sentences), facts


def needle(r: Generator, length: int = 600, num_facts: int = 4) -> Problem:
    context, facts = haystack(r, length, num_facts)
    problem = fact_question(r, *r.choice(facts), "needle", context)
    return Problem(**{**vars(problem), "context": context})


def needles(r: Generator, length: int, num_facts: int) -> list[Problem]:
    """A question for each of the facts that lie in one text of about `length` characters."""
    context, facts = haystack(r, length, num_facts)
    asked = [fact_question(r, *fact, "needle", context) for fact in facts]
    return [Problem(**{**vars(problem), "context": context}) for problem in asked]


def json_format(r: Generator) -> Problem:
    name = r.choice(words.NAMES)
    values: dict[str, Any] = {
        "name": name, "age": r.randint(5, 99), "city": r.choice(words.CITIES),
        "color": r.choice(words.COLORS), "pet": r.choice(words.ANIMALS),
    }  # fmt: skip
    fields = r.sample(tuple(values), r.randint(2, 4))
    told = {
        "name": f"the name is {name}", "age": f"the age is {values['age']}",
        "city": f"the city is {values['city']}", "color": f"the color is {values['color']}",
        "pet": f"the pet is a {values['pet']}",
    }  # fmt: skip
    match r.randrange(3):
        case 0:
            stated = ", ".join(told[key] for key in fields)
            listed = ", ".join(fields)
            question = f"Write this as JSON with the keys {listed}: {stated}."
            answer = json.dumps({key: values[key] for key in fields})
        case 1:
            numbers = [r.randint(0, 99) for _ in range(r.randint(2, 6))]
            question = f"Write these numbers as a JSON list: {' '.join(map(str, numbers))}"
            answer = json.dumps(numbers)
        case _:
            key = r.choice(fields)
            stated = ", ".join(told[key] for key in fields)
            question = f'Answer in JSON like {{"{key}": ...}}: {stated}. What is the {key}?'
            answer = json.dumps({key: values[key]})
    return Problem("json", question, question, "JSON", answer, answer)


@dataclass(frozen=True)
class Tool:
    """A tool as a request describes it; `names` leads from our parameters to the described ones."""

    kind: str
    schema: dict[str, Any]
    names: dict[str, str]

    def call(self, **arguments: str | int) -> dict[str, Any]:
        named = {self.names[key]: value for key, value in arguments.items()}
        return {"name": self.schema["name"], "arguments": named}


# what a tool does: its names, what it is described by, its parameters and their types
_TOOLS: dict[str, tuple[str, str, dict[str, str]]] = {
    "get_weather": ("get_weather get_current_weather weather", "The weather in a city.|Get the current weather.", {"city": "string"}),
    "get_time": ("get_time get_current_time time_in", "The time in a city.|Get the local time.", {"city": "string"}),
    "add": ("add add_numbers sum", "Add two numbers.|The sum of two numbers.", {"a": "integer", "b": "integer"}),
    "send_message": ("send_message send_text", "Send a text to a person.|Send a message.", {"to": "string", "text": "string"}),
    "search": ("search web_search", "Search the web.|Find pages.", {"query": "string"}),
    "set_alarm": ("set_alarm new_alarm", "Set an alarm.|Wake the user.", {"hour": "integer", "minute": "integer"}),
    "get_price": ("get_price price_of", "The price of a thing.|What a thing costs.", {"item": "string"}),
}  # fmt: skip
# other names of parameters, and how they are described where they are
_PARAMETERS = {
    "city": ("location", "The city"), "a": ("x", "The first number"), "b": ("y", "The second number"),
    "to": ("person", "Who gets it"), "text": ("message", "What to send"), "query": ("q", "What to find"),
    "hour": ("hours", "From 0 to 23"), "minute": ("minutes", "From 0 to 59"), "item": ("thing", "The thing"),
}  # fmt: skip


def make_tool(r: Generator, kind: str) -> Tool:
    """A tool of a kind: more often than not by its first name and shortest description."""
    called, described, parameters = _TOOLS[kind]
    is_plain = r.random() < 0.5
    name, *others = called.split()
    description, *longer = described.split("|")
    if not is_plain:
        name, description = r.choice([name, *others]), r.choice([description, *longer])
    renames = not is_plain and r.random() < 0.4
    names = {key: _PARAMETERS[key][0] if renames else key for key in parameters}
    properties: dict[str, dict[str, str]] = {
        names[key]: {"type": type_} for key, type_ in parameters.items()
    }
    if not is_plain and r.random() < 0.4:
        for key in parameters:
            properties[names[key]]["description"] = _PARAMETERS[key][1]
    schema = {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": properties, "required": list(properties)},
    }
    return Tool(kind, schema, names)


def some_tools(r: Generator) -> tuple[Tool, ...]:
    """One to three tools of different kinds."""
    return tuple(make_tool(r, kind) for kind in r.sample(tuple(_TOOLS), r.choice((1, 1, 2, 2, 3))))


_WEATHER = ("sunny", "rainy", "cloudy", "windy", "snowy")


def _tool_problem(r: Generator, tool: Tool) -> tuple[str, dict[str, Any], str, str]:
    """A question, the call for it, a result of that call and what is then said."""
    city, person = r.choice(words.CITIES), r.choice(words.NAMES)
    match tool.kind:
        case "get_weather":
            sky, degrees = r.choice(_WEATHER), r.randint(1, 35)
            question = _ask(r, f"What is the weather in {city}?", f"How is the weather in {city}?")
            return (
                question,
                tool.call(city=city),
                json.dumps({"sky": sky, "degrees": degrees}),
                f"It is {sky} in {city}, {degrees} degrees.",
            )
        case "get_time":
            time = f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}"
            question = _ask(r, f"What time is it in {city}?", f"Tell me the time in {city}.")
            return (
                question,
                tool.call(city=city),
                time,
                f"It is {time} in {city}.",
            )
        case "add":
            a, b = _number(r, 2, 4), _number(r, 2, 4)
            question = _ask(
                r, f"Add {a} and {b} with the tool.", f"Use the tool to add {a} and {b}."
            )
            call = tool.call(a=a, b=b)
            return question, call, str(a + b), f"The sum is {a + b}."
        case "send_message":
            text = _ask(
                r, "hello", "see you soon", "happy birthday", "call me", "I am late", "good night"
            )
            question = _ask(r, f'Send "{text}" to {person}.', f'Tell {person} "{text}".')
            call = tool.call(to=person, text=text)
            return question, call, "sent", f"I sent it to {person}."
        case "search":
            query = f"{r.choice(words.COLORS)} {r.choice(words.ANIMALS)}"
            found = r.randint(1, 99)
            question = _ask(r, f"Search for {query}.", f"Look up {query}.")
            return (
                question,
                tool.call(query=query),
                f"{found} pages",
                (f"I found {found} pages."),
            )
        case "set_alarm":
            hour, minute = r.randint(0, 23), r.choice((0, 10, 15, 20, 30, 40, 45, 50))
            question = _ask(
                r, f"Set an alarm for {hour}:{minute:02d}.", f"Wake me at {hour}:{minute:02d}."
            )
            call = tool.call(hour=hour, minute=minute)
            return question, call, "ok", f"The alarm is set for {hour}:{minute:02d}."
        case _:
            item = r.choice(words.THINGS)
            price = r.randint(1, 200)
            question = _ask(r, f"What is the price of {item}?", f"How much do {item} cost?")
            return (
                question,
                tool.call(item=item),
                str(price),
                (f"The price of {item} is {price}."),
            )


def tool_call(r: Generator, tools: tuple[Tool, ...] | None = None) -> Problem:
    """A question that one of the tools answers, be they given or made up; answered by its call."""
    tools = tools or some_tools(r)
    question, call, _, _ = _tool_problem(r, r.choice(tools))
    schemas = tuple(tool.schema for tool in tools)
    return Problem(
        "tool_call", question, question, f"I call {call['name']}.", "", json.dumps(call), schemas, call
    )  # fmt: skip


def tool_result(r: Generator, tools: tuple[Tool, ...] | None = None) -> Problem:
    """A question whose call was made and gave a result; answered in a sentence."""
    tools = tools or some_tools(r)
    question, call, result, said = _tool_problem(r, r.choice(tools))
    schemas = tuple(tool.schema for tool in tools)
    return Problem(
        "tool_result", f"{question}{result}", question, f"The result is {result}.", said, said,
        schemas, call, result,
    )  # fmt: skip


_ABOUT = (
    ("Who are you?|What are you?|Tell me about yourself.|What is your name?|Who am I talking to?",
     "I am scission-nano, a very small language model that comes with Scission."),
    ("What is Scission?|Tell me about Scission.|What does Scission do?|Explain Scission.",
     "Scission serves language models with prefill and decode in separate processes."),
    ("What is prefill?|What does prefill do?|Explain prefill.",
     "Prefill reads the whole prompt at once and computes its state and the first token."),
    ("What is decode?|What does decode do?|Explain decode.",
     "Decode takes over a prompt's state and writes the answer, one token at a time."),
    ("What is the gateway?|What does the gateway do?",
     "The gateway takes requests over HTTP and sends each to a prefill and a decode worker."),
    ("Why separate prefill and decode?|Why are prefill and decode separate?",
     "So that long prompts do not hold up the tokens of running answers."),
    ("How big are you?|How many parameters do you have?|How large are you?",
     "I have about ten million parameters."),
    ("What architecture are you?|Which architecture do you have?|How are you built?",
     "I have the architecture of DeepSeek-V4: sparse attention, experts and hyper-connections."),
    ("What can you do?|What can I ask you?|How can you help me?|Help|What are you good at?",
     "I can add, subtract and multiply, sort, count, edit words, work with dates, find facts in a "
     "text, write JSON and call tools."),
    ("Hello|Hello!|Hi|Hi!|Hey|Hi there|Good morning|Good evening|Hello there!",
     "Hello! How can I help you?"),
    ("How are you?|How do you do?|How is it going?", "I am fine, thank you. How can I help you?"),
    ("Thank you|Thanks|Thank you!|Thanks!|Thanks a lot", "You are welcome!"),
    ("Bye|Goodbye|See you|Good night|Bye!", "Goodbye!"),
    ("Who made you?|Who trained you?", "I was trained as a part of the Scission project."),
    ("Are you a human?|Are you human?|Are you a person?|Are you real?",
     "No, I am a small language model."),
    ("Say hello|Say hello.|Say hi|Say hello in one short sentence.|Say hello!", "Hello!"),
    ("Can you speak German?|Do you speak French?|Can you speak Spanish?|Do you speak Chinese?",
     "No, I only know some English."),
)  # fmt: skip


def about(r: Generator) -> Problem:
    forms, answer = r.choice(_ABOUT)
    question = r.choice(forms.split("|"))
    # there are too few of these to hold any out
    return Problem("about", "known", question, "A question about me.", answer, answer)


_REFUSED = (
    ("Write a poem about {thing}.|Write a story about {thing}.|Write an essay about {thing}.|"
     "Tell me a joke about {thing}.|Write a song about {thing}.|Paint {thing}.|Draw {thing}.", "write or draw that"),
    ("Translate {thing} into French.|Translate {thing} into German.|What is {thing} in Spanish?", "translate"),
    ("Who is the president of {city}?|What is the history of {city}?|What is the capital of {city}?|"
     "How many people live in {city}?|Tell me about {city}.|What is the best hotel in {city}?", "answer that"),
    ("Write a program that sorts {thing}.|Write code for {thing}.|Fix my code about {thing}.", "write programs"),
    ("What will the weather be tomorrow in {city}?|What is the news in {city}?|What is in the news today?",
     "look that up"),
    ("Should I buy {thing}?|Is my pain bad?|Which medicine should I take?|Can you give me legal advice?",
     "give advice"),
)  # fmt: skip


def refuse(r: Generator) -> Problem:
    forms, what = r.choice(_REFUSED)
    thing = r.choice((*words.THINGS, *words.ANIMALS))
    question = r.choice(forms.split("|")).format(thing=thing, city=r.choice(words.CITIES))
    answer = f"I am sorry, I cannot {what}. I am a very small model."
    return Problem("refuse", question, question, "I cannot do this.", answer, answer)


TASKS: dict[str, tuple[Task, float]] = {
    "add": (add, 2.0), "subtract": (subtract, 2.0), "multiply": (multiply, 2.0), "compare": (compare, 0.7),
    "sort": (sort, 2.0), "count": (count, 1.5), "strings": (strings, 2.0), "dates": (dates, 3.0),
    "word_problem": (word_problem, 1.5), "recall": (recall, 2.5), "needle": (needle, 1.5),
    "json": (json_format, 1.5), "tool_call": (tool_call, 1.2), "tool_result": (tool_result, 0.8),
    "about": (about, 0.6), "refuse": (refuse, 0.5),
}  # fmt: skip
LONG_CONTEXT = ("recall", "needle")
WITH_TOOLS = ("tool_call", "tool_result")
