"""
Write short fables from a grammar whose entropy, the lowest possible loss, is known exactly.

    python data/fables/prepare.py
    python data/fables/prepare.py --train_stories=2000 --out_dir=data/few_fables
    python data/fables/prepare.py --instruct=True       # writes data/fables_instruct

A fable is a sequence of random choices: each sentence is one of a few templates, and each [slot] of
a template is filled with an option from a table. All options of a choice are equally likely, so a
fable made by choices among n_1, ..., n_k options has -log p = log n_1 + ... + log n_k nats.

The options of a choice never begin alike. Different choices therefore give different texts, and a
reader knows every choice from left to right; this is how parse() works. The mean of -log p over
a split is its entropy: no model can have a lower loss on average. A text that parse() rejects
cannot come from the grammar, for example because of a wrong name, a found thing that was never
lost, or the moral of another fable.

With --instruct, each document is a conversation: a request that names four to six facts, such as
the hero, the helper and the moral, and a fable that has them. The entropy is that of the fables,
given the requests. Tokens that only conversations need follow the vocabulary of the plain fables,
so that a model of these can be tuned.
"""
import math
import os
import random
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.chat import ChatTokenizer, chat_meta, ensure_template, render
from lib.checkpoint import make_tokenizer
from lib.configurator import at_least, configure, user_errors
from lib.corpus import finish_dataset, remove_temporary_files, write_split
from lib.tokenizer import EOT, add_tokens

# -----------------------------------------------------------------------------
train_stories = 50000  # about 130 tokens each
val_stories = 2000  # held out for validation
seed = 1337  # of the random choices
tokenizer = "pieces"  # words with the space before them; or another kind, or a model
vocab_size = 0  # at most this many tokens (0: 4,096 of bpe, 10,000 words, all others)
instruct = False  # write requests and fables that answer them
out_dir = ""  # where to write (empty: this folder, or fables_instruct beside it)
# -----------------------------------------------------------------------------


# The tables. [slot] in a template is a choice from the table of that name, {slot} repeats it.

def options(text: str) -> tuple[str, ...]:
    return tuple(" ".join(option.split()) for option in text.split(","))


SHE = options("""Fern, Hazel, Willow, Clover, Poppy, Daisy, Ivy, Juniper, Maple, Olive, Pearl, Ruby,
    Stella, Tansy, Wren, Bramble, Cinnamon, Dahlia, Ember, Flora""")
HE = options("""Alder, Basil, Cedar, Dusty, Elmer, Felix, Gus, Hector, Igor, Jasper, Kip, Leo, Milo,
    Nico, Oscar, Pip, Quentin, Rufus, Yorick, Ziggy""")

