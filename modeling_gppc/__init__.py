"""GPPC: predict every gene's expression after imposed expression changes."""

from .feature_extraction_gppc import GppcFeatureExtractor

__all__ = ["GppcFeatureExtractor"]
