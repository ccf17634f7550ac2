"""What looks like a secret: passwords and tokens belong into no file of a run and no message."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from pathlib import Path
from urllib.parse import quote, unquote

_INSIDE = re.compile(r"PASSW(OR)?D|PASSPHRASE|PASSCODE|SECRET|CREDENTIAL|TOKEN(?!IZ)|BEARER")
_WHOLE = {"AUTH", "AUTHORIZATION", "COOKIE", "CRED", "JWT", "PAT", "SIG", "SIGNATURE"}
_ENDINGS = ("PASS", "PW", "PWD", "KEY", "KEYS", "PASSES", "CREDS")
_INNOCENT = {"BYPASS", "COMPASS", "PKEY", "HOTKEY", "MONKEY"}
"""Words with such an ending; a PKEY is the number of an InfiniBand partition."""
_LIES_IN_FILES = ("KEY", "CREDENTIALS")
"""Endings of names whose value is no secret if it is a path; keys of AWS may look like paths."""
_SWITCHES = {"DISABLE", "ENABLE", "USE", "REQUIRE", "ALLOW", "SKIP"}
_POSITIONS = {"0", "1", "false", "true", "no", "yes", "off", "on"}
_COUNTS = {"MAX", "MIN", "NUM", "COUNT", "SIZE", "LIMIT", "PER", "DIM"}
_PLACES = {
    "FILE", "PATH", "DIR", "FOLDER", "SOCK", "LOCATION", "ASKPASS", "PASSFILE", "KEYFILE",
    "TOKENFILE",
}  # fmt: skip
"""Last words of names that say where a secret lies, which is none."""
_PLUGINS = {"MLFLOW_TRACKING_AUTH"}
"""Variables that name a plug-in which signs in."""
_SHELLS_OWN = {"PWD", "OLDPWD"}
"""Variables in which a shell keeps its folders."""
_SIGNS_IN = {"USER", "USERNAME", "UID", "LOGIN"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LINK = re.compile(r"[a-z][a-z0-9+.-]*:[/\\]+[^\s'\"<>]*", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):([/\\]*)(.*)", re.IGNORECASE | re.DOTALL)
_FIELD = re.compile(r"(?:^|(?<=[\s?&;#,]))(?:--?)?([\w.%-]+)=([^\s&;#,]+)")
_OPTION = re.compile(r"(?:^|\s)(?:--([\w-]+)|set(?:env)?\s+([\w.]+))\s+([^\s-]\S*)")
_HEADER = re.compile(
    r"(?:^|[\s=:])(?:bearer|authorization)(?:[\s:=+]|%20)+(?!none\b)\S",
    re.IGNORECASE,
)
_BASIC = re.compile(r"(?:^|[\s=:])basic(?:[\s:=+]|%20)+([a-z0-9+/_-]{4,}=*)", re.IGNORECASE)
_CURL = re.compile(r"(?:^|\s)(?:-u|-U|--user|--proxy-user)[\s=]*[^\s:/]+:\S")
_LOGIN = re.compile(
    r"\bsshpass\s+-p|\bmysql\w*\s(?:.*\s)?-p\S|\bwandb\s+login\s.*[0-9a-f]{20}|\spass:\S"
    r"|\b(?:docker|podman|az|oc|helm)\s(?:.*\s)?login\s(?:.*\s)?-p[\s=]*\S"
)
"""Programs that take a password as an option of one letter, or as a bare word."""
_ISSUED = re.compile(
    r"\b(?:(?:gh[pousr]|hf)_|sk-)[A-Za-z0-9]{16,}\b|\b(?:github_pat_|glpat-|sk-(?:ant|proj)-)[\w-]{16,}"
    r"|\bxox[abp]-[\w-]{16,}|\bA[KS]IA[0-9A-Z]{12,}|\bAIza[\w-]{30,}|\bdapi[0-9a-f]{32}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""Tokens that can be told by their form."""
_ASSIGNED = re.compile(r"([\w.-]+)(['\"]?\s*[:=]\s*)([^\s,;&]+)")
_SHORTEST = 4