TABLES = {
    "hero": SHE + HE,
    "animal": options("""rabbit, fox, hedgehog, mouse, bear, kitten, puppy, lamb, piglet, calf,
        duckling, penguin, panda, raccoon, otter, deer, wolf, lion, tiger, elephant, monkey, zebra,
        camel, kangaroo"""),
    "trait": options("""a shy, a curious, a cheerful, a dreamy, a stubborn, a polite, a clumsy,
        a sleepy, a brave, a noisy, a tidy, a clever, a hungry, a lazy, a vain, a gentle, an eager,
        a proud, a silly, a quiet"""),
    "place": options("""beside the old windmill, under the crooked bridge, at the edge of town,
        behind the village bakery, on a windy hilltop, near the silver lake, in a hollow log,
        beyond the apple orchard, in a teapot, at the foot of the mountain, among the sand dunes,
        below the dam, in a garden full of bees, on Pepper Lane, inside a giant pumpkin,
        between two haystacks, over the toy shop, by the frozen pond, on a green island,
        along the dusty road"""),
    "hobby": options("""counting clouds, painting snails, humming to the bees, collecting acorns,
        dancing in puddles, baking mud pies, naming the stars, telling riddles, drawing maps,
        reading to chickens, juggling turnips, building sandcastles, yodeling, knitting socks,
        inventing recipes, feeding pigeons"""),
    "look": options("""a crimson, a golden, a wooden, a striped, a purple, a shiny, a spotted,
        a tiny, a blue, a green, a yellow, a scarlet, a painted, a polished, a battered, a curious,
        an orange, an enormous, an ancient, a pink"""),
    "giver": options("""grandmother, grandfather, uncle, aunt, cousin, godmother, godfather,
        neighbor, teacher, sister, brother, nanny, dentist, postman"""),
    "town": options("""Lisbon, Paris, Cairo, Vienna, Dublin, Oslo, Havana, Athens, Naples, Timbuktu,
        Boston, Kyoto"""),
    "event": options("""birthday, bath, first haircut, long nap, spelling test, swimming lesson,
        cold, vacation, school play, trip to the zoo, sneezing fit, garden party"""),
    "shelf": options("""shelf, windowsill, mantelpiece, nightstand, cupboard, cushion, balcony,
        desk"""),
    # what a hero may own, by what will happen to it
    "windy": options("""kite, balloon, hat, scarf, ribbon, feather, handkerchief, pinwheel, bonnet,
        flag, cap, shawl, letter, umbrella"""),
    "small": options("""button, coin, key, ring, marble, thimble, bead, whistle, brooch, spoon,
        bell, medal, charm, necklace"""),
    "wet": options("""boat, raft, ball, barrel, basket, bottle, drum, bucket, bowl, doll, pail, tub,
        canoe, cork"""),
    "frail": options("""teacup, vase, lamp, clock, chair, cart, violin, flute, wagon, sled, plate,
        jug, teapot, lantern"""),
    "deep": options("""trumpet, boot, mitten, slipper, watch, shovel, book, pencil, candle, comb,
        brush, compass, diary, harmonica"""),
    "treat": options("""cake, pie, loaf, pudding, tart, pancake, muffin, waffle, dumpling, pretzel,
        strudel, trifle, omelet, pizza"""),
    "plant": options("""sunflower, pumpkin, carrot, rose, tulip, bean, melon, turnip, radish,
        cucumber, poppy, cabbage, lemon, tomato"""),
    "wonder": options("""comet, lighthouse, waterfall, rainbow, ocean, circus, carnival, parade,
        eclipse, volcano, canyon, desert, fireworks, pyramids"""),
    # when it happens
    "weather": options("""foggy, chilly, misty, sunny, drizzly, cloudy, frosty, snowy, sticky, dull,
        fine, gray"""),
    "hour": options("""morning, noon, afternoon, evening, night, Sunday, Monday, Tuesday, Friday,
        Saturday"""),
    # the wind takes it
    "breeze": options("""gusty, blustery, rude, cheeky, howling, roaring, playful, warm, bitter,
        wild"""),
    "tree": options("""oak, elm, pine, birch, poplar, beech, sycamore, maple, cedar, spruce, palm,
        larch"""),
    "snatch": options("snatched, grabbed, stole, lifted, plucked, swept, whisked, pinched"),
    "thrown": options("""pebbles, pinecones, snowballs, slippers, potatoes, dumplings, walnuts,
        cushions, twigs"""),
    "flyer": options("""sparrow, squirrel, owl, woodpecker, stork, raven, heron, crow, magpie,
        parrot, bat, jay"""),
    # it is lost
    "pocket": options("""pocket, drawer, left boot, satchel, lunch box, sleeve, suitcase, pillow,
        treasure chest, schoolbag"""),
    "under": options("bed, carpet, sofa, doormat, staircase, table, blankets, piano, bathtub"),
    "behind": options("stove, curtains, barn, shed, fireplace, flowerpots, henhouse, chimney"),
    "junk": options("""a sock, an old crust, a sleeping spider, a bent nail, a chewed bone, fluff,
        a moldy pear, half a biscuit, a dry leaf, a sandwich"""),
    "finder": options("""terrier, cat, ferret, hen, beetle, weasel, ant, spaniel, goose, bloodhound,
        rat, pigeon"""),
    "nook": options("""sugar bowl, piano, birdhouse, watering can, cookie jar, cuckoo clock,
        mailbox, toolbox, beehive, flour sack"""),
    # it falls into the water
    "water": options("river, brook, pond, canal, harbor, lagoon, swamp, creek, bay, marsh"),
    "moved": options("rolled, bounced, slid, tumbled, skidded, toppled, bumped, hopped"),
    "hook": options("""stick, fishing rod, rake, butterfly net, rope, walking cane, soup spoon, mop,
        pole, chain"""),
    "swimmer": options("""frog, swan, turtle, seal, pelican, beaver, duck, toad, newt, salmon,
        dolphin, crab"""),
    # it breaks
    "crash": options("crash, crack, clatter, bang, thud, snap, crunch, tinkle, pop, smash"),
    "trip": options("""a root, a cat's tail, a loose stone, a garden gnome, a shoelace,
        a snoring tortoise, a doorstep, a puddle, a banana peel, a skateboard"""),
    "paste": options("""honey, mud, string, jam, porridge, chewing gum, tape, melted cheese, wax,
        spaghetti"""),
    "fixer": options("""ox, spider, tortoise, rooster, ram, boar, hare, gorilla, llama, yak, moose,
        stag"""),
    "trade": options("""carpenter, tinker, tailor, clockmaker, blacksmith, potter, cobbler, plumber,
        mechanic"""),
    "tool": options("""hammer, needle, saw, wrench, file, paintbrush, drill, chisel, tiny ladder,
        pot of glue"""),
    # it drops into a hole
    "pit": options("well, burrow, ditch, drain, cave, cellar, ravine, tunnel, crevice, foxhole"),
    "limb": options("arm, leg, neck, tail, nose, tongue, elbow, ear"),
    "digger": options("""worm, snake, lizard, mongoose, armadillo, meerkat, gopher, shrew, vole,
        groundhog, chipmunk, aardvark"""),
    # the treat is too good to share
    "flavor": options("""an apple, a cherry, a chocolate, a blueberry, a cinnamon, a banana,
        a walnut, a vanilla, a caramel, a ginger, an almond, a cheese"""),
    "helping": options("slice, bite, crumb, spoonful, corner, nibble, mouthful"),
    "guest": options("""sheep, tramp, peacock, snail, turkey, lynx, ostrich, flamingo, antelope,
        bison, jackal, coyote"""),
    "belly": options("belly, throat, conscience, head, heart, jaw, tummy, toe"),
    "meal": options("""Sunday, Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, breakfast,
        last week"""),
    # the seed will not hurry
    "season": options("spring, summer, autumn, winter, March, April, May, June, August, October"),
    "pot": options("""flowerpot, bathtub, boot, bucket, teacup, bowl, sandbox, backyard, drawer,
        bonnet"""),
    "coax": options("""sang to it, shouted at it, tickled it, bribed it with cookies, watered it,
        blew on it, begged it, warned it, played it a waltz, showed it a calendar"""),
    "gardener": options("""dove, ladybug, bee, plowhorse, cow, butterfly, grub, robin, grasshopper,
        moth, dormouse, hummingbird"""),
    "number": options("""two, three, four, five, six, seven, eight, nine, ten, eleven, twelve,
        thirteen"""),
    # the way there is frightening
    "gloom": options("""dark, foggy, haunted, rickety, winding, deserted, thorny, gloomy,
        whispering, steep"""),
    "road": options("forest, valley, barn, bridge, tunnel, graveyard, thicket, cave, alley, attic"),
    "fear": options("""ghosts, spiders, thunder, owls, shadows, strangers, giants, goblins, bats,
        lightning"""),
    "noise": options("""a hoot, a creak, a rustle, a growl, a whisper, a squeak, a sneeze, a howl,
        a cough"""),
    "guide": options("""firefly, glowworm, mastiff, eagle, lioness, hornet, cub, stallion,
        crocodile, falcon, grizzly, leopard"""),
    "song": options("""lullabies, sea shanties, marches, carols, nonsense, ballads, drinking songs,
        hymns"""),
    # what everybody needs
    "friend": options("""Abner, Bertha, Clementine, Doris, Edgar, Frida, Gerald, Harriet, Isolde,
        Jeremiah, Kasimir, Lavinia, Mortimer, Nadine, Ophelia, Percival, Queenie, Roderick, Sybil,
        Theodore"""),
    "air": options("""a kindly, a wise, an elderly, a cheery, a sensible, a patient, a famous,
        a nearsighted, a good-natured, a well-dressed, a retired, a generous, a barefoot,
        a talkative"""),
    "doing": options("""on a bicycle, with a suitcase, on the way to market, out for a stroll,
        carrying an umbrella, late for tea, chewing a straw, wearing two hats, munching peanuts,
        humming a polka, reading a newspaper, looking for mushrooms"""),
    "say": options("""declared, mumbled, murmured, whispered, stammered, croaked, admitted,
        explained, replied, sobbed, sighed, wailed, groaned, whimpered, sniffed"""),
    "ask": options("""asked, inquired, begged, wondered, pleaded, demanded, squeaked, piped up,
        stuttered"""),
    "adverb": options("""slowly, gently, bravely, quickly, carefully, calmly, cheerfully, quietly,
        eagerly, politely, proudly, gladly, neatly, nimbly, patiently, silently"""),
    "meekly": options("""sadly, shyly, softly, hoarsely, bitterly, nervously, faintly, timidly,
        meekly, wearily, weakly, tearfully"""),
    "joy": options("""laughed, cheered, giggled, beamed, clapped, twirled, squealed, grinned,
        hopped up and down, blushed, somersaulted, bowed"""),
    "party": options("""danced, sang, giggled, played cards, told stories, played hopscotch,
        blew bubbles, flew paper planes, counted stars, played the ukulele, sat by the fire,
        played hide-and-seek"""),
    "until": options("""sunset, midnight, bedtime, the moon rose, the rooster crowed,
        the candles burned down, supper, breakfast, the last bus left, their feet ached"""),
    "food": options("""toast, dumplings, strawberries, pickles, gingerbread, popcorn, carrots,
        cupcakes, cheese, blackberries, soup, eggs, raisins, porridge, pancakes, chestnuts"""),
    "drink": options("""lemonade, cocoa, mint tea, cold milk, apple juice, ginger ale, buttermilk,
        hot cider, coffee, plain water"""),
}

