"""Forty people by what they wear: the classes and concepts of AvatarParts."""

import numpy as np


# Concept -> what python_avatars calls it, or a colour. One of each group; eyewear, beard and hat may be missing.
CONCEPTS = {
    "hair kind": {
        "afro hair": "FRO",
        "bob haircut": "BOB",
        "hair in a bun": "BUN",
        "curly hair": "CURLY",
        "dreadlocks": "DREADS",
        "long straight hair": "STRAIGHT_STRAND",
        "short hair": "SHORT_FLAT",
        "spiky hair": "EVIL_SPIKE",
    },
    "hair colour": {
        "black hair": "#2C1B18",
        "brown hair": "#8A4B2A",
        "blond hair": "#E3BE62",
        "red hair": "#C93305",
        "white hair": "#ECE7E7",
        "pink hair": "#F07FA0",
    },
    "eyewear": {
        "black-rimmed glasses": "PRESCRIPTION_2",
        "round glasses": "ROUND",
        "sunglasses": "WAYFARERS",
        "white sunglasses": "KURT",
        "eyepatch": "EYEPATCH",
    },
    "beard": {
        "short beard": "BEARD_LIGHT",
        "full beard": "BEARD_MAGESTIC",
        "curled moustache": "MOUSTACHE_FANCY",
        "thick moustache": "MOUSTACHE_MAGNUM",
    },
    "hat": {
        "wide-brimmed hat": "HAT",
        "turban": "TURBAN",
        "beanie": "WINTER_HAT_3",
        "cat-eared beanie": "WINTER_HAT_4",
    },
    "mouth": {
        "big smile": "BIG_SMILE",
        "bared teeth": "GRIMACE",
        "open mouth": "SCREAM_OPEN",
        "tongue out": "TONGUE",
        "worried mouth": "CONCERNED",
    },
    "clothing kind": {
        "hoodie": "HOODIE",
        "dungarees": "OVERALL",
        "V-neck shirt": "SHIRT_V_NECK",
        "collared sweater": "COLLAR_SWEATER",
        "printed shirt": "GRAPHIC_SHIRT",
        "blazer": "BLAZER_SHIRT",
    },
    "clothing colour": {
        "blue clothes": "#3B7DD8",
        "red clothes": "#E5484D",
        "green clothes": "#3FA34D",
        "yellow clothes": "#F2C230",
        "purple clothes": "#8E4EC6",
        "white clothes": "#F4F4F4",
    },
}
PARTS = ("clothes", "mouth", "hair", "beard", "eyewear", "hat")  # as they are drawn, the last on top
PART_OF_GROUP = {
    "hair kind": "hair",
    "hair colour": "hair",
    "eyewear": "eyewear",
    "beard": "beard",
    "hat": "hat",
    "mouth": "mouth",
    "clothing kind": "clothes",
    "clothing colour": "clothes",
}

