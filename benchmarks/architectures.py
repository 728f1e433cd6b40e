"""Departures from the linear response in other shapes than the shipped one: what `compare_architectures.py` compares."""

import dataclasses

import torch
from torch import nn

from modeling_gppc import GppcConfig
from modeling_gppc.modeling_gppc import GppcBlock

MEMORY_HEADS = 4
POOL_SIZE = 64  # width of a gene embedding that pools values


@dataclasses.dataclass
class Batch:
    """Pairs, and what the closed-form linear response says of them.

    Args:
        values, centred (`torch.Tensor`): Source's log values, and the same minus the gene's mean, `(B, V)`.
        ids, mask (`torch.Tensor`): Revealed genes, `(B, K)`.
        levels, changes (`torch.Tensor`): Their level in the target minus the gene's mean, and their change, `(B, K)`.
        known (`torch.Tensor`): Factors and state probabilities of the source, `(B, r + C)`.
        factors (`torch.Tensor`): Expected factors and state probabilities after the perturbation, `(B, r + C)`.
        base (`torch.Tensor`): Linear response, or the gene's mean where a variant goes without, `(B, V)`.
        pairing (`torch.Tensor`): `(B,)`.
        labels (`torch.Tensor`): Target's log values, `(B, V)`; scored (`torch.Tensor`): where they count.
    """

    values: torch.Tensor
    centred: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    levels: torch.Tensor
    changes: torch.Tensor
    known: torch.Tensor
    factors: torch.Tensor
    base: torch.Tensor
    pairing: torch.Tensor
    labels: torch.Tensor
    scored: torch.Tensor


class LinearState(nn.Module):
    """Shipped: a linear map of what the linear response knows of the source to latents."""

    def __init__(self, config: GppcConfig):
        super().__init__()
        self.shape = (-1, config.num_latents, config.hidden_size)
        self.proj = nn.Linear(config.num_factors + config.num_components, config.num_latents * config.hidden_size)
        self.block = GppcBlock(config)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.block(self.proj(batch.known).view(self.shape))


class LinearPool(nn.Module):
    """Sum over genes of value times a learned embedding, then a linear map to latents; or values added to embeddings."""

    def __init__(self, config: GppcConfig, additive: bool = False):
        super().__init__()
        self.additive, self.shape = additive, (-1, config.num_latents, config.hidden_size)
        self.embedding = nn.Embedding(config.vocab_size, POOL_SIZE)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.direction = nn.Parameter(torch.randn(POOL_SIZE) * 0.02)
        self.proj = nn.Linear(POOL_SIZE, config.num_latents * config.hidden_size)
        self.block = GppcBlock(config)

    def forward(self, batch: Batch) -> torch.Tensor:
        if self.additive:
            expressed = (batch.values != 0).float()
            pooled = expressed @ self.embedding.weight + batch.values.sum(1, keepdim=True) * self.direction
        else:
            pooled = batch.centred @ self.embedding.weight
        return self.block(self.proj(pooled).view(self.shape))


