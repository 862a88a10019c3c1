"""An Alertmanager that is installed on this machine: it groups the alerts of Prometheus and shows them on a page of its own.

Whom it tells is in `prometheus/alertmanager.yml`, nobody as it stands. Without one `make monitor` works all the same.
"""

from __future__ import annotations

from pathlib import Path

from monitoring.child_server import ChildServer, find
from monitoring.prometheus_server import ALERTMANAGER

CONFIG = Path(__file__).parent / "prometheus" / "alertmanager.yml"


def find_alertmanager(given: str | Path | None = None) -> Path:
    """Return the binary: `given`, else $ALERTMANAGER, else on PATH, under Debian's name too; or raise `ProgramMissing`."""
    return find(["alertmanager", "prometheus-alertmanager"], "ALERTMANAGER", "prometheus-alertmanager", given)


def alertmanager(storage: Path, listen: str = ALERTMANAGER, binary: str | Path | None = None) -> ChildServer:
    """Return an Alertmanager, not yet started.

    Args:
        storage: directory of its data; its log is `alertmanager.log` in there.
        listen: host:port of its page.
        binary: None looks for one.

    Raises:
        ProgramMissing: there is none.
    """
    command = [str(find_alertmanager(binary)), f"--config.file={CONFIG}", f"--storage.path={storage}",
               f"--web.listen-address={listen}", "--cluster.listen-address="]  # fmt: skip
    return ChildServer("Alertmanager", command, listen, "/-/ready", storage / "alertmanager.log")