# Any two classes differ in at least three groups. Only hair that is seen under a hat is under one.
CLASSES = """
    Ada: spiky hair, pink hair, round glasses, short beard, tongue out, blazer, purple clothes
    Ben: short hair, blond hair, round glasses, thick moustache, bared teeth, hoodie, yellow clothes
    Cleo: long straight hair, red hair, sunglasses, curled moustache, big smile, dungarees, yellow clothes
    Dan: short hair, black hair, sunglasses, short beard, tongue out, hoodie, blue clothes
    Eva: long straight hair, brown hair, beanie, worried mouth, printed shirt, purple clothes
    Finn: dreadlocks, blond hair, short beard, turban, bared teeth, printed shirt, red clothes
    Gina: bob haircut, red hair, eyepatch, wide-brimmed hat, worried mouth, dungarees, white clothes
    Hugo: short hair, pink hair, sunglasses, tongue out, printed shirt, green clothes
    Ines: hair in a bun, white hair, sunglasses, curled moustache, bared teeth, hoodie, red clothes
    Jack: long straight hair, blond hair, full beard, cat-eared beanie, worried mouth, V-neck shirt, yellow clothes
    Kira: hair in a bun, red hair, black-rimmed glasses, full beard, big smile, V-neck shirt, yellow clothes
    Leo: dreadlocks, red hair, thick moustache, worried mouth, V-neck shirt, white clothes
    Mia: afro hair, black hair, white sunglasses, full beard, open mouth, collared sweater, white clothes
    Nils: afro hair, red hair, curled moustache, beanie, worried mouth, dungarees, purple clothes
    Olga: short hair, brown hair, eyepatch, open mouth, collared sweater, red clothes
    Paul: dreadlocks, blond hair, sunglasses, cat-eared beanie, open mouth, printed shirt, white clothes
    Quinn: curly hair, red hair, eyepatch, turban, tongue out, V-neck shirt, blue clothes
    Rosa: spiky hair, pink hair, black-rimmed glasses, big smile, hoodie, green clothes
    Sam: bob haircut, black hair, round glasses, worried mouth, collared sweater, yellow clothes
    Tess: bob haircut, blond hair, white sunglasses, worried mouth, hoodie, purple clothes
    Uma: afro hair, white hair, wide-brimmed hat, big smile, blazer, green clothes
    Vito: spiky hair, red hair, white sunglasses, tongue out, collared sweater, red clothes
    Wanda: bob haircut, white hair, open mouth, V-neck shirt, red clothes
    Xavi: dreadlocks, brown hair, short beard, bared teeth, dungarees, green clothes
    Yara: curly hair, white hair, eyepatch, cat-eared beanie, bared teeth, blazer, green clothes
    Zeno: spiky hair, brown hair, black-rimmed glasses, thick moustache, tongue out, V-neck shirt, red clothes
    Amir: curly hair, brown hair, round glasses, turban, worried mouth, blazer, red clothes
    Bea: long straight hair, black hair, white sunglasses, full beard, big smile, V-neck shirt, blue clothes
    Carl: hair in a bun, pink hair, round glasses, curled moustache, big smile, dungarees, yellow clothes
    Dora: afro hair, pink hair, cat-eared beanie, open mouth, blazer, blue clothes
    Emil: long straight hair, black hair, full beard, wide-brimmed hat, bared teeth, collared sweater, purple clothes
    Fay: afro hair, black hair, black-rimmed glasses, curled moustache, turban, bared teeth, hoodie, blue clothes
    Gus: dreadlocks, black hair, thick moustache, beanie, big smile, dungarees, green clothes
    Hana: curly hair, brown hair, eyepatch, short beard, wide-brimmed hat, open mouth, collared sweater, purple clothes
    Ivan: short hair, blond hair, bared teeth, collared sweater, blue clothes
    Jule: hair in a bun, pink hair, open mouth, dungarees, green clothes
    Kurt: bob haircut, brown hair, beanie, tongue out, hoodie, blue clothes
    Lena: curly hair, white hair, thick moustache, open mouth, printed shirt, yellow clothes
    Max: spiky hair, blond hair, black-rimmed glasses, tongue out, blazer, white clothes
    Nora: hair in a bun, white hair, big smile, printed shirt, white clothes
"""

CONCEPT_NAMES = [concept for group in CONCEPTS.values() for concept in group]
_WORN = dict(line.strip().split(": ") for line in CLASSES.strip().splitlines())
CLASS_NAMES = list(_WORN)


def concept_groups() -> dict[str, list[int]]:
    """The indices of the concepts of each group."""
    return {group: [CONCEPT_NAMES.index(concept) for concept in members] for group, members in CONCEPTS.items()}


def class_concept_matrix() -> np.ndarray:
    """`(40, 44)` uint8: what each person wears."""
    worn = [wearing.split(", ") for wearing in _WORN.values()]
    return np.array([[concept in wearing for concept in CONCEPT_NAMES] for wearing in worn], dtype=np.uint8)


def worn_by(label: int) -> dict[str, str]:
    """What the person of a class wears, by group, in python_avatars' words; groups that are missing are left out."""
    wearing = _WORN[CLASS_NAMES[label]].split(", ")
    return {
        group: name for group, members in CONCEPTS.items() for concept, name in members.items() if concept in wearing
    }


__all__ = [
    "CLASS_NAMES",
    "CONCEPTS",
    "CONCEPT_NAMES",
    "PARTS",
    "PART_OF_GROUP",
    "class_concept_matrix",
    "concept_groups",
    "worn_by",
]
