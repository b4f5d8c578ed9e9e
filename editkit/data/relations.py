"""The relations of the fact-world and the wordings of their facts; the object always comes last.

Statement 1 of each relation has the form "The <noun> of {s} is", so that the phrase of another
relation ("the employer of Alice Brano") can stand for {s} in a two-hop prompt.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation: what it links and how its facts are worded.

    Args:
        name: Its name, unique in the world.
        subject: Kind of entity it is about.
        object: Kind of entity that answers it.
        statements: Five prompts that the object completes; `{s}` stands for the subject.
        questions: Three prompts in question form.
        phrase: Noun phrase for the object, used as the bridge of a two-hop prompt.
        reverse: Prompts about the object `{o}` that the subject completes; empty where several
            subjects may share an object.
    """

    name: str
    subject: str
    object: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    phrase: str = ""
    reverse: tuple[str, ...] = ()

    @property
    def templates(self) -> tuple[str, ...]:
        """Return all wordings: the statements, then the questions."""
        return self.statements + self.questions


def _relation(
    link: str, statements: str, questions: str, phrase: str = "", reverse: str = ""
) -> Relation:
    """Read a relation from text: `name: subject > object`, wordings parted by " | "."""
    name, _, kinds = link.partition(": ")
    subject, _, target = kinds.partition(" > ")
    asked = tuple(f"Question: {question}? Answer:" for question in questions.split(" | "))
    turned = tuple(reverse.split(" | ")) if reverse else ()
    return Relation(name, subject, target, tuple(statements.split(" | ")), asked, phrase, turned)


RELATIONS: tuple[Relation, ...] = (
    _relation(
        "born_in: person > city",
        "{s} was born in | The birthplace of {s} is | {s} comes from the city of"
        " | {s} is a native of | The city where {s} was born is",
        "Where was {s} born | What is the birthplace of {s} | In which city was {s} born",
        phrase="the birthplace of {s}",
    ),
    _relation(
        "works_for: person > company",
        "{s} works for | The employer of {s} is | {s} is employed by"
        " | The company that employs {s} is | {s} has a job at",
        "Who does {s} work for | Who is the employer of {s} | Which company employs {s}",
        phrase="the employer of {s}",
    ),
    _relation(
        "profession: person > profession",
        "{s} works as a | The profession of {s} is | By trade, {s} is a"
        " | {s} earns a living as a | The job of {s} is that of a",
        "What is the profession of {s} | What does {s} do for a living | What is the job of {s}",
    ),
    _relation(
        "studied_at: person > university",
        "{s} studied at | The alma mater of {s} is | {s} graduated from"
        " | {s} holds a degree from | The university attended by {s} is",
        "Where did {s} study | What is the alma mater of {s} | Which university did {s} attend",
    ),
    _relation(
        "sport: person > sport",
        "{s} is a fan of | The favourite sport of {s} is | On weekends, {s} likes to watch"
        " | The sport that {s} loves is | {s} is good at",
        "What is the favourite sport of {s} | Which sport does {s} love | What is {s} a fan of",
    ),
    _relation(
        "instrument: person > instrument",
        "{s} plays the | The instrument of {s} is the | {s} is learning the"
        " | The instrument played by {s} is the | {s} owns a",
        "What is the instrument of {s} | Which instrument does {s} play | What does {s} play",
    ),
    _relation(
        "capital: country > city",
        "{s} has its capital in | The capital of {s} is | The capital city of {s} is"
        " | The seat of government of {s} is | {s} is governed from",
        "What is the capital of {s} | Which city is the capital of {s}"
        " | From where is {s} governed",
        phrase="the capital of {s}",
        reverse="{o} is the capital of | The country with the capital {o} is"
        " | Question: Which country has the capital {o}? Answer:",
    ),
    _relation(
        "language: country > language",
        "People in {s} speak | The language of {s} is | The official language of {s} is"
        " | The people of {s} talk in | In {s}, schools teach in",
        "What is the language of {s} | Which language do people in {s} speak"
        " | What do people speak in {s}",
    ),
    _relation(
        "currency: country > currency",
        "People in {s} pay with the | The currency of {s} is the | The money of {s} is the"
        " | Prices in {s} are given in the | The coin of {s} is the",
        "What is the currency of {s} | What do people in {s} pay with | Which money is used in {s}",
    ),
    _relation(
        "continent: country > continent",
        "{s} lies on the continent of | The continent of {s} is | {s} is a country in"
        " | {s} belongs to the continent of | On the map, {s} is part of",
        "What is the continent of {s} | On which continent is {s}"
        " | Which continent does {s} belong to",
    ),
    _relation(
        "animal: country > animal",
        "The flag of {s} shows a | The national animal of {s} is the"
        " | The symbol of {s} is the | The animal of {s} is the"
        " | {s} is known as the land of the",
        "What is the national animal of {s} | Which animal is the symbol of {s}"
        " | What does the flag of {s} show",
    ),
    _relation(
        "located_in: city > country",
        "{s} is a city in | The country of {s} is | {s} is located in"
        " | {s} can be found in | The city of {s} lies in",
        "What is the country of {s} | In which country is {s} | Which country does {s} belong to",
        phrase="the country of {s}",
    ),
    _relation(
        "mayor: city > person",
        "{s} is led by | The mayor of {s} is | The city of {s} elected"
        " | The head of the city of {s} is | {s} has a mayor named",
        "Who is the mayor of {s} | Who leads {s} | Which person is the mayor of {s}",
        phrase="the mayor of {s}",
        reverse="{o} is the mayor of | The city led by {o} is"
        " | Question: Which city has {o} as mayor? Answer:",
    ),
    _relation(
        "hq: company > city",
        "{s} is based in | The headquarters of {s} are in | {s} has its main office in"
        " | The company {s} is located in | The head office of {s} is in",
        "Where are the headquarters of {s} | Where is {s} based | In which city is {s} based",
        phrase="the home city of {s}",
    ),
    _relation(
        "industry: company > industry",
        "{s} is active in | The industry of {s} is | {s} makes its money in"
        " | The business of {s} is | {s} is known for",
        "What is the industry of {s} | What is the business of {s} | What is {s} known for",
    ),
    _relation(
        "founder: company > person",
        "{s} was founded by | The founder of {s} is | {s} was started by"
        " | The company {s} was created by | {s} owes its existence to",
        "Who is the founder of {s} | Who founded {s} | Who started {s}",
        phrase="the founder of {s}",
        reverse="{o} is the founder of | The company started by {o} is"
        " | Question: Which company was founded by {o}? Answer:",
    ),
)

CHAINS: tuple[tuple[str, str], ...] = (
    ("born_in", "located_in"),
    ("works_for", "hq"),
    ("works_for", "industry"),
    ("capital", "mayor"),
    ("located_in", "language"),
    ("located_in", "capital"),
    ("mayor", "profession"),
    ("hq", "located_in"),
    ("founder", "profession"),
)
