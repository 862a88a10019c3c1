"""Questions about a chunk whose answers stand in it, from an engine that may be a very small model.

A small model does not find facts worth asking for, and copies badly. So rules find the answer in a sentence (a date, a number
with its unit, a name, a reason, what something is), a question word is put in its place, and the model only has to bring
"The rent is how much a year." into the order of a question (over-generate and rank: Heilman and Smith 2010). What comes back
is then tried: by rules, and by asking the model to choose the answer from those of the neighbourhood. The rules know English.
Used by pipelines.tune.from_docs; nothing is written here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.rag.chunk import Chunk
from pipelines.tune.rows import Message

Request = tuple[list[Message], dict[str, Any]]  # chat turns, and the JSON schema of the reply

LONGEST_QUESTION = 120  # characters
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = rf"(?:\b(?:\d{{1,2}} )?{_MONTH}(?: \d{{1,2}},)?(?: (?:19|20)\d\d)?\b|\b(?:19|20)\d\d\b)"
_COUNT = "(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty)"
_NO_UNIT = ("the is was has have its this as per does means comes gives scores of in on to for and or with which that from at by "
            "are were but not when while it be a an").replace(" ", "|")  # fmt: skip
_UNIT = rf"(?!(?:{_NO_UNIT})\b)[a-z]{{2,}}(?![\w'-])"
_CAPITAL = r"[A-Z][\w&.+-]*[\w+]"
_KINDS = {name: re.compile(pattern) for name, pattern in {
    "date": rf"{_DATE}(?: (?:to|until) {_DATE})?",
    "money": r"(?<![\w.,])(?:[$£€]\d(?:[\d.,]*\d)?(?: (?:million|billion)\b)?|\d(?:[\d.,]*\d)? (?:pounds|dollars|euros)\b)",
    "number": rf"(?<![\w.,$£€-])(?:\d(?:[\d.,]*\d)?(?:[KMBT]\b|%)?(?: (?:thousand|million|billion|trillion)\b)?(?: {_UNIT})?"
              rf"|{_COUNT} [a-z]+s\b)(?![\w-])",
    "name": rf"(?:\b(?:Dr|Mr|Mrs|Ms|Prof)\.? |(?<=[a-z,] )){_CAPITAL}(?: (?:(?:and|of|de|van) )?{_CAPITAL}| \d[\d.]*[A-Z]?\b)*",
    "reason": r"(?<=because )[^.;:()]{12,90}",
    "thing": r"(?<= is )an? [a-z][^.,;:()]{8,80}|(?<= are )[a-z][^.;:()]{4,60} and [^.,;:()]{4,60}",
}.items()}  # fmt: skip
_SENTENCE_ENDS = re.compile(r"\n\s*\n|\n(?=[ \t]*(?:[-*+]|\d+[.)]|\||#)\s)|(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])")
_VERB = "(?:is|are|was|were|has|have|can|will)"
_CLAUSE_BEGINS = re.compile(rf"[;:] |, (?:and|but|so|while|whereas) | and (?=(?:the|its|it) [^,]*\b{_VERB}\b)")
_CLAUSE_ENDS = re.compile(rf"[;:] |, | and (?={_VERB}\b|(?:the|its|it) [^,]*\b{_VERB}\b)")
_PHRASE_ENDS = re.compile(r", (?:and (?:it|they|the)|which|so|but|where|with)\b")
_MARKUP = re.compile(r"[|`\[\]{}<>]|https?:")
_QUESTION = re.compile(r"(?:Who|What|When|Where|Which|Why|How)\b.*\w(?<! what)(?<! when)(?<! where)(?<! who)\?")
_PRONOUN = re.compile(r"\b(?:it|its|they|them|their|he|she|this|these|those)\b", re.I)
_STOP = set(
    "a an the of in on at to for from by with and or as that its we our you your i is are was were be been do does did can "
    "could will would should may might must what when who which where why how many much long there not if than".split()
)
_FREE = set("take go come give make get cost name have".split())  # English needs them to turn a sentence around

# (title, statement, question)
_QUESTION_SHOTS = (
    ("Vela", "It was released when by Orion Labs.", "When was Vela released by Orion Labs?"),
    ("The orchard", "We planted how many trees behind the house.", "How many trees did we plant behind the house?"),
    ("Vela", "Vela was trained by who on text from books.", "Who trained Vela on text from books?"),
    ("Kite", "Kite is what.", "What is Kite?"),
    ("The orchard", "The pears failed because why.", "Why did the pears fail?"),
    ("The orchard", "Most of the trees are of the variety what, which came from Kent.", "What variety are most of the trees?"),
    ("The orchard", "The new fence cost 340 pounds and the gate how much.", "How much did the gate cost?"),
    ("Minutes", "Who takes over as chair on 5 March.", "Who takes over as chair on 5 March?"),
    ("Minutes", "Anna Berg takes over as chair when and stays for a year.", "When does Anna Berg take over as chair?"),
    ("Vela", "The model has 9 billion parameters and reads up to how many tokens.", "How many tokens does Vela read?"),
    ("The orchard", "The rent is how much a year, paid to the council.", "How much is the rent of the orchard?"),
    ("Minutes", "The meeting was held where and lasted two hours.", "Where was the meeting held?"),
    ("Minutes", "The treasurer is who, and she keeps the keys.", "Who is the treasurer?"),
    ("Vela", "Its licence is what, and the weights are open.", "What is the licence of Vela?"),
    ("Kite", "It exports its graphs to what and to plain files.", "What does Kite export its graphs to?"),
    ("Vela", "Vela scores what for accuracy and 0.8 for speed.", "What does Vela score for accuracy?"),
    ("Minutes", "The roof repair takes how many weeks.", "How many weeks does the roof repair take?"),
)  # fmt: skip
# (title, text, question, answer)
_ANSWER_SHOTS = (
    ("Vela", "It was released in May 2022 by Orion Labs. It has 9 billion parameters.", "How many parameters does Vela have?",
     "9 billion parameters"),
    ("The orchard", "We planted 40 trees. The pears failed because frost came in April.", "Why did the pears fail?",
     "frost came in April"),
    ("Kite", "Kite is a database for vectors. It was written by Anna Berg in Rust.", "Who wrote Kite?", "Anna Berg"),
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """Something that can be asked for.

    Attributes:
        kind: date, money, number, name, reason or thing.
        answer: the words of the chunk, white space made single.
        sentence: where they stand.
        statement: the sentence with a question word in their place.
        openings: how a question for them can begin.
    """

    kind: str
    answer: str
    sentence: str
    statement: str
    openings: tuple[str, ...]


def candidates(chunk: Chunk) -> list[Candidate]:
    """Return what can be asked about a chunk: first one of each kind in the order of the text, then the second ones."""
    found, seen = list[tuple[int, Candidate]](), Counter[str]()
    for sentence in _sentences(chunk.text):
        taken: list[tuple[int, int]] = []
        for kind, pattern in _KINDS.items():
            for match in pattern.finditer(sentence):
                answer, start = _PHRASE_ENDS.split(match[0])[0].strip(), match.start()
                end = start + len(answer)
                overlaps = any(start < e and s < end for s, e in taken)
                if overlaps or _poor(kind, answer, sentence[:start], sentence[end:], chunk.title):
                    continue
                taken.append((start, end))
                found.append((seen[kind], _candidate(kind, answer, sentence, start)))
                seen[kind] += 1
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0])]


def question_request(title: str, candidate: Candidate) -> Request:
    """Return the request for a question with this answer; the reply is {"question": ...}."""
    pattern = f'^({"|".join(candidate.openings)}) [^"\\\\?]{{4,{LONGEST_QUESTION}}}\\?$'
    shots = [(f"{about}: {statement}", question) for about, statement, question in _QUESTION_SHOTS]
    return _request("Turn the statement into a question about the same thing. Name what it is about.", "question", shots,
                    f"{title}: {candidate.statement}", {"type": "string", "pattern": pattern})  # fmt: skip


def choice_request(chunk: Chunk, question: str, choices: Iterable[str]) -> Request:
    """Return the request to choose the answer to a question about a chunk; the reply is {"answer": ...}."""
    shots = [(f"{about}: {text}\nQuestion: {asked}", answer) for about, text, asked, answer in _ANSWER_SHOTS]
    return _request("Answer with words of the text.", "answer", shots,
                    f"{document_title(chunk)}: {' '.join(chunk.text.split())}\nQuestion: {question}",
                    {"type": "string", "enum": list(dict.fromkeys(choices))})  # fmt: skip


def reply_field(reply: str, field: str) -> str:
    """Return a text field of a reply; empty if the reply is not such a JSON object, as when it was cut."""
    try:
        value = json.loads(reply)[field]
    except (ValueError, KeyError, TypeError):
        return ""
    return value.strip() if isinstance(value, str) else ""


def fault(question: str, candidate: Candidate, chunk: Chunk) -> str | None:
    """Return why a pair must not be kept, or None; all of it is told by rules, without the engine."""
    asked = _stems(question)
    if not _QUESTION.fullmatch(question):
        return "not a question"
    if not holds(chunk.text, candidate.answer):
        return "answer not in its chunk"
    if plain(candidate.answer) == plain(chunk.text):
        return "answer is the whole chunk"
    if set(_words(candidate.answer)) <= set(_words(question)):
        return "question holds the answer"
    if _PRONOUN.search(question):
        return "question does not say about what"
    if any(times > 1 for word, times in Counter(_words(question)).items() if word not in _STOP):
        return "question repeats itself"
    if asked - _stems(f"{chunk.title} {chunk.text}") - {_stem(word) for word in _FREE}:
        return "question has words from elsewhere"
    said = _stems(candidate.sentence) - _stems(candidate.answer, document_title(chunk))
    if candidate.kind == "thing":  # "X is what." asks about its subject only, which may be the title
        said = _stems(re.split(r"\bwhat\b", candidate.statement)[0]) or asked
    return None if asked & said else "question is beside its sentence"


def plain(text: str) -> str:
    """Return a text in lower case, white space made single, without punctuation at its ends."""
    return re.sub(r"^\W+|\W+$", "", " ".join(text.lower().split()))


def holds(text: str, answer: str) -> bool:
    """Return True if an answer stands in a text as whole words, both as `plain` makes them."""
    return bool(plain(answer)) and re.search(rf"(?<!\w){re.escape(plain(answer))}(?!\w)", plain(text)) is not None


def document_title(chunk: Chunk) -> str:
    """Return the first of the headings above a chunk."""
    return chunk.title.split(" > ")[0]


def _sentences(text: str) -> Iterator[str]:
    for piece in _SENTENCE_ENDS.split(text):
        sentence = " ".join(piece.split()).lstrip("-*+ ")
        if 4 <= len(sentence.split()) <= 45 and sentence[-1] in ".!" and not _MARKUP.search(sentence):
            yield sentence


def _poor(kind: str, answer: str, before: str, after: str, title: str) -> bool:
    """Return True for what the patterns find but nobody would ask for."""
    words = before.split()
    last = words[-1] if words else ""
    if answer.lower() in title.lower():
        return True
    if kind == "number":  # without a unit it is a name, as is one behind a capital
        return bool(re.fullmatch(r"\d+|[\d.,]+[KMBT]", answer)) or last == "version" or (last[:1].isupper() and len(words) > 1)
    if kind == "name":
        noun = re.match(r" ([a-z]+)\b|'s", after)
        if (noun and noun[1] not in _STOP and noun[1] != "licence") or last[:1].isupper() and last[-1] != ",":
            return True  # in front of a noun it only says which; behind a capital it is half a name
        one = " " not in answer and not re.search(r"[a-z][A-Z]", answer)
        return one and (answer.isupper() or last not in ("by", "from", "in", "at", "near", "called"))
    return kind == "thing" and re.match(r"\w+(?:ed|ing|en)\b|not\b", answer) is not None


def _candidate(kind: str, answer: str, sentence: str, start: int) -> Candidate:
    before = _CLAUSE_BEGINS.split(sentence[:start])[-1]
    after = _CLAUSE_ENDS.split(sentence[start + len(answer) :])[0].rstrip(" .!") + "."
    word, openings = _question_word(kind, answer, before)
    if word in ("when", "where"):
        before = re.sub(r"(?:^|(?<= ))(?:in|on|at|near) $", "", before, flags=re.I)
    statement = before + word + after
    return Candidate(kind, answer, sentence, statement[0].upper() + statement[1:], openings)


def _question_word(kind: str, answer: str, before: str) -> tuple[str, tuple[str, ...]]:
    """Return the word that stands for the answer in the statement, and how the question can begin."""
    last, unit = before.split()[-1:], answer.split()[-1]
    fixed = {"date": ("when", ("When",)), "money": ("how much", ("How much", "What")), "reason": ("why", ("Why",)),
             "thing": ("what", ("What is", "What are"))}  # fmt: skip
    if kind in fixed:
        return fixed[kind]
    if kind == "number":
        many = unit.endswith("s") and unit.isalpha()
        return (f"how many {unit}", (f"How many {unit}",)) if many else ("what", ("What", "How"))
    if re.match(r"(?:Dr|Mr|Mrs|Ms|Prof)\b", answer) or last == ["by"]:
        return "who", ("Who",)
    if last in (["in"], ["at"], ["near"]):
        return "where", ("Where",)
    person = last in ([], ["is"], ["was"], ["and"]) or before.endswith(", ")
    return "what", ("What", "Which", "Who") if person else ("What", "Which")


def _request(system: str, field: str, shots: Sequence[tuple[str, str]], asked: str, value: dict[str, Any]) -> Request:
    turns = [{"role": "system", "content": system}]
    for said, wanted in shots:
        turns += [{"role": "user", "content": said}, {"role": "assistant", "content": json.dumps({field: wanted})}]
    schema = {"type": "object", "properties": {field: value}, "required": [field], "additionalProperties": False}
    return [*turns, {"role": "user", "content": asked}], schema


def _words(text: str) -> list[str]:
    found = re.findall(r"\w+(?:[.'-]\w+)*", text.lower())
    return ["have" if word in ("has", "had") else word.removesuffix("'s") for word in found]


def _stem(word: str) -> str:
    return (word.rstrip("s") if len(word) > 3 else word)[:4]


def _stems(*texts: str) -> set[str]:
    return {_stem(word) for text in texts for word in _words(text) if word not in _STOP}
