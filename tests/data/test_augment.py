"""Captions that are made from captions: examples by hand, and what holds for any text."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.augment import augmented, shuffled

SHORTER = {
    "A cat. It sits on a wall.": "A cat.",
    "Is it a cat? Yes!": "Is it a cat?",
    'He said "go." She went.': 'He said "go."',
    "By Dr. J. Smith, St. Ives, ca. 1.5 m wide. Oil.": "By Dr. J. Smith, St. Ives, ca. 1.5 m wide.",
    "Some of it, e.g. this… and that. 2 more": "Some of it, e.g. this… and that.",
    "A title\n\nof a paragraph": "A title",
    "一只猫。它很大。": "一只猫。",
    "one, two, three, four, five": "one, two, three",
    "1girl,solo,red hair,": "1girl,solo",
    "a, St. Mary, v1.5, church": "a, St. Mary",
}
SAME = [
    "A man, a woman, and a dog walk.",
    "cat, dog",
    "A cat",
    "a line\nand another",
    " A cat. ",
    "...",
    ".",
    "",
    ", , ,",
    "etc.",
]


@pytest.mark.parametrize("caption", SHORTER)
def test_a_shorter_form_is_the_first_sentence_or_half_of_the_tags(caption: str) -> None:
    assert augmented([caption], shorten=True, shuffle_tags=0) == [caption, SHORTER[caption]]


@pytest.mark.parametrize("caption", SAME)
def test_other_captions_have_none(caption: str) -> None:
    assert augmented([caption], shorten=True, shuffle_tags=3) == [caption]


def test_captions_come_first_then_shorter_ones_then_other_orders() -> None:
    captions = ["x, y, z, w", "A cat. A dog.", "x, y"]
    made = augmented(captions, shorten=True, shuffle_tags=1)
    assert made[:4] == [*captions, "A cat."]  # half of the tags is a caption already
    assert made[4:] == [shuffled("x, y, z, w", 0)] or shuffled("x, y, z, w", 0) == "x, y, z, w"
    assert augmented(captions, shorten=False, shuffle_tags=0) == captions
    assert augmented(["a", "b", "a"], shorten=False, shuffle_tags=0) == ["a", "b"]


def test_every_order_with_the_first_tag_in_its_place_comes_equally_often() -> None:
    expected = {", ".join(("sky", *others)) for others in permutations(("a", "b", "c"))}
    found = [shuffled("sky, a, b, c", number) for number in range(600)]
    assert set(found) == expected
    assert all(70 < found.count(order) < 130 for order in expected)  # 100 each, within three standard deviations
    assert set(augmented(["sky, a, b, c"], shorten=False, shuffle_tags=600)) == expected


def test_an_order_stays_the_same() -> None:
    """In every process, on every machine: captions are embedded once, and found again by their text."""
    assert [shuffled("1girl,solo,red hair,smile", number) for number in range(2)] == [
        "1girl,smile,solo,red hair",
        "1girl,smile,red hair,solo",
    ]


TEXTS = st.text(alphabet=st.sampled_from("ab .,!?\n\"'。St"), max_size=30) | st.text(max_size=30)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3), st.booleans(), st.integers(0, 4))
def test_what_holds_for_any_captions(captions: list[str], shorten: bool, shuffle_tags: int) -> None:
    made = augmented(captions, shorten=shorten, shuffle_tags=shuffle_tags)
    distinct = list(dict.fromkeys(captions))
    assert made[: len(distinct)] == distinct and len(set(made)) == len(made)
    assert len(made) <= len(distinct) * (1 + shorten + shuffle_tags)
    assert made == augmented(captions, shorten=shorten, shuffle_tags=shuffle_tags)
    fewer = augmented(captions, shorten=shorten, shuffle_tags=max(0, shuffle_tags - 1))
    assert set(fewer) <= set(made)  # a further order changes none before it
    for text in made[len(distinct) :]:
        assert any(is_made_from(text, caption) for caption in captions)


def is_made_from(text: str, caption: str) -> bool:
    """A beginning, the first half of what stands between commas, or all of that in another order."""
    have, had = ([part.strip() for part in one.split(",") if part.strip()] for one in (text, caption))
    half, reordered = had[: -(-len(had) // 2)], had[:1] == have[:1] and sorted(had) == sorted(have)
    return caption.strip().startswith(text) or (len(had) > 2 and (have == half or reordered))