# -----------------------------------------------------------------------------
# The sentences, each a list of templates that begin differently.
# {She} {she} {Her} {her} {him} depend on the hero's name, {thing} is what the fable is about.

BEGINNING = [
    ["Once upon a time, [place], there lived [trait] [animal] named [hero].",
     "Long ago, [place], lived [trait] [animal] called [hero].",
     "There was once [trait] [animal] named [hero] who lived [place].",
     "Nobody [place] was as happy as [hero], [trait] [animal]."],
    ["{hero} loved [hobby].",
     "{Her} hobby was [hobby].",
     "All day {she} practiced [hobby]."],
    ["After {her} [event], {she} was given [look] [treasure].",
     "{Her} [giver] had sent {him} [look] [treasure] from [town].",
     "On a [shelf] {she} kept [look] [treasure].",
     "Every night {hero} slept beside [look] [treasure].",
     "One [weather] [hour] {she} baked [flavor] [treat].",
     "In [season] {she} planted a [plant] seed in a [pot].",
     "More than anything {she} wished to see the [wonder] of [town]."],
]

MEETING = [
    ["Just then [air] [helper] named [friend] came by, [doing].",
     "Along came [air] [helper] named [friend], [doing].",
     "Who should pass but [friend], [air] [helper], [doing]?"],
]

