"""Concept density: which words are nouns, what counts as one concept, and sums over partitions."""

from collections import Counter

import pytest
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st

from pixart_models.concepts import ConceptDensity, find_nouns, measure_concepts

# Caption sentences with their nouns: proper nouns and nouns before nouns too, singular.
FITTED = """\
The image depicts a cozy living room with a large sofa, a coffee table and two armchairs. | image \
living room sofa coffee table armchair
A young woman is sitting on a wooden chair, reading a book by the window. | woman chair book window
The city skyline glows at night, with tall buildings reflected in the calm river. | city skyline \
night building river
Three children run along the beach while their parents watch from under a striped umbrella. | \
child beach parent umbrella
The photograph shows an elderly man with a white beard and a wrinkled face, looking directly at \
the camera. | photograph man beard face camera
A bowl of fresh fruit, including apples, bananas and strawberries, sits in the center of the \
table. | bowl fruit apple banana strawberry center table
The dog has a red collar around its neck and appears to be waiting for its owner. | dog collar \
neck owner
In the background, snow-capped mountains rise above a field of yellow wildflowers. | background \
mountain field wildflower
The artwork is done in a watercolor style, with soft brush strokes and pastel colors. | artwork \
watercolor style brush stroke pastel color
Several motorcycles are parked in a row outside a restaurant on a narrow street. | motorcycle row \
restaurant street
A surfer rides a huge wave as spray flies through the air. | surfer wave spray air
The store displays a variety of handbags, shoes and watches on glass shelves. | store variety \
handbag shoe watch glass shelf
Two women in traditional dresses dance on a stage decorated with flowers and lanterns. | woman \
dress stage flower lantern
The cat sleeps on top of a laptop, next to a half-empty cup of tea. | cat top laptop cup tea
An old stone bridge crosses a stream surrounded by moss-covered rocks. | stone bridge stream rock
The chef uses a sharp knife to cut vegetables on a cutting board. | chef knife vegetable board
A group of tourists walks past the ruins of an ancient temple. | group tourist ruin temple
The overall atmosphere is peaceful, with warm sunlight filtering through the leaves. | atmosphere \
sunlight leaf
There is a stop sign on the left side of the road, partially hidden by branches. | stop sign side \
road branch
The player in the white jersey kicks the ball toward the goal while the referee looks on. | \
player jersey ball goal referee
The bathroom features a white toilet, a sink with a mirror, and a shower with glass doors. | \
bathroom toilet sink mirror shower glass door
A herd of elephants drinks water from a muddy pond in the savanna. | herd elephant water pond \
savanna
The illustration shows a robot holding a paintbrush in front of a canvas. | illustration robot \
paintbrush front canvas
Her hair is tied back in a ponytail, and she wears earrings and a silver necklace. | hair \
ponytail earring silver necklace
The airplane is flying low over the runway, its landing gear already extended. | airplane runway \
landing gear
Wooden crates filled with tomatoes, onions and peppers line the market stall. | crate tomato \
onion pepper market stall
The poster contains bold text and a picture of a guitar in flames. | poster text picture guitar \
flame
A firefighter climbs a ladder to rescue a kitten from the roof of a house. | firefighter ladder \
kitten roof house
The sculpture, made of bronze, represents a warrior on horseback. | sculpture bronze warrior \
horseback
The bride and groom hold hands while guests throw confetti and cheer. | bride groom hand guest \
confetti
Light from the candles creates dramatic shadows on the brick walls. | light candle shadow brick wall
The boats are docked at the pier, and seagulls circle above the harbor. | boat pier seagull harbor
A digital rendering of a futuristic spaceship hovering above a desert planet. | rendering \
spaceship desert planet
black leather wallet with zipper, gift for men | leather wallet zipper gift man
Eiffel Tower at dawn, Paris, France | eiffel tower dawn paris france
Modern kitchen design ideas for small apartments | kitchen design idea apartment
Free vector set of autumn leaves and mushrooms | vector set autumn leaf mushroom
portrait of a knight in shining armor, oil on canvas | portrait knight armor oil canvas
Toyota Corolla 2015 review and price | toyota corolla review price
homemade bread recipe step by step | bread recipe step step
A family of four enjoys a picnic on a blanket in the park. | family picnic blanket park
The composition draws the viewer's attention to the contrast between the old lighthouse and the \
stormy sea. | composition viewer attention contrast lighthouse sea
"""
UNSEEN = """\
The painting portrays a lonely fisherman mending his net beside a wooden hut. | painting \
fisherman net hut
Colorful balloons float above the crowd during the street festival. | balloon crowd street festival
A waiter carries a tray of drinks between the tables of a crowded cafe. | waiter tray drink table \
cafe
The photo shows a close view of a bee collecting pollen from a purple flower. | photo view bee \
pollen flower
Two astronauts walk on the surface of the moon, with the Earth visible in the distance. | \
astronaut surface moon earth distance
The soldier stands guard near the entrance, holding a rifle in both hands. | soldier guard \
entrance rifle hand
A glass vase with fresh tulips brightens the corner of the dining room. | glass vase tulip corner \
dining room
The tiger rests in the shade, its stripes blending with the tall grass. | tiger shade stripe grass
Snow covers the rooftops of the village, and smoke rises from the chimneys. | snow rooftop \
village smoke chimney
An office worker types on a keyboard while a monitor displays several charts. | office worker \
keyboard monitor chart
Bicycles lean against the fence, and a helmet hangs from one of the handlebars. | bicycle fence \
helmet handlebar
The musician plays the violin with great emotion, her eyes closed. | musician violin emotion eye
cheap running shoes for women, free shipping | shoe woman shipping
Map of Germany with rivers and major cities | map germany river city
The image has a dreamy quality, achieved through blurred edges and muted tones. | image quality \
edge tone
Sheep graze on the hillside under a clear blue sky. | sheep hillside sky
The logo consists of a white letter on a green circle. | logo letter circle
A black cat with bright green eyes peers out from behind a curtain. | cat eye curtain
"""
NOUNS = st.sampled_from(["cat", "hat", "sea"])


