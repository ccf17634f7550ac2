"""YAML in, a validated ``RunConfig`` out; every mistake is one line that names its key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vssl_dist.confidential import has_secret_in_text, redact_secrets
from vssl_dist.config.complaints import explain
from vssl_dist.config.fields import MethodConfig, Model
from vssl_dist.config.paths import expanded
from vssl_dist.config.scalars import Plain, typed
from vssl_dist.config.schema import RunConfig
from vssl_dist.errors import ConfigError
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 32
_INDEX = re.compile(r"-?(0|[1-9][0-9]*)")
Block = TypeVar("Block", bound=Model)


def _scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    text: str = loader.construct_scalar(node)
    return Plain(text) if node.style is None else text


class _Loader(yaml.SafeLoader):
    """Safe, without aliases (a bomb needs them) and without duplicate keys; plain scalars are
    left to the types of their keys."""

    yaml_constructors: ClassVar[Any] = yaml.SafeLoader.yaml_constructors | {
        f"tag:yaml.org,2002:{tag}": _scalar for tag in ("str", "int", "float", "bool", "null")
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        # No word but that of a merge has a type of its own.
        self.yaml_implicit_resolvers = {"<": self.yaml_implicit_resolvers["<"]}

    def compose_node(self, parent: Any, index: int) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise ConfigError("YAML aliases (*name) are not used in configs: write the value out")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ConfigError(f"not YAML of a config: more than {_MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, str):
                raise ConfigError(f"a key is no word (line {node.start_mark.line + 1} on)")
            if key in keys:
                raise ConfigError(f"{key!r} stands twice (line {node.start_mark.line + 1} on)")
            keys.add(key)
        return super().construct_mapping(node, deep)


def _text(path: Path) -> str:
    try:
        with path.open() as file:
            return file.read(_MAX_BYTES + 1)  # which `_parse` refuses
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def refuse_no_file(path: Path) -> None:
    """Refuse what a run folder may hold in place of a file: a pipe would be waited for.

    A user's own config may be one, as in ``submit.py <(...)``.

    Raises:
        ConfigError: It is there, and no file.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: is no file: remove it")


def _parse(text: str, where: str) -> Any:
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{where}: larger than {_MAX_BYTES} bytes, which no config is")
    try:
        return yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: such as a 13th month
        quoted = " ".join(redact_secrets(str(error)).split())
        raise ConfigError(f"{where}: not YAML: {quoted}") from error


