"""Which drawings of the seven sets are taken, and what the things in them are called, for `tiny/draw.py`.

Skin tones, flags, letters, brands and mirrored drawings ("... facing right") are left out, and of drawings that are the
same to the byte one is kept. A thing has one name, whatever the sets call it.
"""

import re
from collections import defaultdict

TONE = re.compile(r"(-medium)?-(light|dark)(-skin-tone)?(?=-|$)|-medium(-skin-tone)?(?=-|$)|-tone[1-5]")
LEFT_OUT = re.compile(
    r"(^|-)skin-tone|facing-right|^letter-.$|^regional-|^keycap$|^\d$|^combining-|^(curly|red|white)-hair"
)
# OpenMoji alone draws brands, regional symbols and flags that aren't in its category of flags
EXTRAS_LEFT_OUT = re.compile(
    r"(^|-)flag(-|$)|navarra|gmund|^rounded-symbol-|^(adilette|android|apple|arduino|artstation|bluesky|c|chrom.*|cplusplus|"
    r"crocs|csharp|discord|dotnet|ecosia.*|edge|element|facebook|facetime|firefox.*|github|gitlab|golang|greta-.*|ibeacon|"
    r"inaturalist|instagram|internet-explorer|intricate|javascript|jellyfin|kehrwoche|kotlin|linkedin|markdown|mastodon|"
    r"musicbrainz|netscape.*|openfoodfact|openstreetmap|opera|peertube|pinterest|pixelfed|raspberry-pi|reddit|ruby|safari|"
    r"signal|simple|spatzlepresse|svg|trump|twitter|typescript|ubuntu|ulmer-hocker|web-syndication|webassembly|wikidata|"
    r"windows|winrar|youtube)$"
)
FLAG_FRAME = "M5 17h62v38H5z"  # the outline of every OpenMoji flag: the pride flags aren't named as flags
# Where the sets' names for a thing differ by habit. What these rules leave is found by the sets' aliases (merge).
RULES = [
    (r"blonde", "blond"),
    (r"^blond-haired-person$", "person-blond-hair"),
    (r"^(man|woman|person)-deaf$", r"deaf-\1"),
    (r"^man-merpeople$", "merman"),
    (r"^woman-merpeople$", "mermaid"),
    (r"^person-merpeople$", "merperson"),
    (r"^person-(elf|fairy|genie|mage|superhero|supervillain|vampire|zombie)$", r"\1"),
    (r"^men-(with-bunny-ears|wrestling)$", r"man-\1"),
    (r"^women-(with-bunny-ears|wrestling)$", r"woman-\1"),
    (r"^people-(with-bunny-ears|wrestling)$", r"person-\1"),
    (r"^two-(wo)?men-holding", r"\1men-holding"),
    (r"^man-and-woman-holding", "woman-and-man-holding"),
    (r"-(exclamation|text)-(arrow|button)$", r"-\2"),
    (r"^(a|ab|b|o)-button$", r"\1-button-blood-type"),
    (r"^keycap-(hashtag|hash)$", "keycap-pound"),
    (r"cat-face(?=-with)|(?<=[a-z]-)cat-face$", "cat"),
    (r"^(robot|frog|bear|lion|panda|unicorn|hamster)-face$", r"\1"),
    (r"^blackbird$", "black-bird"),
    (r"^phoenix-bird$", "phoenix"),
    (r"^piata$", "pinata"),
    (r"^heavy-heart-exclamation$", "heart-exclamation"),
    (r"^bride-with-veil$", "person-with-veil"),
    (r"^man-with-chinese-cap$", "person-with-skullcap"),
    (r"^((wo)?man)s-", r"\1's-"),
    (r"oclock$", "o'clock"),
]


def wanted(name: str, icon_set: dict) -> bool:
    icon, category = icon_set["icons"][name], icon_set["category"].get(name, "")
    plain = TONE.sub("", name)
    toned = plain != name and plain in icon_set["icons"]  # "police-car-light" is no tone of a "police-car"
    hidden = icon.get("hidden")  # the set has replaced it by a newer drawing
    extra = category.startswith("Extras") and (EXTRAS_LEFT_OUT.search(name) or FLAG_FRAME in icon["body"])
    return not (toned or hidden or extra or category in ("Flags", "Modifiers") or LEFT_OUT.search(name))


def by_rule(name: str) -> str:
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def merge(sets: dict[str, dict], names: dict[str, list[str]]) -> dict[str, str]:
    """One name per thing: two names are one thing if a set has one as the other's alias and no set draws both."""
    drawn_in, related = defaultdict(set), defaultdict(set)
    for style, listed in names.items():
        for name in listed:
            drawn_in[by_rule(name)].add(style)
    for icon_set in sets.values():
        for alias, target in icon_set.get("aliases", {}).items():
            a, b = by_rule(alias), by_rule(target["parent"])
            if a in drawn_in and b in drawn_in and not drawn_in[a] & drawn_in[b] and "hFlip" not in target:
                related[a].add(b)
                related[b].add(a)
    return {name: max([name, *sorted(related[name])], key=lambda n: (len(drawn_in[n]), n)) for name in drawn_in}


def collect(sets: dict[str, dict]) -> list[dict]:
    """Everything to draw, one entry per drawing."""
    names = {style: [name for name in s["icons"] if wanted(name, s)] for style, s in sets.items()}
    thing_of, seen, jobs = merge(sets, names), set(), []
    for style, listed in names.items():
        # of equal drawings the least specific name stays: "person running", not "man running"
        for name in sorted(listed, key=lambda n: (bool(re.search(r"\b(wo)?m[ae]n\b|boy|girl", n)), len(n), n)):
            icon, thing = sets[style]["icons"][name], thing_of[by_rule(name)].replace("-", " ")
            if seen & {icon["body"], (style, thing)}:
                continue
            seen |= {icon["body"], (style, thing)}
            width, height = (icon.get(side, sets[style][side]) for side in ("width", "height"))
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            )
            jobs.append({"set": style, "name": name, "thing": thing, "svg": svg, "aspect": width / height})
    return jobs
