"""Word lists and distinct adjective-noun keys for synthetic tasks."""

from __future__ import annotations

from math import lcm
from random import Random

from attnsieve.errors import require

_ADJECTIVES = (
    "able amber ample ancient angry arctic bashful bitter blank bold brave breezy brief bright brisk broad broken bronze "
    "calm careful cheerful chilly civil clean clear clever cloudy clumsy coarse cold common cosmic crimson crisp curious "
    "curly damp daring dark deep dense distant dizzy double dry dull dusty eager early earnest easy elder elegant empty "
    "even exact fading faint fair famous fancy fast fearless feeble fierce final fine firm flat fluffy foggy fond formal "
    "fragile frank fresh friendly frozen full fuzzy gentle giant glad gloomy golden graceful grand grateful great greedy "
    "green grim hairy half handy happy hardy harsh hasty hazy heavy hidden hollow honest humble hungry icy idle jolly keen "
    "kind large lazy lean light little lively lonely long loud lovely loyal lucky mellow merry mild minor misty modern "
    "modest muddy narrow neat nervous nimble noble noisy northern novel odd orange pale patient plain playful polite proud "
    "purple quick quiet rapid rare red restless rich rough round royal rusty salty scarce secret serious shady sharp shiny "
    "short shy silent silver simple sleepy slender slow small smooth sober soft solid sour spare stale steady steep stern "
    "stormy strange strict sturdy subtle sudden sunny sweet swift tall tame tender thick thin tidy tiny tough upper urban "
    "vague vast vivid warm weary wet white wide wild wise witty wooden yellow young"
)

_NOUNS = (
    "acorn actor album anchor ankle apple arch armor arrow artist atlas author axle badge baker balcony ball bamboo banana "
    "banjo barn barrel basket beach beacon bear beaver bell bench berry bird blanket boat bone book bottle boulder bowl "
    "branch brick bridge broom brush bucket buffalo butter cabin cactus camel camera candle canoe canyon captain carpet "
    "carrot castle cattle cave cello chain chair chapel cherry chimney circle circus clock cloud coach coast cobra coin "
    "comet compass copper coral corner cotton cousin cradle crane crayon creek cricket crown cube curtain dancer desert "
    "diamond dolphin donkey door dragon drawer drum eagle engine falcon farmer feather fence ferry fiddle finger flag flute "
    "forest fork fossil fountain galaxy garden garlic gate ghost ginger glacier glove goat guitar hammer harbor hawk hedge "
    "helmet hermit hill honey horse hotel island jacket jar jewel jungle kettle kite kitten ladder lake lantern lemon "
    "letter library lion lizard locket magnet mango maple marble market meadow medal melon mirror monkey moon mountain "
    "museum needle nest oasis ocean olive onion orchard otter oven owl paddle palace panda paper parade parrot peach pearl "
    "pebble pencil pepper piano pigeon pillow pilot pine planet pocket pony potato prairie puzzle rabbit raven ribbon river "
    "rocket saddle salmon school shadow sheep shelf ship shovel singer spider spoon square statue stone street sugar table "
    "tailor teapot temple thumb tiger tower trumpet tunnel turtle valley village violin wagon walnut whale window wizard "
    "wolf zebra"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def distinct_keys(random: Random, count: int) -> list[str]:
    """`count` different "adjective-noun" keys; single words repeat only where there are more keys than words, and then evenly.

    Raises UserError beyond the number of pairs that the lists give.
    """
    pairs = lcm(len(ADJECTIVES), len(NOUNS))
    require(count <= pairs, f"there are {pairs} different adjective-noun keys, {count} were asked for: use a shorter length")
    adjectives, nouns = (random.sample(words, len(words)) for words in (ADJECTIVES, NOUNS))
    # Two cycles of different length do not meet in the same pair before both are through.
    keys = [f"{adjectives[place % len(adjectives)]}-{nouns[place % len(nouns)]}" for place in range(count)]
    return random.sample(keys, count)
