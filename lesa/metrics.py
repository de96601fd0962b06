"""How near an image is to its reference: true PSNR, the papers' wrapped PSNR, SSIM.

The reference is the image of the same model, prompt, noise and step count with every step computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_LUMA_601 = (0.299, 0.587, 0.114)
_SSIM_WINDOW = 7


def psnr(image: Any, reference: Any) -> np.ndarray:
    """Peak signal-to-noise ratio, 10 log10(1 / mean((image - reference)^2)), with data range 1.

    Args:
        image: [H, W, 3] or [B, H, W, 3], array or tensor of floats in [0, 1].
        reference: the same shape and range.

    Returns:
        float64 [B], dB, one figure an image ([1] for a single image); inf where the images are identical.

    Raises:
        TypeError: an argument does not hold floats.
        ValueError: the shapes differ or are not those of images, or a value is outside [0, 1].
    """
    images, references = _pair(image, reference)
    return _decibel(np.mean((images - references) ** 2, axis=(1, 2, 3)), peak=1.0)


def psnr_wrapped(image: Any, reference: Any) -> np.ndarray:
    """The figure called PSNR in the image tables of the caching papers; wrong, and only for comparison with them.

    It subtracts and squares uint8 levels in uint8, so every squared difference is taken modulo 256: a
    difference of 16 levels counts as none, and unrelated images score about 27.9 "dB" (7 to 8 dB true). Use
    `psnr` to judge images.

    Args:
        image: [H, W, 3] or [B, H, W, 3], array or tensor of floats in [0, 1].
        reference: the same shape and range.

    Returns:
        float64 [B], "dB", one figure an image ([1] for a single image).

    Raises:
        TypeError, ValueError: as `psnr`.
    """
    images, references = (_levels(batch) for batch in _pair(image, reference))
    squares = (images - references) ** 2
    return _decibel(np.mean(squares, axis=(1, 2, 3), dtype=np.float64), peak=255.0)


def ssim(image: Any, reference: Any) -> np.ndarray:
    """Structural similarity as the caching papers take it: grey uint8 images, data range 255, 7x7 window.

    Args:
        image: [H, W, 3] or [B, H, W, 3], array or tensor of floats in [0, 1]; H and W at least 7.
        reference: the same shape and range.

    Returns:
        float64 [B], one figure an image ([1] for a single image); 1 where the images are identical.

    Raises:
        ImportError: scikit-image is not installed.
        TypeError, ValueError: as `psnr`, or an image is smaller than the window.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("ssim needs scikit-image: pip install 'lesa[demo]'") from error
    images, references = _pair(image, reference)
    height, width = images.shape[1:3]
    if min(height, width) < _SSIM_WINDOW:
        raise ValueError(
            f"image is {height}x{width}: ssim needs at least {_SSIM_WINDOW} pixels each way; give a larger image"
        )
    return np.array(
        [
            structural_similarity(a, b, data_range=255, win_size=_SSIM_WINDOW)
            for a, b in zip(_grey(images), _grey(references), strict=True)
        ]
    )


def _pair(image: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    images, references = _floats(image, "image"), _floats(reference, "reference")
    if images.shape != references.shape:
        raise ValueError(
            f"image has shape {images.shape} and reference {references.shape}: expected the same; "
            "compare an image with the reference of the same request"
        )
    if images.ndim == 3:
        images, references = images[None], references[None]
    if images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(
            f"image has shape {images.shape}: expected [H, W, 3] or [B, H, W, 3]; move the channels of "
            "[B, 3, H, W] tensors to the end"
        )
    return images, references


def _floats(value: Any, name: str) -> np.ndarray:
    if hasattr(value, "is_floating_point"):  # a tensor: numpy has no bfloat16
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{name} holds {array.dtype}: expected floats in [0, 1]; divide uint8 levels by 255")
    array = array.astype(np.float64)
    # negated, so that NaN fails as well
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"{name} spans [{array.min():.4g}, {array.max():.4g}]: expected floats in [0, 1]; "
            "map [-1, 1] to [0, 1] and clip"
        )
    return array


def _levels(images: np.ndarray) -> np.ndarray:
    return np.round(images * 255).astype(np.uint8)


def _grey(images: np.ndarray) -> np.ndarray:
    return np.round(_levels(images) @ np.array(_LUMA_601)).astype(np.uint8)


def _decibel(errors: Any, peak: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(peak**2 / errors))
