"""Further captions that are made from those of an image: shortened ones, and tags in other orders."""

import re

from ldm.base.randomness import seed_for

FEWEST_TAGS = 3  # fewer parts between commas are no list of tags
# The end of a sentence: a mark with what closes quotes and brackets, before no small letter; or a blank line.
END = re.compile(r"""(?<![.!?…])[.!?…]+["'”’)\]]*(?=\s+[^\sa-z]|\s*$)|[。！？]+[”’」』）]*|(?=\n\s*\n)""")
# A full stop after one of these, or after an initial, ends no sentence.
SHORT = r"\w|[a-z]\.[a-z]|approx|ca|cf|dr|fig|jr|mr|mrs|ms|no|nr|prof|sr|st|vol|vs"
ABBREVIATION = re.compile(rf"(^|[\s(])({SHORT})\.$", re.IGNORECASE)


def augmented(captions: list[str], *, shorten: bool, shuffle_tags: int) -> list[str]:
    """The captions; with `shorten` a shorter form of each; `shuffle_tags` further orders of the tags of each; each text once.

    The shorter form is the first sentence of several, or the first half of the tags. Tags are three or more, between commas, and
    no sentence. The first tag stays the first; the order of the others is a function of the caption and the order's number.
    """
    made = list(captions)
    if shorten:
        made += map(shortened, captions)
    made += [shuffled(caption, number) for caption in captions for number in range(shuffle_tags)]
    return list(dict.fromkeys(made))


def shortened(caption: str) -> str:
    """The first sentence of several, or the first half of the tags, rounded up; other captions as they are."""
    tags, sentence = tags_of(caption), _first_sentence(caption)
    if tags:
        return _joined(caption, tags[: (len(tags) + 1) // 2])
    return caption if sentence in (None, caption.strip()) else sentence


def shuffled(caption: str, number: int) -> str:
    """The tags of a caption in another order, the first one first; other captions as they are."""
    first, *others = tags_of(caption) or [caption]
    order = sorted(range(len(others)), key=lambda place: seed_for(caption, number, place))
    return _joined(caption, [first, *(others[place] for place in order)]) if others else caption


def tags_of(caption: str) -> list[str]:
    """The tags that a caption lists; empty for one that is no list of tags."""
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    return tags if len(tags) >= FEWEST_TAGS and _first_sentence(caption) is None else []


def _joined(caption: str, tags: list[str]) -> str:
    return (", " if ", " in caption else ",").join(tags)


def _first_sentence(caption: str) -> str | None:
    """The first sentence of a caption, which may be all of it; None if no sentence ends in it."""
    starts = (caption[: found.end()].strip() for found in END.finditer(caption))
    return next((text for text in starts if re.search(r"\w", text) and not ABBREVIATION.search(text)), None)
