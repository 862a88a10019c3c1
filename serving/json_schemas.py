"""How large and how branching a JSON schema in a request may be, and which of its words an engine obeys.

Engines turn a schema into a grammar that is consulted for each token, for all requests in turn: on llama.cpp an enum of 5,000
words stops everybody for half a minute. The schema is walked without recursion, so a deep one costs no more than a long one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from serving.engines.abilities import Words
from serving.problems import BadRequest, Unsupported
from serving.settings import SchemaLimits

ALTERNATIVES = ("anyOf", "oneOf", "allOf", "enum")
REPEATS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NAMED = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_DATA = ("enum", "const", "default", "examples", "required")
_BRACES = re.compile(r"\{(\d+)?(?:,(\d+)?)?\}")


def check_schema(schema: Mapping[str, Any], limits: SchemaLimits, words: Words | None, param: str) -> None:
    """Let a schema pass that is within the limits and says only what the engine obeys.

    Args:
        schema: any JSON object.
        limits: of one schema.
        words: of the engine; None if the engine itself refuses what it cannot do.
        param: the schema's place in the request, for the error.

    Raises:
        BadRequest: a limit; says which.
        Unsupported: a word that the engine does not obey.
    """
    alternatives = refs = properties = 0
    for depth, where, node in _nodes(schema, param):
        _at_most(depth, limits.max_depth, "levels", where)
        alternatives += sum(len(node[word]) for word in ALTERNATIVES if isinstance(node.get(word), list))
        refs += "$ref" in node
        properties += len(node["properties"]) if isinstance(node.get("properties"), dict) else 0
        _at_most(alternatives, limits.max_alternatives, "alternatives in anyOf, oneOf, allOf and enum", param)
        _at_most(refs, limits.max_refs, "references", param)
        _at_most(properties, limits.max_properties, "properties", param)
        for word in REPEATS:
            if isinstance(node.get(word), int):
                _at_most(node[word], limits.max_repeats, f"as {word}", where)
        if isinstance(node.get("pattern"), str):
            check_pattern(node["pattern"], limits, f"{where}.pattern")
        if words:
            _check_words(node, words, where)
    _at_most(len(json.dumps(schema)), limits.max_bytes, "bytes", param)


def check_pattern(pattern: str, limits: SchemaLimits, param: str) -> None:
    """Raise `BadRequest` for a regular expression that is too long, or whose braces multiply to too many repeats."""
    _at_most(len(pattern), limits.max_pattern_chars, "characters", param)
    product = 1
    for least, most in _BRACES.findall(pattern):
        product *= max(1, *(int(number[:9]) for number in (least, most) if number)) if least or most else 1
        _at_most(product, limits.max_repeats, "repeats, its braces multiplied", param)


def _nodes(schema: Mapping[str, Any], param: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Yield each schema within a schema, itself first, with its depth and place; values that are data are not entered."""
    waiting: list[tuple[int, str, Any, bool]] = [(1, param, schema, False)]
    while waiting:
        depth, where, value, named = waiting.pop()
        if isinstance(value, list):
            waiting += [(depth + 1, f"{where}[{number}]", each, False) for number, each in enumerate(value)]
        elif isinstance(value, dict):
            if not named:
                yield depth, where, value
            inner = [(key, each) for key, each in value.items() if named or key not in _DATA]
            waiting += [(depth + 1, f"{where}.{key[:40]}"[:120], each, not named and key in _NAMED) for key, each in inner]


def _check_words(node: Mapping[str, Any], words: Words, where: str) -> None:
    for word in node:
        if word not in words.known:
            raise Unsupported(f"the engine does not obey {word[:40]!r} in a schema", ", ".join(sorted(words.known)), param=where)
    form, kind, pattern = node.get("format"), node.get("type"), node.get("pattern")
    if form is not None and form not in words.formats:
        raise Unsupported(
            f"the engine does not obey the format {str(form)[:40]!r}", ", ".join(sorted(words.formats)), param=where
        )
    bounds = [word for word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if word in node]
    if bounds and kind not in words.bounded_types:
        raise Unsupported(f"the engine obeys {bounds[0]} only for {', '.join(sorted(words.bounded_types))}", param=where)
    if words.whole_patterns and isinstance(pattern, str):
        if "(?" in pattern or not (pattern.startswith("^") and pattern.endswith("$")):
            raise Unsupported("the engine obeys only patterns of the whole string", "^...$, without (?", param=f"{where}.pattern")


def _at_most(came: int, limit: int, of_what: str, param: str) -> None:
    if came > limit:
        raise BadRequest(f"{param} has {came} {of_what}", f"at most {limit}", param=param)