ENDING = [
    ["{hero} [joy] and thanked {friend}.",
     "{She} [joy] and kissed {friend}.",
     '"Hooray!" cried {hero} and hugged {friend}.'],
    ["They [party] until [until].",
     "Afterwards {hero} and {friend} [party].",
     "There was [drink] for {friend} and [food] for {hero}."],
]

# What goes wrong and what the hero tries; what helps; the morals. The thing decides on the plot.
PLOTS = {
    "windy": (
        [["One [weather] [hour] a [breeze] wind [snatch] the {thing} and hung it in the [tree].",
          "But a [breeze] wind [snatch] the {thing}, and it landed in the [tree]."],
         ["{hero} threw [thrown] at it and hit {her} own [limb].",
          "{She} jumped [number] times, but it was too high.",
          "The little {animal} shook the trunk, but only [thrown] came down."]],
        [['"Oh {friend}, the wind has my {thing}," [say] {hero} [meekly].',
          '"Oh {friend}, can you reach my {thing}?" [ask] the little {animal} [meekly].'],
         ["Up went {friend} and [adverb] brought down the {thing}.",
          '"Hold my hat," said {friend} and [adverb] climbed up for the {thing}.']],
        ["A friend is taller than any tree.",
         "What the wind takes, a friend brings back.",
         "Nobody is too small to ask for help.",
         "Look up, and then look around.",
         "Throwing things mends nothing."]),
    "small": (
        [["One [weather] [hour] the {thing} was gone from {her} [pocket].",
          "But when {she} opened {her} [pocket], there was no {thing}."],
         ["{hero} looked under the [under] and found [junk].",
          "{She} searched behind the [behind], where there was only [junk].",
          "The little {animal} turned over the [under] [number] times."]],
        [['"Oh {friend}, I have lost my {thing}," [say] {hero} [meekly].',
          '"Oh {friend}, have you seen my {thing}?" [ask] the little {animal} [meekly].'],
         ["Then {friend} [adverb] sniffed around and found the {thing} in the [nook].",
          '"Stand still," said {friend} and [adverb] pulled the {thing} from the [nook].']],
        ["Four eyes see more than two.",
         "Things are lost alone and found together.",
         "A tidy house is good, but a good friend is better.",
         "Whoever seeks with a friend has already found something.",
         "Look last where you looked first."]),
    "wet": (
        [["One [weather] [hour] the {thing} [moved] down the bank into the [water].",
          "But the {thing} [moved] off the bridge and into the [water]."],
         ["{hero} fished for it with a [hook], but it drifted away.",
          "{She} leaned out with a [hook] and fell in up to the [limb].",
          "The little {animal} could not swim and called [number] times for help."]],
        [['"Oh {friend}, there floats my {thing}," [say] {hero} [meekly].',
          '"Oh {friend}, could you save my {thing}?" [ask] the little {animal} [meekly].'],
         ["In dived {friend} and [adverb] pushed the {thing} ashore.",
          '"Nothing easier," said {friend} and [adverb] towed back the {thing}.']],
        ["Leave the swimming to those who can swim.",
         "Still water runs deep, but friendship runs deeper.",
         "It is no shame to be pulled ashore.",
         "Every river has two banks, and a friend knows both.",
         "Learn to swim before you learn to sail."]),
    "frail": (
        [["One [weather] [hour] {she} tripped over [trip] and, [crash], the {thing} broke.",
          "But with a loud [crash] the {thing} broke in [number] pieces."],
         ["{hero} mended it with [paste], but it came apart.",
          "{She} tried [paste], which made a terrible mess.",
          "The little {animal} hid the pieces in {her} [pocket]."]],
        [['"Oh {friend}, I broke my {thing}," [say] {hero} [meekly].',
          '"Oh {friend}, can my {thing} be mended?" [ask] the little {animal} [meekly].'],
         ["Then {friend}, a [trade], took out a [tool] and [adverb] repaired the {thing}.",
          '"Lucky that I am a [trade]," said {friend} and [adverb] fixed the {thing} '
          "with a [tool]."]],
        ["Mistakes can be mended if you own up to them.",
         "The right tool is good, and the right friend is better.",
         "What is broken is not yet lost.",
         "Hiding the pieces never fixed the pot.",
         "Jam is for bread."]),
    "deep": (
        [["One [weather] [hour] the {thing} slipped and dropped into a [pit].",
          "But while {she} was [hobby], the {thing} vanished down a [pit]."],
         ["{hero} reached in and got {her} [limb] stuck.",
          "{She} let down a [hook], but it was too short.",
          "The little {animal} shouted [number] times, and only an echo answered."]],
        [['"Oh {friend}, it swallowed my {thing}," [say] {hero} [meekly].',
          '"Oh {friend}, how do I get my {thing} out?" [ask] the little {animal} [meekly].'],
         ["Down crept {friend} and [adverb] carried up the {thing}.",
          '"I adore the dark," said {friend} and [adverb] returned with the {thing}.']],
        ["No hole is so deep that a friend cannot climb down.",
         "Those who live low may lift you high.",
         "Do not measure a helper by size.",
         "Before you reach into the dark, ask who lives there.",
         "Hold tight to what you love."]),
    "treat": (
        [['"This {thing} is all mine," {she} [say] and locked the door.',
          "It smelled so good that {she} hid the {thing} under the [under]."],
         ["{hero} ate one [helping] after another until {her} [belly] ached.",
          "{She} swallowed [number] pieces and could not even smile.",
          "The little {animal} chewed alone, and each [helping] tasted of dust."]],
        [['"I have eaten nothing since [meal]," said {friend} [meekly].',
          '"Is that your {thing}?" said {friend} [meekly].'],
         ["So {hero} blushed and [adverb] cut the {thing} in [number].",
          '"Come in," said the little {animal} and [adverb] shared the {thing}.']],
        ["Half of a treat, shared, is more than the whole.",
         "Sweet things turn sour behind a locked door.",
         "The best spice is company.",
         "An empty chair makes a poor guest.",
         "A full table needs full chairs."]),
    "plant": (
        [["After [number] days there was no {thing} yet.",
          "But the {thing} would not grow."],
         ["{hero} [coax], and nothing happened.",
          "{She} dug it up [number] times to see whether it was awake.",
          "The little {animal} [coax] and [coax]."]],
        [['"Oh {friend}, my {thing} is too slow," [say] {hero} [meekly].',
          '"Oh {friend}, how do I hurry my {thing}?" [ask] the little {animal} [meekly].'],
         ['"Wait [number] nights," said {friend}, and at last the {thing} [adverb] opened.',
          "Then {friend} [adverb] covered it, and in [number] days the {thing} was in bloom."]],
        ["Good things come to those who water and wait.",
         "You cannot pull a flower taller.",
         "Patience is the best gardener.",
         "A seed keeps its own clock.",
         "Nothing grows faster for being watched."]),
    "wonder": (
        [["But the way led through a [gloom] [road], and {she} was afraid of [fear].",
          "Sadly, between {him} and the {thing} lay a [gloom] [road] full of [fear]."],
         ["{hero} set out [number] times and ran home at [noise].",
          "{She} heard [noise] and hid {her} [limb] in a bush.",
          "The little {animal} got as far as the gate, where [noise] made {him} faint."]],
        [['"Oh {friend}, I shall never see the {thing}," [say] {hero} [meekly].',
          '"Oh {friend}, are there really [fear] on the way?" [ask] the little {animal} [meekly].'],
         ["Then {friend} took {her} hand, sang [song], and [adverb] they walked to the {thing}.",
          '"Hold on to my [limb]," said {friend} and [adverb] led {him} to the {thing}.']],
        ["Courage is fear that has found company.",
         "A song makes every road shorter.",
         "The dark is only the day with its eyes shut.",
         "Brave is whoever takes the second step.",
         "Most ghosts are laundry."]),
}
TREASURES = ("windy", "small", "wet", "frail", "deep")
HELPERS = {"windy": "flyer", "small": "finder", "wet": "swimmer", "frail": "fixer",
           "deep": "digger", "treat": "guest", "plant": "gardener", "wonder": "guide"}
