"""Web pages into a folder of documents, from hosts that were named, at public addresses only.

A name is looked up once, every address it has must be public, and the connection is made to the address that was checked: a
name that changes its address between check and connection (DNS rebinding) gains nothing. Every redirect is checked like the
first address. Proxies of the environment are not used, since a proxy would look the name up again. Links are not followed.
Where a file is from stands in .fetched.json beside it. Run: llmlab index fetch https://example.org/page --into FOLDER
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import ipaddress
import json
import os
import re
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ConfigError, DataError
from pipelines.runs import disk_trouble_is_explained, write_text

if TYPE_CHECKING:
    import ssl

    import httpx

MAX_BYTES = 10_000_000
MAX_SECONDS = 60.0  # for one page, redirects included
MAX_REDIRECTS = 5
RECORD = ".fetched.json"  # in the folder: what each file is a copy of
NEXT = "llmlab index fetch URL --into FOLDER --allow HOST"

Resolve = Callable[[str, int], Sequence[str]]  # host and port -> addresses

_TYPES = {"text/html": ".html", "application/xhtml+xml": ".html", "application/pdf": ".pdf", "text/plain": ".txt",
          "text/markdown": ".md", "text/x-markdown": ".md"}  # fmt: skip
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset=[\"']?([\w.:-]{1,40})", re.IGNORECASE)
# Not every codec: some are no character sets, and some take time by the square of the size.
_CHARSETS = re.compile(r"utf-(?:8|16|32)\S*|iso8859-\d+|cp\d+|koi8-\w|gb\w+|big5\w*|shift_jis\w*|euc_\w+|iso2022_jp\w*|ascii")
# IPv6 networks that lead to an IPv4 address or to one place only; NAT64 is looked into instead, since whole networks live by it.
_NOT_PUBLIC = tuple(ipaddress.IPv6Network(network) for network in (
    "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
))  # fmt: skip
_RELAY = ipaddress.IPv4Network("192.88.99.0/24")
_UNICAST, _NAT64 = ipaddress.IPv6Network("2000::/3"), ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Page:
    """A page that was fetched.

    Attributes:
        url: where it was found at last, redirects followed.
        path: its file.
        size: of the file, in bytes.
    """

    url: str
    path: Path
    size: int


@dataclass(frozen=True)
class _Rules:
    hosts: frozenset[str]
    resolve: Resolve
    is_allowed_address: Callable[[str], bool]
    tls: ssl.SSLContext | None


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet, itself and whatever IPv4 address stands in it."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found.scope_id or found not in _UNICAST or any(found in network for network in _NOT_PUBLIC):
            return False
    elif found in _RELAY:
        return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_private or found.is_loopback
                                    or found.is_link_local or found.is_unspecified)  # fmt: skip


def fetch(
    url: str, into: Path, hosts: Collection[str], *, resolve: Resolve | None = None,
    is_allowed_address: Callable[[str], bool] = is_public, tls: ssl.SSLContext | None = None,
) -> Page:  # fmt: skip
    """Copy one page into a folder, in place of an older copy of it.

    Args:
        url: http or https, without a name and password in it.
        into: the folder, made if there is none.
        hosts: names that may be asked, also by redirects, as `host`, or `host:port` for a port of its own.
        resolve: looks a name up; the system does if not given. For tests.
        is_allowed_address: for tests, which have no public address.
        tls: which certificates are trusted; those of common authorities if not given. For tests.

    Raises:
        ConfigError: the address, or one that it leads to, is not one that may be asked.
        DataError: no such page, or not of a kind and size that is kept.
        DiskFull, NotWritable: a write ran out of space, or is not allowed.
    """
    import httpx

    rules = _Rules(frozenset(host.lower() for host in hosts), resolve or _resolve, is_allowed_address, tls)
    try:
        final, content_type, content = asyncio.run(asyncio.wait_for(_get(url, rules), MAX_SECONDS))
    except TimeoutError:
        raise DataError(f"{url} took more than {MAX_SECONDS:.0f} seconds", "a page that comes sooner", NEXT) from None
    except httpx.HTTPError as error:
        raise DataError(f"{url} cannot be fetched: {type(error).__name__}: {error}", "a page", NEXT) from None
    suffix, content = _kept(final, content_type, content)
    return Page(final, _write(into, url, final, suffix, content), len(content))


async def _get(url: str, rules: _Rules) -> tuple[str, str, bytes]:
    """Return the final URL, the content type with its parameters, and the content."""
    import httpx

    here = _checked_url(url, rules)
    for _ in range(MAX_REDIRECTS + 1):
        # A client for each: no cookie and no connection goes from one host to another that has the same address.
        async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=20, verify=rules.tls or True) as client:
            response = await _asked(client, here, rules)
            try:
                location = response.headers.get("location", "")
                if response.status_code not in _REDIRECTS or not location:
                    return str(here), response.headers.get("content-type", ""), await _body(here, response)
            finally:
                await response.aclose()
        there = _checked_url(_joined(here, location), rules)
        if (here.scheme, there.scheme) == ("https", "http"):
            raise ConfigError(f"{here} leads to {there}, which is not encrypted", "https", NEXT)
        here = there
    raise DataError(f"{url} leads on more than {MAX_REDIRECTS} times", "a page", NEXT)


def _joined(here: httpx.URL, location: str) -> str:
    import httpx

    try:
        return str(here.join(location))
    except (httpx.InvalidURL, ValueError) as error:
        raise DataError(f"{here} leads to {location[:200]!r}, which is not an address: {error}", "a page", NEXT) from None


def _checked_url(url: str, rules: _Rules) -> httpx.URL:
    import httpx

    try:
        found = httpx.URL(url)
        host = found.raw_host.decode("ascii").lower()
    except (httpx.InvalidURL, ValueError, UnicodeError) as error:
        raise ConfigError(f"{url[:200]!r} is not an address of a page: {error}", "https://host/page", NEXT) from None
    if found.scheme not in _PORTS or not host:
        raise ConfigError(f"{url[:200]!r} is not an address of a web page", "http:// or https://", NEXT)
    if found.userinfo:
        raise ConfigError(f"an address at {host} holds a user name or a password", "an address without them", NEXT)
    name = f"{host}:{found.port}" if found.port else host
    if name not in rules.hosts:
        allowed = ", ".join(sorted(rules.hosts)) or "(none)"
        raise ConfigError(f"{name} is not a host that may be asked", f"one of {allowed}",
                          f"--allow {name}, or web_hosts in configs/rag/default.yaml")  # fmt: skip
    return found.copy_with(fragment=None)


async def _asked(client: httpx.AsyncClient, url: httpx.URL, rules: _Rules) -> httpx.Response:
    """Send the request to an address that was checked, and return the response with its body still to come."""
    import httpx

    host = url.raw_host.decode("ascii")
    addresses = await asyncio.to_thread(_addresses, host, url.port or _PORTS[url.scheme], rules)
    headers = {"Host": url.netloc.decode("ascii"), "User-Agent": "llmlab", "Accept": ", ".join(_TYPES),
               "Accept-Encoding": "identity"}  # fmt: skip
    failed: Exception | None = None
    for address in addresses:
        request = client.build_request("GET", url.copy_with(host=address), headers=headers, extensions={"sni_hostname": host})
        try:
            return await client.send(request, stream=True)
        except httpx.ConnectError as error:
            failed = error
    raise failed or DataError(f"{host} has no address", "a host that exists", NEXT)


def _addresses(host: str, port: int, rules: _Rules) -> list[str]:
    try:
        addresses = list(dict.fromkeys(rules.resolve(host, port)))
    except (OSError, UnicodeError) as error:
        raise DataError(f"{host} cannot be looked up: {error}", "a host that exists", NEXT) from None
    refused = [address for address in addresses if not rules.is_allowed_address(address)]
    if refused:
        raise ConfigError(f"{host} is at {refused[0]}, which is not a public address", "a host on the public internet", NEXT)
    return addresses


def _resolve(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


async def _body(url: httpx.URL, response: httpx.Response) -> bytes:
    if response.status_code != 200:
        raise DataError(f"{url} answers with status {response.status_code}", "a page (status 200)", NEXT)
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise DataError(f"{url} comes as {encoding}, which was not asked for", "a page that is not compressed", NEXT)
    pieces, size = [], 0
    async for piece in response.aiter_raw():
        size += len(piece)
        if size > MAX_BYTES:
            raise DataError(f"{url} has more than {MAX_BYTES} bytes", "a smaller page", NEXT)
        pieces.append(piece)
    return b"".join(pieces)


def _kept(url: str, content_type: str, content: bytes) -> tuple[str, bytes]:
    """Return the suffix of the file, and the content, as UTF-8 if it is text."""
    kind = content_type.split(";")[0].strip().lower()
    suffix = _TYPES.get(kind)
    if suffix is None:
        raise DataError(f"{url} is of type {kind[:80] or '(none)'}", f"one of {', '.join(_TYPES)}", NEXT)
    if not content:
        raise DataError(f"{url} is empty", "a page with text", NEXT)
    if suffix == ".pdf":
        return suffix, content
    declared = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", content_type, re.IGNORECASE)
    meta = _META_CHARSET.search(content[:4096]) if suffix == ".html" else None
    charset = declared[1] if declared else meta[1].decode("ascii") if meta else ""
    return suffix, _decoded(content, charset).replace("\x00", "").encode("utf-8", "replace")


def _decoded(content: bytes, charset: str) -> str:
    for name in (charset, "utf-8-sig"):
        try:
            if name and _CHARSETS.fullmatch(codecs.lookup(name).name):
                return content.decode(name)
        except (LookupError, ValueError):  # an unknown name, or the wrong one
            pass
    return content.decode("cp1252", "replace")  # what browsers take a page for that names nothing


def _write(into: Path, url: str, final: str, suffix: str, content: bytes) -> Path:
    """Write the page and where it is from; the name of the file tells the address, and stays the same."""
    plain = re.sub(r"[^a-z0-9.-]+", "-", url.split("://", 1)[-1].split("#")[0].lower()).strip("-.")[:80]
    name = f"{plain}-{hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()[:8]}{suffix}"
    facts = {"url": url, "final_url": final, "fetched": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
             "sha256": hashlib.sha256(content).hexdigest()}  # fmt: skip
    with disk_trouble_is_explained(into / name):
        into.mkdir(parents=True, exist_ok=True)
        record = _record(into)
        for other in [n for n, known in record.items() if known.get("url") == url and n != name]:
            (into / Path(other).name).unlink(missing_ok=True)  # the page was of another type then
            del record[other]
        temporary = into / f".{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, into / name)
        write_text(into / RECORD, json.dumps({**record, name: facts}, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return into / name


def _record(into: Path) -> dict[str, dict[str, str]]:
    try:
        record = json.loads((into / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise DataError(f"{into / RECORD} cannot be read: {error}", "what was fetched", f"rm {into / RECORD}") from None
    return {name: facts for name, facts in record.items() if isinstance(facts, dict)} if isinstance(record, dict) else {}