def is_secret(name: str, value: str) -> bool:
    """Whether a variable, an option or a field of a form is a secret, by what it is called.

    >>> is_secret("DB_PWD", "x"), is_secret("AWS_ACCESS_KEY_ID", "x"), is_secret("PGPASS", "x")
    (True, True, True)
    >>> is_secret("TOKENIZERS_PARALLELISM", "0"), is_secret("PGPASSFILE", "/home/me/.pgpass")
    (False, False)
    >>> is_secret("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"), is_secret("MAX_TOKENS", "4096")
    (False, False)
    """
    words = [word.upper() for word in _WORD.findall(re.sub(r"[0-9]+", "_", unquote(name)))]
    if not words or not value or name in _PLUGINS:
        return False
    if value.lower() in _POSITIONS and _SWITCHES.intersection(words):
        return False
    if words[-1] in _PLACES or words[-1].endswith(("PASSFILE", "ASKPASS", "KEYLOGFILE")):
        return False
    if value.startswith(("/", "~/", "./")) and words[-1].endswith(_LIES_IN_FILES):
        return not {"SECRET", "ACCESS"}.isdisjoint(words)
    if value.isdecimal() and _COUNTS.intersection(words):
        return False
    return _INSIDE.search("".join(words)) is not None or any(
        word in _WHOLE or (word.endswith(_ENDINGS) and word not in _INNOCENT) for word in words
    )


def has_secret_in_setting(name: str, value: str) -> bool:
    """Whether a variable of a process holds a secret, by its name or by its value.

    >>> has_secret_in_setting("http_proxy", "me:hunter2@proxy:3128")
    True
    >>> has_secret_in_setting("SSH_AUTH_SOCK", "/run/s")
    False
    """
    is_address = name.lower().endswith(("_proxy", "_uri", "_url", "_dsn"))
    return (
        is_secret(name, value)
        or has_secret_in_command(value)
        or (is_address and has_secret_in_address(value))
    )


def has_secret_in_command(line: str) -> bool:
    """Whether a command assigns a secret to a variable or an option, or has one in its text.

    >>> (
    ...     has_secret_in_command("export PGPASS=hunter2"),
    ...     has_secret_in_command("module load cuda/13.0"),
    ... )
    (True, False)
    """
    options = ((option or name, value) for option, name, value in _OPTION.findall(line))
    return (
        has_secret_in_text(line)
        or _CURL.search(line) is not None
        or _LOGIN.search(line) is not None
        or any(is_secret(*option) for option in options)
        or any(has_secret_in_setting(*field) for field in _FIELD.findall(line))
    )


def has_secret_in_text(text: str) -> bool:
    """Whether text has a secret in it: an address with a password, a header, a token.

    >>> has_secret_in_text("see http://me:hunter2@host"), has_secret_in_text("Bearer abc")
    (True, True)
    >>> has_secret_in_text("file:///a/me@home")
    False
    """
    if _HEADER.search(text) or _ISSUED.search(text):
        return True
    if any(_is_basic(login) for login in _BASIC.findall(text)):
        return True
    return any(has_secret_in_address(link) for link in _LINK.findall(text))


def _is_basic(text: str) -> bool:
    """Whether it is what the header of that name holds: a name and a password, in base64."""
    try:
        return b":" in base64.urlsafe_b64decode(text.replace("+", "-").replace("/", "_"))
    except ValueError:
        return False


