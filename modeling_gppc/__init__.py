"""GPPC: predict every gene's expression after imposed expression changes."""

__all__ = ["GppcConfig", "GppcFeatureExtractor", "GppcForPerturbationPrediction", "GppcModel"]


def __getattr__(name: str):
    """Imports and registers the classes when one of them is asked for: torch and transformers take seconds to load,
    which whoever needs an options module or a help text alone should not wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
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
    globals().update(
        GppcConfig=GppcConfig,
        GppcFeatureExtractor=GppcFeatureExtractor,
        GppcForPerturbationPrediction=GppcForPerturbationPrediction,
        GppcModel=GppcModel,
    )
    return globals()[name]
