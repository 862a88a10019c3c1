"""What the monitoring tests share: how a PromQL expression is taken apart, and what the rules file holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import promql_parser
import pytest
import yaml

from monitoring.prometheus_server import CONFIG


@pytest.fixture(scope="session")
def selected_names() -> Callable[[str], set[str]]:
    """Parse an expression and return the names of the series that it selects."""

    def parse(expr: str) -> set[str]:
        names: set[str] = set()

        def visit(node: Any) -> bool:
            if isinstance(node, promql_parser.VectorSelector):
                assert node.name, f"a selector without a metric name in {expr}"
                names.add(node.name)
            return True

        promql_parser.walk(promql_parser.parse(expr), visit)
        return names

    return parse


@pytest.fixture(scope="session")
def rules() -> list[dict[str, Any]]:
    """Return every recording and alerting rule."""
    groups = yaml.safe_load((CONFIG.parent / "rules.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]