def score(labelled: str) -> tuple[float, float, int]:
    """Precision, recall and sentences."""
    found = right = wanted = 0
    lines = labelled.splitlines()
    for line in lines:
        sentence, nouns = line.rsplit(" | ", 1)
        written, true = Counter(find_nouns(sentence)), Counter(nouns.split())
        right += (written & true).total()
        found += written.total()
        wanted += true.total()
    return right / found, right / wanted, len(lines)


def test_nouns_of_captions_are_found_and_little_else() -> None:
    """The figures that the module states."""
    precision, recall, count = score(FITTED + UNSEEN)
    assert (round(precision, 2), round(recall, 2), count) == (0.97, 0.98, 60)
    precision, recall, count = score(UNSEEN)
    assert (round(precision, 2), round(recall, 2), count) == (0.94, 0.99, 18)


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("A cat. CATS! The cat\u2019s cats", ["cat"] * 4),
        ("the features of a face", ["feature", "face"]),  # and no noun where it is a verb:
        ("the picture features a face", ["picture", "face"]),
        ("leaves, knives, children and glasses", ["leaf", "knife", "child", "glass"]),
        ("a snow-capped fjordscape in 4k, 1920x1080", ["fjordscape"]),
        ("see https://a.example/cats.jpg", []),
        ("eiffel tower, Paris", ["eiffel", "tower", "paris"]),
    ],
)
def test_one_concept_is_one_word_whatever_its_form(text: str, nouns: list[str]) -> None:
    assert find_nouns(text) == nouns


def test_a_noun_is_valid_when_it_appears_more_than_ten_times() -> None:
    density = measure_concepts(["a cat on a mat"] * 10 + ["a cat", "", "  "])
    assert density.counts == {"cat": 11, "mat": 10}
    assert (density.num_distinct, density.num_valid, density.valid_share) == (2, 1, 0.5)
    assert (density.num_nouns, density.num_captions) == (21, 11)
    assert density.nouns_per_caption == pytest.approx(21 / 11)


def test_nothing_has_no_density() -> None:
    empty = measure_concepts(["", " \n"])
    assert empty == ConceptDensity()
    assert (empty.valid_share, empty.nouns_per_caption) == (0, 0)


@repeatable
@given(st.lists(st.lists(NOUNS, min_size=1).map(" and ".join)), st.integers(0, 20))
def test_partitions_add_up_to_the_whole_in_any_order(texts: list[str], cut: int) -> None:
    parts = [measure_concepts(texts[cut:]), measure_concepts(texts[:cut])]
    whole = ConceptDensity()
    for part in parts:
        whole.merge(part)
    assert whole == measure_concepts(texts)


@repeatable
@given(st.text())
def test_any_text_has_lower_case_nouns(text: str) -> None:
    assert all(noun == noun.lower() and noun.strip() for noun in find_nouns(text))


def test_a_caption_of_ten_thousand_words_is_counted_whole() -> None:
    assert measure_concepts(["a red cat sits " * 2500]).counts == {"cat": 2500}
