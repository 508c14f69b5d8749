"""The error breakdown: a hand-made image and the cost of each type, and sums over random images."""

import numpy as np
import pytest
from hypothesis import strategies as st

from fusedet import evaluation
from fusedet.evaluation.error_analysis import ERROR_TYPES
from properties import property_test
from test_evaluate import GUESSES, OBJECTS, dataset, result

CAT, DOG = 7, 3  # category ids of labels 0 and 1
BOX, FAR = (10, 10, 110, 110), (150, 150, 190, 190)


def part(share):
    """A box inside BOX that overlaps it by `share`."""
    return (10, 10, 10 + 100 * share, 110)


def count_types(images, results, **options):
    errors = evaluation.analyze_errors(dataset(images, **options), results)
    assert list(errors["types"]) == list(ERROR_TYPES)
    return errors["AP50"], {
        name: (row["count"], row["dAP"]) for name, row in errors["types"].items() if row["count"] or row["dAP"]
    }


def detection(box, category, score=0.9):
    return result(1, category, box, score)


def test_no_error():
    assert count_types([[(BOX, 0, False)]], [detection(BOX, CAT)]) == (pytest.approx(1), {})


def test_missed():
    # without the missed object the other one is all there is; before, recall ends at 1/2: 51 of 101 levels
    ap, errors = count_types([[(BOX, 0, False), (FAR, 0, False)]], [detection(BOX, CAT)])
    assert ap == pytest.approx(51 / 101)
    assert errors == {"missed": (1, pytest.approx(50 / 101))}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.499])
def test_localization(share):
    assert count_types([[(BOX, 0, False)]], [detection(part(share), CAT)]) == (
        0,
        {"localization": (1, pytest.approx(1))},
    )


@pytest.mark.parametrize("share", [0.5, 0.8, 1])
def test_classification(share):
    # of two classes only the cat has an object; mended, the detection is a cat
    assert count_types([[(BOX, 0, False)]], [detection(part(share), DOG)]) == (
        0,
        {"classification": (1, pytest.approx(1))},
    )


@pytest.mark.parametrize("share", [0.11, 0.499])
def test_both(share):
    # the object is missed too: no detection that its place or its class alone would correct lies on it; without it no
    # class has an object
    errors = evaluation.analyze_errors(dataset([[(BOX, 0, False)]]), [detection(part(share), DOG)])
    assert {name: row["count"] for name, row in errors["types"].items() if row["count"]} == {"both": 1, "missed": 1}


@pytest.mark.parametrize("box", [FAR, (10, 10, 19, 110)])
def test_background(box):
    # the false one comes first: precision 1/2 becomes 1
    ap, errors = count_types([[(BOX, 0, False)]], [detection(BOX, CAT, 0.5), detection(box, CAT)])
    assert (ap, errors) == (pytest.approx(0.5), {"background": (1, pytest.approx(0.5))})
    assert count_types([[]], [detection(BOX, CAT)])[1]["background"][0] == 1, (
        "in an image without objects all is background"
    )


def test_overlap_at_the_edge_of_the_background():
    """0.1 of an object of the own class is a place, of another class background; to the bit, in a box of 10."""
    ten, tenth = (0, 0, 10, 10), (0, 0, 10, 1)
    assert "localization" in count_types([[(ten, 0, False)]], [detection(tenth, CAT)])[1]
    assert "background" in count_types([[(ten, 0, False)]], [detection(tenth, DOG)])[1]


def test_duplicate():
    # right, its duplicate, then the second object: precision at recall 1 is 2/3, without the duplicate 1
    guesses = [detection(BOX, CAT), detection(part(0.8), CAT, 0.8), detection(FAR, CAT, 0.5)]
    ap, errors = count_types([[(BOX, 0, False), (FAR, 0, False)]], guesses)
    assert ap == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert errors == {"duplicate": (1, pytest.approx(50 / 3 / 101))}


def test_place_goes_before_class():
    """It overlaps a cat by 0.4 and a dog wholly: a cat in the wrong place."""
    _, errors = count_types([[(BOX, 0, False), (part(0.4), 1, False)]], [detection(part(0.4), CAT)])
    assert {name: count for name, (count, _) in errors.items()} == {"localization": 1, "missed": 1}


