"""Builds a backend by its name; its libraries are loaded only where it is chosen."""

from __future__ import annotations

from vssl_dist.data.backends.base import Backend, BackendSpec
from vssl_dist.data.views import blur_window
from vssl_dist.errors import ConfigError


def build_backend(name: str, spec: BackendSpec) -> Backend:
    """Build the backend called ``dali`` or ``reference``.

    Raises:
        ConfigError: The backend is not installed, or the images are too small for the blur.
    """
    for recipe in spec.recipes:
        blur_radius = int(blur_window(recipe.blur_sigma[1])) // 2 if recipe.blur else 0
        if blur_radius >= spec.side(recipe):
            raise ConfigError(
                f"data.views: a blur of sigma {recipe.blur_sigma[1]:g} reaches {blur_radius} "
                f"pixels, beyond views of {spec.side(recipe)} pixels (smaller sigma, or blur: 0)"
            )
    if name != "dali":
        from vssl_dist.data.backends.reference import ReferenceBackend

        return ReferenceBackend(spec)
    try:
        from vssl_dist.data.backends.dali import DaliBackend
    except ImportError as error:
        raise ConfigError(
            f"data.backend=dali: DALI cannot be loaded ({error}); use data.backend=reference"
        ) from error
    return DaliBackend(spec)