def has_secret_in_address(address: str) -> bool:
    """Whether an address holds a password, a token, or fields that sign in.

    It is read as its most careless reader would: SQLAlchemy takes all up to the last ``@`` for
    the password, whatever is in it.  A user's name alone is a secret to servers only, whose
    tokens stand there.

    >>> has_secret_in_address("postgresql://me:hun/ter2@db/mlflow")
    True
    >>> has_secret_in_address("http://hunter2@host")
    True
    >>> has_secret_in_address("postgresql://me@db/mlflow")
    False
    >>> has_secret_in_address("sqlite:////data/me@home/mlflow.db")
    False
    """
    scheme, slashes, rest = _split_address(address.strip())
    if any(_is_login(name, value) for name, value in _fields(rest)):
        return True
    if not slashes:
        return re.match(r"[^/@]*:[^@]*@", f"{scheme}:{rest}" if scheme else rest) is not None
    if _is_of_files(scheme):
        has_host = len(slashes) == 2
        return has_host and re.match(r"[^/]*:[^@]*@", _decoded(rest)) is not None
    head = re.split(r"[/\\?#]", rest, maxsplit=1)[0]
    tail = rest[len(head) :]
    is_server = scheme.startswith("http")
    host = _decoded(head)
    if "@" in host:
        return is_server or ":" in host.rpartition("@")[0]
    if "@" not in tail or ":" not in host or "[" in host:
        return False
    if is_server and host.rpartition(":")[2].isdigit():
        # A port and a path, unless what follows has another port.
        return re.search(r"[?#].*@|@[^/@]*:[0-9]", tail) is not None
    return True


def redact(text: str) -> str:
    """Replace the secrets in a text: those that this process knows, and those told by their form.

    >>> redact("no way to http://me:hunter2@host with password=hunter2")
    'no way to http://***@host with password=***'
    """
    for secret in sorted(_own_secrets(os.environ), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _ASSIGNED.sub(_without_value, text)
    return re.sub(r"(?<=://)[^\s'\"/@]*(?::[^\s'\"@]*)?@", "***@", text)


def _without_value(assigned: re.Match[str]) -> str:
    name, between, value = assigned.groups()
    return f"{name}{between}***" if is_secret(name, value) else assigned[0]


def stored_login() -> dict[str, str]:
    """Read the user and password that ``mlflow login`` has stored, if any."""
    reader = ConfigParser(interpolation=None)
    try:
        reader.read(Path.home() / ".mlflow" / "credentials")
        return dict(reader["mlflow"])
    except (OSError, RuntimeError, KeyError, ConfigParserError, UnicodeDecodeError):
        return {}


def _own_secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield every spelling of the secrets of this process."""
    stored = stored_login()
    user = environ.get("MLFLOW_TRACKING_USERNAME") or stored.get("mlflow_tracking_username", "")
    for name, value in (*stored.items(), *environ.items()):
        if name in _SHELLS_OWN or not is_secret(name, value):
            continue
        bare = value.strip()
        raw = value.encode(errors="surrogateescape")
        spellings = {value, bare, repr(value)[1:-1], repr(raw)[2:-1], *bare.split("\n")}
        spellings |= {quote(bare), quote(bare, safe="")}
        spellings.add(base64.b64encode(f"{user}:".encode() + raw).decode())
        yield from (secret for secret in spellings if len(secret) >= _SHORTEST)


def _split_address(address: str) -> tuple[str, str, str]:
    """Split an address into scheme, slashes, and all that follows."""
    match = _SCHEME.match(address)
    if match is None:
        bare = address.lstrip("/\\")
        is_path = len(address) - len(bare) != 2
        return "", "" if is_path else "//", address if is_path else bare
    scheme, slashes, rest = match.groups()
    return scheme.lower(), slashes, rest


def _is_of_files(scheme: str) -> bool:
    return scheme == "file" or scheme.partition("+")[0] == "sqlite"


def _fields(rest: str) -> Iterator[tuple[str, str]]:
    """Yield names and values behind the first question mark, and those inside a value (ODBC's)."""
    for field in re.split(r"[?#&;]", rest)[1:]:
        name, _, value = field.partition("=")
        yield _decoded(name), value
        inner = (pair.partition("=") for pair in _decoded(value).split(";"))
        yield from ((key, content) for key, equals, content in inner if equals)


def _is_login(name: str, value: str) -> bool:
    return bool(value) and (is_secret(name, value) or name.strip().upper() in _SIGNS_IN)


def _decoded(text: str) -> str:
    """Replace ``%XX`` by its character, also where the percent sign is itself written ``%25``."""
    for _ in range(3):
        text = unquote(text)
    return text
