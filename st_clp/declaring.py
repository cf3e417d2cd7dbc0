"""Declare options once, and derive settings, command lines and keyword arguments from the declarations."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_type_hints

from st_clp.option_values import SettingsError, kind_of, read_value

OptionsT = TypeVar("OptionsT", bound="Options")
ResultT = TypeVar("ResultT")
_DECLARED: dict[type, dict[str, Any]] = {}


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    group: str | None = None,
    changes_results: bool = True,
    keyword: str | None = None,
) -> Any:
    """A field of an options class.

    Args:
        default: Its default.
        help: What it does, in sentences for the command line and the documentation.
        least: The smallest number that it may be.
        above: A number that it must be above.
        most: The largest.
        group: Where the command line shows it; None: with the others of its class.
        changes_results: Whether results depend on it, so that a run cannot go on with another value.
        keyword: Its name as an argument of Python functions; None: the field's.
    """
    metadata = {
        "help": help,
        "limits": (least, above, most),
        "group": group,
        "changes_results": changes_results,
        "keyword": keyword,
    }
    if isinstance(default, (list, dict)):
        kind = type(default)
        return field(default_factory=lambda: kind(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """Options of a stage: read and checked wherever they come from.

    A class that inherits from several has the options of all. Each may check what several options must satisfy
    together, in a method ``_check``.

    Raises:
        SettingsError: A value has the wrong type, is out of range, is not among the choices, or conflicts with another
            option.
    """

    group: ClassVar[str] = ""

    def __post_init__(self) -> None:
        kinds = declared(type(self))
        for item in fields(self):
            value = read_value(item.name, kinds[item.name], getattr(self, item.name))
            _require_in_range(item.name, value, *item.metadata["limits"])
            object.__setattr__(self, item.name, value)
        for one in reversed(type(self).__mro__):
            if check := vars(one).get("_check"):
                check(self)

    @classmethod
    def of(cls: type[OptionsT], other: Options, **changes: Any) -> OptionsT:
        """The options of this class that ``other`` has, with changes."""
        shared = {item.name for item in fields(cls)} & {item.name for item in fields(other)}
        return cls(**{**{name: getattr(other, name) for name in shared}, **changes})


def declared(cls: type[Options]) -> dict[str, Any]:
    """The type of each option, resolved from its annotation."""
    if cls not in _DECLARED:
        _DECLARED[cls] = get_type_hints(cls)
    return _DECLARED[cls]


def group_of(cls: type[Options], name: str) -> str:
    """Where the command line shows an option."""
    item = cls.__dataclass_fields__[name]
    owner = next(one for one in cls.__mro__ if name in vars(one).get("__annotations__", {}))
    return str(item.metadata["group"] or owner.group)  # type: ignore[attr-defined]


def names_of(*classes: type[Options]) -> list[str]:
    """The names of all options of these classes."""
    return [item.name for cls in classes for item in fields(cls)]


def _require_in_range(name: str, value: Any, least: float | None, above: float | None, most: float | None) -> None:
    if value is None or isinstance(value, (str, list, dict)):
        return
    limits = [
        (f"at least {least:.12g}", least is None or value >= least) if least is not None else None,
        (f"above {above:.12g}", value > above) if above is not None else None,
        (f"at most {most:,.12g}", value <= most) if most is not None else None,
    ]
    given = [limit for limit in limits if limit is not None]
    if not all(kept for _, kept in given):
        raise SettingsError(f"{name} must be {' and '.join(text for text, _ in given)}, got {value:.12g}")


def takes(**parameters: type[Options]) -> Callable[[Callable[..., ResultT]], Callable[..., ResultT]]:
    """Let a function be given the options of a class one by one, as keyword arguments.

    ``@takes(options=MiningOptions)`` lets ``function(options=MiningOptions(num_negatives=2))`` be called as
    ``function(num_negatives=2)``. Signature and docstring show the options in the parameter's place; in the docstring
    that is the line with the parameter's name and nothing else.

    Args:
        **parameters: Parameter of the function to the class that it is of.
    """

    def decorate(function: Callable[..., ResultT]) -> Callable[..., ResultT]:
        keywords = {name: _keywords(cls) for name, cls in parameters.items()}

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> ResultT:
            for parameter, cls in parameters.items():
                given = {name: kwargs.pop(key) for key, name in keywords[parameter].items() if key in kwargs}
                if parameter not in kwargs:
                    kwargs[parameter] = _made(cls, given, keywords[parameter])
                elif given:
                    raise TypeError(f"{function.__name__}() takes {parameter} or {', '.join(given)}, not both")
            return function(*args, **kwargs)

        del wrapper.__wrapped__  # tools would document that in its place
        wrapper.__signature__ = _signature(function, parameters, keywords)  # type: ignore[attr-defined]
        wrapper.__doc__ = _documented(function.__doc__ or "", parameters, keywords)
        return wrapper

    return decorate


def shows(**parameters: type[Options]) -> Callable[[type[ResultT]], type[ResultT]]:
    """Show the options in the docstring of a class whose ``__init__`` :func:`takes` them."""

    def fill(cls: type[ResultT]) -> type[ResultT]:
        cls.__doc__ = _documented(cls.__doc__ or "", parameters, {name: _keywords(o) for name, o in parameters.items()})
        return cls

    return fill


def _made(cls: type[OptionsT], given: dict[str, Any], keywords: Mapping[str, str]) -> OptionsT:
    """Make the options; errors name the argument that the value was given by."""
    try:
        return cls(**given)
    except SettingsError as error:
        text = str(error)
        for key, name in keywords.items():
            text = re.sub(rf"\b{name}\b", key, text)
        raise SettingsError(text) from None


def _keywords(cls: type[Options]) -> dict[str, str]:
    """Argument of Python functions to option."""
    return {item.metadata["keyword"] or item.name: item.name for item in fields(cls)}


def _signature(
    function: Callable[..., Any], parameters: Mapping[str, type[Options]], keywords: Mapping[str, Mapping[str, str]]
) -> inspect.Signature:
    signature = inspect.signature(function)
    shown: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        cls = parameters.get(parameter.name)
        if cls is None:
            shown.append(parameter)
            continue
        for key, name in keywords[parameter.name].items():
            item = cls.__dataclass_fields__[name]
            shown.append(
                inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type)
            )
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    shown.sort(key=lambda one: (one.kind, one.kind is keyword_only and one.default is inspect.Parameter.empty and -1))
    return signature.replace(parameters=shown)


def with_parameters_of(function: Callable[..., Any], extended: Callable[..., Any]) -> inspect.Signature:
    """The signature of a method that passes its ``*args`` and ``**kwargs`` on to ``function``, these written out."""
    taken = inspect.signature(function).parameters
    own = inspect.signature(extended)
    added = [
        one
        for one in own.parameters.values()
        if one.name not in taken and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    return own.replace(parameters=[*taken.values(), *added])


def _documented(text: str, parameters: Mapping[str, type[Options]], keywords: Mapping[str, Mapping[str, str]]) -> str:
    for parameter, cls in parameters.items():
        lines = []
        for key, name in keywords[parameter].items():
            choices = kind_of(declared(cls)[name])[1]
            among = f" ({', '.join(choices)})" if choices else ""
            help = cls.__dataclass_fields__[name].metadata["help"]
            lines.append(textwrap.fill(f"{key}{among}: {help}", 112, subsequent_indent="    "))
        entry = re.compile(rf"^( +){parameter}$", re.MULTILINE)
        text = entry.sub(lambda found: textwrap.indent("\n".join(lines), found.group(1)), text)  # noqa: B023
    return text