class TokenEncoder(nn.Module):
    """Genes as tokens: all or the expressed ones, attending to each other or not, then pooled by attention."""

    def __init__(self, config: GppcConfig, expressed_only: bool, self_attention: bool, additive: bool = False):
        super().__init__()
        width = config.hidden_size
        self.expressed_only, self.additive = expressed_only, additive
        self.embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.direction = nn.Parameter(torch.randn(width) * 0.5)
        self.tokens = GppcBlock(config) if self_attention else None
        self.latents = nn.Parameter(torch.randn(config.num_latents, width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.pool = nn.MultiheadAttention(width, MEMORY_HEADS, batch_first=True)
        self.block = GppcBlock(config)

    def forward(self, batch: Batch) -> torch.Tensor:
        values, padding = batch.centred, None
        ids = torch.arange(values.shape[1]).expand(len(values), -1)
        if self.expressed_only:
            expressed = batch.values != 0
            width = max(int(expressed.sum(1).max()), 1)
            ids = torch.argsort((~expressed).int(), dim=1, stable=True)[:, :width]
            padding, values = ~expressed.gather(1, ids), values.gather(1, ids)
        embedded = self.embedding(ids)
        tokens = embedded + values[..., None] * (self.direction if self.additive else embedded)
        if self.tokens is not None:
            bias = None
            if padding is not None:
                bias = torch.zeros(padding.shape).masked_fill(padding, -1e9)[:, None, None]
                bias = bias.expand(-1, -1, padding.shape[1], -1)
            tokens = self.tokens(tokens, bias)
        tokens = self.norm(tokens)
        pooled, _ = self.pool(self.latents.expand(len(values), -1, -1), tokens, tokens, padding, need_weights=False)
        return self.block(pooled + self.latents)


class Perturb(nn.Module):
    """Latents, one token of the linear posterior and one of each perturbation attend to each other, as shipped."""

    def __init__(self, config: GppcConfig):
        super().__init__()
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.proj = nn.Linear(3 * width, width)
        self.factors = nn.Linear(config.num_factors + config.num_components, width)
        self.pairings = nn.Embedding(len(config.pairings), width)
        self.blocks = nn.ModuleList([GppcBlock(config) for _ in range(config.decoder_layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, latents: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """State after the perturbation `(B, L + 1, width)`, and with the perturbation tokens `(B, L + 1 + K, width)`."""
        identity = self.embedding(batch.ids)
        parts = [identity, batch.levels[..., None] * identity, batch.changes[..., None] * identity]
        tokens = self.proj(torch.cat(parts, dim=-1))
        latents = latents + self.pairings(batch.pairing)[:, None]
        hidden = torch.cat([latents, self.factors(batch.factors)[:, None], tokens], dim=1)
        visible = torch.cat([batch.mask.new_ones(len(latents), latents.shape[1] + 1), batch.mask], dim=1).bool()
        bias = torch.zeros(visible.shape).masked_fill(~visible, -1e9)[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, bias.expand(-1, -1, hidden.shape[1], -1))
        hidden = self.norm(hidden)
        return hidden[:, : latents.shape[1] + 1], hidden * visible[..., None]


class QueryDecoder(nn.Module):
    """Gene queries that cross-attend to the perturbed state, and to each other if asked; a scalar a gene comes out."""

    def __init__(self, config: GppcConfig, self_attention: bool):
        super().__init__()
        width = config.hidden_size
        self.perturb = Perturb(config)
        self.queries = nn.Parameter(torch.randn(config.vocab_size, width) * 0.5)
        self.value = nn.Linear(1, width)
        self.among = GppcBlock(config) if self_attention else None
        self.norm = nn.LayerNorm(width)
        self.cross = nn.MultiheadAttention(width, MEMORY_HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, width),
        )
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, latents: torch.Tensor, batch: Batch) -> torch.Tensor:
        _, memory = self.perturb(latents, batch)
        queries = self.queries + self.value(batch.centred[..., None])
        if self.among is not None:
            queries = self.among(queries)
        attended, _ = self.cross(self.norm(queries), memory, memory, need_weights=False)
        queries = queries + attended
        return batch.base + self.head(queries + self.mlp(queries))[..., 0]


class BilinearDecoder(nn.Module):
    """Shipped read-out: one vector of the state that every gene meets with its own; other heads on the same vector."""

    def __init__(self, config: GppcConfig, head: str = "linear", pool: nn.Embedding | None = None):
        super().__init__()
        size, genes = config.readout_size, config.vocab_size
        self.perturb, self.head, self.n_parts = Perturb(config), head, {"mixture": 4, "hurdle": 2}.get(head, 1)
        self.proj = nn.Sequential(
            nn.Linear((config.num_latents + 1) * config.hidden_size, size),
            nn.GELU(),
            nn.Dropout(config.hidden_dropout_prob),
        )
        self.pool = pool
        self.tie = nn.Linear(size, POOL_SIZE, bias=False) if head == "tied" else None
        if head == "tied":
            nn.init.zeros_(self.tie.weight)
        self.vectors = nn.Parameter(torch.zeros(self.n_parts, genes, size))
        if head == "mlp":
            nn.init.normal_(self.vectors, std=0.5)
            self.mlp = nn.Sequential(nn.Linear(size, 32), nn.GELU(), nn.Linear(32, 1))
            nn.init.zeros_(self.mlp[2].weight)
        if head == "mixture":
            nn.init.normal_(self.vectors, std=0.01)
            self.gates = nn.Linear(size, self.n_parts)
        if head in ("gaussian", "mixture"):
            self.logvar = nn.Parameter(torch.zeros(genes))
        if head == "hurdle":
            self.scales = nn.Parameter(torch.tensor([[1.0], [0.0]]).expand(2, genes).clone())
            self.offsets = nn.Parameter(torch.zeros(2, genes))

    def forward(self, latents: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.parts(latents, batch)[0]

    def parts(self, latents: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Expected value `(B, V)`, then what the head's own likelihood needs."""
        state = self.proj(self.perturb(latents, batch)[0].flatten(1))
        if self.head == "tied":
            return (batch.base + self.tie(state) @ self.pool.weight.T,)
        if self.head == "mlp":
            return (batch.base + self.mlp(state[:, None] * self.vectors[0])[..., 0],)
        read = torch.einsum("bs,kvs->kbv", state, self.vectors)
        if self.head == "hurdle":
            logit, amount = read + self.scales[:, None] * batch.base + self.offsets[:, None]
            return torch.sigmoid(logit) * amount, logit, amount
        if self.head == "mixture":
            gates = torch.log_softmax(self.gates(state), dim=-1)
            means = batch.base + read
            return torch.einsum("bk,kbv->bv", gates.exp(), means), gates, means
        return (batch.base + read[0],)

    def loss(self, latents: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Squared error, or the negative log-likelihood of the head's distribution."""
        expected, *rest = self.parts(latents, batch)
        if self.head == "hurdle":
            logit, amount = rest
            expressed = (batch.labels != 0).float()
            likelihood = nn.functional.binary_cross_entropy_with_logits(logit, expressed, reduction="none")
            return mean_over(likelihood + 0.5 * expressed * (amount - batch.labels).square(), batch.scored)
        if self.head == "gaussian":
            error = (expected - batch.labels).square()
            return mean_over(0.5 * (error * torch.exp(-self.logvar) + self.logvar), batch.scored)
        if self.head == "mixture":
            gates, means = rest
            error = (means - batch.labels).square() * torch.exp(-self.logvar) + self.logvar
            joint = gates.T - 0.5 * torch.where(batch.scored, error, torch.zeros_like(error)).sum(-1)
            return -torch.logsumexp(joint, dim=0).sum() / batch.scored.sum()
        return mean_over((expected - batch.labels).square(), batch.scored)


def start_hurdle(head: BilinearDecoder, values: torch.Tensor) -> None:
    """A hurdle that starts at how often each gene is expressed and how much then, from cells `(n, V)`."""
    share = (values != 0).float().mean(0).clamp(1e-3, 1 - 1e-3)
    with torch.no_grad():
        head.offsets[0] = torch.logit(share) - values.mean(0)
        head.offsets[1] = values.mean(0) / share


def mean_over(values: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Mean of the scored entries."""
    return torch.where(scored, values, torch.zeros_like(values)).sum() / scored.sum()


class Variant(nn.Module):
    """An encoder and a decoder."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        for module in self.modules():
            # As in the shipped model; what starts at zero stays there.
            if isinstance(module, nn.Linear) and module.weight.any():
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Expected log values, `(B, V)`."""
        return self.decoder(self.encoder(batch), batch)

    def loss(self, batch: Batch) -> torch.Tensor:
        """What training lowers."""
        latents = self.encoder(batch)
        if isinstance(self.decoder, BilinearDecoder):
            return self.decoder.loss(latents, batch)
        return mean_over((self.decoder(latents, batch) - batch.labels).square(), batch.scored)


def make_variant(name: str, config: GppcConfig, values: torch.Tensor) -> Variant:
    """A variant by its name in the table; `values` are some cells `(n, V)`."""
    encoders = {
        "dense self-attention": lambda: TokenEncoder(config, expressed_only=False, self_attention=True),
        "expressed-only tokens": lambda: TokenEncoder(config, expressed_only=True, self_attention=True),
        "expressed-only tokens, values added": lambda: TokenEncoder(
            config, expressed_only=True, self_attention=True, additive=True
        ),
        "latents by attention": lambda: TokenEncoder(config, expressed_only=True, self_attention=False),
        "latents by attention, values added": lambda: TokenEncoder(
            config, expressed_only=True, self_attention=False, additive=True
        ),
        "linear pool": lambda: LinearPool(config),
        "linear pool, values added": lambda: LinearPool(config, additive=True),
    }
    # The tied head shares the embedding that pools.
    shipped = LinearPool if name == "tied head" else LinearState
    encoder = encoders[name]() if name in encoders else shipped(config)
    decoders = {
        "queries cross-attend": lambda: QueryDecoder(config, self_attention=False),
        "queries self- and cross-attend": lambda: QueryDecoder(config, self_attention=True),
    }
    if name in decoders:
        return Variant(encoder, decoders[name]())
    head = name.removesuffix(" head") if name.endswith(" head") else "linear"
    decoder = BilinearDecoder(config, head, encoder.embedding if head == "tied" else None)
    if head == "hurdle":
        start_hurdle(decoder, values)
    return Variant(encoder, decoder)


VARIANTS = (
    "shipped",
    "dense self-attention",
    "expressed-only tokens",
    "expressed-only tokens, values added",
    "latents by attention",
    "latents by attention, values added",
    "linear pool",
    "linear pool, values added",
    "queries cross-attend",
    "queries self- and cross-attend",
    "mlp head",
    "tied head",
    "hurdle head",
    "gaussian head",
    "mixture head",
)
