"""A Grafana that was unpacked on this machine, with data source and boards provisioned by files, on loopback.

It installs nothing; Compose runs another one in a container (`compose.yaml`). The command is:

    make monitor GRAFANA=/path/to/grafana        # the folder that has bin/ and conf/
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml

from monitoring.child_server import ChildServer, ProgramMissing

LISTEN = "127.0.0.1:3000"
VARIABLE = "GRAFANA"
FILES = Path(__file__).parent / "grafana"
OFFLINE = {  # no reports, no look for updates, no plugins fetched at the start, as in compose.yaml
    "GF_ANALYTICS_REPORTING_ENABLED": "false",
    "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
    "GF_PLUGINS_PREINSTALL_DISABLED": "true",
    "GF_AUTH_ANONYMOUS_ENABLED": "false",
    "GF_USERS_ALLOW_SIGN_UP": "false",
}


def find_home(given: str | Path | None = None) -> Path | None:
    """Return Grafana's folder: `given`, else $GRAFANA, None if neither names one; `ProgramMissing` if it is not Grafana's."""
    named = given or os.environ.get(VARIABLE)
    if not named:
        return None
    home = Path(named).expanduser().resolve()
    if not shutil.which(home / "bin" / "grafana"):
        raise ProgramMissing(
            f"{named} was named as {VARIABLE}, but has no bin/grafana; name the folder that Grafana was unpacked to"
        )
    return home


def provision(to: Path, prometheus: str) -> Path:
    """Write the provisioning for these boards and a Prometheus at `prometheus`; return its folder."""
    source = yaml.safe_load((FILES / "provisioning/datasources/prometheus.yaml").read_text(encoding="utf-8"))
    source["datasources"][0]["url"] = prometheus
    boards = yaml.safe_load((FILES / "provisioning/dashboards/llmlab.yaml").read_text(encoding="utf-8"))
    boards["providers"][0]["options"]["path"] = str(FILES / "dashboards")
    for name, content in (("datasources/prometheus.yaml", source), ("dashboards/llmlab.yaml", boards)):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return to


def grafana(home: Path, storage: Path, prometheus: str, password: str, listen: str = LISTEN) -> ChildServer:
    """Return a Grafana, not yet started.

    Args:
        home: the folder that it was unpacked to.
        storage: directory of its data; its log is `grafana.log` in there.
        prometheus: address of the data source.
        password: of its user admin; it goes through the environment, never into a file.
        listen: host:port of its page.
    """
    host, _, port = listen.rpartition(":")
    environment = OFFLINE | {
        "GF_SERVER_HTTP_ADDR": host,
        "GF_SERVER_HTTP_PORT": port,
        "GF_SECURITY_ADMIN_PASSWORD": password,
        "GF_PATHS_DATA": str(storage),
        "GF_PATHS_LOGS": str(storage),
        "GF_PATHS_PROVISIONING": str(provision(storage / "provisioning", prometheus)),
    }
    command = [str(home / "bin" / "grafana"), "server", f"--homepath={home}"]
    return ChildServer("Grafana", command, listen, "/api/health", storage / "grafana.log", environment, 120.0)