PLOT_OF = {thing: plot for plot in PLOTS for thing in TABLES[plot]}
TABLES["treasure"] = tuple(thing for plot in TREASURES for thing in TABLES[plot])


# -----------------------------------------------------------------------------
# Writing and parsing

class NotAFable(ValueError):
    """The text cannot come from the grammar. The message says where it departs from it."""


def tell(choose: Callable[[str, tuple[str, ...]], int]) -> tuple[str, dict[str, str]]:
    """
    Return a fable and its facts: the first option chosen for each slot, the thing and the moral.

    choose: a function of the text so far and the options for what comes next, which returns the
    index of an option. With random numbers this writes a fable, with a finished text it parses it.
    """
    facts: dict[str, str] = {}
    text = ""

    def fill(template: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: facts[match[1]], template)

    def add_choice(slot: str) -> None:
        nonlocal text
        table = TABLES[HELPERS[PLOT_OF[facts["thing"]]] if slot == "helper" else slot]
        option = table[choose(text, table)]
        facts.setdefault(slot, option)
        text += option
        if slot == "hero":
            she, her, him = ("She", "her", "her") if facts["hero"] in SHE else ("He", "his", "him")
            facts.update(She=she, her=her, him=him, she=she.lower(), Her=her.capitalize())
        if slot in ("treasure", "treat", "plant", "wonder"):
            facts["thing"] = facts[slot]

    def add_sentence(templates: list[str], space: str) -> None:
        nonlocal text
        text += space
        beginnings = tuple(fill(template.split("[")[0]) for template in templates)
        template = templates[choose(text, beginnings)]
        for words, slot in re.findall(r"([^\[]*)(?:\[(\w+)\])?", template):
            text += fill(words)
            if slot:
                add_choice(slot)

    def add_paragraph(sentences: list[list[str]]) -> None:
        for i, templates in enumerate(sentences):
            add_sentence(templates, "" if not text else " " if i else "\n\n")

    add_paragraph(BEGINNING)
    trouble, rescue, morals = PLOTS[PLOT_OF[facts["thing"]]]
    add_paragraph(trouble + MEETING)
    add_paragraph(rescue + ENDING)
    add_paragraph([morals])
    facts["moral"] = text.rsplit("\n", 1)[-1]
    return text, facts


