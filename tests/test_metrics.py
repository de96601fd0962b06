"""metrics: against scikit-image, values worked out by hand, and what is wrong with the wrapped figure."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lesa.metrics import psnr, psnr_wrapped, ssim

METRICS = [psnr, psnr_wrapped, ssim]


def random_images(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((*shape, 3))


def noisy(images: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(images + scale * np.random.default_rng(len(images)).standard_normal(images.shape), 0, 1)


def test_psnr_equals_scikit_image(seed):
    references = random_images(3, 20, 24, seed=seed)
    images = noisy(references, 0.05)
    expected = [peak_signal_noise_ratio(r, i, data_range=1) for r, i in zip(references, images, strict=True)]
    assert psnr(images, references) == pytest.approx(expected, abs=1e-10)


def test_psnr_by_hand():
    black = np.zeros((8, 8, 3))
    for difference, expected in ((1.0, 0.0), (0.1, 20.0), (0.01, 40.0)):
        assert psnr(black + difference, black) == pytest.approx([expected], abs=1e-9)


def test_psnr_is_an_images_own_figure():
    black = np.zeros((2, 8, 8, 3))
    assert psnr(np.stack([black[0], black[1] + 0.1]), black) == pytest.approx([math.inf, 20.0])


def test_identical_images(seed):
    images = random_images(2, 16, 16, seed=seed)
    for metric, expected in ((psnr, math.inf), (psnr_wrapped, math.inf), (ssim, 1.0)):
        assert metric(images, images).tolist() == [expected, expected]


def test_psnr_wrapped_equals_psnr_while_no_square_reaches_256():
    reference = np.full((8, 8, 3), 100 / 255)
    image = np.full((8, 8, 3), 115 / 255)
    assert psnr_wrapped(image, reference) == pytest.approx(psnr(image, reference))


def test_psnr_wrapped_takes_16_levels_for_none():
    reference = np.full((8, 8, 3), 100 / 255)
    image = np.full((8, 8, 3), 116 / 255)
    assert psnr_wrapped(image, reference).tolist() == [math.inf]
    assert psnr(image, reference) == pytest.approx([20 * math.log10(255 / 16)])


def test_psnr_wrapped_cannot_tell_unrelated_images(seed):
    images, references = random_images(4, 128, 128, seed=seed), random_images(4, 128, 128, seed=seed + 1)
    assert psnr_wrapped(images, references) == pytest.approx([27.9] * 4, abs=0.15)
    # the mean square difference of two uniform variables is 1/6
    assert psnr(images, references) == pytest.approx([10 * math.log10(6)] * 4, abs=0.15)


def test_ssim_equals_scikit_image_on_integer_luma(seed):
    references = random_images(2, 24, 20, seed=seed)
    images = noisy(references, 0.2)

    def grey(image):
        red, green, blue = np.moveaxis(np.round(image * 255).astype(int), -1, 0)
        return ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)

    expected = [
        structural_similarity(grey(r), grey(i), data_range=255) for r, i in zip(references, images, strict=True)
    ]
    assert ssim(images, references) == pytest.approx(expected, abs=1e-3)
    assert max(expected) < 0.95


@pytest.mark.parametrize("metric", METRICS)
def test_tensors_arrays_and_batches_agree(metric, seed):
    references = random_images(3, 16, 16, seed=seed).astype(np.float32)
    images = noisy(references, 0.1).astype(np.float32)
    batch = metric(images, references)
    assert batch.shape == (3,) and batch.dtype == np.float64
    assert metric(torch.from_numpy(images), torch.from_numpy(references)).tolist() == batch.tolist()
    assert [metric(images[i], references[i]).item() for i in range(3)] == batch.tolist()


def test_bfloat16_tensors_with_gradients_are_read():
    reference = torch.zeros(8, 8, 3, dtype=torch.bfloat16)
    image = torch.full((8, 8, 3), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert psnr(image, reference) == pytest.approx([20 * math.log10(2)])


def test_what_is_no_pair_of_images_is_refused():
    for image, reference, error, message in [
        (np.zeros((8, 8, 3)), np.zeros((8, 9, 3)), ValueError, r"\(8, 8, 3\) and reference \(8, 9, 3\)"),
        (np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3)), ValueError, "same"),
        (np.zeros((2, 3, 8, 8)), np.zeros((2, 3, 8, 8)), ValueError, "channels"),
        (np.zeros((0, 8, 8, 3)), np.zeros((0, 8, 8, 3)), ValueError, "expected"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3)), TypeError, "image holds uint8"),
        (np.zeros((8, 8, 3)), torch.zeros(8, 8, 3).int(), TypeError, "reference holds int32"),
        (np.zeros((8, 8, 3)), np.full((8, 8, 3), 255.0), ValueError, r"reference spans \[255, 255\]"),
        (np.full((8, 8, 3), -1.0), np.zeros((8, 8, 3)), ValueError, r"image spans \[-1, -1\]"),
        (np.full((8, 8, 3), math.nan), np.zeros((8, 8, 3)), ValueError, "image spans"),
    ]:
        for metric in METRICS:
            with pytest.raises(error, match=message):
                metric(image, reference)


def test_ssim_refuses_images_below_its_window():
    with pytest.raises(ValueError, match="6x9.*at least 7"):
        ssim(np.zeros((6, 9, 3)), np.zeros((6, 9, 3)))
