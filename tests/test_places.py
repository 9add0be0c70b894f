"""Where a row was recorded, in every way that a row says it: none of them hides another."""

from __future__ import annotations

from typing import Any

import pytest
from test_splits import leak, row

from kd_cache.dataset.guard import location_in_name, select
from kd_cache.dataset.manifest import Manifest, parse_manifest, place_name
from kd_cache.errors import DataLeakageError

TEST_ROW = {"location": "barcelona-7", "city_label": 1}


@pytest.mark.parametrize("identifier", [17, "17", "0017", "rec-00012", "clip", "a1b2"])
def test_an_identifier_that_is_no_place_does_not_hide_the_location(identifier: Any) -> None:
    train = row("tr.npy", identifier=identifier, location="barcelona-7", city_label=1)
    assert "tr.npy: location barcelona-7" in leak(train, row("te.npy", split="test", identifier=99, **TEST_ROW))


@pytest.mark.parametrize("field", ["identifier", "location"])
def test_a_bare_number_is_a_place_in_its_city(field: str) -> None:
    train = row("tr.npy", **{field: 7, "city_label": 1})
    assert "tr.npy: location barcelona-7" in leak(train, row("te.npy", split="test", **TEST_ROW))


@pytest.mark.parametrize(
    "text",
    ["barcelona-7", "Barcelona 07", "barcelona.7", "barcelona7", "barcelona_007", "barcelona\u20117", "barcelona–7",
     "barcelona-\uff17", "barcelona-\u0667", " BARCELONA — 7 "],
)  # fmt: skip
def test_one_place_has_one_name_however_it_is_written(text: str) -> None:
    assert place_name(text) == "barcelona-7"


def test_composed_and_decomposed_letters_are_one_place() -> None:
    assert place_name("m\u00fcnchen-3") == place_name("mu\u0308nchen-3")


@pytest.mark.parametrize("split", ["testing", "dev-test", "test_unseen", "holdout", "held-out", "Evaluation", "eval2"])
def test_whatever_the_held_out_split_is_called(split: str) -> None:
    assert "tr.npy" in leak(row("tr.npy", location="barcelona-7"), row("te.npy", split=split, location="barcelona-7"))


def test_rows_that_only_carry_an_opaque_identifier_are_not_located_but_never_shared() -> None:
    import json

    def samples(*rows: dict[str, Any]) -> Manifest:
        return Manifest(parse_manifest(json.dumps(rows).encode(), "m"), "0" * 64)

    pair = [row(f"{number}.npy", device, identifier=f"rec-{number}") for number, device in enumerate(("A", "b"))]
    made = samples(*pair, row("te.npy", split="test", identifier="rec-9"))
    assert [(sample.location, location_in_name(sample.file)) for sample in made] == [(None, None)] * 3
    assert select(made, "b").located == 0
    with pytest.raises(DataLeakageError, match="rec-0"):
        select(samples(*pair, row("te.npy", split="test", identifier="rec-00")), "b")


def test_a_file_named_after_an_unseen_device_is_no_train_sample_of_another() -> None:
    assert "its name says s5" in leak(row("park-vienna-12-345-7-s5.npy", "A"))
