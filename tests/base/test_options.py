"""Choices by `kind`, dotted keys, and what is said about a wrong value."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from ldm.base.errors import InputError
from ldm.base.options import Choice, Key, OneOf, Positive, Section, assigned, chosen, explained, keys, kinds, value_at


class Shape(Choice):
    colour: Literal["red", "blue"] = "red"


class Square(Shape):
    kind: Literal["square"] = "square"
    side: Positive = 1


class Round(Shape):
    """Not a choice but what two have in common."""

    radius: float


class Circle(Round):
    kind: Literal["circle"] = "circle"


class Ellipse(Round):
    kind: Literal["ellipse"] = "ellipse"
    ratios: tuple[float, float] | None = None


class Alone(Choice):
    pass


class Only(Alone):
    kind: Literal["only"] = "only"
    count: Positive = 3


class Inner(Section):
    shape: Annotated[Shape, OneOf()]
    label: Annotated[str, Field(min_length=1)] | None = None


class Outer(Section):
    seed: int
    inner: Inner
    shapes: tuple[Annotated[Shape, OneOf()], ...] = ()
    alone: Annotated[Alone, OneOf()] = Only()
    fixed: Only = Only()


def test_two_choices_of_one_kind_are_a_mistake_in_the_code():
    class Tool(Choice): ...

    class Saw(Tool):
        kind: Literal["saw"] = "saw"

    class Jigsaw(Saw):
        kind: Literal["jigsaw"] = "jigsaw"

    assert kinds(Tool) == {"saw": Saw, "jigsaw": Jigsaw}  # also below another choice

    class Handsaw(Tool):
        kind: Literal["saw"] = "saw"

    with pytest.raises(TypeError, match=r"Handsaw and .*Saw are both of kind saw"):
        kinds(Tool)


def test_a_section_is_set_before_what_is_in_it_and_of_two_values_the_later_stays():
    values = {"metrics": [{"kind": "a"}], "sampler": {"kind": "x"}}
    found = assigned(
        values, ["metrics.0.kind=c", "metrics=[{kind: b, size: 1}]", "sampler.kind=z", "sampler={kind: y, churn: 3}"]
    )
    assert found == {"metrics": [{"kind": "c"}], "sampler": {"kind": "z"}}
    assert assigned(values, ["sampler.churn=1", "sampler.churn=2"])["sampler"]["churn"] == 2


VALUES: dict[str, Any] = {"seed": 0, "inner": {"shape": {"kind": "square", "side": 2}}}


def complaint(assignments: list[str], *within: str) -> str:
    with pytest.raises(ValidationError) as error:
        Outer.model_validate(assigned(VALUES, assignments))
    return explained(error.value, *within)


def test_a_choice_is_of_the_class_that_its_kind_names() -> None:
    assert kinds(Shape) == {"square": Square, "circle": Circle, "ellipse": Ellipse}
    assert Outer.model_validate(VALUES).inner.shape == Square(side=2)
    shapes = [{"kind": "circle", "radius": 1, "colour": "blue"}, {"kind": "ellipse", "radius": 2, "ratios": [1, 2]}]
    found = Outer.model_validate({**VALUES, "shapes": shapes, "alone": {"kind": "only", "count": 4}})
    assert found.shapes == (Circle(radius=1, colour="blue"), Ellipse(radius=2, ratios=(1, 2)))
    assert found.alone == Only(count=4)
    assert Outer.model_validate(found.model_dump()) == found
    assert Outer.model_validate({**VALUES, "inner": {"shape": Circle(radius=3)}}).inner.shape == Circle(radius=3)


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["inner.shape.kind=triangle"], "inner.shape.kind: found 'triangle'; known are 'square', 'circle', 'ellipse'"),
        (["inner.shape.kind=[circle]"], "inner.shape.kind: found ['circle']; known are 'square', 'circle', 'ellipse'"),
        (["inner.shape={side: 2}"], "inner.shape: found {'side': 2}; write {kind: NAME} and its options"),
        (["inner.shape=cube"], "inner.shape.kind: found 'cube'; known are 'square', 'circle', 'ellipse'"),
        (["inner.shape=circle"], "missing key inner.shape.radius"),
        (["inner.shape=[square]"], "inner.shape: found ['square']; write {kind: NAME} and its options"),
        (["label.of.a=1"], "unknown key label"),
        (["inner.shape.radius=1"], "unknown key inner.shape.radius: known here: kind, colour, side"),
        (["inner.shape.sides=1"], "unknown key inner.shape.sides: did you mean inner.shape.side?"),
        (["inner.shape.side=0"], "inner.shape.side: found 0; Input should be greater than 0"),
        (["inner.shape.kind=circle"], "missing key inner.shape.radius"),
        (["shapes=[{kind: square}, {kind: ellipse, radius: 1, ratios: [1, x]}]"], "shapes.1.ratios.1: found 'x'"),
        (["shapes=[{kind: square, radius: 1}]"], "unknown key shapes.0.radius: known here: kind, colour, side"),
        (["shapes=[{kind: cube}]"], "shapes.0.kind: found 'cube'"),
        (["alone.kind=other"], "alone.kind: found 'other'"),
        (["alone.size=1"], "unknown key alone.size: known here: kind, count"),
        (["fixed.cuont=1"], "unknown key fixed.cuont: did you mean fixed.count?"),
        (["iner.label=x"], "unknown key iner: did you mean inner?"),
        (["inner.label=''"], "inner.label: found ''"),
        (["inner.label=7"], "inner.label: found 7"),
    ],
)
def test_what_is_wrong_is_said_under_the_key_as_it_is_written(assignments: list[str], expected: str) -> None:
    assert complaint(assignments).startswith(expected)


def test_all_that_is_wrong_is_said_within_the_section_that_was_read() -> None:
    message = complaint(["seed=x", "inner.shape.sides=1"], "params", "now")
    assert message.startswith("params.now.seed: found 'x'; ")
    assert message.endswith("; unknown key params.now.inner.shape.sides: did you mean params.now.inner.shape.side?")


def test_a_choice_from_a_dictionary() -> None:
    assert chosen(Shape, {"kind": "ellipse", "radius": 2}) == Ellipse(radius=2)
    for values, message in (
        ({"kind": "cube"}, "kind: found 'cube'; known are 'square', 'circle', 'ellipse'"),
        ({"radius": 2}, "found {'radius': 2}; write {kind: NAME} and its options"),
        ({"kind": "circle", "radius": 2, "side": 1}, "unknown key side: known here: kind, colour, radius"),
    ):
        with pytest.raises(InputError, match=message):
            chosen(Shape, values)


def test_settings_are_assigned_by_dotted_keys() -> None:
    values = {**VALUES, "shapes": [{"kind": "square", "side": 2}, {"kind": "circle", "radius": 1.0}]}
    found = assigned(
        values,
        [
            "seed=1e-3",  # to YAML 1.1, which PyYAML reads, this is text
            "inner.label=a longer text",
            "shapes.1.radius=2",
            "shapes.0.ratios=[1, 2]",
            "shapes.0.kind=ellipse",  # kinds come first, whatever the order
            "new.section.flag=true",
            "inner.shape.kind=square",
        ],
    )
    assert found == {
        "seed": 0.001,
        "inner": {"shape": {"kind": "square", "side": 2}, "label": "a longer text"},  # the same kind keeps its options
        "shapes": [{"kind": "ellipse", "ratios": [1, 2]}, {"kind": "circle", "radius": 2}],  # another kind loses them
        "new": {"section": {"flag": True}},
    }
    assert "label" not in values["inner"]  # the argument is as it was
    assert assigned(values, ["seed=null"])["seed"] is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "--set 'seed': write KEY=VALUE, such as train_unet.lr=1e-3"),
        ("=1", "--set '=1': write KEY=VALUE"),
        ("seed.=1", "--set 'seed.=1': write KEY=VALUE"),
        ("seed.low=1", "--set seed.low=1: seed has no keys of its own"),
        ("seed.low.er=1", "--set seed.low.er=1: there is no low in seed.low.er"),
        ("shapes.2.kind=circle", "--set shapes.2.kind=circle: there is no 2 in shapes.2.kind"),
        ("shapes.first.kind=circle", "there is no first in shapes.first.kind"),
        ("shapes.0=circle", "--set shapes.0=circle: shapes has no keys of its own"),
        ("seed=[1", "--set seed=[1: not readable as YAML: while parsing"),
    ],
)
def test_assignments_that_lead_nowhere(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        assigned({**VALUES, "shapes": [{"kind": "square"}]}, [assignment])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_alone_is_a_kind_without_options() -> None:
    named = Outer.model_validate({"seed": 0, "inner": {"shape": "square"}, "shapes": ["square", "square"], "alone": "only"})
    assert named == Outer(seed=0, inner=Inner(shape=Square()), shapes=(Square(), Square()), alone=Only())
    found = assigned({"a": {"b": "x"}, "list": ["x", {"kind": "y"}]}, ["a.b.size=2", "list.0.size=3"])
    assert found == {"a": {"b": {"kind": "x", "size": 2}}, "list": [{"kind": "x", "size": 3}, {"kind": "y"}]}
    assert assigned({"a": "x"}, ["a.kind=y"]) == {"a": {"kind": "y"}} and assigned({"a": {"kind": "x"}}, ["a=y"]) == {"a": "y"}


def test_another_kind_clears_the_choices_below_it_before_they_are_made() -> None:
    found = assigned({"a": {"kind": "old", "b": {"kind": "x", "size": 1}}}, ["a.b.size=2", "a.b.kind=y", "a.kind=new"])
    assert found == {"a": {"kind": "new", "b": {"kind": "y", "size": 2}}}


def test_a_value_at_a_dotted_key() -> None:
    assert value_at(VALUES, "inner.shape.side") == 2
    assert value_at({"a": ({"b": 3},)}, "a.0.b") == 3
    assert value_at(VALUES, "inner.shape.radius", None) is None
    for key in ("inner.shape.radius", "seed.low", "shapes.1.kind", "shapes.first"):
        with pytest.raises(KeyError, match=key):
            value_at({**VALUES, "shapes": [{"kind": "square"}]}, key)


def test_every_key_is_listed_with_its_type_and_whose_it_is() -> None:
    def of_shapes(section: str) -> list[Key]:
        return [
            Key(f"{section}.kind", str, ("square", "circle", "ellipse")),
            Key(f"{section}.colour", str, ("red", "blue"), ("square", "circle", "ellipse")),
            Key(f"{section}.side", int, (), ("square",)),
            Key(f"{section}.radius", float, (), ("circle", "ellipse")),
            Key(f"{section}.ratios", tuple, (), ("ellipse",)),
        ]

    assert list(keys(Outer)) == [
        Key("seed", int),
        *of_shapes("inner.shape"),
        Key("inner.label", str),
        *of_shapes("shapes.0"),
        Key("alone.kind", str, ("only",)),
        Key("alone.count", int, (), ("only",)),
        Key("fixed.kind", str, ("only",)),
        Key("fixed.count", int, (), ("only",)),
    ]
