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

_SECRET_WORD_PART_PATTERN = re.compile(
    r"PASSW(OR)?D|PASSPHRASE|PASSCODE|SECRET|CREDENTIAL|TOKEN(?!IZ)|BEARER"
)
_SECRET_WORDS = {"AUTH", "AUTHORIZATION", "COOKIE", "CRED", "JWT", "PAT", "SIG", "SIGNATURE"}
_SECRET_WORD_ENDINGS = ("PASS", "PW", "PWD", "KEY", "KEYS", "PASSES", "CREDS")
_HARMLESS_WORDS = {"BYPASS", "COMPASS", "PKEY", "HOTKEY", "MONKEY"}
"""Words with such an ending; a PKEY is the number of an InfiniBand partition."""
_PATH_NAME_ENDINGS = ("KEY", "CREDENTIALS")
"""Endings of names whose value is no secret if it is a path; keys of AWS may look like paths."""
_SWITCH_WORDS = {"DISABLE", "ENABLE", "USE", "REQUIRE", "ALLOW", "SKIP"}
_SWITCH_VALUES = {"0", "1", "false", "true", "no", "yes", "off", "on"}
_COUNT_WORDS = {"MAX", "MIN", "NUM", "COUNT", "SIZE", "LIMIT", "PER", "DIM"}
_LOCATION_WORDS = {
    "FILE", "PATH", "DIR", "FOLDER", "SOCK", "LOCATION", "ASKPASS", "PASSFILE", "KEYFILE",
    "TOKENFILE",
}  # fmt: skip
"""Last words of names that say where a secret lies, which is none."""
_PLUGIN_VARIABLES = {"MLFLOW_TRACKING_AUTH"}
"""Variables that name a plug-in which signs in."""
_SHELL_FOLDER_VARIABLES = {"PWD", "OLDPWD"}
"""Variables in which a shell keeps its folders."""
_LOGIN_FIELD_NAMES = {"USER", "USERNAME", "UID", "LOGIN"}
_NAME_WORD_PATTERN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_URL_PATTERN = re.compile(r"[a-z][a-z0-9+.-]*:[/\\]+[^\s'\"<>]*", re.IGNORECASE)
_URL_SCHEME_PATTERN = re.compile(r"([a-z][a-z0-9+.-]*):([/\\]*)(.*)", re.IGNORECASE | re.DOTALL)
_ASSIGNED_FIELD_PATTERN = re.compile(r"(?:^|(?<=[\s?&;#,]))(?:--?)?([\w.%-]+)=([^\s&;#,]+)")
_SPACED_OPTION_PATTERN = re.compile(r"(?:^|\s)(?:--([\w-]+)|set(?:env)?\s+([\w.]+))\s+([^\s-]\S*)")
_BEARER_HEADER_PATTERN = re.compile(
    r"(?:^|[\s=:])(?:bearer|authorization)(?:[\s:=+]|%20)+(?!none\b)\S",
    re.IGNORECASE,
)
_BASIC_AUTH_PATTERN = re.compile(
    r"(?:^|[\s=:])basic(?:[\s:=+]|%20)+([a-z0-9+/_-]{4,}=*)", re.IGNORECASE
)
_CURL_LOGIN_PATTERN = re.compile(r"(?:^|\s)(?:-u|-U|--user|--proxy-user)[\s=]*[^\s:/]+:\S")
_LOGIN_COMMAND_PATTERN = re.compile(
    r"\bsshpass\s+-p|\bmysql\w*\s(?:.*\s)?-p\S|\bwandb\s+login\s.*[0-9a-f]{20}|\spass:\S"
    r"|\b(?:docker|podman|az|oc|helm)\s(?:.*\s)?login\s(?:.*\s)?-p[\s=]*\S"
)
"""Programs that take a password as an option of one letter, or as a bare word."""
_KNOWN_TOKEN_PATTERN = re.compile(
    r"\b(?:(?:gh[pousr]|hf)_|sk-)[A-Za-z0-9]{16,}\b|\b(?:github_pat_|glpat-|sk-(?:ant|proj)-)[\w-]{16,}"
    r"|\bxox[abp]-[\w-]{16,}|\bA[KS]IA[0-9A-Z]{12,}|\bAIza[\w-]{30,}|\bdapi[0-9a-f]{32}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""Tokens that can be told by their form."""
_ASSIGNMENT_PATTERN = re.compile(r"([\w.-]+)(['\"]?\s*[:=]\s*)([^\s,;&]+)")
_MIN_SECRET_CHARS = 4


def is_secret_variable(name: str, value: str) -> bool:
    """Whether a variable, an option or a field of a form is a secret, by what it is called.

    >>> (
    ...     is_secret_variable("DB_PWD", "x"),
    ...     is_secret_variable("AWS_ACCESS_KEY_ID", "x"),
    ...     is_secret_variable("PGPASS", "x"),
    ... )
    (True, True, True)
    >>> (
    ...     is_secret_variable("TOKENIZERS_PARALLELISM", "0"),
    ...     is_secret_variable("PGPASSFILE", "/home/me/.pgpass"),
    ... )
    (False, False)
    >>> (
    ...     is_secret_variable("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
    ...     is_secret_variable("MAX_TOKENS", "4096"),
    ... )
    (False, False)
    """
    words = [
        word.upper() for word in _NAME_WORD_PATTERN.findall(re.sub(r"[0-9]+", "_", unquote(name)))
    ]
    if not words or not value or name in _PLUGIN_VARIABLES:
        return False
    if value.lower() in _SWITCH_VALUES and _SWITCH_WORDS.intersection(words):
        return False
    if words[-1] in _LOCATION_WORDS or words[-1].endswith(("PASSFILE", "ASKPASS", "KEYLOGFILE")):
        return False
    if value.startswith(("/", "~/", "./")) and words[-1].endswith(_PATH_NAME_ENDINGS):
        return not {"SECRET", "ACCESS"}.isdisjoint(words)
    if value.isdecimal() and _COUNT_WORDS.intersection(words):
        return False
    return _SECRET_WORD_PART_PATTERN.search("".join(words)) is not None or any(
        word in _SECRET_WORDS
        or (word.endswith(_SECRET_WORD_ENDINGS) and word not in _HARMLESS_WORDS)
        for word in words
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
        is_secret_variable(name, value)
        or has_secret_in_command(value)
        or (is_address and has_secret_in_address(value))
    )


def has_secret_in_command(command: str) -> bool:
    """Whether a command assigns a secret to a variable or an option, or has one in its text.

    >>> (
    ...     has_secret_in_command("export PGPASS=hunter2"),
    ...     has_secret_in_command("module load cuda/13.0"),
    ... )
    (True, False)
    """
    named_options = (
        (option or name, value) for option, name, value in _SPACED_OPTION_PATTERN.findall(command)
    )
    return (
        has_secret_in_text(command)
        or _CURL_LOGIN_PATTERN.search(command) is not None
        or _LOGIN_COMMAND_PATTERN.search(command) is not None
        or any(is_secret_variable(*option) for option in named_options)
        or any(has_secret_in_setting(*field) for field in _ASSIGNED_FIELD_PATTERN.findall(command))
    )


def has_secret_in_text(text: str) -> bool:
    """Whether text has a secret in it: an address with a password, a header, a token.

    >>> has_secret_in_text("see http://me:hunter2@host"), has_secret_in_text("Bearer abc")
    (True, True)
    >>> has_secret_in_text("file:///a/me@home")
    False
    """
    if _BEARER_HEADER_PATTERN.search(text) or _KNOWN_TOKEN_PATTERN.search(text):
        return True
    if any(_is_base64_login(login) for login in _BASIC_AUTH_PATTERN.findall(text)):
        return True
    return any(has_secret_in_address(link) for link in _URL_PATTERN.findall(text))


def _is_base64_login(text: str) -> bool:
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
    scheme, slashes, after_scheme = _split_address(address.strip())
    if any(_is_login_field(name, value) for name, value in _query_fields(after_scheme)):
        return True
    if not slashes:
        return (
            re.match(r"[^/@]*:[^@]*@", f"{scheme}:{after_scheme}" if scheme else after_scheme)
            is not None
        )
    if _is_file_scheme(scheme):
        has_host = len(slashes) == 2
        return has_host and re.match(r"[^/]*:[^@]*@", _percent_decoded(after_scheme)) is not None
    host_part = re.split(r"[/\\?#]", after_scheme, maxsplit=1)[0]
    after_host = after_scheme[len(host_part) :]
    is_http_server = scheme.startswith("http")
    decoded_host = _percent_decoded(host_part)
    if "@" in decoded_host:
        return is_http_server or ":" in decoded_host.rpartition("@")[0]
    if "@" not in after_host or ":" not in decoded_host or "[" in decoded_host:
        return False
    if is_http_server and decoded_host.rpartition(":")[2].isdigit():
        # A port and a path, unless what follows has another port.
        return re.search(r"[?#].*@|@[^/@]*:[0-9]", after_host) is not None
    return True


def redact_secrets(text: str) -> str:
    """Replace the secrets in a text: those that this process knows, and those told by their form.

    >>> redact_secrets("no way to http://me:hunter2@host with password=hunter2")
    'no way to http://***@host with password=***'
    """
    for known_secret in sorted(_secret_spellings_of_process(os.environ), key=len, reverse=True):
        text = text.replace(known_secret, "***")
    text = _ASSIGNMENT_PATTERN.sub(_redact_assignment, text)
    return re.sub(r"(?<=://)[^\s'\"/@]*(?::[^\s'\"@]*)?@", "***@", text)


def _redact_assignment(assignment: re.Match[str]) -> str:
    name, separator, value = assignment.groups()
    return f"{name}{separator}***" if is_secret_variable(name, value) else assignment[0]


def read_stored_mlflow_login() -> dict[str, str]:
    """Read the user and password that ``mlflow login`` has stored, if any."""
    config_parser = ConfigParser(interpolation=None)
    try:
        config_parser.read(Path.home() / ".mlflow" / "credentials")
        return dict(config_parser["mlflow"])
    except (OSError, RuntimeError, KeyError, ConfigParserError, UnicodeDecodeError):
        return {}


def _secret_spellings_of_process(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield every spelling of the secrets of this process."""
    stored_login = read_stored_mlflow_login()
    mlflow_user = environ.get("MLFLOW_TRACKING_USERNAME") or stored_login.get(
        "mlflow_tracking_username", ""
    )
    for name, value in (*stored_login.items(), *environ.items()):
        if name in _SHELL_FOLDER_VARIABLES or not is_secret_variable(name, value):
            continue
        stripped_value = value.strip()
        value_bytes = value.encode(errors="surrogateescape")
        spellings = {
            value,
            stripped_value,
            repr(value)[1:-1],
            repr(value_bytes)[2:-1],
            *stripped_value.split("\n"),
        }
        spellings |= {quote(stripped_value), quote(stripped_value, safe="")}
        spellings.add(base64.b64encode(f"{mlflow_user}:".encode() + value_bytes).decode())
        yield from (secret for secret in spellings if len(secret) >= _MIN_SECRET_CHARS)


def _split_address(address: str) -> tuple[str, str, str]:
    """Split an address into scheme, slashes, and all that follows."""
    scheme_match = _URL_SCHEME_PATTERN.match(address)
    if scheme_match is None:
        without_slashes = address.lstrip("/\\")
        is_path = len(address) - len(without_slashes) != 2
        return "", "" if is_path else "//", address if is_path else without_slashes
    scheme, slashes, after_scheme = scheme_match.groups()
    return scheme.lower(), slashes, after_scheme


def _is_file_scheme(scheme: str) -> bool:
    return scheme == "file" or scheme.partition("+")[0] == "sqlite"


def _query_fields(after_scheme: str) -> Iterator[tuple[str, str]]:
    """Yield names and values behind the first question mark, and those inside a value (ODBC's)."""
    for query_field in re.split(r"[?#&;]", after_scheme)[1:]:
        name, _, value = query_field.partition("=")
        yield _percent_decoded(name), value
        odbc_pairs = (odbc_pair.partition("=") for odbc_pair in _percent_decoded(value).split(";"))
        yield from (
            (odbc_key, odbc_value)
            for odbc_key, equals_sign, odbc_value in odbc_pairs
            if equals_sign
        )


def _is_login_field(name: str, value: str) -> bool:
    return bool(value) and (
        is_secret_variable(name, value) or name.strip().upper() in _LOGIN_FIELD_NAMES
    )


def _percent_decoded(text: str) -> str:
    """Replace ``%XX`` by its character, also where the percent sign is itself written ``%25``."""
    for _ in range(3):
        text = unquote(text)
    return text
