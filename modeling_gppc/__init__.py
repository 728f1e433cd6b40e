"""GPPC: predict every gene's expression after imposed expression changes."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from .configuration_gppc import GppcConfig
from .feature_extraction_gppc import GppcFeatureExtractor
from .modeling_gppc import GppcForPerturbationPrediction, GppcModel

# The installed package is used in place of the code that travels with a checkpoint.
AutoConfig.register("gppc", GppcConfig, exist_ok=True)
AutoModel.register(GppcConfig, GppcForPerturbationPrediction, exist_ok=True)
AutoFeatureExtractor.register(GppcConfig, GppcFeatureExtractor, exist_ok=True)
# Saving copies the code and writes the `auto_map` through which strangers load it.
GppcConfig.register_for_auto_class()
GppcForPerturbationPrediction.register_for_auto_class("AutoModel")
GppcFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["GppcConfig", "GppcFeatureExtractor", "GppcForPerturbationPrediction", "GppcModel"]
