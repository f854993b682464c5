"""Settings as pydantic classes: sections with fixed keys, and choices between classes by their `kind`."""

import copy
import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError, core_schema

from ldm.base.errors import InputError

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]


def _names_one_version(name: str) -> str:
    """Refuse an alias of a registered model: tomorrow it may name another version, and the stage would not run again."""
    if name.startswith("models:/") and not re.fullmatch(r"models:/[\w.-]+/[1-9]\d*(@[0-9a-f]{12,64})?", name):
        how = "models:/NAME/VERSION or models:/NAME/VERSION@HASH, 12 or more digits of its `ldm.model`"
        raise ValueError(f"found {name!r}; a stage needs a version: write {how} (the nightly deployment resolves aliases)")
    return name


Weights = Annotated[str, Field(min_length=1), AfterValidator(_names_one_version)]  # a folder, models:/NAME/VERSION[@HASH], …


class Section(BaseModel):
    """A frozen group of keys that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any, handler: Any) -> Any:
        if not isinstance(values, dict) or not (unknown := [str(name) for name in values if name not in cls.model_fields]):
            return handler(values)
        found: dict[str, Any] = {"unknown": unknown, "known": list(cls.model_fields)}
        try:
            handler({name: value for name, value in values.items() if name in cls.model_fields})
        except ValidationError as error:
            found["others"] = error
        raise PydanticCustomError("unknown_keys", "unknown keys {unknown}; known here: {known}", found)


class Choice(Section):
    """One of several classes that a setting can name. Subclasses give `kind` a literal value, and their own options."""

    kind: Any


class OneOf:
    """`sampler: Annotated[Sampler, OneOf()]` takes any choice below `Sampler`, told apart by `kind`; NAME is {kind: NAME}."""

    def __get_pydantic_core_schema__(self, base: type[Choice], handler: Any) -> core_schema.CoreSchema:
        def choose(values: Any) -> Any:
            if isinstance(values, base):
                return values
            known = kinds(base)
            names = list(known)
            if isinstance(values, str):
                values = {"kind": values}
            if not isinstance(values, dict) or ("kind" not in values and len(known) > 1):
                raise PydanticCustomError("no_kind", f"write {{kind: NAME}} and its options; known are {', '.join(names)}")
            kind = values.get("kind", names[0])
            if kind not in names:  # a list: a wrong kind may not be hashable
                found = {"kind": kind, "known": names}
                raise PydanticCustomError("unknown_kind", "unknown kind {kind}; known are {known}", found)
            return known[kind].model_validate(values)  # pydantic reports what is wrong in there, under the choice's key

        return core_schema.no_info_plain_validator_function(choose)


def kinds(base: type[Choice]) -> dict[str, type[Any]]:
    """The choices at or below `base` by their `kind`. (Classes between them and `base` have none.)"""
    name = base.model_fields["kind"].default
    found: dict[str, type[Any]] = {name: base} if isinstance(name, str) else {}
    for kind, choice in (pair for below in base.__subclasses__() for pair in kinds(below).items()):
        if found.setdefault(kind, choice) is not choice:
            raise TypeError(f"{choice.__qualname__} and {found[kind].__qualname__} are both of kind {kind}")
    return found


def chosen(base: type[Choice], values: dict[str, Any]) -> Any:
    """The choice below `base` that these values, `kind` among them, describe."""
    try:
        return TypeAdapter(Annotated[base, OneOf()]).validate_python(values)  # type: ignore[arg-type]
    except ValidationError as error:
        raise InputError(explained(error)) from None


def explained(error: ValidationError, *within: str) -> str:
    """What is wrong with each key of a section, whose own key is `within`."""
    found = []
    for problem in error.errors():
        key, ctx, kind = ".".join((*within, *map(str, problem["loc"]))), problem.get("ctx", {}), problem["type"]
        below = f"{key}." if key else ""
        if kind == "unknown_keys":
            for name in ctx["unknown"]:
                close = difflib.get_close_matches(name, ctx["known"], n=1)
                hint = f"did you mean {below}{close[0]}?" if close else f"known here: {', '.join(ctx['known'])}"
                found.append(f"unknown key {below}{name}: {hint}")
            found += [explained(ctx["others"], *filter(None, [key]))] if "others" in ctx else []
        elif kind == "unknown_kind":
            found.append(f"{below}kind: found {ctx['kind']!r}; known are {', '.join(map(repr, ctx['known']))}")
        elif kind == "missing":
            found.append(f"missing key {key}")
        else:  # our own validators name the keys in their message
            said = str(ctx["error"]) if kind == "value_error" else f"found {problem['input']!r}; {problem['msg']}"
            found.append(f"{key}: {said}" if key else said)
    return "; ".join(found)


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
        key, parts = f"{within}{name}", list(_parts(field.annotation))
        model = next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)
        if model is None and name != "kind":
            plain = next(part for part in parts if isinstance(part, type) or get_origin(part) in (Literal, tuple))
            values = get_args(plain) if get_origin(plain) is Literal else ()
            yield Key(key, type(values[0]) if values else get_origin(plain) or plain, values)
        elif model and issubclass(model, Choice):
            key += ".0" if get_origin(field.annotation) is tuple else ""
            yield Key(f"{key}.kind", str, tuple(kinds(model)))
            options: dict[str, Key] = {}
            for kind, choice in kinds(model).items():
                for option in keys(choice, f"{key}."):
                    others = options[option.name].kinds if option.name in options else ()
                    options[option.name] = replace(option, kinds=(*others, kind))
            yield from options.values()
        elif model:
            yield from keys(model, f"{key}.")


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and all annotations in it, from the outside in."""
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _parts(part)


def value_at(values: Any, key: str, *default: Any) -> Any:
    """The value of a dotted key in nested dictionaries and lists; `KeyError` if there is none and no default."""
    try:
        for part in key.split("."):
            values = values[int(part)] if isinstance(values, list | tuple) else values[part]
    except (LookupError, TypeError, ValueError):
        if default:
            return default[0]
        raise KeyError(key) from None
    return values


def assigned(values: Any, assignments: Iterable[str]) -> Any:
    """A copy of nested dictionaries and lists with keys set, `a.b=value` in YAML; another `kind` clears a choice."""
    from ruamel.yaml import YAML, YAMLError  # reads YAML 1.2, where 1e-3 is a number

    values, keys = copy.deepcopy(values), {assignment: assignment.partition("=")[0].split(".") for assignment in assignments}
    for assignment in sorted(keys, key=lambda assignment: (len(keys[assignment]), keys[assignment][-1] != "kind")):
        key, equals, text = assignment.partition("=")
        *path, last = key.split(".")
        if not equals or not last:
            raise InputError(f"--set {assignment!r}: write KEY=VALUE, such as train_unet.lr=1e-3")
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except YAMLError as error:
            raise InputError(f"--set {assignment}: not readable as YAML: {' '.join(str(error).split())}") from None
        section = values
        for part in path:
            try:
                place = int(part) if isinstance(section, list) and part.isdecimal() else part
                inner = section[place] if isinstance(place, int) else section.get(place, {})
                section[place] = {"kind": inner} if isinstance(inner, str) else inner  # a name is short for its kind
                section = section[place]
            except (IndexError, AttributeError):
                raise InputError(f"--set {assignment}: there is no {part} in {key}") from None
        if not isinstance(section, dict):
            raise InputError(f"--set {assignment}: {'.'.join(path)} has no keys of its own")
        if last == "kind" and section.get("kind") != value:
            section.clear()
        section[last] = value
    return values
