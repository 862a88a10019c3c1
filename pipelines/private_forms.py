"""The forms of secrets and personal data: what each looks like, how it may begin, and how long it may become.

Each pattern is linear in the text: repetitions are bounded, and a match begins only where the character before it cannot belong
to it. That character is looked at behind the first one of the match, since a pattern that begins with a character is searched for
many times faster. `pipelines.private` searches for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Group = Literal["secrets", "personal"]
_ALNUM = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_DIGITS = frozenset("0123456789")
_UPPER = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass(frozen=True)
class Found:
    """A stretch `start` to `end` of a text, and the kind of thing that it is."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Kind:
    """One form of private data.

    Attributes:
        pattern: what it looks like.
        letters: all characters that a match may have; with those above 127 that are letters or digits if `wide`.
        longest: characters of a match, and of what is looked at behind it, at most.
        first: matches where a match may begin, also if the text ends there.
        needs: a character that each match has, which tells fast that there is none; or empty.
        accept: returns how many characters of a match are the thing itself, 0 for none.
    """

    name: str
    group: Group
    pattern: re.Pattern[str]
    letters: frozenset[str]
    longest: int
    first: re.Pattern[str]
    needs: str = ""
    accept: Callable[[str], int] = len
    wide: bool = False

    def search(self, text: str, start: int) -> Found | None:
        """Return the first of this kind that begins at `start` or later."""
        if self.needs and text.find(self.needs, start) == -1:
            return None
        while match := self.pattern.search(text, start):
            if length := self.accept(match[0]):
                return Found(match.start(), match.start() + length, self.name)
            start = match.start() + 1
        return None

    def open_from(self, text: str) -> int:
        """Return where the first match begins that more text could still make or change; the length of the text if nowhere."""
        limit = max(0, len(text) - self.longest)
        if self.wide:
            begin = next((at for at in range(len(text), limit, -1) if not self._may_hold(text[at - 1])), limit)
        else:
            begin = max(limit, len(text.rstrip(self._stripped)))
        match = self.first.search(text, begin)
        return match.start() if match else len(text)

    @cached_property
    def _stripped(self) -> str:
        return "".join(self.letters)

    def _may_hold(self, character: str) -> bool:
        return character in self.letters or (character > "\x7f" and character.isalnum())


_DOUBLED = str.maketrans("0123456789", "0246813579")  # the sum of the digits of twice a digit


def luhn(digits: str) -> bool:
    """Return True if the last digit is the check digit of the others (ISO/IEC 7812-1), and not all of them are the same."""
    total = sum(map(int, digits[::-2])) + sum(map(int, digits[-2::-2].translate(_DOUBLED)))
    return total % 10 == 0 and digits.count(digits[0]) < len(digits)


def _card(text: str) -> int:
    return len(text) if luhn(text.replace(" ", "").replace("-", "")) else 0


