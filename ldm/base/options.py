"""Settings as pydantic classes: sections with fixed keys, and choices between classes by their `kind`."""

from typing import Annotated, Any, Union, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.annotated_handlers import GetCoreSchemaHandler

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
    """`sampler: Annotated[Sampler, OneOf()]` takes any direct subclass of `Sampler`, told apart by `kind`."""

    def __get_pydantic_core_schema__(self, base: type[Choice], handler: GetCoreSchemaHandler) -> Any:
        choices = tuple(base.__subclasses__())
        if len(choices) == 1:
            return handler.generate_schema(choices[0])
        return handler.generate_schema(Annotated[Union[choices], Field(discriminator="kind")])  # noqa: UP007


def kinds(base: type[Choice]) -> dict[str, type[Choice]]:
    """The choices below `base` by their `kind`."""
    return {get_args(choice.model_fields["kind"].annotation)[0]: choice for choice in base.__subclasses__()}
