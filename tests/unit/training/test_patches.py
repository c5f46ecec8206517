from __future__ import annotations

import numpy as np
import pytest
import torch

from training.patches import Batch, Crop, cut

ROWS, COLUMNS = 11, 7
IMAGE = torch.arange(3.0, 3.0 + ROWS * COLUMNS).view(ROWS, COLUMNS)


def crop(**changes: object) -> Crop:
    facts: dict[str, object] = {
        "start": 0, "stride": COLUMNS, "rows": ROWS, "columns": COLUMNS, "turns": 0, "flip": False,
        "patch": 0, "cell": (0, 0, 12, 12),
    }  # fmt: skip
    return Crop(**(facts | changes))  # type: ignore[arg-type]


def test_patches_are_taken_out_of_a_batch_with_all_that_belongs_to_them() -> None:
    lq, hq, mask = (torch.rand(4, 1, 8, 8) for _ in range(3))
    some = Batch(lq, hq, mask, torch.tensor([2, 0, 1, 0])).rows(torch.tensor([3, 0]))
    assert torch.equal(some.task, torch.tensor([0, 2]))
    for found, given in ((some.lq, lq), (some.hq, hq), (some.mask, mask)):
        assert torch.equal(found, given[[3, 0]])


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_turned_and_flipped_as_torch_does_it(turns: int, flip: bool) -> None:
    expected = torch.rot90(IMAGE, turns)
    expected = expected.flip(1) if flip else expected
    rows, columns = expected.shape
    (found,), mask = cut([crop(turns=turns, flip=flip)], [IMAGE.flatten()], 1, 12)
    assert torch.equal(found[0, :rows, :columns], expected)
    assert torch.equal(mask[0].bool(), _corner(rows, columns))


def _corner(rows: int, columns: int) -> torch.Tensor:
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[:rows, :columns] = True
    return mask


def test_what_a_crop_does_not_fill_repeats_its_last_row_and_column() -> None:
    (found,), _ = cut([crop()], [IMAGE.flatten()], 1, 12)
    expected = np.pad(IMAGE.numpy(), ((0, 1), (0, 5)), mode="edge")
    np.testing.assert_array_equal(found[0].numpy(), expected)


def test_a_part_inside_an_image_is_found_by_its_start_and_stride() -> None:
    part = crop(start=2 * COLUMNS + 3, rows=4, columns=3, cell=(0, 0, 4, 4))
    (found,), mask = cut([part], [IMAGE.flatten()], 1, 4)
    assert torch.equal(found[0, :4, :3], IMAGE[2:6, 3:6])
    assert mask.sum() == 12


def test_cells_of_several_patches_and_several_images_stay_apart() -> None:
    cells = [(0, 0, 4, 4), (0, 4, 4, 5), (4, 0, 5, 4), (4, 4, 5, 5)]
    crops = [crop(start=k, rows=3, columns=3, patch=k // 4, cell=cells[k % 4]) for k in range(8)]
    first, second = IMAGE.flatten(), -IMAGE.flatten()
    (a, b), mask = cut(crops, [first, second], 2, 9)
    assert torch.equal(a, -b)
    assert mask.sum() == 8 * 9
    for k, (top, left, _, _) in enumerate(cells * 2):
        start = divmod(k, COLUMNS)
        expected = IMAGE[start[0] : start[0] + 3, start[1] : start[1] + 3]
        if expected.shape == (3, 3):
            assert torch.equal(a[k // 4, top : top + 3, left : left + 3], expected)


def test_integers_become_floats() -> None:
    (found,), _ = cut([crop()], [IMAGE.flatten().to(torch.int16)], 1, 12)
    assert found.dtype == torch.float32
    assert found[0, 0, 0] == 3