def test_only_the_best_detection_on_an_object_is_mended():
    """Two shifted ones on one object: the better becomes right, the other goes; AP is 1, not 1 with a false one."""
    ap, errors = count_types([[(BOX, 0, False)]], [detection(part(0.4), CAT, 0.5), detection(part(0.3), CAT, 0.9)])
    assert (ap, errors) == (0, {"localization": (2, pytest.approx(1))})


def test_a_mended_detection_keeps_its_score():
    # the badly placed one at 0.3 stays behind the false one at 0.6: right, false, right gives 2/3 from recall 1/2 on
    images = [[(BOX, 0, False), (FAR, 0, False)]]
    guesses = [detection(FAR, CAT, 0.9), detection((120, 0, 130, 10), CAT, 0.6), detection(part(0.4), CAT, 0.3)]
    ap, errors = count_types(images, guesses)
    assert ap == pytest.approx(51 / 101)
    assert errors == {"localization": (1, pytest.approx(50 * 2 / 3 / 101)), "background": (1, 0)}


def test_localization_error_on_a_matched_object_is_removed():
    """The object is matched: the badly placed detection of higher score cannot become right too."""
    ap, errors = count_types([[(BOX, 0, False)]], [detection(part(0.4), CAT, 0.9), detection(BOX, CAT, 0.5)])
    assert (ap, errors) == (pytest.approx(0.5), {"localization": (1, pytest.approx(0.5))})


def test_best_of_place_and_class_on_one_object():
    """A shifted cat (0.9) and a dog (0.8) on one cat: only the better one can be corrected; the cat is not missed."""
    _, errors = count_types([[(BOX, 0, False)]], [detection(part(0.4), CAT, 0.9), detection(BOX, DOG, 0.8)])
    assert errors == {"localization": (1, pytest.approx(1)), "classification": (1, 0)}


def test_ignored_objects_have_no_type():
    assert count_types([[(BOX, 0, False), (FAR, 0, True)]], [detection(BOX, CAT), detection(FAR, CAT, 0.95)])[1] == {}
    assert (
        count_types([[(BOX, 0, False), (FAR, 1, True)]], [detection(BOX, CAT), detection(FAR, CAT, 0.95)])[1][
            "background"
        ][0]
        == 1
    )


def test_nothing_at_all():
    ap, errors = count_types([[], []], [])
    assert np.isnan(ap)
    assert errors == {}
    ap, errors = count_types([[(BOX, 0, False)]], [])
    assert ap == 0
    assert errors["missed"][0] == 1


@property_test(100, st.lists(st.tuples(OBJECTS, GUESSES), min_size=1, max_size=3))
def test_every_false_positive_and_every_missed_object_has_one_type(images):
    """True positives, counted in plain loops, and the five types are all detections.

    An object without a match is missed or has a detection on it.
    """
    ids = (4, 1, 9)
    objects = [[o for o in own if not o[2]] for own, _ in images]
    data = dataset(objects, names=("a", "b", "c"), ids=ids)
    results = [result(i, ids[k], box, score) for i, (_, own) in enumerate(images, 1) for box, k, score in own]
    errors = evaluation.analyze_errors(data, results)
    assert errors["AP50"] == pytest.approx(evaluation.evaluate_coco(data, results)["AP50"], abs=1e-12, nan_ok=True)
    counts = {name: row["count"] for name, row in errors["types"].items()}
    hits = sum(hits_of_a_image(own, guesses) for own, (_, guesses) in zip(objects, images, strict=True))
    assert hits + sum(counts[name] for name in ERROR_TYPES[:5]) == len(results)
    lost = sum(map(len, objects)) - hits
    assert lost - counts["localization"] - counts["classification"] <= counts["missed"] <= lost
    assert all(row["dAP"] >= 0 for row in errors["types"].values())


def hits_of_a_image(objects, guesses):
    """Count the objects matched at IoU 0.5, detection by detection, best first."""
    free = list(range(len(objects)))
    count = 0
    for box, k, _ in sorted(guesses, key=lambda guess: -guess[2]):
        near = [(overlap(box, objects[j][0]), -j) for j in free if objects[j][1] == k]
        best = max(near, default=(0, 0))
        if best[0] >= 0.5:
            free.remove(-best[1])
            count += 1
    return count


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0) * max(height, 0)
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)