# How many characters the account numbers of a country have (ISO 13616 registry).
_IBAN_LENGTHS = {
    country: int(length)
    for length, countries in {
        "15": "NO", "16": "BE", "18": "DK FI FO GL NL SD", "19": "MK SI", "20": "AT BA EE KZ LT LU MN XK", "21": "CH HR LI LV",
        "22": "BG BH CR DE GB GE IE ME RS VA", "23": "AE GI IL IQ OM SO TL", "24": "AD CZ ES MD PK RO SA SE SK TN VG",
        "25": "LY PT ST", "26": "IS TR", "27": "BI DJ FR GR IT MC MR SM", "28": "AL AZ BY CY DO GT HN HU LB NI PL SV",
        "29": "BR EG PS QA UA", "30": "JO KW MU YE", "31": "MT SC", "32": "LC", "33": "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip


def _iban(text: str) -> int:
    """Return the length of the account number that a text begins with, its spaces included, if ISO 7064 (mod 97) holds."""
    wanted = _IBAN_LENGTHS.get(text[:2])
    if wanted is None:
        return 0
    places = [place for place, character in enumerate(text) if character != " "]
    if len(places) < wanted or (len(text) > places[wanted - 1] + 1 and text[places[wanted - 1] + 1] != " "):
        return 0
    number = "".join(text[place] for place in places[:wanted])
    return places[wanted - 1] + 1 if int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1 else 0


_API_KEYS = {  # openers, and what follows them
    ("AKIA", "ASIA", "ABIA", "ACCA"): r"[A-Z2-7]{16}(?![A-Za-z0-9])",  # Amazon
    ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"): r"[A-Za-z0-9]{36,255}",  # GitHub
    ("github_pat_",): r"[A-Za-z0-9_]{22,255}",
    ("glpat-",): r"[A-Za-z0-9_-]{20,64}",  # GitLab
    ("sk-",): r"(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{20,250}",  # OpenAI, Anthropic, OpenRouter
    ("sk_live_", "sk_test_", "rk_live_", "rk_test_"): r"[A-Za-z0-9]{10,100}",  # Stripe
    ("xoxb-", "xoxp-", "xoxa-", "xoxr-", "xoxs-", "xoxe-", "xapp-"): r"[A-Za-z0-9-]{10,250}",  # Slack
    ("https://hooks.slack.com/services/",): r"[A-Za-z0-9/]{20,80}",
    ("AIza",): r"[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",  # Google
    ("hf_",): r"[A-Za-z0-9]{34}(?![A-Za-z0-9])",  # Hugging Face
    ("npm_",): r"[A-Za-z0-9]{36}(?![A-Za-z0-9])",
    ("pypi-AgE",): r"[A-Za-z0-9_-]{50,250}",
    ("SG.",): r"[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])",  # SendGrid
}


def _alone(openers: Sequence[str]) -> str:
    """Return a pattern of texts that do not stand behind a letter, a digit or an underscore."""
    return "(?:" + "|".join(f"{o[0]}(?<![A-Za-z0-9_]{o[0]}){re.escape(o[1:])}" for o in openers) + ")"


def _begun(openers: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern of where one of some texts stands, or as much of it as the text has left, and no word goes on there."""
    alone = {first: f"(?<![A-Za-z0-9_]{first})" if first.isalnum() else "" for first in dict.fromkeys(o[0] for o in openers)}
    return re.compile("|".join(first + alone[first] + _goes_on([o[1:] for o in openers if o[0] == first]) for first in alone))


def _goes_on(rests: Sequence[str]) -> str:
    """Return a pattern of some texts, each as far as there is text, that tries those with a common beginning together."""
    if "" in rests:
        return ""
    following = {first: [rest[1:] for rest in rests if rest[0] == first] for first in dict.fromkeys(rest[0] for rest in rests)}
    return r"(?:\Z|" + "|".join(re.escape(first) + _goes_on(rest) for first, rest in following.items()) + ")"


_KEY_FORMS = "|".join(f"{o[0]}(?<![A-Za-z0-9_]{o[0]}){re.escape(o[1:])}{rest}" for os, rest in _API_KEYS.items() for o in os)
_AWS_NAMES = ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY", "secretAccessKey", "SecretAccessKey")
_BLOCKS = tuple(f"-----BEGIN {what}PRIVATE KEY-----" for what in ("", "RSA ", "EC ", "DSA ", "OPENSSH ", "ENCRYPTED "))
_BLOCKS += ("-----BEGIN PGP PRIVATE KEY BLOCK-----",)
_BREAK = r"(?:[ \t\r\n]|\\[nr])"  # also as JSON writes it
_BLOCK = (
    rf"(?:{'|'.join(_BLOCKS)})(?:{_BREAK}{{1,4}}[A-Za-z-]{{1,20}}: [A-Za-z0-9,:. -]{{1,80}}){{0,4}}"
    rf"(?:{_BREAK}{{1,4}}[A-Za-z0-9+/=]{{16,128}}){{1,120}}"
    rf"(?:(?:{_BREAK}{{1,4}}[A-Za-z0-9+/=]{{1,15}}){{0,2}}{_BREAK}{{0,4}}-----END [A-Z ]{{0,30}}-----)?"
)
_GAP = r"[ \u00a0./-]"
_PHONE = (
    rf"[+(0-9](?<![\w.+].)(?:(?<=\+)\d(?:[ \u00a0./()-]{{0,2}}\d){{7,14}}"
    rf"|(?<=\()\d{{2,5}}\){_GAP}?\d{{3,4}}{_GAP}?\d{{3,4}}"
    rf"|(?<=0)\d{{1,4}}{_GAP}\d{{3,4}}{_GAP}?\d{{3,4}}|(?<=0)\d(?:[ .-]\d\d){{4}}"
    r"|(?<=\d)\d\d[.-]\d{3}[.-]\d{4})(?!\w|[ .-]\d)"
)
_JWT = _alone(["eyJ"]) + r"[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,5000}\.[A-Za-z0-9_-]{16,1100}"
_AWS = _alone(_AWS_NAMES) + r"[\"']?[ ]{0,4}[:=][ ]{0,4}[\"']?[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
_MAIL = r"[\w.+-](?<![\w.+-].)[\w.+-]{0,63}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,3}\.[^\W\d_]{2,24}"
_IBAN = r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?: ?[A-Z0-9]){11,30}"
_IBAN_BEGUN = r"(?<![A-Za-z0-9])[A-Z](?:\Z|[A-Z](?:\Z|[0-9](?:\Z|[0-9])))"
_CARD = r"[0-9](?<![0-9].)[0-9]{3}(?:(?:[ -][0-9]{4}){2}[ -][0-9]{1,7}|[ -][0-9]{6}[ -][0-9]{4,5}|[0-9]{9,15})(?![0-9])"
_SSN = r"[0-9](?<![\w-].)(?<!9)[0-9]{2}(?<!000)(?<!666)-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-])"

KINDS = (
    Kind("private key", "secrets", re.compile(_BLOCK), _ALNUM | frozenset("+/=\\:,. -\n\r\t"), 17000, _begun(_BLOCKS)),
    Kind("JWT", "secrets", re.compile(_JWT), _ALNUM | frozenset("_-."), 8200, _begun(["eyJ"])),
    Kind("AWS secret key", "secrets", re.compile(_AWS), _ALNUM | frozenset("_/+=:\"' "), 80, _begun(_AWS_NAMES)),
    Kind("API key", "secrets", re.compile(_KEY_FORMS), _ALNUM | frozenset("_-.:/"), 320,
         _begun([opener for openers in _API_KEYS for opener in openers])),
    Kind("e-mail", "personal", re.compile(_MAIL), _ALNUM | frozenset("_.+-@"), 410,
         first=re.compile(r"(?<![\w.+-])[\w.+-]"), needs="@", wide=True),
    Kind("IBAN", "personal", re.compile(_IBAN), _UPPER | _DIGITS | {" "}, 70, first=re.compile(_IBAN_BEGUN), accept=_iban),
    Kind("card", "personal", re.compile(_CARD), _DIGITS | {" ", "-"}, 24, first=re.compile(r"(?<![0-9])[0-9]"), accept=_card),
    Kind("SSN", "personal", re.compile(_SSN), _DIGITS | {"-"}, 13, first=re.compile(r"(?<![\w-])[0-9]")),
    Kind("phone", "personal", re.compile(_PHONE, re.ASCII), _DIGITS | frozenset(" \u00a0+()./-"), 50,
         first=re.compile(r"(?<![\w.+])[+(0-9]", re.ASCII)),
)  # fmt: skip
