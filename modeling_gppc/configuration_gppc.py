"""Configuration of a GPPC model."""

import math
from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    # Never run. transformers copies the files that relative imports name, and tells saved folders apart by them: from
    # here they reach all code, so a model is saved with its pipeline, and other code means another configuration class.
    from .feature_extraction_gppc import GppcFeatureExtractor  # noqa: F401
    from .modeling_gppc import GppcForPerturbationPrediction  # noqa: F401
    from .pipeline_gppc import PerturbationPredictionPipeline  # noqa: F401

# How `transformers.pipeline` finds the pipeline in a saved folder.
PIPELINES = {"perturbation-prediction": {"impl": "pipeline_gppc.PerturbationPredictionPipeline", "pt": ["AutoModel"]}}
# Named sizes; what each costs is in docs/model.md.
_FIELDS = ["hidden_size", "num_latents", "readout_size", "encoder_layers", "decoder_layers", "num_attention_heads"]
_FIELDS += ["intermediate_size", "num_factors", "num_components", "num_references"]
SIZES = {
    "tiny": dict(zip(_FIELDS, (16, 2, 16, 1, 1, 2, 32, 4, 2, 50))),
    "small": dict(zip(_FIELDS, (128, 4, 256, 1, 2, 4, 256, 32, 32, 1000))),
    "base": dict(zip(_FIELDS, (512, 16, 1024, 4, 6, 8, 2048, 64, 64, 1000))),
    "large": dict(zip(_FIELDS, (1024, 32, 2048, 8, 12, 16, 4096, 128, 64, 1000))),
}


@strict
class GppcConfig(PreTrainedConfig):
    r"""
    Args:
        vocab_size (`int`, *optional*, defaults to 1000): Number of genes the model knows.
        hidden_size (`int`, *optional*, defaults to 128): Width of the latents and of the perturbation tokens.
        num_latents (`int`, *optional*, defaults to 8): Latent vectors that hold the encoded state.
        readout_size (`int`, *optional*, defaults to 256): Width of the bilinear read-out of the queried genes.
        encoder_layers (`int`, *optional*, defaults to 1): Blocks over the latents, independent of the perturbation.
        decoder_layers (`int`, *optional*, defaults to 2): Blocks over latents and perturbation tokens.
        num_attention_heads (`int`, *optional*, defaults to 4): Heads of every attention.
        intermediate_size (`int`, *optional*, defaults to 256): Width of the feed-forward layers.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the feed-forward layers.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.1): Dropout on residual branches and on the read-out.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0): Dropout on attention weights; anything
            above zero disables the fused kernels on CPU.
        num_factors (`int`, *optional*, defaults to 32): Shared factors of the linear response.
        num_components (`int`, *optional*, defaults to 16): Unsupervised cell states of the linear response, each of
            which responds linearly; with 1 it is the conditional Gaussian.
        num_references (`int`, *optional*, defaults to 1000): Training pairs of each pairing that are kept, as factors,
            to tell which imposed levels are familiar, see [`GppcFamiliarity`]. With 0 all are.
        use_screen_response (`bool`, *optional*, defaults to `False`): The model was fitted on a CRISPR screen, see
            [`GppcScreenResponse`].
        num_perturbations (`int`, *optional*, defaults to 0): Perturbations of the screen that were seen.
        num_members (`int`, *optional*, defaults to 1): Most genes that one of them perturbs.
        num_targets (`int`, *optional*, defaults to 0): Genes that may be asked about without being measured.
        use_linear_response (`bool`, *optional*, defaults to `True`): Predict linear response + network's contribution;
            otherwise gene mean + network's contribution.
        use_network (`bool`, *optional*, defaults to `True`): Add the network's contribution at all.
        pairings (`list[str]`, *optional*): Names of the contexts that the two cells of a training pair may share.
        default_pairing (`str`, *optional*, defaults to `"same_type"`): The context assumed when none is given.
        variance_loss_weight (`float`, *optional*, defaults to 0.1): Weight of the variance's likelihood in the loss.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of initial weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of the layer norms.
    """

    model_type = "gppc"
    keys_to_ignore_at_inference = [
        "linear_response",
        "familiarity",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "decoder_last_hidden_state",
        "decoder_hidden_states",
        "decoder_attentions",
    ]

    vocab_size: int = 1000
    hidden_size: int = 128
    num_latents: int = 8
    readout_size: int = 256
    encoder_layers: int = 1
    decoder_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 256
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    num_factors: int = 32
    num_components: int = 16
    num_references: int = 1000
    use_screen_response: bool = False
    num_perturbations: int = 0
    num_members: int = 1
    num_targets: int = 0
    use_linear_response: bool = True
    use_network: bool = True
    pairings: list[str] | None = None
    default_pairing: str = "same_type"
    variance_loss_weight: float | int = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        self.pairings = list(self.pairings) if self.pairings else [self.default_pairing]
        if self.default_pairing not in self.pairings:
            self.default_pairing = self.pairings[0]
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers. Called by `save_pretrained` of a model, so every saved model names its pipeline.

        The entry is written anew: that of a model loaded from the Hub points back to its repository.
        """
        self.custom_pipelines = PIPELINES
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_size(cls, size: str, **options) -> "GppcConfig":
        """A configuration of a named size.

        Args:
            size (`str`): `"tiny"` (tests), `"small"` (two CPU cores, minutes), `"base"` (one GPU) or `"large"` (many).
            **options: Any other field; they override the size's.

        Raises:
            ValueError: For a size that does not exist.
        """
        if size not in SIZES:
            raise ValueError(f"`size` is {size!r}; wanted one of {', '.join(SIZES)}.")
        return cls(**{**SIZES[size], **options})

    def validate_architecture(self):
        """Checks that sizes fit each other; called by `@strict` after construction."""
        bounds = {
            (1, math.inf): "vocab_size hidden_size num_latents readout_size num_attention_heads intermediate_size "
            "num_factors num_components num_members",
            (0, math.inf): "encoder_layers decoder_layers num_references num_perturbations num_targets "
            "variance_loss_weight initializer_range layer_norm_eps",
            (0, 1): "hidden_dropout_prob attention_probs_dropout_prob",
        }
        for (least, below), names in bounds.items():
            for name in names.split():
                if not least <= getattr(self, name) < below:
                    raise ValueError(f"`{name}` is {getattr(self, name)}; wanted at least {least} and below {below}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}; wanted a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )


__all__ = ["GppcConfig"]