def _override(raw: dict[str, Any], item: str) -> None:
    """Apply one ``dotted.key=value``; the value is YAML, numbers in keys index lists."""
    dotted, equals, text = item.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {redact_secrets(item)!r} is not of the form dotted.key=value")
    value = _value(dotted, text)
    *parents, leaf = dotted.split(".")
    if len(parents) > _MAX_DEPTH:
        raise ConfigError(f"override {dotted[:40]}...: there is no such place in the config")
    node: Any = raw
    try:
        for key in parents:
            node = node[_index(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[_index(leaf) if isinstance(node, list) else leaf] = value
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(f"override {dotted}: there is no such place in the config") from error


def _value(dotted: str, text: str) -> Any:
    """Read an override's text as YAML, to which ``#``, ``&`` and others mean something."""
    remedy = f"put text with such characters into quotes of its own: '{dotted}=\"...\"'"
    try:
        value = _parse(text, dotted)
    except ConfigError as error:
        raise ConfigError(f"{error} ({remedy})") from error
    read = "" if value is None else value  # nothing but a comment
    if isinstance(value, Plain | None) and read != text.strip(" \t\r\n"):
        raise ConfigError(f"{dotted}: of {text!r} YAML reads only {str(read)!r}: {remedy}")
    return value


def _index(key: str) -> int:
    if not _INDEX.fullmatch(key):
        raise ValueError
    return int(key)


def _typed(raw: Any, model: type[BaseModel], where: str = "", *, expand: bool) -> Any:
    try:
        return typed(raw, model, where, path=expanded if expand else str)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _method(raw: Any, methods: Mapping[str, type[MethodConfig]], expand: bool) -> MethodConfig:
    if not isinstance(raw, dict) or "name" not in raw:
        raise ConfigError("method: must be a block with a name, such as {name: vje}")
    name = raw["name"]
    if not isinstance(name, str) or name not in methods:
        raise ConfigError(f"method.name: {name!r} is not one of {', '.join(sorted(methods))}")
    try:
        return methods[name].model_validate(_typed(raw, methods[name], "method.", expand=expand))
    except ValidationError as error:
        raise ConfigError(explain(error, methods[name], "method.")) from error


def loads(
    text: str,
    overrides: Sequence[str] = (),
    *,
    methods: Mapping[str, type[MethodConfig]],
    where: str = "config",
    name: str | None = None,
) -> RunConfig:
    """Read a resolved configuration from YAML text; see `load`, whose paths are expanded."""
    return _loads(text, overrides, methods, where=where, name=name, expand=False)


def _loads(
    text: str,
    overrides: Sequence[str],
    methods: Mapping[str, type[MethodConfig]],
    *,
    where: str,
    name: str | None,
    expand: bool,
) -> RunConfig:
    raw = _parse(text, where)
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: must be a mapping of keys to values")
    if name is not None:
        raw.setdefault("name", name)
    for item in overrides:
        _override(raw, item)
    for key in _secret_keys(raw) if expand else ():
        raise ConfigError(
            f"{key}: holds a password or a token, which would be written into the run folder: "
            "leave it to the environment"
        )
    if "method" not in raw:
        raise ConfigError("method: this key is required")
    raw["method"] = _method(raw["method"], methods, expand)
    try:
        return RunConfig.model_validate(_typed(raw, RunConfig, expand=expand))
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from error


def _secret_keys(raw: Any, where: str = "") -> Iterator[str]:
    """Find the dotted keys under which somebody has typed a secret."""
    pairs = raw.items() if isinstance(raw, dict) else enumerate(raw)
    for key, value in pairs:
        dotted = f"{where}{printable(redact_secrets(str(key)))}"
        if isinstance(value, dict | list):
            yield from _secret_keys(value, f"{dotted}.")
        elif has_secret_in_text(str(key)) or has_secret_in_text(str(value)):
            yield dotted


def load(
    path: Path, overrides: Sequence[str] = (), *, methods: Mapping[str, type[MethodConfig]]
) -> RunConfig:
    """Read a user's YAML file and apply ``dotted.key=value`` overrides; the last one wins.

    This is the one place where ``~`` and ``$VAR`` in the paths of a run are expanded, by the
    environment of whoever submits it.

    Args:
        path: The YAML file; its stem is the run's name unless the file gives one.
        overrides: Changes such as ``optim.epochs=20``; values are YAML.
        methods: Each method's own model by name (``vssl_dist.methods.CONFIGS``): the ground
            floor does not know the methods.

    Raises:
        ConfigError: One line that names the key and the remedy.
    """
    path = Path(path)
    where, text = str(path), _text(path)
    return _loads(text, overrides, methods, where=where, name=path.stem, expand=True)


def load_run(run_dir: Path, *, methods: Mapping[str, type[MethodConfig]]) -> RunConfig:
    """Read the configuration in a run folder, as `dump` wrote it: no path is expanded.

    Raises:
        ConfigError: The folder holds no run.
    """
    path = RunFolder(run_dir).config_path
    refuse_no_file(path)
    return loads(_text(path), methods=methods, where=str(path))


def load_block(
    path: Path, model: type[Block], check: Callable[[dict[Any, Any]], str | None] | None = None
) -> Block:
    """Read a YAML file that holds one block, such as a machine's profile, as strictly as a config;
    its paths are expanded, too.

    Args:
        path: The file.
        model: Model of the block.
        check: Says what is wrong with the block as it stands there, before other complaints
            repeat what they are about.

    Raises:
        ConfigError: One line that names the file, the key and the remedy.
    """
    raw = _parse(_text(path), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    if check is not None and (problem := check(raw)):
        raise ConfigError(f"{path}: {problem}")
    try:
        return model.model_validate(typed(raw, model, path=expanded))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, model)}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def dump(cfg: RunConfig) -> str:
    """The resolved configuration as YAML that `loads` reads back to an equal one."""
    text: str = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
    return text


def override(dotted: str, value: Any) -> str:
    """``dotted.key=value`` for a command that calls another, whatever characters are in it.

    >>> override("name", "012"), override("optim.betas", [0.9, 1e-3]), override("out", "a #b")
    ("name='012'", 'optim.betas=[0.9, 0.001]', "out='a #b'")
    """
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return f"{dotted}={text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"