def write_story(rng: random.Random) -> tuple[str, dict[str, str], float]:
    """Return a random fable, its facts and its -log p in nats."""
    nats = 0.0

    def choose(text: str, options: tuple[str, ...]) -> int:
        nonlocal nats
        nats += math.log(len(options))
        return rng.randrange(len(options))

    return *tell(choose), nats


def write_stories(seed: str, n: int) -> list[tuple[str, float]]:
    """Return n random fables and their -log p in nats, always the same for a seed."""
    rng = random.Random(seed)
    return [(text, nats) for text, _, nats in (write_story(rng) for _ in range(n))]


def begins_with(text: str, option: str) -> bool:
    """Return whether text begins with option, and not in the middle of a word."""
    inside_word = option[-1:].isalnum() and text[len(option):][:1].isalnum()
    return text.startswith(option) and not inside_word


def parse(text: str) -> tuple[list[int], float]:
    """
    Return the choices that make a text, as indices of options, and its -log p in nats.

    Raises NotAFable if no choices make it.
    """
    choices, nats = [], 0.0

    def choose(start: str, options: tuple[str, ...]) -> int:
        nonlocal nats
        if not text.startswith(start):
            same = len(os.path.commonprefix([start, text]))
            raise NotAFable(f"after {text[:same][-40:]!r} no fable continues with "
                            f"{text[same:][:20]!r}")
        rest = text[len(start):]
        fits = [i for i, option in enumerate(options) if begins_with(rest, option)]
        if len(fits) != 1:
            raise NotAFable(f"after {start[-40:]!r} no fable continues with {rest[:20]!r}")
        choices.append(fits[0])
        nats += math.log(len(options))
        return fits[0]

    if tell(choose)[0] != text:
        raise NotAFable("the text continues after the end of the fable")
    return choices, nats


