"""Fits ladder, prediction, floors for an (embedder, large, small) triple: `modm calibrate`; and the floors of `scenes`."""
