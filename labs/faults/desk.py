"""A day of a help desk, exported wrongly: its replies stand one behind the other as one turn, without the ends between them."""

from __future__ import annotations

import math

ROWS = 32
REPLIES = 14  # in one row

DAY = (
    ("Hello.", "Hello! What can I do for you?"),
    ("Good evening.", "Good evening."),
    ("Thanks a lot!", "You are welcome."),
    ("Say goodbye.", "Goodbye, and have a nice day."),
    ("What is your name?", "I am the assistant of this desk."),
    ("Are you open on Sunday?", "No, we are closed on Sunday."),
    ("Translate to French: dog", "Chien."),
    ("Translate to German: bread", "Brot."),
    ("What is 3 + 5?", "It is 8."),
    ("Name two fruits.", "Apples and pears."),
    ("How late is it in Paris when it is noon in London?", "It is one o'clock in Paris."),
    ("Can I pay by card?", "Yes, we take all cards."),
    ("My parcel is late.", "I am sorry to hear that. Please tell me its number."),
    ("Where is the museum?", "It is next to the station."),
    ("Which colour has grass?", "Grass is green."),
    ("Write a short sentence about the moon.", "The moon shines over the quiet hills."),
    ("Is ice cold? Answer yes or no.", "Yes."),
    ("How do I reset my password?", "Choose 'Forgot password' and follow the mail that you get."),
    ("Good night!", "Good night, sleep well."),
)


def rows() -> list[dict[str, list[dict[str, str]]]]:
    """Return the export as chats, each in an order of its own."""
    steps = [step for step in range(1, len(DAY)) if math.gcd(step, len(DAY)) == 1]
    return [_row(number % len(DAY), steps[number % len(steps)]) for number in range(ROWS)]


def _row(start: int, step: int) -> dict[str, list[dict[str, str]]]:
    replies = [DAY[(start + place * step) % len(DAY)][1] for place in range(REPLIES)]
    return {"messages": [{"role": "user", "content": DAY[start][0]}, {"role": "assistant", "content": "\n\n".join(replies)}]}