def facts_of(text: str) -> dict[str, str]:
    """Return the facts of a fable, see tell(). Raises NotAFable if text is not a fable."""
    choices = iter(parse(text)[0])
    return tell(lambda *_: next(choices))[1]


# -----------------------------------------------------------------------------
# Requests: a sentence of FIRST and two of MORE that name other slots, four to six together. Every
# fable has all of these slots. With fewer facts per request, some were not learned in five minutes.

FIRST = ["Tell me about [hero] the [animal] and the [thing].",
         "Tell me a fable about a [animal] named [hero] and the [thing].",
         "Write a fable about [trait] [animal] named [hero].",
         "Tell me a fable in which [trait] [animal] meets [friend].",
         "Who was [hero], the [animal] who loved [hobby]?",
         "Tell me a story of [hero], who lived [place].",
         "I want to hear about [hero] and [friend] the [helper].",
         "How did the [animal] who loved [hobby] meet [friend]?"]
MORE = ['The moral is "[moral]"',
          'It must end with "[moral]"',
          "Let [friend] the [helper] come by.",
          "A [helper] should help.",
          "It happens [place].",
          "The hero loves [hobby].",
          "It is about the [thing]."]
SLOT = re.compile(r"\[(\w+)\]")
THING = re.compile(r"\[(treasure|treat|plant|wonder)\]")
REQUESTS = [f"{first} {second} {third}" for first in FIRST
            for second, third in permutations(MORE, 2)
            if len(slots := SLOT.findall(first + second + third)) == len(set(slots))]


def named_facts(text: str) -> dict[str, str]:
    """Return the facts that a request names, or {}. There may be control tokens around it."""
    for request in REQUESTS:
        pattern = SLOT.sub(r"(?P<\1>.+)", request.replace("?", "[?]").replace(".", "[.]"))
        if match := re.search(re.sub(r"\b([Aa]) (?=\()", r"\1n? ", pattern), text):
            return match.groupdict()
    return {}


def probability_of(facts: dict[str, str]) -> float:
    """
    Return the probability that a fable has these facts.

    The thing decides the plot, and the plot decides the possible helpers and morals. The other
    slots are independent, and their options equally likely.
    """
    def share(slot: str, table: Sequence[str]) -> float:
        return (facts[slot] in table) / len(table) if slot in facts else 1.0

    p = 0.0
    for sentence in BEGINNING[-1]:  # each introduces one thing
        things = TABLES[THING.search(sentence)[1]]
        for thing in things:
            if facts.get("thing", thing) == thing:
                plot = PLOT_OF[thing]
                p += (share("helper", TABLES[HELPERS[plot]]) * share("moral", PLOTS[plot][2])
                      / len(things) / len(BEGINNING[-1]))
    for slot in facts:
        if slot not in ("thing", "helper", "moral"):
            p /= len(TABLES[slot])
    return p


