"""Private data is told by its form and its check digits, and no text makes the search slow."""

from __future__ import annotations

import time

import pytest

from pipelines.private import kinds_of, redacted, spans
from pipelines.private_forms import KINDS

PEM = "-----BEGIN RSA PRIVATE KEY-----\n" + ("MIIEpAIBAAKCAQEA" * 4 + "\n") * 20 + "a1b2==\n-----END RSA PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
HELD = {
    "key AKIAIOSFODNN7EXAMPLE here": ["API key"],
    "ghp_" + "a1B2" * 9: ["API key"],
    "OPENAI_API_KEY=sk-proj-" + "aB3_" * 12: ["API key"],
    "xoxb-123456789012-abcdefGHIJKL": ["API key"],
    "AIza" + "Sy4_-" * 7: ["API key"],
    f"Bearer {JWT}.": ["JWT"],
    f"{PEM} and after": ["private key"],
    PEM.replace("\n", "\\n"): ["private key"],
    PEM[:300]: ["private key"],
    'aws_secret_access_key = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"': ["AWS secret key"],
    "write to jane.doe+x@example.co.uk today": ["e-mail"],
    "call +49 30 1234 5678 or (020) 7946 0958, or 555-123-4567": ["phone", "phone", "phone"],
    "card 4111 1111 1111 1111 is a test number": ["card"],
    "378282246310005": ["card"],
    "pay to DE89 3704 0044 0532 0130 00 BEFORE FRIDAY": ["IBAN"],
    "GB82WEST12345698765432": ["IBAN"],
    "SSN 123-45-6789.": ["SSN"],
}
FREE = (
    "card 4111 1111 1111 1112 has a wrong check digit",
    "DE88 3704 0044 0532 0130 00 has wrong check digits",
    "in 2023 there were 12,345 cases, 3.14 on average, version 1.2.3; 2020 2021 2022",
    "the task-force for sk-learn-pipelines-and-transformers met at 10:30",
    "666-12-3456 and 000-12-3456 are no social security numbers",
    "AKIA is how Amazon's key ids begin; a header is -----BEGIN CERTIFICATE-----",
    "commit 3f786850e387550fdab836ed7e6dc881de23001b",
)
ADVERSARIAL = (
    "a", "1", "1 ", "1111 ", "AA00 ", "DE89 ", "a@", "a@a.", "a.", "sk-", "eyJaaaaaaaaaa.", "+1", "(01) ", "0 00 ", "0123 4567 ",
    "-----BEGIN PRIVATE KEY-----\n", PEM[:31] + "\n" + "A" * 15 + "\n", "-", "aws_secret_access_key", "é", "123-45-",
)  # fmt: skip


@pytest.mark.parametrize("text", HELD)
def test_private_data_is_found(text: str) -> None:
    shown, kinds = redacted(text, KINDS)
    assert kinds == HELD[text]
    assert all(f"[{kind} redacted]" in shown for kind in kinds)
    assert redacted(shown, KINDS) == (shown, []), "what is shown instead is private itself"


@pytest.mark.parametrize("text", FREE)
def test_other_text_is_left_alone(text: str) -> None:
    assert redacted(text, KINDS) == (text, [])


def test_what_stands_around_is_kept() -> None:
    text = "from a@b.example to c@d.example, cc e@f.example"
    parts = redacted(text, kinds_of("personal"))[0].split("[e-mail redacted]")
    assert parts == ["from ", " to ", ", cc ", ""]
    assert redacted(text, kinds_of("secrets")) == (text, [])


@pytest.mark.parametrize("part", ADVERSARIAL)
def test_no_text_is_slow(part: str) -> None:
    """Four times the text takes about four times as long; a quadratic search would take sixteen times."""
    short, long = (part * (length // len(part)) for length in (8_000, 32_000))
    seconds = [min(_seconds(text) for _ in range(3)) for text in (short, long)]
    assert seconds[1] < 10 * seconds[0] + 0.02, seconds


def _seconds(text: str) -> float:
    began = time.thread_time()
    list(spans(text, KINDS))
    return time.thread_time() - began
