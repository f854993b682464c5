"""Settings as pydantic classes: sections with fixed keys, and choices between classes by their `kind`."""

import difflib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.annotated_handlers import GetCoreSchemaHandler

from ldm.base.errors import InputError

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A frozen group of keys that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Choice(Section):
    """One of several classes that a setting can name. Subclasses give `kind` a literal value, and their own options."""

    kind: Any


class OneOf:
    """`sampler: Annotated[Sampler, OneOf()]` takes any choice below `Sampler`, told apart by `kind`."""

    def __get_pydantic_core_schema__(self, base: type[Choice], handler: GetCoreSchemaHandler) -> Any:
        choices = tuple(kinds(base).values())
        if len(choices) == 1:
            return handler.generate_schema(choices[0])
        return handler.generate_schema(Annotated[Union[choices], Field(discriminator="kind")])  # noqa: UP007


def kinds(base: type[Choice]) -> dict[str, type[Any]]:
    """The choices at or below `base` by their `kind`. (Classes between them and `base` have none.)"""
    name = base.model_fields["kind"].default
    if isinstance(name, str):
        return {name: base}
    return {name: choice for below in base.__subclasses__() for name, choice in kinds(below).items()}


def chosen(base: type[Choice], values: dict[str, Any]) -> Any:
    """The choice below `base` that these values, `kind` among them, describe."""
    known, kind = kinds(base), values.get("kind")
    if kind not in known:
        raise InputError(f"kind {kind!r}: expected one of {', '.join(known)}")
    try:
        return known[str(kind)].model_validate(values)
    except ValidationError as error:
        raise InputError(explained(error, known[str(kind)])) from None


@dataclass(frozen=True)
class Key:
    """A dotted key of a section, as `--set` takes it."""

    name: str
    type: type  # int, float, str, bool, or tuple for a list
    values: tuple[Any, ...] = ()  # all there are, if they can be listed
    kinds: tuple[str, ...] = ()  # the kinds of a choice that have it


def keys(section: type[BaseModel], within: str = "") -> Iterator[Key]:
    """Every key of a section, of its sections and of all that can be chosen in it."""
    for name, field in section.model_fields.items():
        model, key = _model_in(field.annotation), f"{within}{name}"
        if issubclass(model, Choice):
            key += ".0" if get_origin(field.annotation) is tuple else ""
            yield Key(f"{key}.kind", str, tuple(kinds(model)))
            options = {kind: list(keys(choice, f"{key}.")) for kind, choice in kinds(model).items()}
            for option in {option.name: option for found in options.values() for option in found}.values():
                having = tuple(kind for kind, found in options.items() if option.name in {one.name for one in found})
                yield Key(option.name, option.type, option.values, having)
        elif model is not Section:
            yield from keys(model, f"{key}.")
        elif name != "kind":
            yield Key(key, *_type_of(field.annotation))


def _type_of(annotation: Any) -> tuple[type, tuple[Any, ...]]:
    """The plain type of a field, and its values if it is a Literal."""
    if get_origin(annotation) is Literal:
        return type(get_args(annotation)[0]), get_args(annotation)
    if get_origin(annotation) is tuple:
        return tuple, ()
    if isinstance(annotation, type):
        return annotation, ()
    return next(_type_of(part) for part in get_args(annotation) if part is not type(None))  # optional, or annotated


def value_at(values: Any, key: str, *default: Any) -> Any:
    """The value of a dotted key in nested dictionaries and lists; `KeyError` if there is none and no default."""
    for part in key.split("."):
        try:
            values = values[int(part)] if isinstance(values, list | tuple) else values[part]
        except (LookupError, TypeError, ValueError):
            if default:
                return default[0]
            raise KeyError(key) from None
    return values


def assigned(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of nested values with some of them set; see `assign`."""
    values = json.loads(json.dumps(values))
    for assignment in kinds_first(assignments):
        assign(values, assignment)
    return values


def kinds_first(assignments: Iterable[str]) -> list[str]:
    """Assignments in the order of their effect: a `kind` clears the options, and the choices, that are below it."""

    def depth(assignment: str) -> float:
        *path, last = assignment.partition("=")[0].split(".")
        return len(path) if last == "kind" else math.inf

    return sorted(assignments, key=depth)


def assign(values: Any, assignment: str) -> None:
    """Set a key of nested dictionaries and lists in place: `a.b=value`, the value in YAML or JSON.

    Another `kind` takes the place of a choice and all its options. `InputError` if the assignment or its key is wrong.
    """
    key, equals, text = assignment.partition("=")
    try:
        value = _parsed(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {assignment}: not readable as YAML: {' '.join(str(error).split())}") from None
    *path, last = key.split(".")
    if not equals or not last:
        raise InputError(f"--set {assignment!r}: write KEY=VALUE, such as train_unet.lr=1e-3")
    for part in path:
        try:
            values = values[int(part)] if isinstance(values, list) else values.setdefault(part, {})
        except (ValueError, IndexError, AttributeError):
            raise InputError(f"--set {assignment}: there is no {part} in {key}") from None
    if not isinstance(values, dict):
        raise InputError(f"--set {assignment}: {'.'.join(path)} has no keys of its own")
    if last == "kind" and values.get("kind") != value:
        values.clear()
    values[last] = value


def _parsed(text: str) -> Any:
    """A value as YAML 1.2 has it: `1e-3` is a number, which PyYAML takes for text."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def explained(error: ValidationError, section: type[BaseModel], *within: str) -> str:
    """What is wrong with each key of a section, whose own key is `within`."""
    return "; ".join(_explain(problem, section, within) for problem in error.errors())


def _explain(problem: Any, section: type[BaseModel], within: tuple[str, ...]) -> str:
    path, holder = _located(problem["loc"], section)
    key = ".".join((*within, *path))
    if problem["type"] == "extra_forbidden":
        known = list(holder.model_fields)
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {'.'.join((*within, *path[:-1], close[0]))}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if problem["type"] == "missing":
        return f"missing key {key}"
    if problem["type"] == "value_error":  # our own validators name the keys in their message
        return ": ".join(filter(None, (key, str(problem["ctx"]["error"]))))
    if problem["type"] == "union_tag_invalid":
        return f"{key}.kind: found {problem['ctx']['tag']!r}; known are {problem['ctx']['expected_tags']}"
    if problem["type"] in ("union_tag_not_found", "model_attributes_type"):
        return f"{key}: found {problem['input']!r}; write {{kind: NAME}} and its options"
    return f"{key}: found {problem['input']!r}; {problem['msg']}"


def _located(location: tuple[Any, ...], section: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The keys of a problem's location, without the kinds that pydantic adds, and the section that holds the last key."""
    path: list[str] = []
    holder, inside = section, section
    for part in map(str, location):
        if issubclass(inside, Choice) and part in (choices := kinds(inside)) and part not in inside.model_fields:
            inside = choices[part]
            continue
        holder = inside
        path.append(part)
        field = inside.model_fields.get(part)
        inside = _model_in(field.annotation) if field else inside
        if issubclass(inside, Choice) and len(only := kinds(inside)) == 1:
            inside = next(iter(only.values()))  # where there is no choice, pydantic adds no kind
    return path, holder


def _model_in(annotation: Any) -> type[BaseModel]:
    """The section or choice that an annotation speaks of, at whatever depth; `Section` if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(part) for part in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not Section), Section)