def is_held_out(named: dict[str, str]) -> bool:
    """Return whether requests for these facts are for validation only: a fifth of all sets."""
    return zlib.crc32(repr(sorted(named.items())).encode()) % 5 == 0


def write_conversations(seed: str, n: int, held_out: bool) -> list[tuple[str, str, float]]:
    """
    Return n requests, fables that answer them, and -log p in nats of a fable given its request.

    Every kind of request is equally likely for every fable, so p(fable | request) is p(fable) /
    p(facts).
    """
    rng, conversations = random.Random(seed), []
    while len(conversations) < n:
        fable, facts, nats = write_story(rng)
        request = rng.choice(REQUESTS)
        named = {slot: facts[slot] for slot in SLOT.findall(request)}
        if is_held_out(named) == held_out:
            for slot, value in named.items():
                request = request.replace(f"[{slot}]", value)
            request = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", request)
            conversations.append((request, fable, nats + math.log(probability_of(named))))
    return conversations


# -----------------------------------------------------------------------------

def instruct_texts(sizes: dict[str, int], seed: int, tokenizer) -> tuple[dict, dict, object, dict]:
    """
    Write conversations for each split, whose sizes are given.

    Return their texts; the fables with their nats; a tokenizer that also has the requests; and
    entries for meta.json.
    """
    rows = {split: write_conversations(f"{seed} {split} instruct", n, split == "val")
            for split, n in sizes.items()}
    parts = [part for split in sizes for row in rows[split] for part in row[:2]]
    tokenizer, template = ensure_template(add_tokens(tokenizer, parts), "")
    texts = {split: [render(template, [{"role": "user", "content": request},
                                       {"role": "assistant", "content": fable}], tokenizer)
                     for request, fable, _ in rows[split]] for split in sizes}
    fables = {split: [row[1:] for row in rows[split]] for split in sizes}
    return texts, fables, ChatTokenizer(tokenizer), chat_meta(template, tokenizer)


def prepare(folder: Path, train_stories: int, val_stories: int, seed: int, kind: str,
            vocab_size: int, instruct: bool = False) -> None:
    sizes = {"train": train_stories, "val": val_stories}
    print(f"writing {train_stories + val_stories:,} fables ...", flush=True)
    stories = {split: write_stories(f"{seed} {split}", n) for split, n in sizes.items()}
    texts = {split: [text for text, _ in stories[split]] for split in sizes}
    specials = None if kind == "word" else (EOT,)
    trained = make_tokenizer(kind, texts["train"] + texts["val"], vocab_size, specials)
    more = {}
    if instruct:  # the fables above only gave the vocabulary
        texts, stories, trained, more = instruct_texts(sizes, seed, trained)
    with remove_temporary_files(folder):
        splits = {split: write_split(folder, split, texts[split], trained, n)
                  for split, n in sizes.items()}
        if trained.unk >= 0:  # without capitals and rare words the entropy is another
            finish_dataset(folder, trained, splits, **more)
            return
        fables = [fable for fable, _ in stories["val"]]
        nats = math.fsum(nats for _, nats in stories["val"])
        # the token after a fable, which ends it, is also predicted
        floor = nats / (sum(map(len, trained.encode_many(fables))) + len(fables))
        floor_bits_per_byte = nats / math.log(2) / sum(len(fable.encode()) for fable in fables)
        finish_dataset(folder, trained, splits, floor=floor,
                       floor_bits_per_byte=floor_bits_per_byte, **more)
    print(f"entropy of the validation split, the lowest possible loss: {floor:.4f} nats per token")


if __name__ == "__main__":
    configure(globals(), train_stories=at_least(1), val_stories=at_least(1), seed=at_least(0),
              vocab_size=at_least(0, at_most=65536))
    with user_errors():
        folder = HERE.with_name("fables_instruct") if instruct else HERE
        folder = Path(out_dir) if out_dir else folder
        prepare(folder, train_stories, val_stories, seed, tokenizer, vocab_size, instruct)
