from __future__ import annotations

import numpy as np
import pytest

from training.phantoms import body_pet, chest_ct
from training.uptake import WATER_PER_MM, embed_crop, fdg_from_ct, largest_extent_mm


def test_fdg_lies_in_the_body_and_not_in_the_table() -> None:
    chest = chest_ct(3, 128)
    rng = np.random.default_rng(0)
    activity, attenuation = fdg_from_ct(
        chest.volume, chest.spacing_mm, size=128, pixel_mm=4.0, rng=rng
    )
    assert activity.shape == attenuation.shape == (3, 128, 128)
    y = (np.arange(128) - 63.5) * 4.0
    table, spine = np.abs(y - 132) < 5, np.abs(y - 66) < 5
    centre = slice(60, 68)
    assert activity[:, table].max() == attenuation[:, table].max() == 0
    assert activity[:, spine, centre].min() > 0.3
    assert activity.min() >= 0
    assert activity[:, 0].max() == 0


def test_attenuation_is_that_of_tissue() -> None:
    chest = chest_ct(2, 128)
    _, attenuation = fdg_from_ct(
        chest.volume, chest.spacing_mm, size=128, pixel_mm=4.0, rng=np.random.default_rng(0)
    )
    x = y = (np.arange(128) - 63.5) * 4.0
    heart = attenuation[:, np.abs(y + 20) < 15][:, :, np.abs(x - 20) < 15]
    lung = attenuation[:, np.abs(y + 30) < 15][:, :, np.abs(x - 85) < 10]
    assert np.median(heart) == pytest.approx(WATER_PER_MM * 1.08, rel=0.04)
    assert np.median(lung) == pytest.approx(WATER_PER_MM * 0.14, rel=0.3)


def test_uptake_varies_with_the_seed_alone() -> None:
    chest = chest_ct(2, 96)
    first, again, other = (
        fdg_from_ct(
            chest.volume,
            chest.spacing_mm,
            size=96,
            pixel_mm=5.0,
            rng=np.random.default_rng(seed),
        )[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_air_alone_gives_no_activity() -> None:
    air = np.full((2, 40, 40), -1000, np.float32)
    activity, attenuation = fdg_from_ct(
        air, (5.0, 2.0, 2.0), size=48, pixel_mm=4.0, rng=np.random.default_rng(0)
    )
    assert activity.max() == attenuation.max() == 0


def test_a_crop_keeps_its_values_where_it_lies() -> None:
    suv = np.random.default_rng(0).uniform(0.3, 5, (2, 21, 30)).astype(np.float32)
    activity, attenuation, (rows, columns) = embed_crop(suv, pixel_mm=5.0, size=96)
    np.testing.assert_array_equal(activity[:, rows, columns], suv)
    # A body of 220 mm at least surrounds the crop.
    through = attenuation[0, 48].sum() * 5.0
    assert through == pytest.approx(WATER_PER_MM * 220, rel=0.06)
    assert activity[:, 0].max() == 0


def test_a_whole_body_stays_alone_and_its_air_does_not_attenuate() -> None:
    body = body_pet(2, 64)
    activity, attenuation, (rows, columns) = embed_crop(
        body.volume, pixel_mm=body.spacing_mm[1], size=96
    )
    outside = np.ones((96, 96), bool)
    outside[rows, columns] = False
    assert activity[:, outside].max() == 0
    wide = attenuation[0, 48].sum() * body.spacing_mm[1] / WATER_PER_MM
    assert 280 < wide < 400
    assert attenuation[:, 48, 40].min() > 0  # the lungs are inside


def test_an_image_beyond_the_field_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        embed_crop(np.ones((1, 90, 90), np.float32), pixel_mm=4.0, size=96)


def test_the_extent_is_the_diagonal_in_mm() -> None:
    assert largest_extent_mm((5, 300, 400), (2.0, 1.0, 1.0)) == pytest.approx(500)
