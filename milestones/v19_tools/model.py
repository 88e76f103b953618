"""The decoder: embed, layers, norm, head. Modules are named as in the checkpoint.

N tokens of this step   R rows whose logits are needed   E hidden_size   V vocab_size   D head_dim
"""
from torch import Tensor, nn

from .attention import Attention
from .batch import Batch
from .config import ModelConfig
from .layers import MLP, Linear, RMSNorm, RotaryEmbedding


class DecoderLayer(nn.Module):
    """Attention, then MLP, each added to the residual stream, in place."""

    def __init__(self, config: ModelConfig, layer_id: int):
        super().__init__()
        self.self_attn = Attention(config, layer_id)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        result = self.self_attn(self.input_layernorm(hidden, batch), cos, sin, batch)  # [N, E]
        normed = self.post_attention_layernorm(hidden, batch, result)  # adds result to hidden
        return hidden.add_(self.mlp(normed, batch))


class Decoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer_id) for layer_id in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.embed_tokens(batch.token_ids)  # [N, E]
        cos, sin = self.rotary_emb(batch.positions, hidden.dtype)  # [N, 1, D / 2]
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, batch)  # [N, E]
        return self.norm(hidden, batch)


class CausalLM(nn.Module):
    """Tokens to hidden states, and hidden states to logits, for the rows whose logits are needed."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        """The final hidden states [R, E] of the batch's logit_rows."""
        hidden = self.model(batch)  # [N, E]
        return hidden[batch.logit_rows]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] in float32, from hidden states [R, E]."""
        return self.lm_head(hidden).float()
